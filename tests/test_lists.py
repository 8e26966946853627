"""Certified survivor lists that lost their total, at the coordinator: each comes again, whole, and keeps nobody out."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import coordinator.engine
import participant.patience
from coordinator import phases
from coordinator.engine import Engine
from privacy.roster import Rules
from tests.on_disk import OnDisk
from tests.test_end_to_end import toy_plan


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(participant.patience, "BACKOFF_S", (0.0,))


def test_a_certified_list_smaller_than_a_cohort_gets_its_total(tmp_path: Path) -> None:
    """One of five is lost, two of the other four restart before they release; the four come again, and alone."""
    world = OnDisk(tmp_path, 7, toy_plan().replace(b"min_cohort = 4", b"min_cohort = 5"))
    world.ready()
    world.run(phases.Uploading)
    lost = world.rounds[-1].row.invited[-1]
    world.away = {lost}
    world.run(phases.Unmasking)
    assert isinstance(world.phase, phases.Unmasking)
    listed = world.phase.closed.survivors
    assert len(listed) == 4
    world.away = {lost, *listed[:2]}
    world.run()
    assert isinstance(world.phase, phases.Aborted)
    for member in listed[:2]:
        world.restart(member)
    world.away = set()
    world.run(phases.Released)
    assert world.rounds[-1].row.invited == listed
    assert [survivors for survivors, _ in world.totals()] == [listed]
    world.assert_exact()
    world.engine.store.close()


@pytest.mark.parametrize(
    ("bonds", "away", "last", "expected"),
    [
        ([(0, 1, 2)], (), (), (0, 1, 2)),
        ([(0, 1, 2)], (2,), (), (5, 6, 7)),  # nobody of the list is put among others
        ([(0, 1, 2)], (), (0, 1, 2), (5, 6, 7)),  # it failed just now
        ([(0, 1, 2)], (), (5, 6, 7), (0, 1, 2)),
        ([(0, 1, 2), (5, 6, 7)], (), (), (0, 1, 2)),
        ([(0, 1, 2), (5, 6, 7)], (), (0, 1, 2), (5, 6, 7)),
        ([(0, 1, 2), (5, 6, 7)], (0, 5), (), None),
        ([(0, 1, 2), (5, 6, 7)], (0,), (5, 6, 7), (5, 6, 7)),  # there is no other
    ],
)
def test_lists_and_others_take_turns(
    bonds: list[tuple[int, ...]],
    away: tuple[int, ...],
    last: tuple[int, ...],
    expected: tuple[int, ...] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two lists without totals and others that are free: each is offered whole, and whoever failed last waits."""
    there = [m for m in (0, 1, 2, 5, 6, 7) if m not in away]
    job = mock.Mock(rules=Rules(3, 1, 3, 3, 24))
    job.roster.members, job.plan.deadlines.join_s = range(6), 0.0
    engine = mock.Mock(jobs={b"x": job}, clock=lambda: 9.0)
    engine.done.return_value = set()
    engine.store.ready.return_value = dict.fromkeys(there, 0.0)
    monkeypatch.setattr(coordinator.engine, "open_bonds", lambda *_: bonds)
    rounds: Any = [mock.Mock(row=mock.Mock(invited=last))]
    assert Engine._cohort(engine, b"x", 1, rounds, there) == expected
