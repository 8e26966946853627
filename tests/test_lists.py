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
from tests.test_end_to_end import POLICY, toy_plan


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


A, B, REST = (0, 1, 2), (3, 4, 5), (6, 7, 8)


@pytest.mark.parametrize(
    ("bonds", "away", "before", "expected"),
    [
        ([], (), [], (0, 1, 2)),
        ([A], (), [A], (3, 4, 5)),
        ([A], (), [A, B], A),  # both were offered; it is its turn
        ([A], (0,), [A, B], (3, 4, 5)),  # nobody of a list is put among others
        ([A, B], (), [A, B], REST),
        ([A, B], (), [A, B, REST], A),
        ([A, B], (), [A, B, REST, A], B),
        ([A, B], (), [A, B, REST, A, B], REST),  # two lists with a silent member each do not keep it out
        ([A, B], (6,), [A, B, REST, A, B], A),
        ([A, B], (1, 4, 6), [A, B], None),
    ],
)
def test_lists_and_others_take_turns(
    bonds: list[tuple[int, ...]],
    away: tuple[int, ...],
    before: list[tuple[int, ...]],
    expected: tuple[int, ...] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = [m for m in range(9) if m not in away]
    job = mock.Mock(rules=Rules(3, 1, 3, 3, 24))
    job.roster.members, job.plan.deadlines.join_s = range(9), 0.0
    engine = mock.Mock(jobs={b"x": job}, clock=lambda: 9.0)
    engine.done.return_value = set()
    engine.store.ready.return_value = dict.fromkeys(there, 0.0)
    monkeypatch.setattr(coordinator.engine, "open_bonds", lambda *_: bonds)
    rounds: Any = [mock.Mock(row=mock.Mock(invited=invited)) for invited in before]
    assert Engine._cohort(engine, b"x", 1, rounds, there) == expected


def test_a_silent_member_in_each_of_two_lists_costs_nobody_else_the_release(tmp_path: Path) -> None:
    """Nine sites in cohorts of three, two of which never release their shares."""
    plan = toy_plan().replace(b"min_cohort = 4", b"min_cohort = 3").replace(b"max_cohort = 5", b"max_cohort = 3")
    policy: dict[str, object] = {**POLICY, "min_cohort": 3}
    world = OnDisk(tmp_path, 9, plan, policy)
    world.ready()
    mute = {0, 3}
    for _ in range(400):
        held = {i for i in mute if world.rounds and isinstance(world.phase, phases.Unmasking)}
        moved = [world.tell(i) for i in range(world.n) if i not in held]
        moved += [world.work() for _ in range(3)]
        if any(r.row.state == "released" for r in world.rounds):
            break
        if not any(moved):
            world.wait(3600.0)
    assert [survivors for survivors, _ in world.totals()] == [REST]
    world.engine.store.close()
