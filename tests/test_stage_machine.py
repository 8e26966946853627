"""Random schedules over a whole stage: rounds that fail, members that crash, retries with their proofs, late cohorts.

The state machine holds real machines of up to twelve members and of every round so far. Hypothesis decides who hears
what and when, what is lost or repeated, who crashes (the machine goes, the records stay), when the coordinator is
killed and built again from its events, and whom it invites to the next round: an honest coordinator's choice, or any
other. Whatever it decides, no delta ends up in two sums that differ.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordinator import phases
from coordinator.proofs import open_bonds, proofs_for
from coordinator.round import CoordinatorRound
from coordinator.running import replay
from coordinator.store import Event
from participant.records import Aborted, Joined, Record, Released, SignedSurvivors
from participant.retry import may_state_abort
from participant.round import abort_step
from privacy.encoding import encode
from privacy.endings import stored
from privacy.errors import ProtocolError, VeilsumError
from privacy.secagg.dialogue import FromMember
from privacy.secagg.messages import (
    MaskSecretShare,
    Offer,
    RoundAborted,
    SelfMaskShare,
    ShareRoot,
    Shares,
    SurvivorVote,
    UnmaskShares,
)
from privacy.secagg.threshold import threshold
from tests.simulation import Member, Simulation, make_member

OVER = (phases.Released, phases.Aborted)
TOTAL = (phases.Confirming, phases.Projecting, phases.Released)
WHO = st.integers(0, 11)
SUBSET = st.integers(0, 4095)
MOST_ROUNDS = 5


def body_of(message: Any) -> Any:
    return message.root.body if isinstance(message, Shares) else message.body


class Stage(RuleBasedStateMachine):
    """Rounds of one stage in order; only the last one runs, the others still take abort statements."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds: list[Simulation] = []
        self.events: list[list[Event]] = []
        self.live: dict[int, tuple[int, Member]] = {}  # member -> (round, machine)
        self.disks: dict[int, list[Record]] = {}
        self.said: dict[tuple[int, int], list[Any]] = {}  # (round, member) -> all that it ever said
        self.heard: list[tuple[int, int, Any]] = []
        self.flying: list[tuple[int, int, Any]] = []  # under way to the coordinator

    @initialize(n=st.integers(3, 12), colluders=st.integers(0, 2))
    def begin(self, n: int, colluders: int) -> None:
        self.colluders = colluders
        self.least = max(colluders, 1) + 2
        self.n = max(n, self.least)
        self.joiners = (self.n + self.least) // 2  # a certified list may have fewer
        self.open(tuple(range(self.n)), {})

    def open(self, invited: tuple[int, ...], proofs: dict[int, Any]) -> None:
        number = len(self.rounds) + 1
        settings_ = {"minimum": self.least, "round_number": number, "invited": invited, "proofs": proofs}
        settings_ |= {"joiners": self.joiners}
        self.rounds.append(Simulation(self.n, self.colluders, 8, disks=self.disks, **settings_))  # type: ignore[arg-type]
        self.events.append([])

    @property
    def last(self) -> Simulation:
        return self.rounds[-1]

    # --- what members do ---------------------------------------------------------------------------------------------

    def speak(self, number: int, i: int, reply: FromMember | None) -> None:
        if reply is not None:
            self.said.setdefault((number, i), []).append(reply)
            self.flying.append((number, i, reply))

    def tell(self, number: int, i: int, message: Any) -> None:
        """One message reaches one member, as its daemon would take it."""
        found = self.live.get(i)
        member = found[1] if found is not None and found[0] == number else None
        if isinstance(message, Offer):
            self.join(number, i, message)
        elif isinstance(message, RoundAborted):
            self.abort(number, i, message, member)
        elif member is not None:
            before = len(member.refusals)
            reply = member.hear(message)
            if len(member.refusals) == before:
                self.speak(number, i, reply)
                if member.upload:
                    self.rounds[number].uploads[i] = member.upload

    def join(self, number: int, i: int, offer: Offer) -> None:
        simulation, disk = self.rounds[number], self.disks.setdefault(i, [])
        try:
            member = make_member(i, offer, simulation.context, simulation.size, disk)
        except VeilsumError:
            return
        self.live[i] = (number, member)
        simulation.members[i] = member
        self.speak(number, i, member.keep(member.machine.join()))

    def abort(self, number: int, i: int, message: RoundAborted, member: Member | None) -> None:
        if member is not None:
            self.speak(number, i, member.hear(message))
            del self.live[i]
            return
        disk, header = self.disks.get(i, []), message.header
        joined = self.rounds[number].members.get(i)
        if joined is not None and may_state_abort(disk, header.hash()):
            assert any(isinstance(r, Joined) and r.header == header for r in disk)
            step = abort_step(joined.machine.site, header, message.reason)
            disk.extend(step.records)
            self.speak(number, i, step.reply)

    # --- the network -------------------------------------------------------------------------------------------------

    def deliver(self, number: int, i: int, message: Any) -> None:  # noqa: ARG002
        coordinator = self.rounds[number].coordinator
        before = coordinator.phase
        try:
            fresh = coordinator.receive(message)
        except ProtocolError:
            assert coordinator.phase is before
            return
        if fresh:
            self.events[number].append(Event("message", encode(message, FromMember)))
        self.shell(number)

    def shell(self, number: int) -> None:
        """Fold and unmask, and keep what a restart needs."""
        for _ in range(2):
            simulation, before = self.rounds[number], self.rounds[number].coordinator.phase
            simulation._shell()
            phase = simulation.coordinator.phase
            if isinstance(before, phases.Folding):
                self.events[number].append(Event("sum", b""))
            elif isinstance(before, phases.Publishing):
                assert isinstance(phase, phases.Confirming)
                self.events[number].append(Event("publish", phase.outcome.root))

    def tell_from_coordinator(self, number: int, i: int) -> None:
        message = self.rounds[number].coordinator.message_for(i)
        if message is not None:
            self.heard.append((number, i, message))
            self.tell(number, i, message)

    @rule(absent=SUBSET, patient=st.booleans())
    def all_but_some_hear_and_answer(self, absent: int, patient: bool) -> None:
        """``patient`` leaves the answers on their way."""
        for i in range(self.n):
            if not absent & (absent >> 1) >> i & 1:
                self.tell_from_coordinator(len(self.rounds) - 1, i)
        if not patient:
            self.everything_arrives()

    @rule()
    def everybody_hears_and_answers(self) -> None:
        self.all_but_some_hear_and_answer(0, False)

    @rule(who=WHO, which=st.integers(0, 4))
    def one_hears_of_some_round(self, who: int, which: int) -> None:
        self.tell_from_coordinator(which % len(self.rounds), who % self.n)

    @rule(which=st.integers(0, 200), who=WHO)
    def an_old_message_arrives_somewhere(self, which: int, who: int) -> None:
        """Again at the member it was for, or at another one."""
        if self.heard:
            number, i, message = self.heard[which % len(self.heard)]
            other = (i + who) % self.n if who > 8 and not isinstance(message, Offer) else i
            self.tell(number, other, message)

    @rule()
    def everything_arrives(self) -> None:
        flying, self.flying = self.flying, []
        for number, i, message in flying:
            self.deliver(number, i, message)

    @rule(which=st.integers(0, 60))
    def one_answer_arrives_before_the_others(self, which: int) -> None:
        if self.flying:
            self.deliver(*self.flying.pop(which % len(self.flying)))

    @rule(which=st.integers(0, 60), repeat=st.booleans())
    def an_answer_is_lost_or_doubled(self, which: int, repeat: bool) -> None:
        if self.flying and repeat:
            self.flying.append(self.flying[which % len(self.flying)])
        elif self.flying:
            self.flying.pop(which % len(self.flying))

    @rule(steps=st.integers(2, 6), absent=SUBSET)
    def the_stage_goes_on_without_some(self, steps: int, absent: int) -> None:
        if isinstance(self.last.phase, OVER) and len(self.rounds) < MOST_ROUNDS:
            self.the_next_round_opens(absent, absent % 5 > 1, absent % 7 > 0)
        for _ in range(steps):
            self.all_but_some_hear_and_answer(absent, False)
        if absent % 3:
            self.a_deadline_passes()

    @precondition(lambda self: self.rounds and not isinstance(self.last.phase, OVER) and not self.flying)
    @rule()
    def a_deadline_passes(self) -> None:
        self.last.coordinator.close_phase()
        self.events[-1].append(Event("close", b""))
        self.shell(len(self.rounds) - 1)

    @precondition(lambda self: self.rounds and isinstance(self.last.phase, phases.Signing | phases.Unmasking))
    @rule(deaf=SUBSET)
    def the_coordinator_gives_up_after_some_heard(self, deaf: int) -> None:
        """It says that the round failed; what some said before may be enough to open it all the same."""
        for i in range(self.n):
            if not deaf & (deaf >> 1) & (deaf >> 2) >> i & 1:
                self.tell_from_coordinator(len(self.rounds) - 1, i)
        self.last.coordinator.abort(stored("it says so"))
        self.events[-1].append(Event("abort", b"it says so"))

    @rule(who=SUBSET)
    def members_crash(self, who: int) -> None:
        """Their machines are gone; what is on disk stays, and they are there again at once."""
        for i in range(self.n):
            if who & who >> 1 & who >> 2 & 1 << i:
                self.live.pop(i, None)

    @rule()
    def the_coordinator_is_killed_and_restarted(self) -> None:
        simulation = self.last
        fresh = CoordinatorRound(simulation.context, simulation.coordinator.invited, simulation.proofs)
        for one in self.events[-1]:
            replay(fresh, one)
        for i in range(self.n):
            told, again = simulation.coordinator.message_for(i), fresh.message_for(i)
            assert told == again
        simulation.coordinator = fresh

    # --- the next round ----------------------------------------------------------------------------------------------

    def done(self) -> set[int]:
        return {i for s in self.rounds if isinstance(s.phase, TOTAL) for i in s.survivors}

    @precondition(lambda self: self.rounds and isinstance(self.last.phase, OVER) and len(self.rounds) < MOST_ROUNDS)
    @rule(subset=SUBSET, cunning=st.booleans(), asked=st.booleans())
    def the_next_round_opens(self, subset: int, cunning: bool, asked: bool) -> None:
        """An honest coordinator keeps a certified list together; a cunning one takes whom it likes, twice if it can."""
        if asked:  # everybody still there hears how the round before ended
            self.everybody_hears_and_answers()
        machines = [s.coordinator for s in self.rounds]
        proofs = {i: proofs_for(machines, i) for i in range(self.n)}
        free = [i for i in range(self.n) if proofs[i] is not None and (cunning or i not in self.done())]
        bonds = open_bonds(machines, self.done())
        whole = [bond for bond in bonds if set(bond) <= set(free)]
        if cunning:
            free = [i for i in free if not subset >> i & subset >> (i + 1) & 1]
        elif whole:
            free = list(whole[0])
        else:
            free = [i for i in free if i not in set().union(*bonds)]
        if len(free) >= max(self.least, self.colluders + 2):
            for i in free:
                for proof in proofs[i] or ():
                    event(f"offered {type(proof).__name__}")
            self.open(tuple(free), {i: proofs[i] for i in free})

    @precondition(lambda self: self.rounds and isinstance(self.last.phase, OVER) and len(self.rounds) < MOST_ROUNDS)
    @rule()
    def a_round_opens_without_proofs(self) -> None:
        self.open(tuple(range(self.n)), {})

    # --- what must hold ----------------------------------------------------------------------------------------------

    def bodies(self, number: int, kind: type) -> dict[int, Any]:
        """The one body of this kind that each member said in a round."""
        found: dict[int, Any] = {}
        for (at, i), messages in self.said.items():
            for body in map(body_of, messages) if at == number else ():
                if isinstance(body, kind):
                    assert found.setdefault(i, body) == body, f"member {i} said two different {kind.__name__}"
        return found

    def thresholds(self, number: int) -> dict[bytes, int]:
        """T1 -> t of everybody's share roots in a round."""
        roots = self.bodies(number, ShareRoot)
        sizes = {}
        for (at, _), messages in self.said.items():
            for message in messages if at == number else ():
                if isinstance(message, Shares):
                    sizes[message.root.body.t1] = threshold(len(message.leaves), self.colluders)
        assert {root.t1 for root in roots.values()} == set(sizes)
        return sizes

    @invariant()
    def one_list_is_certified_in_a_round_and_one_secret_of_each_member_is_open(self) -> None:
        """Both with the signatures and shares that ``colluders`` members would add."""
        for number in range(len(self.rounds)):
            t = self.thresholds(number)
            assert len(t) <= 1  # this coordinator shows everybody one key list
            if not t:
                continue
            (needed,) = t.values()
            votes = list(self.bodies(number, SurvivorVote).values())
            assert sum(votes.count(v) + self.colluders >= needed for v in set(votes)) <= 1
            released = self.bodies(number, UnmaskShares).values()
            for owner in range(self.n):
                kinds = [type(s) for body in released for s in body.shares if s.owner == owner]
                least = min(kinds.count(SelfMaskShare), kinds.count(MaskSecretShare))
                assert least + self.colluders < needed

    def openable(self) -> list[frozenset[int]]:
        """Members of every sum that enough shares were released for."""
        found = []
        for number in range(len(self.rounds)):
            released = list(self.bodies(number, UnmaskShares).values())
            lists = {body.survivors: body for body in released}
            for survivors, body in lists.items():
                (needed,) = self.thresholds(number).values()
                if sum(b.survivors == survivors for b in released) + self.colluders >= needed:
                    found.append(frozenset(s.owner for s in body.shares if isinstance(s, SelfMaskShare)))
        return found

    @invariant()
    def two_sums_that_can_be_opened_are_over_the_same_members_or_over_others(self) -> None:
        for one, other in combinations(self.openable(), 2):
            assert one == other or not one & other

    @invariant()
    def totals_are_exact(self) -> None:
        for simulation in self.rounds:
            if isinstance(simulation.phase, TOTAL):
                assert simulation.is_exact()
            elif isinstance(simulation.phase, phases.Aborted):
                assert simulation.total is None

    @invariant()
    def no_disk_says_both_released_and_aborted(self) -> None:
        for disk in self.disks.values():
            headers = [{r.header for r in disk if isinstance(r, kind)} for kind in (Released, Aborted)]
            assert not headers[0] & headers[1]

    @invariant()
    def what_is_once_is_once(self) -> None:
        for disk in self.disks.values():
            joined = [r for r in disk if isinstance(r, Joined)]
            counts = [r.rounds_joined for r in joined]
            assert counts == sorted(set(counts))
            assert [r.header.round for r in joined] == sorted({r.header.round for r in joined})
            for kind in (SignedSurvivors, Released):
                headers = [r.header for r in disk if isinstance(r, kind)]
                assert len(headers) == len(set(headers))

    def teardown(self) -> None:
        """Left to itself the last round ends, with an exact total or without any."""
        for _ in range(14):
            if not self.rounds or isinstance(self.last.phase, OVER):
                break
            self.everybody_hears_and_answers()
            if not isinstance(self.last.phase, OVER):
                self.a_deadline_passes()
        if self.rounds:
            assert isinstance(self.last.phase, OVER)
            released = sum(isinstance(s.phase, TOTAL) for s in self.rounds)
            event(f"{released} released of {len(self.rounds)} rounds")
            self.totals_are_exact()
            self.two_sums_that_can_be_opened_are_over_the_same_members_or_over_others()


TestStage = Stage.TestCase
TestStage.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
