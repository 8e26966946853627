"""What a site brings into a round, and the records that are durable before a message leaves (protocol section 6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.errors import ProtocolError
from privacy.secagg.dialogue import FromMember
from privacy.secagg.messages import Header


@dataclass(frozen=True)
class Site:
    """What this site brings into a round; all of it computed or pinned locally, none of it received."""

    me: int
    identity: Ed25519PrivateKey = field(repr=False)
    plan: str  # name of the plan
    dataset: str
    vector: bytes  # SHA-256 of the quantised vector
    rounds_joined: int  # over the life of this identity, before this round
    peer_counts: Mapping[int, int]  # highest count of rounds seen of each peer
    ledger_size: int
    ledger_root: bytes
    #: Members of the only survivor list that this stage's delta may be in (retry proof c); ``None`` for no bond.
    bond: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Joined:
    """Record before M1: forbids a second M1 in this round."""

    header: Header
    rounds_joined: int


@dataclass(frozen=True)
class PeersSeen:
    """Record before M3: the counts that peers must exceed from now on, as (member, count)."""

    header: Header
    members: tuple[int, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.members) != len(self.counts):
            raise ProtocolError(f"expected a count of each of {len(self.members)} members, found {len(self.counts)}")


@dataclass(frozen=True)
class Spent:
    """Record before M5: from here on the delta of (data set, plan name, stage) is spent."""

    header: Header
    plan: str  # name: a new digest, round or start adapter changes nothing about what is spent
    dataset: str
    t1: bytes
    t2: bytes
    members: tuple[int, ...]  # U1
    colluders: int
    threshold: int
    root: bytes  # of the spool, the only bytes ever sent
    vector: bytes  # SHA-256 of the quantised vector, the only one this stage ever masks


@dataclass(frozen=True)
class SignedSurvivors:
    """Record before M7: the only list this member signs in this round."""

    header: Header
    survivors: bytes  # L
    members: tuple[int, ...]  # U3


@dataclass(frozen=True)
class Released:
    """Record before M9; excludes :class:`Aborted` for good."""

    header: Header
    survivors: bytes


@dataclass(frozen=True)
class Aborted:
    """Record of an abort before release; excludes :class:`Released` for good."""

    header: Header
    reason: str


Record = Joined | PeersSeen | Spent | SignedSurvivors | Released | Aborted


@dataclass(frozen=True)
class Step:
    """First make ``records`` durable, in order; then send ``reply``, if any."""

    records: tuple[Record, ...] = ()
    reply: FromMember | None = None
