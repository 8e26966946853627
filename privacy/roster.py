"""The roster: every member's identity key and the pinned policy; no coordinator chooses any of it.

A roster is one TOML file. Its hash H_R is taken over the bytes of the file and pinned at each site, so a coordinator
that shows another roster is refused before anything else happens. Members are named in messages by their position.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from privacy.encoding import DOMAIN
from privacy.errors import Refusal, UserError
from privacy.plan import Plan
from privacy.secagg.keys import is_low_order
from privacy.secagg.shapes import MAX_MEMBERS
from privacy.secagg.threshold import MAX_COMPLETE_GRAPH, smallest_survivors
from privacy.settings import HexDigest, Name, Positive, Section, parse_toml


class Policy(Section):
    """What the members agreed on once; a plan may be stricter, never weaker."""

    #: A plan must withstand at least so many members that work together with the coordinator.
    max_colluders: Annotated[int, Field(ge=0, le=126)]
    #: Fewer members that begin a round are refused, but for a certified list that comes again without its lost ones.
    min_cohort: Annotated[int, Field(ge=2)]
    #: Fewer members in a sum are refused.
    min_survivors: Annotated[int, Field(ge=2)]
    #: More members in a round are refused.
    max_cohort: Annotated[int, Field(ge=2, le=MAX_COMPLETE_GRAPH)] = MAX_COMPLETE_GRAPH
    #: Word sizes a plan may ask for.
    bits: Annotated[tuple[Literal[16, 20, 24, 32], ...], Field(min_length=1)] = (16, 20, 24, 32)
    #: Largest clipping range a plan may ask for.
    max_clip: Annotated[float, Field(gt=0)] = 1e6
    #: Largest weight of a site a plan may ask for.
    max_weight: Positive = 1 << 40
    #: Digests of the base models that plans may train; empty leaves it to each site's own file.
    bases: tuple[HexDigest, ...] = ()
    #: Sums of two: each learns the other's delta. Every site must opt in besides.
    allow_two_members: bool = False

    @model_validator(mode="after")
    def _minima_protect(self) -> Policy:
        least = smallest_survivors(self.max_colluders, self.allow_two_members)
        if self.min_survivors < least:
            raise ValueError(
                f"min_survivors: expected at least {least} (max(max_colluders, 1) + 2), found {self.min_survivors}"
            )
        if not self.min_survivors <= self.min_cohort <= self.max_cohort:
            raise ValueError("expected min_survivors <= min_cohort <= max_cohort")
        return self


class Member(Section):
    """One organisation: its name and its long-term Ed25519 key."""

    #: Of the member, in certificates and everywhere.
    name: Name
    #: Its Ed25519 identity key, hex.
    key: HexDigest


class Roster(Section):
    """All members, in the order that numbers them, and the policy they pinned."""

    #: Name of the federation.
    federation: Name
    #: Ed25519 key of the coordinator, which signs receipts.
    coordinator: HexDigest
    policy: Policy
    #: Tables ``[[members]]`` as below.
    members: Annotated[tuple[Member, ...], Field(min_length=2, max_length=MAX_MEMBERS)]

    @model_validator(mode="after")
    def _members_are_distinct(self) -> Roster:
        if len({m.name for m in self.members}) != len(self.members):
            raise ValueError("members: names must be distinct")
        if len({m.key for m in self.members} | {self.coordinator}) != len(self.members) + 1:
            raise ValueError("members: keys must be distinct, also from the coordinator's")
        for name, key in [("the coordinator", self.coordinator), *((m.name, m.key) for m in self.members)]:
            if is_low_order(bytes.fromhex(key)):
                raise ValueError(f"key of {name}: expected an Ed25519 key of full order, anybody can sign for this one")
        return self

    def index(self, name: str) -> int:
        """Roster index of a member by name; raises Refusal for a stranger."""
        for i, member in enumerate(self.members):
            if member.name == name:
                return i
        raise Refusal(f"'{name}' is not a member of the federation '{self.federation}'")

    def name(self, index: int) -> str:
        """Name of a member for people."""
        return self.members[index].name if 0 <= index < len(self.members) else f"member {index}"

    def keys(self) -> tuple[bytes, ...]:
        """Identity keys by roster index, 32 bytes each."""
        return tuple(bytes.fromhex(m.key) for m in self.members)


@dataclass(frozen=True)
class RosterFile:
    """A validated roster together with the very bytes that H_R is taken over."""

    roster: Roster
    raw: bytes

    @property
    def hash(self) -> bytes:
        """H_R, 32 bytes."""
        return hashlib.sha256(DOMAIN + b"roster\0" + self.raw).digest()


def parse_roster(raw: bytes, source: str = "roster") -> RosterFile:
    """Parse and validate the bytes of a roster file; raises UserError naming key and file."""
    return RosterFile(parse_toml(Roster, raw, source), raw)


def load_roster(path: Path, pin: bytes | None = None) -> RosterFile:
    """Read a roster file and, where ``pin`` is given, insist on that hash.

    Raises:
        UserError: unreadable or invalid file, or another roster than the pinned one.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: expected a roster file, found: {error.strerror}", hint="check the path") from error
    found = parse_roster(raw, str(path))
    if pin is not None and found.hash != pin:
        raise UserError(
            f"{path}: expected the pinned roster {pin.hex()[:16]}…, found {found.hash.hex()[:16]}…",
            hint="compare the roster with the other members by telephone before you pin another one",
        )
    return found


@dataclass(frozen=True)
class Rules:
    """The numbers of a round that plan and policy fix together, the strictest of each; no message carries them."""

    cohort: int  # N
    colluders: int  # c
    min_cohort: int
    min_survivors: int
    bits: int


def rules_for(plan: Plan, policy: Policy) -> Rules:
    """Combine plan and pinned policy.

    Raises:
        Refusal: the plan asks for what the policy does not allow.
    """
    r = plan.round
    for ok, asked in (
        (r.bits in policy.bits, f"bits {r.bits}, allowed {', '.join(map(str, policy.bits))}"),
        (r.max_cohort <= policy.max_cohort, f"max_cohort {r.max_cohort}, allowed {policy.max_cohort}"),
        (r.clip <= policy.max_clip, f"clip {r.clip}, allowed {policy.max_clip}"),
        (r.max_weight <= policy.max_weight, f"max_weight {r.max_weight}, allowed {policy.max_weight}"),
        (
            not policy.bases or plan.base.digest in policy.bases,
            f"base model {plan.base.digest[:16]}…, allowed {', '.join(d[:16] + '…' for d in policy.bases)}",
        ),
    ):
        if not ok:
            raise Refusal(f"plan '{plan.name}' asks for {asked} by the pinned policy")
    colluders = max(r.max_colluders, policy.max_colluders)
    least = smallest_survivors(colluders, policy.allow_two_members)
    min_survivors = max(r.min_survivors, policy.min_survivors, least)
    min_cohort = max(r.min_cohort, policy.min_cohort, min_survivors)  # min_survivors is at least colluders + 2
    if min_cohort > r.max_cohort:
        raise Refusal(
            f"plan '{plan.name}' allows cohorts of {r.max_cohort}, but policy and {colluders} colluders "
            f"need at least {min_cohort}"
        )
    return Rules(r.max_cohort, colluders, min_cohort, min_survivors, r.bits)
