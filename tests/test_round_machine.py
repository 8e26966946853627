"""Random schedules of delay, repeat, loss and silence: whatever the network does, secrets and sums are safe.

The state machine holds a real coordinator and up to eight real members. Hypothesis decides who hears what and when,
what is lost, what arrives twice or long after its time, and when deadlines pass. After every step no honest member's
two secrets are both within reach; at the end the total is the plain sum bit for bit, or there is none.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordinator import phases
from participant.phases import Checking, Confirmed, Finished, Masking, Projecting, Stopped
from privacy.encoding import encode
from privacy.errors import ProtocolError
from privacy.secagg.messages import (
    MaskSecretShare,
    Offer,
    SelfMaskShare,
    Shares,
    UnmaskShares,
)
from privacy.secagg.projection import project
from privacy.secagg.threshold import threshold
from tests.simulation import Member, Simulation, make_member

#: Answers that take the vector or the total; the shell makes them once and sends the stored bytes again.
OVER = (phases.Released, phases.Aborted)
WHO = st.integers(0, 7)


def body_of(message: Any) -> Any:
    return message.root.body if isinstance(message, Shares) else message.body


class RoundMachine(RuleBasedStateMachine):
    """One round; ``simulation`` gives the coordinator, its shell and the vectors, the rules are the network."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: dict[int, list[Any]] = {}  # what each member was ever told
        self.replies: dict[tuple[int, bytes], bytes] = {}  # what it answered to it, first
        self.outbox: dict[int, list[Any]] = {}  # under way to the coordinator
        self.said: dict[int, list[Any]] = {}  # all that each member ever said
        self.silent: set[int] = set()
        self.lists: set[tuple[int, ...]] = set()  # every U3 that the coordinator ever fixed

    @initialize(n=st.integers(3, 8), colluders=st.integers(0, 2))
    def begin(self, n: int, colluders: int) -> None:
        n = max(n, colluders + 2, 3)
        self.n, self.colluders = n, colluders
        least = min(max(colluders, 1) + 2, n)
        self.simulation = Simulation(n, colluders, size=8, minimum=least)
        for i in range(n):
            self.heard[i], self.outbox[i], self.said[i] = [], [], []

    @property
    def members(self) -> dict[int, Member]:
        return self.simulation.members

    # --- what members do -----------------------------------------------------------------------------------------

    def speak(self, i: int, reply: Any) -> None:
        if reply is not None:
            self.said[i].append(reply)
            self.outbox[i].append(reply)

    def join(self, i: int, offer: Offer) -> None:
        if i not in self.members:
            simulation = self.simulation
            self.members[i] = make_member(i, offer, simulation.context, simulation.size)
            self.speak(i, self.members[i].keep(self.members[i].machine.join()))

    def tell(self, i: int, message: Any) -> None:
        """One message reaches one member: new, repeated, or long after its time."""
        if isinstance(message, Offer):
            self.join(i, message)
            return
        member, key = self.members[i], (i, encode(message))
        before = member.machine.phase
        try:
            step = member.machine.handle(message)
        except ProtocolError:
            assert member.machine.phase is before
            assert key not in self.replies, "a message was taken once and refused when it was repeated"
            return
        reply = member.keep(step)
        if isinstance(member.machine.phase, Masking):
            reply = member.mask()
        elif isinstance(member.machine.phase, Checking):
            reply = member.keep(member.machine.confirm(()))
        elif isinstance(member.machine.phase, Projecting):
            reply = member.keep(member.machine.project(project(member.machine.phase.key, member.vector)))
        found = encode(reply) if reply is not None else b""
        assert self.replies.setdefault(key, found) == found, "a repeat got other bytes"
        self.speak(i, reply)

    # --- the network ---------------------------------------------------------------------------------------------

    def here(self, who: int) -> int | None:
        i = who % self.n
        return None if i in self.silent else i

    @rule(who=WHO)
    def the_coordinator_tells_one(self, who: int) -> None:
        i = self.here(who)
        message = self.simulation.coordinator.message_for(i) if i is not None else None
        if i is None or message is None or (not isinstance(message, Offer) and i not in self.members):
            return
        self.heard[i].append(message)
        self.tell(i, message)

    @rule(who=WHO)
    def the_coordinator_tells_all(self, who: int) -> None:
        for i in range(self.n):
            self.the_coordinator_tells_one(who + i)

    @rule(who=WHO, which=st.integers(0, 9))
    def an_old_message_arrives_again(self, who: int, which: int) -> None:
        i = self.here(who)
        if i is not None and self.heard[i]:
            self.tell(i, self.heard[i][which % len(self.heard[i])])

    @rule(who=WHO, which=st.integers(0, 9))
    def a_message_of_another_member_arrives(self, who: int, which: int) -> None:
        i, other = self.here(who), (who + which) % self.n
        if i is not None and i in self.members and other != i and self.heard[other]:
            message = self.heard[other][-1]
            if not isinstance(message, Offer):
                self.tell(i, message)

    def deliver(self, message: Any) -> None:
        coordinator = self.simulation.coordinator
        before = coordinator.phase
        try:
            coordinator.receive(message)
        except ProtocolError:
            assert coordinator.phase is before
        self.after()

    @rule(who=WHO)
    def one_message_reaches_the_coordinator(self, who: int) -> None:
        if self.outbox[who % self.n]:
            self.deliver(self.outbox[who % self.n].pop(0))

    @rule()
    def all_messages_reach_the_coordinator(self) -> None:
        for i in range(self.n):
            while self.outbox[i]:
                self.deliver(self.outbox[i].pop(0))

    @rule(who=WHO, which=st.integers(0, 9))
    def an_old_answer_arrives_again(self, who: int, which: int) -> None:
        said = self.said[who % self.n]
        if said:
            self.deliver(said[which % len(said)])

    @rule(who=WHO)
    def a_message_is_lost(self, who: int) -> None:
        if self.outbox[who % self.n]:
            self.outbox[who % self.n].pop()

    @precondition(lambda self: len(self.silent) < 3)
    @rule(who=WHO)
    def a_member_falls_silent(self, who: int) -> None:
        self.silent.add(who % self.n)

    @rule()
    def a_deadline_passes(self) -> None:
        self.simulation.coordinator.close_phase()
        self.after()

    def after(self) -> None:
        """The coordinator's shell does what is due; messages carry the uploads of members that committed one."""
        self.simulation.uploads = {i: m.upload for i, m in self.members.items() if m.upload}
        self.simulation._shell()
        closed = getattr(self.simulation.coordinator.phase, "closed", None)
        if closed is not None:
            self.lists.add(closed.survivors)

    # --- what must hold ------------------------------------------------------------------------------------------

    def released(self, owner: int, kind: type) -> set[int]:
        """Holders that let go of this kind of share of ``owner``."""
        found = set()
        for i in range(self.n):
            for body in map(body_of, self.said[i]):
                if isinstance(body, UnmaskShares):
                    found |= {i for share in body.shares if share.owner == owner and isinstance(share, kind)}
        return found

    @invariant()
    def both_secrets_of_one_member_are_never_within_reach(self) -> None:
        """Even with the shares that ``colluders`` holders add to what the others released."""
        for owner in range(getattr(self, "n", 0)):
            t = threshold(self.n, self.colluders)
            kinds = [len(self.released(owner, kind)) for kind in (SelfMaskShare, MaskSecretShare)]
            assert min(kinds) + self.colluders < t

    @invariant()
    def each_member_says_one_thing_of_each_kind(self) -> None:
        for said in self.said.values():
            bodies = {(type(body), encode(body)) for body in map(body_of, said)}
            assert len(bodies) == len({kind for kind, _ in bodies})

    @invariant()
    def there_is_one_list_of_survivors(self) -> None:
        assert len(self.lists) <= 1

    @invariant()
    def a_total_is_exact(self) -> None:
        if hasattr(self, "simulation") and self.simulation.total is not None:
            phase = self.simulation.phase
            if isinstance(phase, phases.Released | phases.Confirming):
                assert self.simulation.is_exact()

    def teardown(self) -> None:
        """Left to itself the round ends: with an exact total, or without any."""
        if not hasattr(self, "simulation"):
            return
        for _ in range(12):
            self.the_coordinator_tells_all(0)
            self.all_messages_reach_the_coordinator()
            if isinstance(self.simulation.phase, OVER):
                break
            self.a_deadline_passes()
        assert isinstance(self.simulation.phase, OVER)
        self.the_coordinator_tells_all(0)
        if isinstance(self.simulation.phase, phases.Released):
            assert self.simulation.is_exact()
            self.both_secrets_of_one_member_are_never_within_reach()
        else:
            assert self.simulation.total is None
            for i, member in self.members.items():
                if i not in self.silent:
                    assert isinstance(member.machine.phase, Stopped | Confirmed | Finished) or self.has_released(i)

    def has_released(self, i: int) -> bool:
        """After M9 a member is asked nothing more and waits for an outcome."""
        return any(isinstance(body_of(message), UnmaskShares) for message in self.said[i])


TestRoundMachine = pytest.mark.slow(RoundMachine.TestCase)
TestRoundMachine.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
