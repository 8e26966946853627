"""The honest path of a round, and every member that may fall silent (protocol sections 4 and 5)."""

from __future__ import annotations

import random

import pytest

from coordinator import phases
from tests.proofs import CONFIGURATIONS, SILENT_FROM, Pattern, completes, failure, patterns
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
