"""Between the stages of a plan and in them: either end is killed, or was away, and what it finds when it is back."""

from __future__ import annotations

import json
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import participant.daemon
import participant.patience
from coordinator import phases
from coordinator.engine import Engine
from coordinator.report import report
from coordinator.store import Event
from coordinator.work import RETRY_S, Worker
from participant.fetch import start_of
from privacy import faults
from privacy.errors import ProtocolError, UserError
from tests.on_disk import OnDisk, full_disk
from tests.staged import assert_released, run_stage, staged
from tests.test_end_to_end import POLICY


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(participant.patience, "BACKOFF_S", (0.0,))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[OnDisk]:
    found = OnDisk(tmp_path, plan=staged(2))
    run_stage(found, 1)
    yield found
    found.engine.store.close()


def test_the_coordinator_goes_on_in_the_second_stage_after_a_restart(world: OnDisk) -> None:
    run_stage(world, 2)
    before = [(r.row.id, type(r.machine.phase)) for r in world.rounds]
    world.open()
    assert world.engine.stage(world.digest) == 2
    assert [(r.row.id, type(r.machine.phase)) for r in world.rounds] == before
    assert_released(world, 2)


def test_a_restart_between_the_closing_and_the_start_computes_the_start_again(world: OnDisk) -> None:
    world.wait(1)
    assert world.engine.beginning() is not None
    world.open()
    (row,) = world.engine.store.stages(world.digest).values()
    assert row.start is None
    run_stage(world, 2)
    assert_released(world, 2)


def test_a_power_cut_after_every_event_of_the_second_stage_loses_nothing(tmp_path: Path) -> None:
    plan = staged(2).replace(b"min_cohort = 4", b"min_cohort = 3")
    world = OnDisk(tmp_path, 3, plan, {**POLICY, "min_cohort": 3})
    run_stage(world, 1)
    world.begin(2)
    world.train()
    kinds: list[str] = []

    def cut(event: Event) -> bool:
        kinds.append(event.kind)
        return True

    world.cut = cut
    world.ready()
    world.run()
    world.cut = lambda _event: False
    world.run()
    assert isinstance(world.phase, phases.Released)
    assert {"proofs", "message", "sum", "publish"} <= set(kinds)
    assert world.engine.stage(world.digest) == 2
    while world.work():
        pass
    world.assert_exact()
    assert_released(world, 2)


class Killed(BaseException):
    """The process ends at a fault point."""


def killed_at_every_point(step: Callable[[], object], again: Callable[[], object], patch: pytest.MonkeyPatch) -> int:
    """Run a step, killed once at each fault point that it passes, until it comes through; how often it was killed."""
    seen: set[tuple[str, ...]] = set()

    def point(action: str, where: str | Path = "") -> None:
        called = [frame.name for frame in traceback.extract_stack()]
        key = (faults.name_of(action, where), *called)
        if key not in seen:
            seen.add(key)
            raise Killed

    for kills in range(200):
        with patch.context() as faulty:
            faulty.setattr(faults, "point", point)
            try:
                step()
            except Killed:
                pass
            else:
                return kills
        again()
    raise AssertionError("it never came through")


def test_a_coordinator_killed_at_any_point_between_two_stages_begins_the_second_once(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step() -> None:
        world.wait(1)
        while world.work():
            pass

    kills = killed_at_every_point(step, world.open, monkeypatch)
    assert kills >= 4  # before and after the row that closes a stage, and the one that begins the next
    assert world.engine.stage(world.digest) == 2
    assert len(world.engine.store.stages(world.digest)) == 1
    run_stage(world, 2)
    assert_released(world, 2)


def test_a_site_killed_at_any_point_while_it_computes_a_start_computes_the_same_again(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.begin(2)

    def step() -> None:
        start_of(world.site(0), world.daemons[0].client, world.job, 2)

    kills = killed_at_every_point(step, lambda: world.restart(0), monkeypatch)
    assert kills >= 8  # release and its note, start and its note, each before and after it is there
    world.train()
    assert len({world.site(i).start_digest(world.job, 2) for i in range(5)}) == 1
    world.ready()
    world.run()
    assert_released(world, 2)


def test_a_site_that_restarts_finds_its_start_and_asks_nobody_for_it(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.begin(2)
    world.train()
    digest = world.site(1).start_digest(world.job, 2)
    world.restart(1)
    monkeypatch.setattr(world.daemons[1].client, "releases", None)
    assert start_of(world.site(1), world.daemons[1].client, world.job, 2).digest == digest
    world.ready()
    world.run()
    assert_released_by(world, 1, digest)


def assert_released_by(world: OnDisk, member: int, start: bytes) -> None:
    assert member in world.totals(2)[0][0]
    assert world.rounds[-1].machine.context.header.start == start


def test_a_damaged_start_is_noticed_and_computed_again_once_it_is_gone(world: OnDisk) -> None:
    world.begin(2)
    world.train()
    place = world.site(0).store.directory("toy", 2) / "start"
    weights = place / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"expected the start .*, found another"):
        start_of(world.site(0), world.daemons[0].client, world.job, 2)
    for path in place.iterdir():
        path.unlink()
    place.rmdir()
    start = start_of(world.site(0), world.daemons[0].client, world.job, 2)
    assert start.digest == world.site(1).start_digest(world.job, 2)


def test_a_plan_that_is_cancelled_in_its_second_stage_leaves_the_release_of_the_first(world: OnDisk) -> None:
    world.begin(2)
    world.train(0)
    world.engine.cancel_plan("toy", "enough")
    daemon = world.daemons[0]
    (offered,) = daemon.client.plans()
    assert (offered.state, offered.stage) == ("cancelled", 2)
    assert daemon._consider(offered) == "cancelled", "no release of the whole plan"
    note = daemon.site.notes()["toy"]
    assert note["reason"].startswith("enough; the release of stage 1 of 2 stays: ")
    assert note["reason"].endswith("stage-1/adapter")
    assert note["cause"] == "cancelled"
    world.wait(1e6)
    assert world.engine.beginning() is None


def test_a_stage_that_cannot_begin_keeps_no_other_plan_waiting() -> None:
    engine, rows = mock.MagicMock(), {digest: mock.Mock(start=None, stage=2) for digest in (b"a", b"b")}
    engine.lock, engine.clock = threading.RLock(), lambda: 10.0
    engine.store.plans.return_value = [mock.Mock(digest=digest, state="released") for digest in rows]
    engine.store.stages = lambda digest: {2: rows[digest]}
    engine.beginning = lambda but=(): Engine.beginning(engine, but)
    worker, begun = Worker(engine), list[bytes]()

    def begin(digest: bytes, row: Any) -> None:
        begun.append(digest)
        if digest == b"a":
            raise ProtocolError("its total is damaged")
        row.start = b"computed"

    with mock.patch.object(worker, "_begin", begin):
        assert [worker._work_on_stage() for _ in range(4)] == [True, True, False, False]
        assert begun == [b"a", b"b"]
        engine.clock = lambda: 10.0 + RETRY_S
        assert worker._work_on_stage()
    assert begun == [b"a", b"b", b"a"]


def test_a_stage_of_a_cancelled_plan_does_not_begin(world: OnDisk) -> None:
    world.wait(1)
    assert world.engine.beginning() is not None
    world.engine.cancel_plan("toy", "enough")
    assert world.engine.beginning() is None
    assert not world.work()


def test_a_daemon_that_was_late_goes_on_with_the_stage_that_is_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits in stage 1, hears nothing, and finds that the plan is in stage 2 now."""
    world = OnDisk(tmp_path, plan=staged(2, stage_s=5000))
    world.ready(0, 1, 2, 3)
    world.wait(10)
    world.run()
    monkeypatch.setattr(participant.daemon, "prepare", lambda *_: None)
    daemon = world.daemons[4]
    seen: list[int] = []

    def silent(_plan: bytes, stage: int, _seen: bytes) -> None:
        seen.append(stage)
        if len(seen) == 1:
            world.begin(2)
        elif len(seen) == 2:
            world.engine.cancel_plan("toy", "enough")

    monkeypatch.setattr(daemon.client, "next", silent)
    states = [daemon._consider(daemon.client.plans()[0]) for _ in range(2)]
    assert seen == [1, 2]
    assert states[0] == "waiting"
    assert world.site(4).stage_begun(world.job) == 2
    assert json.loads(report(world.engine, "toy"))["ready"] == ["site-4"]


@pytest.mark.parametrize("full", [True, False])
def test_a_stage_that_cannot_begin_says_why_and_is_tried_again(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """The disk is full, or a total on it was damaged."""
    world.wait(1)
    total = world.engine.store.total(world.rounds[0].row.id)
    content = total.read_bytes()
    if full:
        full_disk(monkeypatch, "before-commit:stages")
    else:
        total.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert world.work()
    total.write_bytes(content)
    assert world.engine.stage(world.digest) == 1
    said = "state.db: expected to write" if full else "M10: the total fetched does not have the root"
    assert f"stage 2 cannot begin: {said}" in report(world.engine, "")
    assert not world.work()
    world.wait(RETRY_S + 1)
    assert world.work()
    assert world.engine.stage(world.digest) == 2
    assert world.engine.held[world.digest] == ""
