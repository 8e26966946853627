"""The honest path of a round, and every member that may fall silent (protocol sections 4 and 5)."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from coordinator import phases
from coordinator.round import CoordinatorRound
from privacy.errors import ProtocolError
from privacy.secagg.dialogue import FromMember
from privacy.secagg.messages import (
    Advertise,
    KeyList,
    ListProof,
    Offer,
    SelfMaskShare,
    Shares,
    UnmaskShares,
)
from privacy.secagg.naming import BadShare, proves
from privacy.secagg.shamir import SHARE_BYTES
from privacy.secagg.signed import Signed, sign
from privacy.secagg.transcript import verify_transcript
from tests.proofs import CONFIGURATIONS, SILENT_FROM, Pattern, completes, failure, patterns
from tests.simulation import STEPS, Simulation, context_for, identity, make_member


@pytest.mark.parametrize("bits", [16, 20, 24, 32])
@pytest.mark.parametrize(("n", "colluders"), [(3, 0), (3, 1), (5, 1), (8, 2)])
def test_everybody_answers_and_the_total_is_exact(n: int, colluders: int, bits: int) -> None:
    simulation = Simulation(n, colluders, bits=bits, size=101).run()
    assert isinstance(simulation.phase, phases.Released)
    assert simulation.survivors == tuple(range(n))
    assert simulation.is_exact()
    assert not simulation.coordinator_refusals
    assert all(not member.refusals for member in simulation.members.values())
    assert len(simulation.phase.shares) == n


@pytest.mark.slow
def test_every_dropout_pattern_of_three_members() -> None:
    for colluders in (0, 1):
        assert [failure(pattern, colluders) for pattern in patterns(3)] == [None] * len(SILENT_FROM) ** 3


@pytest.mark.slow
@pytest.mark.parametrize(("n", "colluders"), [c for c in CONFIGURATIONS if c[0] > 3])
def test_a_sample_of_the_dropout_patterns_of_more(n: int, colluders: int) -> None:
    """``make proofs`` runs them all; half of this sample completes, so that both ends are seen."""
    shuffled = list(patterns(n))
    random.Random(20_26).shuffle(shuffled)
    sample: list[Pattern] = []
    for wanted in (True, False):
        sample += [p for p in shuffled if completes(p, colluders) == wanted][:25]
    assert [failure(pattern, colluders) for pattern in sample] == [None] * len(sample)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("n", "colluders"), [(5, 1), (8, 2), (12, 3)])
def test_losing_n_minus_t_members_at_any_one_step_still_completes(n: int, colluders: int, step: str) -> None:
    lost = n - ((n + colluders) // 2 + 1)
    simulation = Simulation(n, colluders, silent=dict.fromkeys(range(1, lost + 1), step)).run()
    if step == "M1":  # then fewer joined, and n is smaller
        assert len(simulation.survivors) == n - lost
    assert isinstance(simulation.phase, phases.Released)
    assert simulation.is_exact()


@pytest.mark.parametrize("when", [("M3", "M3"), ("M3", "M5"), ("M5", "M5"), ("M5", "M9"), ("M7", "M9")])
def test_two_losses_of_five_with_one_colluder_abort_with_the_reason(when: tuple[str, str]) -> None:
    simulation = Simulation(5, 1, silent=dict(zip((1, 3), when, strict=True))).run()
    assert isinstance(simulation.phase, phases.Aborted)
    assert "expected at least 4 members" in simulation.phase.reason
    assert simulation.total is None


# --- the smallest round: quick enough to be the first tests that a mistake in the coordinator's machine meets ---


def body_of(message: FromMember) -> Any:
    return message.root.body if isinstance(message, Shares) else message.body


def test_a_phase_waits_for_those_who_have_not_answered() -> None:
    missing: dict[str, tuple[int, ...]] = {}
    released: list[int] = []

    def ask(member: int, message: FromMember) -> FromMember:
        if member == 1:
            missing[type(body_of(message)).__name__] = running.coordinator.missing()
        if isinstance(body_of(message), UnmaskShares):
            released.append(member)
        return message

    running = Simulation(3, size=1, from_member=ask)
    phase = running.run().phase
    kinds = ("Advertise", "ShareRoot", "MaskedInput", "SurvivorVote", "UnmaskShares", "OutcomeVote", "ProjectionShare")
    assert missing == dict.fromkeys(kinds, (1, 2))
    assert released == [0, 1], "t = 2 releases are enough"
    assert isinstance(phase, phases.Released)
    assert sorted(phase.votes) == sorted(phase.shares) == [0, 1, 2]
    verified = verify_transcript(running.context, phase.outcome.transcript)
    assert verified.sharers == verified.survivors == (0, 1, 2)


def test_a_projection_that_one_does_not_answer_keeps_the_votes_and_the_others_answers() -> None:
    phase = Simulation(3, size=1, silent={2: "M13"}).run().phase
    assert isinstance(phase, phases.Released)
    assert (sorted(phase.votes), sorted(phase.shares)) == ([0, 1, 2], [0, 1])


def test_a_repeat_is_no_news_and_another_word_is_refused() -> None:
    said: list[FromMember] = []

    def keep(_member: int, message: FromMember) -> FromMember:
        said.append(message)
        return message

    done = Simulation(3, size=1, from_member=keep).run()
    for message in said:
        assert done.coordinator.receive(message) is False
    first = said[0]
    assert isinstance(first, Signed)
    assert isinstance(first.body, Advertise)
    body = replace(first.body, rounds_joined=7)
    with pytest.raises(ProtocolError, match="a second, different Advertise of member 0"):
        done.coordinator.receive(sign(identity(0), 0, body, done.context.header_hash))


def test_only_who_takes_part_is_told_anything() -> None:
    context, proof = context_for(4, minimum=3), ListProof(context_for(4).header, (), ())
    machine = CoordinatorRound(context, (0, 1, 2), {1: (proof,)})
    offers = [machine.message_for(member) for member in range(4)]
    assert offers == [Offer(context.header, ()), Offer(context.header, (proof,)), Offer(context.header, ()), None]
    assert CoordinatorRound(context, (0,)).message_for(0) == Offer(context.header, ())
    for i in range(3):
        reply = make_member(i, Offer(context.header, ()), context, 24).machine.join().reply
        assert reply is not None
        machine.receive(reply)
    assert [isinstance(machine.message_for(member), KeyList) for member in range(4)] == [True, True, True, False]
    assert machine.message_for(3) is None


@pytest.mark.parametrize("stolen", ["share_key", "mask_key", "its own"])
def test_a_key_serves_one_member_and_one_purpose(stolen: str) -> None:
    context = context_for(3)
    machine = CoordinatorRound(context, (0, 1, 2))
    first, second = (make_member(i, Offer(context.header, ()), context, 24).machine.join().reply for i in (0, 1))
    assert isinstance(first, Signed)
    assert isinstance(second, Signed)
    assert isinstance(first.body, Advertise)
    assert isinstance(second.body, Advertise)
    machine.receive(first)
    key = second.body.mask_key if stolen == "its own" else getattr(first.body, stolen)
    forged = sign(identity(1), 1, replace(second.body, share_key=key), context.header_hash)
    with pytest.raises(ProtocolError, match="a key of member 1 is not its own"):
        machine.receive(forged)
    machine.receive(second)


def test_a_bad_share_is_proven_once_and_names_its_sender() -> None:
    forged: list[Signed[UnmaskShares]] = []

    def forge(member: int, message: FromMember) -> FromMember:
        if member == 1 and isinstance(message, Signed) and isinstance(message.body, UnmaskShares):
            for value in (b"\0" * SHARE_BYTES, b"\0" * (SHARE_BYTES - 1) + b"\1"):
                shares = (SelfMaskShare(0, value), *message.body.shares[1:])
                body = replace(message.body, shares=shares)
                forged.append(sign(identity(1), 1, body, running.context.header_hash))
            with pytest.raises(ProtocolError, match="does not match its hash in M3"):
                running.coordinator.receive(forged[0])
            return forged[1]
        return message

    running = Simulation(3, size=1, from_member=forge)
    phase = running.run().phase
    assert isinstance(phase, phases.Released)
    (accusation,) = running.coordinator.accusations
    closed, evidence = phase.closed, accusation.evidence
    assert isinstance(evidence, BadShare)
    assert (evidence.release, evidence.root) == (forged[0], closed.shares[0].root)
    assert (evidence.leaf.owner, evidence.leaf.leaf.holder) == (0, 1)
    assert proves(closed.cohort, closed.roots, evidence)
