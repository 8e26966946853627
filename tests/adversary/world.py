"""The attacker's workbench: honest members are real machines, everything between them is the attacker's.

A :class:`World` is the malicious coordinator. It holds what members sent, and makes any message out of it; it knows the
identity keys and the round secrets of the members that collude with it, and of nobody else. Attacks go step by step,
and end in :meth:`World.refused`, which asserts the reason, and that the refusal changed and revealed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from participant.records import PeersSeen, Released, SignedSurvivors
from privacy import merkle
from privacy.encoding import encode
from privacy.errors import ProtocolError, VeilsumError
from privacy.secagg import dealing, keys, transcript
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.messages import (
    Advertise,
    Certificate,
    Inbox,
    KeyList,
    MaskedInput,
    MaskSecretShare,
    Offer,
    OwnedLeaf,
    SelfMaskShare,
    ShareLeaf,
    ShareRoot,
    Shares,
    SurvivorList,
    SurvivorVote,
    UnmaskShares,
)
from privacy.secagg.signed import Signed, sign
from privacy.secagg.threshold import threshold
from privacy.secagg.transcript import RoundContext
from tests.simulation import Member, Simulation, context_for, identity, make_member

SIZE = 24


def changed(value: Any, **changes: Any) -> Any:
    """A copy of a frozen message with other fields."""
    return replace(value, **changes)


def signed_by(member: int, body: Any, context: RoundContext) -> Any:
    """A message of a member that the attacker holds the identity key of."""
    return sign(identity(member), member, body, context.header_hash)


@dataclass
class World:
    """A malicious coordinator with ``corrupt`` members at its side; the others are honest.

    Attributes:
        sent: all that each member ever said, in order.
    """

    n: int
    corrupt: Collection[int] = ()
    minimum: int | None = None
    size: int = SIZE
    bits: int = 24
    counts: Mapping[int, int] = field(default_factory=dict)
    context: RoundContext = field(init=False)
    members: dict[int, Member] = field(init=False)
    sent: dict[int, list[FromMember]] = field(init=False)

    def __post_init__(self) -> None:
        self.context = context_for(self.n, len(self.corrupt), size=self.size, bits=self.bits, minimum=self.minimum)
        offer = Offer(self.context.header)
        earlier = replace(self.context.header, stage=7)
        seen = PeersSeen(earlier, tuple(self.counts), tuple(self.counts.values()))
        self.members = {i: make_member(i, offer, self.context, self.size, [seen]) for i in range(self.n)}
        self.sent = {i: [] for i in range(self.n)}
        for i in range(self.n):
            self._keep(i, self.members[i].keep(self.members[i].machine.join()))

    # --- what the attacker has -----------------------------------------------------------------------------------

    @property
    def honest(self) -> list[int]:
        return [i for i in range(self.n) if i not in self.corrupt]

    def secrets(self, member: int) -> keys.RoundSecrets:
        """Round secrets of a colluder; asking for those of an honest member is a bug of the test."""
        assert member in self.corrupt
        return self.members[member].machine._secrets

    def sign(self, member: int, body: Any) -> Any:
        """A colluder's signature in this round."""
        assert member in self.corrupt
        return signed_by(member, body, self.context)

    def last(self, member: int, body: type) -> Any:
        """The last message of a member with this body (for M3: ``Shares``)."""
        found = [m for m in self.sent[member] if isinstance(m if body is Shares else getattr(m, "body", None), body)]
        return found[-1]

    def _keep(self, member: int, reply: FromMember | None) -> FromMember | None:
        if reply is not None:
            self.sent[member].append(reply)
        return reply

    # --- saying things -------------------------------------------------------------------------------------------

    def tell(self, member: int, message: ToMember) -> Any:
        """Say something acceptable to a member; its reply."""
        machine = self.members[member]
        before = len(machine.refusals)
        reply = self._keep(member, machine.hear(message))
        assert len(machine.refusals) == before, machine.refusals[-1]
        return reply

    def refused(
        self,
        member: int,
        message: ToMember,
        fragment: str,
        *,
        culprit: int | None = None,
        kind: type[VeilsumError] = ProtocolError,
    ) -> None:
        """The message is refused for this reason; phase, records, replies and what was sent are as before."""
        machine = self.members[member].machine
        before = (machine.phase, dict(machine._answered), list(self.members[member].records))
        with pytest.raises(kind, match=fragment) as caught:
            machine.handle(message)
        assert (machine.phase, machine._answered, self.members[member].records) == before
        assert machine.phase is before[0]
        if isinstance(caught.value, ProtocolError):
            assert caught.value.culprit == culprit
        self.assert_nothing_revealed()

    # --- making messages -----------------------------------------------------------------------------------------

    def key_list(self, *members: int) -> KeyList:
        return KeyList(tuple(self.last(i, Advertise) for i in members or range(self.n)))

    def leaf(self, owner: int, holder: int, shares: Shares | None = None) -> OwnedLeaf:
        """The leaf of ``owner`` for ``holder`` with its honest path."""
        given = shares or self.last(owner, Shares)
        place = [leaf.holder for leaf in given.leaves].index(holder)
        return OwnedLeaf(owner, given.leaves[place], merkle.path(dealing.leaf_hashes(given.leaves), place))

    def inbox(self, member: int, *sharers: int, other: Mapping[int, Shares] | None = None) -> Inbox:
        """M4 for ``member``; ``other`` replaces the M3 of some colluders."""
        given = {i: (other or {}).get(i) or self.last(i, Shares) for i in sharers or range(self.n)}
        leaves = tuple(self.leaf(i, member, shares) for i, shares in given.items() if i != member)
        return Inbox(tuple(shares.root for shares in given.values()), leaves)

    def survivor_list(self, *survivors: int) -> SurvivorList:
        return SurvivorList(tuple(self.last(i, MaskedInput) for i in survivors or range(self.n)))

    def certificate(self, *signers: int) -> Certificate:
        return Certificate(tuple(self.last(i, SurvivorVote) for i in signers))

    def vote(self, member: int, listed: SurvivorList) -> Signed[SurvivorVote]:
        """A colluder signs any list, as often as it likes."""
        t2 = listed.inputs[0].body.t2
        vote: Signed[SurvivorVote] = self.sign(member, SurvivorVote(t2, transcript.survivors_hash(t2, listed.inputs)))
        return vote

    def redealt(self, owner: int, holder: int, change: Callable[[ShareLeaf], ShareLeaf]) -> Shares:
        """A colluder's M3 with one leaf changed and the root signed anew."""
        given = self.last(owner, Shares)
        leaves = tuple(change(leaf) if leaf.holder == holder else leaf for leaf in given.leaves)
        return Shares(leaves, self.sign(owner, ShareRoot(given.root.body.t1, merkle.root(dealing.leaf_hashes(leaves)))))

    # --- whole steps ---------------------------------------------------------------------------------------------

    def dealt(self) -> World:
        """Everybody got the same M2 and answered M3."""
        for i in range(self.n):
            self.tell(i, self.key_list())
        return self

    def uploaded(self, *sharers: int) -> World:
        """Every sharer got its M4 and answered M5."""
        for i in sharers or range(self.n):
            self.tell(i, self.inbox(i, *sharers))
        return self

    def voted(self, *survivors: int) -> World:
        """Every survivor got the same M6 and answered M7."""
        listed = self.survivor_list(*survivors)
        for i in survivors or range(self.n):
            self.tell(i, listed)
        return self

    def released(self, *survivors: int) -> World:
        """Every survivor got the whole certificate and answered M9."""
        certificate = self.certificate(*(survivors or range(self.n)))
        for i in survivors or range(self.n):
            self.tell(i, certificate)
        return self

    # --- what must hold after any attack --------------------------------------------------------------------------

    def holders(self, owner: int, kind: type) -> set[int]:
        """Holders whose share of this kind the attacker has: all colluders', and what honest members released."""
        found = set(self.corrupt)
        for i in self.honest:
            for message in self.sent[i]:
                if isinstance(body := getattr(message, "body", None), UnmaskShares):
                    found |= {i for share in body.shares if share.owner == owner and isinstance(share, kind)}
        return found

    def threshold_of(self, owner: int) -> int | None:
        """t of the cohort that ``owner`` dealt its shares to, which may be smaller than the whole roster."""
        dealt = [m for m in self.sent[owner] if isinstance(m, Shares)]
        return threshold(len(dealt[0].leaves), len(self.corrupt)) if dealt else None

    def assert_never_both(self) -> None:
        """No honest member's two secrets both reach t shares; none signed two lists or released twice."""
        for i in self.honest:
            b, z = self.holders(i, SelfMaskShare), self.holders(i, MaskSecretShare)
            t = self.threshold_of(i)
            assert t is None or len(b) < t or len(z) < t, f"both secrets of member {i} are open"
            for body in (SurvivorVote, UnmaskShares, MaskedInput, ShareRoot):
                bodies = [m.root.body if isinstance(m, Shares) else m.body for m in self.sent[i]]
                said = {encode(b) for b in bodies if isinstance(b, body)}
                assert len(said) <= 1, f"member {i} said two different {body.__name__}"
            for record in (SignedSurvivors, Released):  # a repeat gives the same record again
                assert len({r for r in self.members[i].records if isinstance(r, record)}) <= 1

    def assert_nothing_revealed(self) -> None:
        """No honest member released a share of anything."""
        self.assert_never_both()
        for i in self.honest:
            assert not any(isinstance(getattr(m, "body", None), UnmaskShares) for m in self.sent[i])
            assert not any(isinstance(r, Released) for r in self.members[i].records)


# --- malicious members against an honest coordinator ------------------------------------------------------------------


def body_of(message: FromMember) -> Any:
    return message.root.body if isinstance(message, Shares) else message.body


def cheating(
    body: type, change: Callable[[Simulation, Any], Any], *, cheat: int = 4, n: int = 5, **more: Any
) -> Simulation:
    """A round in which one member's message with this body is replaced, and signed anew."""
    made: list[Simulation] = []

    def hook(member: int, message: FromMember) -> FromMember | None:
        if member != cheat or not isinstance(body_of(message), body):
            return message
        altered = change(made[0], message)
        return altered if isinstance(altered, Signed | Shares) or altered is None else signed(made[0], altered)

    def signed(simulation: Simulation, altered: Any) -> Any:
        return signed_by(cheat, altered, simulation.context)

    made.append(Simulation(n, 1, from_member=hook, **more))
    return made[0].run()
