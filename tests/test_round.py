"""The honest path of a round, and every member that may fall silent (protocol sections 4 and 5)."""

from __future__ import annotations

import itertools

import pytest

from coordinator import phases
from privacy.secagg.threshold import threshold
from tests.simulation import STEPS, Simulation


@pytest.mark.parametrize("bits", [16, 20, 24, 32])
@pytest.mark.parametrize(("n", "colluders"), [(3, 0), (3, 1), (5, 1), (8, 2)])
def test_everybody_answers_and_the_total_is_exact(n: int, colluders: int, bits: int) -> None:
    simulation = Simulation(n, colluders, bits=bits, size=101).run()
    assert isinstance(simulation.phase, phases.Released)
    assert simulation.survivors == tuple(range(n))
    assert simulation.is_exact()
    assert not simulation.coordinator_refusals
    assert all(not member.refusals for member in simulation.members.values())


def expected_to_complete(n: int, colluders: int, silent: dict[int, str], minimum: int) -> bool:
    """A round aborts exactly when fewer than max(t, min_survivors) remain where a quorum is needed.

    n is the number that joined; a member silent from M11 on has done all that a total needs.
    """
    joined = n - sum(step == "M1" for step in silent.values())
    if joined < max(minimum, colluders + 2):
        return False
    t = threshold(joined, colluders)
    order = STEPS.index
    left = {step: n - sum(order(s) <= order(step) for s in silent.values()) for step in STEPS}
    return left["M3"] >= max(t, minimum) and left["M5"] >= max(t, minimum) and left["M9"] >= t


def silences(n: int, most: int) -> list[dict[int, str]]:
    """All ways in which up to ``most`` members fall silent, each from some message on."""
    found: list[dict[int, str]] = [{}]
    for count in range(1, most + 1):
        for who in itertools.combinations(range(n), count):
            for when in itertools.product(STEPS, repeat=count):
                found.append(dict(zip(who, when, strict=True)))
    return found


@pytest.mark.parametrize("colluders", [0, 1])
@pytest.mark.parametrize("silent", silences(3, 2), ids=str)
def test_dropouts_of_three(silent: dict[int, str], colluders: int) -> None:
    simulation = Simulation(3, colluders, silent=silent).run()
    complete = expected_to_complete(3, colluders, silent, max(colluders, 1) + 2)
    assert isinstance(simulation.phase, phases.Released) == complete, simulation.phase
    if complete:
        assert simulation.is_exact()


@pytest.mark.parametrize("silent", silences(5, 1), ids=str)
def test_one_loss_of_five_with_one_colluder_completes(silent: dict[int, str]) -> None:
    simulation = Simulation(5, 1, silent=silent).run()
    assert isinstance(simulation.phase, phases.Released), simulation.phase
    assert simulation.is_exact()


@pytest.mark.parametrize("when", [("M3", "M3"), ("M3", "M5"), ("M5", "M5"), ("M5", "M9"), ("M7", "M9")])
def test_two_losses_of_five_with_one_colluder_abort_with_the_reason(when: tuple[str, str]) -> None:
    simulation = Simulation(5, 1, silent=dict(zip((1, 3), when, strict=True))).run()
    assert isinstance(simulation.phase, phases.Aborted)
    assert "expected at least 4 members" in simulation.phase.reason
    assert simulation.total is None
