"""Attacks with the outcome: another total, another round, openings that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from coordinator import phases
from participant.phases import Checking, Confirmed, Uploading
from privacy.errors import ProtocolError
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.messages import MaskedInput, OpenedMaskSecret, OpenedSelfMask, Outcome, OutcomeVote
from privacy.secagg.signed import Signed
from tests.simulation import Simulation

X = bytes(32)


def before_outcome(silent: dict[int, str] | None = None) -> tuple[Simulation, Outcome]:
    """A round of five in which nobody has been told the outcome yet; member 3 drops out before M5."""

    def withhold(_member: int, message: ToMember) -> ToMember | None:
        return None if isinstance(message, Outcome) else message

    simulation = Simulation(5, 1, silent={3: "M5"} if silent is None else silent, to_member=withhold).run()
    assert isinstance(simulation.phase, phases.Released)
    return simulation, simulation.phase.outcome


def with_opened(outcome: Outcome, place: int, seed: OpenedSelfMask | OpenedMaskSecret) -> Outcome:
    opened = outcome.transcript.opened
    return replace(
        outcome, transcript=replace(outcome.transcript, opened=(*opened[:place], seed, *opened[place + 1 :]))
    )


def survivor_seed(outcome: Outcome, place: int) -> bytes:
    seed = outcome.transcript.opened[place]
    assert isinstance(seed, OpenedSelfMask)
    return seed.seed


OUTCOMES: dict[str, tuple[Callable[[Outcome], Outcome], str]] = {
    "a root that the hash does not promise": (
        lambda o: replace(o, root=X),
        "M10: the hash of the total does not belong to its Merkle root",
    ),
    "a hash that the root does not give": (
        lambda o: replace(o, total=X),
        "M10: the hash of the total does not belong to its Merkle root",
    ),
    "the seeds of two survivors swapped": (
        lambda o: with_opened(o, 0, OpenedSelfMask(0, survivor_seed(o, 1))),
        "the opened seed of member 0 does not match its M1",
    ),
    "a secret of a survivor": (
        lambda o: with_opened(o, 0, OpenedMaskSecret(0, X)),
        "the wrong kind of seed was opened for member 0",
    ),
    "a self mask of the dropout": (
        lambda o: with_opened(o, 3, OpenedSelfMask(3, X)),
        "the wrong kind of seed was opened for member 3",
    ),
    "too few signatures": (
        lambda o: replace(o, transcript=replace(o.transcript, votes=o.transcript.votes[:3])),
        "M8: expected at least 4 signatures, found 3",
    ),
    "a transcript of another round": (
        lambda o: replace(o, transcript=replace(o.transcript, header=replace(o.transcript.header, round=2))),
        "M10: the transcript is of another round",
    ),
}


@pytest.mark.parametrize("member", [0, 4])
@pytest.mark.parametrize(("change", "fragment"), OUTCOMES.values(), ids=OUTCOMES.keys())
def test_a_bad_outcome_is_refused(change: Callable[[Outcome], Outcome], fragment: str, member: int) -> None:
    simulation, outcome = before_outcome()
    machine = simulation.members[member].machine
    before, records = machine.phase, list(simulation.members[member].records)
    with pytest.raises(ProtocolError, match=fragment):
        machine.handle(change(outcome))
    assert machine.phase is before
    assert simulation.members[member].records == records
    machine.handle(outcome)  # the good one is still welcome
    assert isinstance(machine.phase, Checking)


def test_the_outcome_of_another_run_with_the_same_header_is_refused() -> None:
    """Everything in it verifies; but it is not the round that this member took part in."""
    simulation, _ = before_outcome()
    _, other = before_outcome()
    machine = simulation.members[0].machine
    with pytest.raises(ProtocolError, match="M10: the transcript is not of the round that I took part in"):
        machine.handle(other)


def test_an_outcome_without_me_is_refused_by_a_member_that_uploaded() -> None:
    """Its upload was late or withheld: the sum is of the others, and it must not sign for it."""
    simulation, outcome = before_outcome()
    machine = simulation.members[3].machine
    assert isinstance(machine.phase, Uploading)
    with pytest.raises(ProtocolError, match="M10: the transcript is not of the round that I took part in"):
        machine.handle(outcome)
    assert isinstance(machine.phase, Uploading)


def test_a_second_outcome_is_refused() -> None:
    simulation, outcome = before_outcome()
    machine = simulation.members[0].machine
    machine.handle(outcome)
    machine.confirm((1, 2))
    with pytest.raises(ProtocolError, match="a second, different Outcome in one round"):
        machine.handle(replace(outcome, root=X))
    assert isinstance(machine.phase, Confirmed)


def test_a_survivor_that_was_never_asked_for_shares_still_checks_the_outcome() -> None:
    """t holders are enough; the other survivors verify the transcript from M5 on."""
    simulation, outcome = before_outcome({2: "M9"})
    simulation.members[2].machine.handle(outcome)
    assert isinstance(simulation.members[2].machine.phase, Checking)


def test_a_member_signs_one_outcome_and_says_which_blocks_it_checked() -> None:
    simulation, outcome = before_outcome()
    machine = simulation.members[0].machine
    machine.handle(outcome)
    vote = machine.confirm((0,)).reply
    assert isinstance(vote, Signed)
    assert isinstance(vote.body, OutcomeVote)
    assert (vote.body.total, vote.body.blocks) == (outcome.total, (0,))
    with pytest.raises(RuntimeError, match="belongs to phase Checking"):
        machine.confirm((0,))


def test_an_upload_of_a_dropout_never_enters_the_transcript() -> None:
    """Member 3 did upload; what it sent came to nothing, and only its mask secret was opened."""
    kept: list[FromMember] = []

    def late(member: int, message: FromMember) -> FromMember | None:
        if member == 3 and isinstance(message, Signed) and isinstance(message.body, MaskedInput):
            kept.append(message)
            return None
        return message

    simulation = Simulation(5, 1, from_member=late).run()
    assert isinstance(simulation.phase, phases.Released)
    assert kept
    assert 3 not in [m.sender for m in simulation.phase.outcome.transcript.inputs]
    assert isinstance(simulation.phase.outcome.transcript.opened[3], OpenedMaskSecret)
    assert simulation.is_exact()
