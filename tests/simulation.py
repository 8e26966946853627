"""The whole protocol as one loop with no network: two real state machines, and a link that drops what it is told to.

The fakes here are peers, not mocks: every member is a real :class:`ParticipantRound`, the coordinator a real
:class:`CoordinatorRound`; only the vectors are short. A test drops, repeats or tampers through hooks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from coordinator import phases
from coordinator.round import CoordinatorRound
from participant.phases import Checking, Masking, Projecting, Stopped, Uploading
from participant.records import Joined, PeersSeen, Record, Site, Spent, Step
from participant.retry import check_proofs
from participant.round import ParticipantRound, accept_offer
from privacy import PROTOCOL_VERSION, merkle
from privacy.encoding import decode, encode
from privacy.errors import VeilsumError
from privacy.roster import Rules
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.keys import identity_public
from privacy.secagg.masking import BLOCK, MaskStreams, masked_blocks, pack, packed_length, unpack
from privacy.secagg.messages import Header, Offer, RetryProof
from privacy.secagg.projection import project
from privacy.secagg.transcript import RoundContext

#: Messages of a member, in order: a member "silent from M5 on" sends M1 and M3 and then nothing.
STEPS = ("M1", "M3", "M5", "M7", "M9", "M11", "M13")

KIND = {
    "Advertise": "M1",
    "ShareRoot": "M3",
    "MaskedInput": "M5",
    "Complaint": "M5",
    "SurvivorVote": "M7",
    "UnmaskShares": "M9",
    "OutcomeVote": "M11",
    "ProjectionShare": "M13",
    "AbortStatement": "M13",
}


def seeded(seed: str) -> Callable[[int], bytes]:
    """Deterministic bytes for a test: SHAKE-256 of seed and a counter. Never used outside tests."""
    state = {"n": 0}

    def rand(count: int) -> bytes:
        state["n"] += 1
        return hashlib.shake_256(f"{seed}/{state['n']}".encode()).digest(count)

    return rand


def identity(index: int) -> Ed25519PrivateKey:
    """Identity key of test member ``index``."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"identity %d" % index).digest())


def context_for(
    n: int,
    colluders: int = 0,
    *,
    size: int = 24,
    bits: int = 24,
    round_number: int = 1,
    minimum: int | None = None,
    joiners: int = 0,
) -> RoundContext:
    """The context of a test round of ``n`` roster members; at least ``joiners`` begin, ``minimum`` end."""
    least = minimum if minimum is not None else max(colluders, 1) + 2
    smallest = max(least, colluders + 2, joiners)
    rules = Rules(cohort=n, colluders=colluders, min_cohort=smallest, min_survivors=least, bits=bits)
    header = Header(
        PROTOCOL_VERSION,
        hashlib.sha256(b"plan").digest(),
        1,
        round_number,
        hashlib.sha256(b"roster").digest(),
        hashlib.sha256(b"start").digest(),
        identity_public(identity(999)),
    )
    keys = tuple(identity_public(identity(i)) for i in range(n))
    return RoundContext(header, keys, rules, packed_length(size, bits))


def vector_of(member: int, size: int, qmax: int = 1000) -> NDArray[np.int32]:
    """A fixed quantised vector with both signs."""
    stream = hashlib.shake_256(b"vector %d" % member).digest(4 * size)
    return (np.frombuffer(stream, "<u4") % (2 * qmax + 1)).astype(np.int32) - qmax


@dataclass
class Member:
    """A participant with what its disk would hold."""

    index: int
    machine: ParticipantRound
    vector: NDArray[np.int32]
    records: list[Record] = field(default_factory=list)
    upload: tuple[bytes, ...] = ()
    refusals: list[VeilsumError] = field(default_factory=list)
    heard: set[bytes] = field(default_factory=set)

    def keep(self, step: Step) -> FromMember | None:
        self.records.extend(step.records)
        return step.reply

    def mask(self) -> FromMember | None:
        """What the shell does after M4: mask, spool, commit."""
        phase = self.machine.phase
        assert isinstance(phase, Masking)
        bits = self.machine.context.rules.bits
        self.upload = tuple(masked_blocks(self.vector, phase.streams.plus, phase.streams.minus, bits))
        return self.keep(self.machine.commit(merkle.root([merkle.leaf_hash(b) for b in self.upload])))

    def hear(self, message: ToMember) -> FromMember | None:
        """One message in, one reply out; a refusal is remembered and nothing is sent."""
        try:
            reply = self.keep(self.machine.handle(message))
        except VeilsumError as error:
            self.refusals.append(error)
            return None
        if isinstance(self.machine.phase, Masking):
            return self.mask()
        if isinstance(self.machine.phase, Checking):
            return self.keep(self.machine.confirm(()))
        if isinstance(self.machine.phase, Projecting):
            return self.keep(self.machine.project(project(self.machine.phase.key, self.vector)))
        return reply


def make_member(
    index: int, offer: Offer, expected: RoundContext, size: int, disk: list[Record] | None = None
) -> Member:
    """Accept an offer as a site with these records would; ``disk`` is its disk and grows with the round.

    Raises:
        Refusal: the offer is not one this site takes. ProtocolError: a retry proof does not hold.
    """
    records = [] if disk is None else disk
    vector = vector_of(index, size)
    joined = [r for r in records if isinstance(r, Joined)]
    context = accept_offer(offer, expected, max((r.header.round for r in joined), default=0))
    spent = [r for r in records if isinstance(r, Spent)]
    bond = check_proofs(spent, records, index, offer.proofs, context)
    counts: dict[int, int] = {}
    for record in records:
        if isinstance(record, PeersSeen):
            counts |= dict(zip(record.members, record.counts, strict=True))
    digest = hashlib.sha256(vector.tobytes()).digest()
    site = Site(index, identity(index), "plan", "data", digest, len(joined), counts, 0, merkle.EMPTY_ROOT, bond)
    machine = ParticipantRound(context, site, seeded(f"member {index} {context.header.round}"))
    return Member(index, machine, vector, records)


Tamper = Callable[[int, ToMember], ToMember | None]


@dataclass
class Simulation:
    """One round: ``run()`` until nothing moves any more.

    Attributes:
        silent: member -> first step (of STEPS) it no longer takes.
        to_member: hook on every message to a member; returns what arrives, ``None`` for nothing.
        from_member: hook on every message of a member.
    """

    n: int
    colluders: int = 0
    size: int = 24
    bits: int = 24
    silent: Mapping[int, str] = field(default_factory=dict)
    to_member: Tamper = lambda _member, message: message
    from_member: Callable[[int, FromMember], FromMember | None] = lambda _member, message: message
    minimum: int | None = None
    joiners: int = 0
    round_number: int = 1
    invited: tuple[int, ...] | None = None
    proofs: Mapping[int, tuple[RetryProof, ...]] = field(default_factory=dict)
    disks: dict[int, list[Record]] = field(default_factory=dict)
    vectors: dict[int, NDArray[np.int32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.context = context_for(
            self.n,
            self.colluders,
            size=self.size,
            bits=self.bits,
            minimum=self.minimum,
            joiners=self.joiners,
            round_number=self.round_number,
        )
        invited = tuple(range(self.n)) if self.invited is None else self.invited
        self.coordinator = CoordinatorRound(self.context, invited, self.proofs)
        self.members: dict[int, Member] = {}
        self.uploads: dict[int, tuple[bytes, ...]] = {}
        self.offer_refusals: dict[int, VeilsumError] = {}
        self.coordinator_refusals: list[VeilsumError] = []
        self.total: NDArray[np.uint32] | None = None
        self.running_sum: NDArray[np.uint32] | None = None

    # --- the coordinator's shell, in miniature ---------------------------------------------------------------------

    def _unpacked(self, member: int) -> NDArray[np.uint32]:
        sizes = [min(BLOCK, self.size - low) for low in range(0, self.size, BLOCK)]
        blocks = zip(self.uploads[member], sizes, strict=True)
        return np.concatenate([unpack(block, count, self.bits) for block, count in blocks])

    def _shell(self) -> None:
        phase = self.coordinator.phase
        if isinstance(phase, phases.Folding):
            self.running_sum = np.zeros(self.size, np.uint32)
            for survivor in phase.closed.survivors:
                self.running_sum += self._unpacked(survivor)
            self.coordinator.sum_saved()
        elif isinstance(phase, phases.Publishing):
            assert self.running_sum is not None
            self.total = self.running_sum.copy()
            off = phase.streams.inverse()
            masks, blocks = MaskStreams(off.plus, off.minus, self.bits), []
            for low in range(0, self.size, BLOCK):
                tile = self.total[low : low + BLOCK]
                masks.apply(tile)
                blocks.append(pack(tile, self.bits))
            self.coordinator.publish(merkle.root([merkle.leaf_hash(block) for block in blocks]))

    def _close(self) -> None:
        self.coordinator.close_phase()

    # --- the loop ----------------------------------------------------------------------------------------------------

    def _may_send(self, member: int, reply: FromMember) -> bool:
        body = getattr(reply, "body", None) or reply.root.body  # type: ignore[union-attr]
        first_silent = self.silent.get(member)
        return first_silent is None or STEPS.index(KIND[type(body).__name__]) < STEPS.index(first_silent)

    def _exchange(self, index: int) -> bool:
        """Give one member what the coordinator has for it; did its reply change anything?"""
        message = self.coordinator.message_for(index)
        message = self.to_member(index, message) if message is not None else None
        if message is None:
            return False
        if isinstance(message, Offer):
            return self._join(index, message)
        if index not in self.members or isinstance(self.members[index].machine.phase, Stopped):
            return False
        member = self.members[index]
        if encode(message) in member.heard:
            return False
        member.heard.add(encode(message))
        reply = member.hear(message)
        return reply is not None and self._deliver(index, reply)

    def _join(self, index: int, offer: Offer) -> bool:
        if index in self.members or index in self.offer_refusals:
            return False
        try:
            member = make_member(index, offer, self.context, self.size, self.disks.setdefault(index, []))
        except VeilsumError as error:
            self.offer_refusals[index] = error
            return False
        member.vector = self.vectors.get(index, member.vector)
        self.members[index] = member
        reply = member.keep(member.machine.join())
        return reply is not None and self._deliver(index, reply)

    def _deliver(self, index: int, reply: FromMember) -> bool:
        if not self._may_send(index, reply):
            return False
        delivered = self.from_member(index, reply)
        if delivered is None:
            return False
        if isinstance(self.members[index].machine.phase, Uploading):
            self.uploads[index] = self.members[index].upload
        try:
            # Through the canonical encoding, as over a wire: nothing is shared by reference.
            return self.coordinator.receive(decode(FromMember, encode(delivered, FromMember)))  # type: ignore[arg-type]
        except VeilsumError as error:
            self.coordinator_refusals.append(error)
            return False

    def run(self) -> Simulation:
        """Exchange until the round is over; deadlines pass when nothing moves."""
        for _ in range(200):
            self._shell()
            moved = [self._exchange(index) for index in range(self.n)]
            self._shell()
            if isinstance(self.coordinator.phase, phases.Released | phases.Aborted):
                break
            if not any(moved):
                self._close()
        for index in range(self.n):
            self._exchange(index)
        return self

    # --- what a test asks --------------------------------------------------------------------------------------------

    @property
    def phase(self) -> phases.Phase:
        return self.coordinator.phase

    @property
    def survivors(self) -> tuple[int, ...]:
        assert isinstance(self.phase, phases.Released | phases.Confirming | phases.Projecting)
        return self.phase.closed.survivors

    def plain_sum(self) -> NDArray[np.int64]:
        """The sum over the survivors, computed in the clear."""
        plain = np.zeros(self.size, np.int64)
        for i in self.survivors:
            plain += self.members[i].vector
        return plain

    def is_exact(self) -> bool:
        """Does the unmasked total equal the plain integer sum, bit for bit?"""
        assert self.total is not None
        wanted = self.plain_sum() & (1 << self.bits) - 1
        return bool(np.array_equal(self.total & np.uint32((1 << self.bits) - 1), wanted.astype(np.uint32)))


def with_field(message: object, **changes: object) -> object:
    """A copy of a frozen message with other fields."""
    return replace(message, **changes)  # type: ignore[type-var]
