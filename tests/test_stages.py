"""Several stages on a real engine with real sites: who goes on when, where each starts, what a restart finds."""

from __future__ import annotations

import json
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import participant.daemon
import participant.patience
from coordinator import phases
from coordinator.report import report
from coordinator.store import Event
from coordinator.work import RETRY_S
from participant.fetch import fetch_release, start_of
from participant.records import Spent
from privacy import faults
from privacy.adapter import Tensors, flatten, load_peft, start_adapter, start_digest, trained_part
from privacy.audit import audit_release
from privacy.errors import ProtocolError, Refusal, UserError
from privacy.job import Job
from privacy.outcome import is_certified
from privacy.plan import parse_plan
from privacy.secagg.messages import Offer
from tests.on_disk import OnDisk, full_disk
from tests.test_end_to_end import POLICY, toy_plan


def staged(stages: int, stage_s: int = 100_000) -> bytes:
    """The toy plan with so many stages."""
    raw = toy_plan().replace(b'task = "classification"', b'task = "classification"\nstages = %d' % stages)
    return raw + b"stage_s = %d\n" % stage_s


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(participant.patience, "BACKOFF_S", (0.0,))


def released(world: OnDisk, stage: int) -> Path:
    return world.engine.home.releases / "toy" / f"stage-{stage}"


def manifest(world: OnDisk, stage: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((released(world, stage) / "manifest.json").read_bytes())
    return found


def flat(world: OnDisk, tensors: Tensors) -> NDArray[np.float32]:
    return flatten(trained_part(tensors, world.job.layout), world.job.layout)


def plain_release(world: OnDisk, stage: int) -> NDArray[np.float64]:
    """What the stages up to this one give in plain numpy: start + sum over stages of server_lr * weighted mean."""
    plan = world.job.plan
    found = flat(world, start_adapter(plan.adapter)).astype(np.float64)
    size, qmax = world.job.quantizer.size, world.job.quantizer.qmax
    for number in range(1, stage + 1):
        members = [m for survivors, _ in world.totals(number) for m in survivors]
        vectors = [world.vector_of(m, number).astype(np.int64)[:size] for m in members]
        weight = sum(100 + m for m in members)
        scale = plan.round.clip * plan.round.max_weight / (qmax * weight)
        found = (found + plan.aggregation.server_lr * np.sum(vectors, axis=0) * scale).astype(np.float32)
    return found.astype(np.float64)


def assert_released(world: OnDisk, stage: int) -> None:
    """A stage's release is the plain computation, an audit accepts it, and each site computes the same bits."""
    audit_release(released(world, stage), world.job.roster_file.hash)
    adapter = load_peft(released(world, stage) / "adapter")
    assert np.abs(flat(world, adapter) - plain_release(world, stage)).max() < 1e-6
    for i in range(world.n):
        site = world.site(i)
        assert fetch_release(site, world.daemons[i].client, world.job, stage)
        own = load_peft(site.release_directory("toy", stage) / "adapter")
        assert start_digest(own) == start_digest(adapter)


def run_stage(world: OnDisk, stage: int) -> None:
    """A whole stage with everybody."""
    if stage > 1:
        world.begin(stage)
        world.train()
    world.ready()
    world.run()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[OnDisk]:
    found = OnDisk(tmp_path, plan=staged(2))
    run_stage(found, 1)
    yield found
    found.engine.store.close()


# --- what stages compute ----------------------------------------------------------------------------------------------


def test_three_stages_give_what_plain_numpy_gives(tmp_path: Path) -> None:
    world = OnDisk(tmp_path, plan=staged(3))
    for stage in (1, 2, 3):
        run_stage(world, stage)
        world.assert_exact()
        assert_released(world, stage)
    starts = [manifest(world, stage)["start"]["digest"] for stage in (1, 2, 3)]
    assert starts[0] == world.job.plan.adapter.digest
    assert starts[1:] == [manifest(world, stage)["adapter_digest"] for stage in (1, 2)]
    assert len(set(starts)) == 3
    assert [cohort["round"] for cohort in manifest(world, 3)["start"]["cohorts"]] == [1]
    assert [cohort["total"] for cohort in manifest(world, 3)["start"]["cohorts"]] == [
        cohort["total"] for cohort in manifest(world, 2)["cohorts"]
    ]
    world.wait(1e6)
    assert world.engine.stage(world.digest) == 3


def test_each_stage_is_spent_once_and_only_once(world: OnDisk) -> None:
    run_stage(world, 2)
    for i in range(5):
        spent = [r for r in world.records(i) if isinstance(r, Spent)]
        assert [r.header.stage for r in spent] == [1, 2]
        assert spent[0].vector != spent[1].vector
    with pytest.raises(Refusal, match="'site-0' is in a release of this stage already"):
        world.engine.ready(world.digest, 2, 0)


def test_two_cohorts_of_a_stage_are_both_in_the_next_start(tmp_path: Path) -> None:
    world = OnDisk(tmp_path, 8, staged(2))
    run_stage(world, 1)
    world.wait(1)
    world.run()
    assert len(world.rounds) == 2
    run_stage(world, 2)
    assert [cohort["round"] for cohort in manifest(world, 2)["start"]["cohorts"]] == [1, 2]
    assert_released(world, 1)
    assert_released(world, 2)


def test_a_late_member_joins_at_the_second_stage_and_computes_the_first_by_itself(tmp_path: Path) -> None:
    world = OnDisk(tmp_path, plan=staged(2, stage_s=5000))
    world.ready(0, 1, 2, 3)
    world.wait(10)
    world.run()
    world.begin(2)
    world.train()
    world.ready()
    world.run()
    assert [survivors for survivors, _ in world.totals(1)] == [(0, 1, 2, 3)]
    assert [survivors for survivors, _ in world.totals(2)] == [(0, 1, 2, 3, 4)]
    assert_released(world, 2)
    assert not any(isinstance(r, Spent) and r.header.stage == 1 for r in world.records(4))


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[set[int], int | None, bool]]:
    """Of two or three stages: who is there, who of five falls silent before its upload, and is C restarted."""
    stages = []
    for _ in range(draw(st.integers(2, 3))):
        late = draw(st.none() | st.integers(0, 4))
        silent = draw(st.none() | st.integers(0, 4)) if late is None else None
        stages.append((set(range(5)) - {late}, silent, draw(st.booleans())))
    return stages


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(history=histories(), phase=st.sampled_from([phases.Sharing, phases.Uploading]), restarted=st.integers(0, 4))
def test_whoever_is_late_or_lost_in_a_stage_is_in_the_next(
    history: list[tuple[set[int], int | None, bool]], phase: type, restarted: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        world = OnDisk(Path(directory), plan=staged(len(history), stage_s=5000))
        for stage, (present, silent, restart) in enumerate(history, 1):
            if stage > 1:
                world.begin(stage)
                world.train(*present)
            if restart:
                world.open()
                world.restart(restarted)
            world.ready(*present)
            world.wait(10)
            world.run(phase)
            world.away = set() if silent is None else {silent}
            world.run()
            world.away = set()
            assert world.totals(stage)[0][0] == tuple(sorted(present - {silent}))
        world.assert_exact()
        for stage in range(1, len(history) + 1):
            assert_released(world, stage)
        world.engine.store.close()


# --- when a stage closes ----------------------------------------------------------------------------------------------


def test_a_stage_closes_when_everybody_is_in_its_release(world: OnDisk) -> None:
    world.wait(1)
    assert world.work()
    assert world.engine.stage(world.digest) == 2


def test_a_stage_waits_for_late_members_and_no_longer_than_the_plan_says(tmp_path: Path) -> None:
    world = OnDisk(tmp_path, plan=staged(2, stage_s=5000))
    world.ready(0, 1, 2, 3)
    world.wait(10)
    world.run()
    first = world.engine.store.first_release(world.digest, 1)
    assert first is not None
    world.wait(first + 4990 - world.engine.clock())
    assert not world.engine.store.stages(world.digest)
    world.wait(20)
    assert list(world.engine.store.stages(world.digest)) == [2]


def test_a_stage_with_a_running_round_stays_open(tmp_path: Path) -> None:
    world = OnDisk(tmp_path, 8, staged(2, stage_s=1))
    world.ready(0, 1, 2, 3)
    world.wait(10)
    world.run()
    world.ready(4, 5, 6, 7)
    assert len(world.rounds) == 2
    assert not world.engine.store.stages(world.digest)
    world.run()
    world.wait(2)
    (row,) = world.engine.store.stages(world.digest).values()
    assert [round_id for round_id, _ in row.cohorts] == [r.row.id for r in world.rounds]


def test_a_closed_stage_takes_nobody_any_more(tmp_path: Path) -> None:
    world = OnDisk(tmp_path, plan=staged(2, stage_s=5000))
    world.ready(0, 1, 2, 3)
    world.wait(10)
    world.run()
    with pytest.raises(Refusal, match=r"expected stage 1 of plan 'toy', found 2$"):
        world.engine.ready(world.digest, 2, 4)
    world.wait(10_000)
    assert world.engine.stage(world.digest) == 1  # its start is not computed yet
    with pytest.raises(Refusal, match="expected stage 1 of plan 'toy', found 1, which is closed"):
        world.engine.ready(world.digest, 1, 4)
    world.begin(2)
    with pytest.raises(Refusal, match="expected stage 2 of plan 'toy', found 1, which is closed"):
        world.engine.ready(world.digest, 1, 4)


def test_a_total_without_certificate_is_left_out_of_the_next_start_and_of_the_release(tmp_path: Path) -> None:
    """One survivor of the second cohort falls silent before M11: its blocks lack a signer."""
    world = OnDisk(tmp_path, 8, staged(2, stage_s=5000))
    run_stage(world, 1)
    world.wait(1)
    world.run(phases.Unmasking)
    silent = world.rounds[-1].row.invited[0]
    while not isinstance(world.phase, phases.Confirming):
        for i in range(8):
            world.tell(i)
        world.work()
    world.away = {silent}
    world.run()
    world.away = set()
    assert isinstance(world.phase, phases.Released)
    assert not is_certified(world.job, world.phase.votes.values())
    first = world.rounds[0].machine.phase.closed.survivors  # type: ignore[union-attr]
    run_stage(world, 2)
    assert [survivors for survivors, _ in world.totals(1)] == [first]
    assert [c["round"] for c in manifest(world, 1)["cohorts"]] == [1]
    assert [c["round"] for c in manifest(world, 2)["start"]["cohorts"]] == [1]
    assert_released(world, 1)
    assert_released(world, 2)


def test_without_any_certificate_the_next_stage_does_not_begin(tmp_path: Path) -> None:
    world = OnDisk(tmp_path, plan=staged(2))
    world.ready()
    world.run(phases.Unmasking)
    while not isinstance(world.phase, phases.Confirming):
        for i in range(5):
            world.tell(i)
        world.work()
    world.away = {0}
    world.run()
    while world.work():
        pass
    world.wait(1e6)
    assert not world.engine.store.stages(world.digest)
    assert "no total of stage 1 is certified: stage 2 must wait" in report(world.engine, "")


# --- restarts ---------------------------------------------------------------------------------------------------------


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
    with pytest.raises(UserError, match=r"expected the adapter .*, found another"):
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
    assert daemon._consider(offered) == "released"
    assert daemon.site.notes()["toy"]["reason"].endswith("stage-1/adapter")
    world.wait(1e6)
    assert world.engine.beginning() is None


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


# --- what people see --------------------------------------------------------------------------------------------------


def test_the_report_lists_the_stages(world: OnDisk) -> None:
    world.begin(2)
    world.train()
    world.ready(0, 1)
    found = json.loads(report(world.engine, "toy"))
    assert (found["stage"], found["stages"], found["ready"], found["released"]) == (2, 2, ["site-0", "site-1"], [])
    assert [(s["stage"], s["closed"], len(s["released"])) for s in found["history"]] == [(1, True, 5), (2, False, 0)]
    assert found["history"][1]["start"] == manifest(world, 1)["adapter_digest"]
    assert found["release"]["stage"] == 1
    assert [(r["stage"], r["round"]) for r in found["rounds"]] == [(1, 1)]


def test_an_auditor_needs_the_stages_before_and_believes_none_of_them(world: OnDisk, tmp_path: Path) -> None:
    run_stage(world, 2)
    directory, pin = released(world, 2), world.job.roster_file.hash
    found = audit_release(directory, pin)
    assert found.facts["start"] == manifest(world, 2)["start"]
    path = directory / "manifest.json"
    path.write_text(json.dumps(manifest(world, 2) | {"start": manifest(world, 1)["start"]}))
    with pytest.raises(ProtocolError, match="names another start"):
        audit_release(directory, pin)
    total = released(world, 1) / "rounds" / "1" / "total.bin"
    kept = total.read_bytes()
    total.write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
    with pytest.raises(ProtocolError, match="does not have the root"):
        audit_release(directory, pin)
    released(world, 1).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="expected the release that stage 2 starts from, found none"):
        audit_release(directory, pin)
    directory.rename(directory.with_name("stage-3"))
    with pytest.raises(UserError, match="expected a directory named stage-K, K from 1 to 2"):
        audit_release(directory.with_name("stage-3"), pin)


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 16])
def test_a_plan_has_one_to_sixteen_stages(stages: int) -> None:
    assert parse_plan(staged(stages)).plan.stages == stages


@pytest.mark.parametrize("stages", [0, 17])
def test_another_number_of_stages_is_refused(stages: int) -> None:
    with pytest.raises(UserError, match="'stages'"):
        parse_plan(staged(stages))


def test_several_stages_demand_the_divided_audit() -> None:
    for audit in (b"spot", b"none"):
        raw = staged(2).replace(b"bits = 24", b'bits = 24\naudit = "%s"' % audit)
        with pytest.raises(UserError, match=f'expected "divided" with 2 stages, found "{audit.decode()}"'):
            parse_plan(raw)
        parse_plan(raw.replace(b"stages = 2", b"stages = 1"))


def test_a_job_has_as_many_trainings_as_stages_are_left(tmp_path: Path) -> None:
    world = OnDisk(tmp_path, plan=staged(3))
    job: Job = world.job
    assert [job.plan.trainings_from(stage) for stage in (1, 2, 3)] == [3, 2, 1]
    assert isinstance(world.engine.start(world.digest, 1), bytes)


def test_an_offer_of_the_second_stage_names_its_start(world: OnDisk) -> None:
    world.begin(2)
    world.train()
    world.ready()
    _, offer = world.message_for(0)
    assert isinstance(offer, Offer)
    assert (offer.header.stage, offer.header.round) == (2, 1)
    assert offer.header.start.hex() == manifest(world, 1)["adapter_digest"]
