"""The phases of a round at the coordinator: each holds what exists in it, and the table says what it accepts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from privacy.secagg import transcript
from privacy.secagg.messages import (
    AbortStatement,
    Advertise,
    Complaint,
    MaskedInput,
    Outcome,
    OutcomeVote,
    ProjectionShare,
    ShareRoot,
    Shares,
    SurvivorVote,
    Transcript,
    UnmaskShares,
)
from privacy.secagg.signed import Signed
from privacy.secagg.transcript import Cohort, Streams


@dataclass(frozen=True)
class Joining:
    """M0 offered; collecting M1."""

    keys: dict[int, Signed[Advertise]] = field(default_factory=dict)


@dataclass(frozen=True)
class Sharing:
    """M2 out; collecting M3."""

    cohort: Cohort
    shares: dict[int, Shares] = field(default_factory=dict)


@dataclass(frozen=True)
class Uploading:
    """M4 out; collecting M5 (or complaints)."""

    cohort: Cohort
    shares: Mapping[int, Shares]
    inputs: dict[int, Signed[MaskedInput]] = field(default_factory=dict)
    complaints: dict[int, Signed[Complaint]] = field(default_factory=dict)

    @property
    def roots(self) -> tuple[Signed[ShareRoot], ...]:
        return tuple(self.shares[i].root for i in sorted(self.shares))

    @property
    def sharers(self) -> tuple[int, ...]:
        return tuple(sorted(self.shares))

    @property
    def t2(self) -> bytes:
        return transcript.t2_hash(self.cohort.t1, self.roots)


@dataclass(frozen=True)
class Closed:
    """What is fixed once U3 is: every later phase carries it."""

    cohort: Cohort
    shares: Mapping[int, Shares]
    roots: tuple[Signed[ShareRoot], ...]
    t2: bytes
    inputs: tuple[Signed[MaskedInput], ...]
    survivors_l: bytes

    @property
    def survivors(self) -> tuple[int, ...]:
        return tuple(i.sender for i in self.inputs)

    @property
    def sharers(self) -> tuple[int, ...]:
        return tuple(r.sender for r in self.roots)


@dataclass(frozen=True)
class Folding:
    """U3 is fixed; the shell makes U3 and the sum over it durable and calls ``sum_saved``, before M6 leaves."""

    closed: Closed


@dataclass(frozen=True)
class Signing:
    """M6 out; collecting M7."""

    closed: Closed
    votes: dict[int, Signed[SurvivorVote]] = field(default_factory=dict)


@dataclass(frozen=True)
class Unmasking:
    """M8 out; collecting M9."""

    closed: Closed
    votes: tuple[Signed[SurvivorVote], ...]
    releases: dict[int, Signed[UnmaskShares]] = field(default_factory=dict)


@dataclass(frozen=True)
class Publishing:
    """All seeds are open: the shell takes ``streams`` off the sum and calls ``publish``."""

    closed: Closed
    transcript: Transcript
    streams: Streams = field(repr=False)


@dataclass(frozen=True)
class Confirming:
    """M10 out; collecting M11."""

    closed: Closed
    outcome: Outcome
    votes: dict[int, Signed[OutcomeVote]] = field(default_factory=dict)


@dataclass(frozen=True)
class Projecting:
    """Every survivor confirmed; M12 out, collecting M13."""

    closed: Closed
    outcome: Outcome
    votes: Mapping[int, Signed[OutcomeVote]]
    shares: dict[int, Signed[ProjectionShare]] = field(default_factory=dict)


@dataclass(frozen=True)
class Released:
    """The round is over; the total stands."""

    closed: Closed
    outcome: Outcome
    votes: Mapping[int, Signed[OutcomeVote]]
    shares: Mapping[int, Signed[ProjectionShare]]


@dataclass(frozen=True)
class Aborted:
    """The round is over without a total; collecting statements that nobody will release in it any more.

    ``cohort`` is ``None`` where no key list was closed: then nobody dealt shares. ``sharers`` is U2 where M4 went out:
    any of them may have spent its delta. ``closed`` is there once a survivor list was, ``votes`` are signatures on it.
    """

    reason: str
    culprit: int | None
    cohort: Cohort | None
    sharers: tuple[int, ...]
    closed: Closed | None
    votes: tuple[Signed[SurvivorVote], ...]
    statements: dict[int, Signed[AbortStatement]] = field(default_factory=dict)


Phase = (
    Joining
    | Sharing
    | Uploading
    | Folding
    | Signing
    | Unmasking
    | Publishing
    | Confirming
    | Projecting
    | Released
    | Aborted
)

#: The phases in which the total stands.
HasTotal = Confirming | Projecting | Released

#: Which phase takes which body from a member.
ACCEPTS: dict[type, tuple[type, ...]] = {
    Joining: (Advertise,),
    Sharing: (ShareRoot,),
    Uploading: (MaskedInput, Complaint),
    Folding: (),
    Signing: (SurvivorVote,),
    Unmasking: (UnmaskShares,),
    Publishing: (),
    Confirming: (OutcomeVote,),
    Projecting: (ProjectionShare,),
    Released: (),
    Aborted: (AbortStatement,),
}
