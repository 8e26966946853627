"""What a round leaves: every field of a member's records, answers to repeats, and what an aborted round proves."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from coordinator import phases
from coordinator.proofs import certified_list, proofs_for, retry_proof
from participant.phases import Stopped
from participant.records import Aborted, Joined, PeersSeen, Record, Released, SignedSurvivors, Spent, Step
from privacy.endings import stored
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.messages import (
    Certificate,
    Inbox,
    KeyList,
    MaskedInput,
    NonceList,
    Outcome,
    OutcomeVote,
    Shares,
    SurvivorList,
    UnmaskShares,
)
from tests.simulation import Simulation, context_for
from tests.test_retry import C, N, aborted_after_uploads, list_proof


def test_the_records_of_a_round_say_what_was_done() -> None:
    """Each field of each record: a restarted site knows nothing else."""
    early: list[Record] = [Joined(replace(context_for(N, C).header, round=0), 1)]
    done = Simulation(N, C, silent={4: "M5"}, disks={0: early}).run()
    assert isinstance(done.phase, phases.Released)
    header, closed, member = done.context.header, done.phase.closed, done.members[0]
    counts = tuple(m.body.rounds_joined for m in closed.cohort.keys)
    vector = hashlib.sha256(member.vector.tobytes()).digest()
    root = closed.inputs[0].body.root
    t1, t2, survivors_l, everybody = closed.cohort.t1, closed.t2, closed.survivors_l, (0, 1, 2, 3, 4)
    assert counts == (2, 1, 1, 1, 1)
    assert done.disks[0] == [
        *early[:1],
        Joined(header, 2),
        PeersSeen(header, everybody, counts),
        Spent(header, "plan", "data", t1, t2, everybody, C, 4, root, vector),
        SignedSurvivors(header, survivors_l, (0, 1, 2, 3)),
        Released(header, survivors_l),
    ]


def test_the_answer_to_a_repeat_has_the_same_reply_and_no_record() -> None:
    heard: dict[type, ToMember] = {}

    def keep(member: int, message: ToMember) -> ToMember:
        if member == 0:
            heard[type(message)] = message
        return message

    done = Simulation(N, C, to_member=keep).run()
    said = {type(m): m for m in heard.values()}
    for kind, reply in ((KeyList, Shares), (Inbox, MaskedInput), (Certificate, UnmaskShares), (Outcome, OutcomeVote)):
        step = done.members[0].machine.handle(said[kind])
        assert step.records == ()
        assert isinstance(step.reply if kind is KeyList else getattr(step.reply, "body", None), reply)


def test_three_members_leave_the_same_records_and_repeat_the_same_replies() -> None:
    """The smallest round, quick enough to be the first test that a mistake in a member's machine meets."""
    heard: dict[type, ToMember] = {}
    said: list[FromMember] = []

    def hear(member: int, message: ToMember) -> ToMember:
        if member == 0:
            heard[type(message)] = message
        return message

    def say(member: int, message: FromMember) -> FromMember:
        if member == 0:
            said.append(message)
        return message

    done = Simulation(3, size=1, to_member=hear, from_member=say).run()
    assert isinstance(done.phase, phases.Released)
    header, survivors_l, everybody = done.context.header, done.phase.closed.survivors_l, (0, 1, 2)
    assert [r for r in done.disks[0] if not isinstance(r, Spent)] == [
        Joined(header, 1),
        PeersSeen(header, everybody, (1, 1, 1)),
        SignedSurvivors(header, survivors_l, everybody),
        Released(header, survivors_l),
    ]
    kinds = (KeyList, Inbox, SurvivorList, Certificate, Outcome, NonceList)
    for kind, reply in zip(kinds, said[1:], strict=True):
        assert done.members[0].machine.handle(heard[kind]) == Step((), reply), kind.__name__


def test_a_member_that_missed_the_list_takes_the_outcome() -> None:
    def lose(member: int, message: ToMember) -> ToMember | None:
        return None if member == 2 and isinstance(message, SurvivorList | Certificate) else message

    done = Simulation(3, size=1, to_member=lose).run()
    assert isinstance(done.phase, phases.Released)
    assert sorted(done.phase.votes) == [0, 1, 2]
    assert not done.members[2].refusals


@pytest.mark.parametrize("bond", [(0, 1, 2), (0, 1)])
def test_a_bond_allows_its_own_list_and_no_other(bond: tuple[int, ...]) -> None:
    def bind(member: int, message: ToMember) -> ToMember:
        if member == 0 and isinstance(message, KeyList):
            machine = running.members[0].machine
            machine.site = replace(machine.site, bond=bond)
        return message

    running = Simulation(3, size=1, to_member=bind)
    refusals = running.run().members[0].refusals
    assert [str(refusal)[:2] for refusal in refusals] == ([] if bond == (0, 1, 2) else ["M4"])


def test_exactly_t_signatures_certify_a_list() -> None:
    def lose_certificate(member: int, message: ToMember) -> ToMember | None:
        return None if member == 3 and isinstance(message, Certificate) else message

    first = Simulation(N, C, silent={4: "M7"}, minimum=3, to_member=lose_certificate).run()
    assert isinstance(first.phase, phases.Aborted)
    assert [v.sender for v in first.phase.votes] == [0, 1, 2, 3]
    assert [v.sender for v in list_proof(first).votes] == [0, 1, 2, 3]


def test_a_round_that_goes_on_proves_nothing() -> None:
    asked: list[str] = []

    def ask(member: int, message: FromMember) -> FromMember:
        body = getattr(message, "body", None)
        if member == 0 and isinstance(body, MaskedInput | UnmaskShares):
            assert certified_list(running.coordinator) is retry_proof(running.coordinator, 0) is None
            assert proofs_for([running.coordinator], 0) is None
            asked.append(type(body).__name__)
        return message

    running = Simulation(N, C, from_member=ask)
    running.run()
    assert asked == ["MaskedInput", "UnmaskShares"]


def test_a_round_that_nobody_joined_proves_nothing_and_needs_no_proof() -> None:
    first = Simulation(N, C, silent=dict.fromkeys(range(3), "M1")).run()
    assert isinstance(first.phase, phases.Aborted)
    assert retry_proof(first.coordinator, 4) is None
    assert proofs_for([first.coordinator], 4) == ()


@pytest.mark.parametrize(("silent", "signed"), [("M5", ()), ("M7", (0, 1, 2)), ("M9", (0, 1, 2, 3, 4))])
def test_an_aborted_round_keeps_the_signatures_on_its_list(silent: str, signed: tuple[int, ...]) -> None:
    first = Simulation(N, C, silent={3: silent, 4: silent}, minimum=3).run()
    assert isinstance(first.phase, phases.Aborted)
    assert tuple(v.sender for v in first.phase.votes) == signed


class Unpublished(Simulation):
    """The coordinator never gets to publish the total."""

    def _shell(self) -> None:
        if not isinstance(self.coordinator.phase, phases.Publishing):
            super()._shell()


def test_a_round_aborted_before_its_total_is_out_keeps_its_certificate() -> None:
    first = Unpublished(N, C)
    first.run()
    assert isinstance(first.phase, phases.Publishing)
    votes = first.phase.transcript.votes
    first.coordinator.abort(stored("the disk is full"))
    assert isinstance(first.phase, phases.Aborted)
    assert first.phase.votes == votes
    assert len(votes) == N


def test_an_abort_is_recorded_with_the_reason_that_was_given() -> None:
    first = aborted_after_uploads()
    assert isinstance(first.phase, phases.Aborted)
    assert first.disks[0][-1] == Aborted(first.context.header, first.phase.reason)
    assert first.members[0].machine.phase == Stopped(first.phase.reason)
