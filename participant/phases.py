"""The phases of a round at a member: each holds what exists in it, and the table says what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from privacy.secagg.dealing import HeldShares
from privacy.secagg.messages import (
    Advertise,
    Certificate,
    Inbox,
    KeyList,
    MaskedInput,
    NonceList,
    Outcome,
    RoundAborted,
    ShareRoot,
    SurvivorList,
)
from privacy.secagg.signed import Signed
from privacy.secagg.transcript import Cohort, Streams, VerifiedTranscript


@dataclass(frozen=True)
class Advertising:
    """M1 sent; M2 expected."""

    own: Signed[Advertise]


@dataclass(frozen=True)
class Dealing:
    """M3 sent; M4 expected."""

    cohort: Cohort
    own_root: Signed[ShareRoot]
    own_shares: HeldShares


@dataclass(frozen=True)
class Masking:
    """M4 accepted: the shell masks the vector and calls :meth:`ParticipantRound.commit`."""

    cohort: Cohort
    sharers: tuple[int, ...]
    t2: bytes
    held: Mapping[int, HeldShares]
    streams: Streams = field(repr=False)


@dataclass(frozen=True)
class Uploading:
    """M5 committed; M6 expected."""

    cohort: Cohort
    sharers: tuple[int, ...]
    t2: bytes
    held: Mapping[int, HeldShares]
    own_input: Signed[MaskedInput]


@dataclass(frozen=True)
class Voting:
    """M7 sent; M8 expected."""

    cohort: Cohort
    sharers: tuple[int, ...]
    t2: bytes
    held: Mapping[int, HeldShares]
    survivors: tuple[int, ...]
    survivors_l: bytes


@dataclass(frozen=True)
class Releasing:
    """M9 sent; M10 expected."""

    t2: bytes
    held: Mapping[int, HeldShares]
    survivors_l: bytes


@dataclass(frozen=True)
class Checking:
    """M10 verified: the shell fetches the total and calls :meth:`ParticipantRound.confirm`."""

    outcome: Outcome
    verified: VerifiedTranscript
    seeds: Mapping[int, bytes] = field(repr=False)


@dataclass(frozen=True)
class Confirmed:
    """M11 sent; M12 expected, unless a survivor is missing."""

    outcome: Outcome
    verified: VerifiedTranscript
    seeds: Mapping[int, bytes] = field(repr=False)


@dataclass(frozen=True)
class Projecting:
    """M12 accepted: the shell projects its vector and calls :meth:`ParticipantRound.project`."""

    outcome: Outcome
    t2: bytes
    key: bytes  # of r, public
    term: int = field(repr=False)  # zero-sum, hides <r, x>


@dataclass(frozen=True)
class Finished:
    """M13 sent; the round is over."""


@dataclass(frozen=True)
class Stopped:
    """The round ended here without an outcome."""

    reason: str


Phase = (
    Advertising
    | Dealing
    | Masking
    | Uploading
    | Voting
    | Releasing
    | Checking
    | Confirmed
    | Projecting
    | Finished
    | Stopped
)

#: Which phase takes which message. A member aborts only when asked, never by a timer, and never after M9. t holders are
#: enough for a total, so M10 may reach a survivor that was never asked for its shares; it verifies all the same.
ACCEPTS: dict[type, tuple[type, ...]] = {
    Advertising: (KeyList, RoundAborted),
    Dealing: (Inbox, RoundAborted),
    Masking: (RoundAborted,),
    Uploading: (SurvivorList, Outcome, RoundAborted),
    Voting: (Certificate, Outcome, RoundAborted),
    Releasing: (Outcome,),
    Checking: (),
    Confirmed: (NonceList,),
    Projecting: (),
    Finished: (),
    Stopped: (),
}
