"""Random attacks by a coordinator that plays its members against one another: no schedule opens both secrets.

The attacker is a clever one. Whatever it says to an honest member it makes acceptable if it can: it only uses key
lists, sharers and survivors that the member's own checks could pass, has its colluders deal, upload and vote again for
every T1, T2 and list, and shows each member another subset. Hypothesis chooses whom it tells what.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from participant.phases import Advertising, Dealing, Masking, Uploading, Voting
from privacy import merkle
from privacy.errors import ProtocolError
from privacy.secagg import dealing
from privacy.secagg.dialogue import ToMember
from privacy.secagg.messages import (
    Certificate,
    Inbox,
    KeyList,
    MaskedInput,
    SelfMaskShare,
    ShareRoot,
    Shares,
    SurvivorList,
    SurvivorVote,
    UnmaskShares,
)
from tests.adversary.world import World, body_of

WHO = st.integers(0, 6)
SUBSET = st.integers(0, 127)


class Attack(RuleBasedStateMachine):
    """A :class:`World` and an attacker that knows what each honest member would accept."""

    def __init__(self) -> None:
        super().__init__()
        self.dealt: dict[tuple[int, bytes], Shares] = {}

    @initialize(n=st.integers(3, 7), colluders=st.integers(0, 2))
    def begin(self, n: int, colluders: int) -> None:
        n = max(n, colluders + 2)
        least = min(max(colluders, 1) + 2, n)
        self.world = World(n, corrupt=list(range(n - colluders, n)), minimum=least)

    # --- what the attacker can put together -----------------------------------------------------------------------

    def chosen(self, available: list[int], subset: int, me: int) -> list[int]:
        return [i for i in available if i == me or subset >> i & 1]

    def shares(self, owner: int, phase: Any) -> Shares | None:
        """M3 of an honest member, if it was for this T1; a colluder deals again for any."""
        world, t1 = self.world, phase.cohort.t1
        if owner not in world.corrupt:
            found = [m for m in world.sent[owner] if isinstance(m, Shares) and m.root.body.t1 == t1]
            return found[0] if found else None
        if (owner, t1) not in self.dealt:
            leaves, _ = dealing.deal(
                world.secrets(owner),
                owner,
                phase.cohort.advertised,
                phase.cohort.threshold,
                world.context.header_hash,
                t1,
            )
            root = ShareRoot(t1, merkle.root(dealing.leaf_hashes(leaves)))
            self.dealt[owner, t1] = Shares(leaves, world.sign(owner, root))
        return self.dealt[owner, t1]

    def key_list(self, me: int, subset: int) -> KeyList:
        return self.world.key_list(*self.chosen(list(range(self.world.n)), subset, me))

    def inbox(self, me: int, phase: Dealing, subset: int) -> Inbox:
        given = {i: shares for i in phase.cohort.members if (shares := self.shares(i, phase)) is not None}
        sharers = self.chosen(sorted(given), subset, me)
        leaves = tuple(self.world.leaf(i, me, given[i]) for i in sharers if i != me)
        return Inbox(tuple(given[i].root for i in sharers), leaves)

    def survivor_list(self, me: int, phase: Uploading, subset: int) -> SurvivorList:
        world = self.world
        uploads: dict[int, Any] = {}
        for i in phase.sharers:
            if i in world.corrupt:
                uploads[i] = world.sign(i, MaskedInput(phase.t2, bytes(32), world.context.upload_length))
            else:
                for message in world.sent[i]:
                    if isinstance(body := body_of(message), MaskedInput) and body.t2 == phase.t2:
                        uploads[i] = message
        return SurvivorList(tuple(uploads[i] for i in self.chosen(sorted(uploads), subset, me)))

    def certificate(self, phase: Voting) -> Certificate:
        wanted = SurvivorVote(phase.t2, phase.survivors_l)
        votes: dict[int, Any] = {}
        for i in phase.survivors:
            if i in self.world.corrupt:
                votes[i] = self.world.sign(i, wanted)
            else:
                votes.update((i, m) for m in self.world.sent[i] if body_of(m) == wanted)
        return Certificate(tuple(votes[i] for i in sorted(votes)))

    # --- what it says ------------------------------------------------------------------------------------------------

    def say(self, i: int, message: ToMember) -> None:
        member = self.world.members[i]
        before = member.machine.phase
        try:
            step = member.machine.handle(message)
        except ProtocolError:
            assert member.machine.phase is before
            return
        reply = member.keep(step)
        if isinstance(member.machine.phase, Masking):
            reply = member.mask()
        if reply is not None:
            self.world.sent[i].append(reply)

    def attack(self, i: int, subset: int) -> None:
        phase = self.world.members[i].machine.phase
        if isinstance(phase, Advertising):
            self.say(i, self.key_list(i, subset))
        elif isinstance(phase, Dealing):
            self.say(i, self.inbox(i, phase, subset))
        elif isinstance(phase, Uploading):
            self.say(i, self.survivor_list(i, phase, subset))
        elif isinstance(phase, Voting):
            self.say(i, self.certificate(phase))

    @rule(who=WHO, subset=SUBSET)
    def one_member_is_shown_a_subset(self, who: int, subset: int) -> None:
        self.attack(self.world.honest[who % len(self.world.honest)], subset)

    @rule(subset=SUBSET)
    def all_members_are_shown_one_subset(self, subset: int) -> None:
        for i in self.world.honest:
            self.attack(i, subset)

    @rule(half=SUBSET, one=SUBSET, other=SUBSET)
    def two_halves_are_shown_two_subsets(self, half: int, one: int, other: int) -> None:
        for i in self.world.honest:
            self.attack(i, one | half if half >> i & 1 else other | ~half)

    @rule()
    def all_members_are_shown_everything(self) -> None:
        self.all_members_are_shown_one_subset(127)

    # --- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def both_secrets_of_no_honest_member_are_open(self) -> None:
        if hasattr(self, "world"):
            self.world.assert_never_both()

    @invariant()
    def one_list_is_released_for_in_each_cohort(self) -> None:
        """Members that were shown disjoint key lists are disjoint cohorts, and may finish side by side."""
        if not hasattr(self, "world"):
            return
        lists: dict[bytes, set[tuple[bytes, bytes]]] = {}
        for i in self.world.honest:
            bodies = list(map(body_of, self.world.sent[i]))
            t1 = [b.t1 for b in bodies if isinstance(b, ShareRoot)]
            for body in bodies:
                if isinstance(body, UnmaskShares):
                    lists.setdefault(t1[0], set()).add((body.t2, body.survivors))
        assert all(len(found) == 1 for found in lists.values())

    @invariant()
    def no_honest_member_is_in_two_sums(self) -> None:
        if not hasattr(self, "world"):
            return
        sums: dict[tuple[bytes, bytes], set[int]] = {}
        for body in map(body_of, chain.from_iterable(self.world.sent[i] for i in self.world.honest)):
            if isinstance(body, UnmaskShares):
                survivors = {share.owner for share in body.shares if isinstance(share, SelfMaskShare)}
                sums[body.t2, body.survivors] = survivors - set(self.world.corrupt)
        found = list(chain.from_iterable(sums.values()))
        assert len(found) == len(set(found))

    @invariant()
    def every_sum_has_enough_honest_members(self) -> None:
        """A list that anybody released for has at least ``min_survivors - c`` honest members."""
        if hasattr(self, "world"):
            world, least = self.world, self.world.context.rules.min_survivors
            for i in world.honest:
                phase = world.members[i].machine.phase
                if isinstance(phase, Voting):
                    honest = [j for j in phase.survivors if j not in world.corrupt]
                    assert len(honest) >= least - len(world.corrupt)


TestAttack = pytest.mark.slow(Attack.TestCase)
TestAttack.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
