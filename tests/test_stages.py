"""Several stages on a real engine with real sites: who goes on when, where each starts, and what people see of it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import participant.daemon
import participant.patience
from coordinator import phases
from coordinator.report import report
from participant.records import Spent
from privacy.audit import audit_release
from privacy.errors import ProtocolError, Refusal, UserError
from privacy.outcome import is_certified
from privacy.secagg.messages import Offer
from tests.on_disk import OnDisk
from tests.staged import assert_released, manifest, released, run_stage, staged


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(participant.patience, "BACKOFF_S", (0.0,))


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


def test_an_offer_of_the_second_stage_names_its_start(world: OnDisk) -> None:
    world.begin(2)
    world.train()
    world.ready()
    _, offer = world.message_for(0)
    assert isinstance(offer, Offer)
    assert (offer.header.stage, offer.header.round) == (2, 1)
    assert offer.header.start.hex() == manifest(world, 1)["adapter_digest"]
