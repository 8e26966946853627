"""A coordinator that lies about stages: about where one starts, which is on, and what was released before it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import participant.daemon
import participant.patience
from coordinator import phases
from participant.client import OfferedPlan, ReleasedCohort
from participant.fetch import start_of
from participant.prepare import prepare
from participant.records import Joined, Spent
from participant.running import join
from privacy.errors import ProtocolError, Refusal
from privacy.job import Job
from privacy.plan import parse_plan
from privacy.secagg import transcript
from privacy.secagg.messages import Header, Offer
from tests.on_disk import Direct, OnDisk
from tests.staged import run_stage, staged

Show = Callable[..., None]
ROUND = b"2" * 32


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnDisk]:
    """Everybody is in the release of stage 1; stage 2 is about to begin."""
    monkeypatch.setattr(participant.patience, "BACKOFF_S", (0.0,))
    found = OnDisk(tmp_path, plan=staged(2))
    run_stage(found, 1)
    found.begin(2)
    yield found
    found.engine.store.close()


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Show:
    """Show sites these cohorts of stage 1 and nothing else."""

    def shown(*cohorts: ReleasedCohort, to: Any = None) -> None:
        honest = Direct.releases

        def releases(client: Direct, plan: bytes, stage: int) -> list[ReleasedCohort]:
            lie = stage == 1 and (to is None or client.me in to)
            return list(cohorts) if lie else honest(client, plan, stage)

        monkeypatch.setattr(Direct, "releases", releases)

    return shown


def cohorts_of(world: OnDisk) -> list[ReleasedCohort]:
    return [ReleasedCohort(c.round_id, 1, c.evidence) for c in world.engine.released(world.digest, 1)]


def begin_at(world: OnDisk, member: int) -> None:
    start_of(world.site(member), world.daemons[member].client, world.job, 2)


def assert_not_begun(world: OnDisk, member: int) -> None:
    """Nothing of stage 2 is settled at this site, and it takes part in no round of it."""
    assert world.site(member).stage_begun(world.job) == 1
    with pytest.raises(Refusal, match="has not computed where stage 2 of plan 'toy' starts"):
        world.site(member).start_digest(world.job, 2)
    offer = Offer(world.job.header(2, 1, world.engine.start(world.digest, 2)), ())
    with pytest.raises(Refusal, match="has not computed where stage 2"):
        join(world.site(member), world.daemons[member].client, world.job, 2, ROUND, offer)


# --- what a stage starts from -----------------------------------------------------------------------------------------


def test_a_stage_that_starts_from_a_total_without_certificate_is_refused(world: OnDisk, show: Show) -> None:
    """Without c + 1 signers for each block the coordinator could have invented the total, and so the model."""
    (cohort,) = cohorts_of(world)
    show(replace(cohort, evidence=replace(cohort.evidence, votes=cohort.evidence.votes[:1], projection=())))
    with pytest.raises(ProtocolError, match="round 1 has no outcome certificate: no stage starts from its total"):
        begin_at(world, 0)
    assert_not_begun(world, 0)


def test_an_invented_total_has_no_signatures_that_fit(world: OnDisk, show: Show) -> None:
    (cohort,) = cohorts_of(world)
    outcome = replace(cohort.evidence.outcome, root=b"9" * 32)
    t2 = transcript.verify_transcript(world.job.context(outcome.transcript.header), outcome.transcript).t2
    invented = replace(outcome, total=transcript.total_hash(t2, outcome.root))
    show(replace(cohort, evidence=replace(cohort.evidence, outcome=invented)))
    with pytest.raises(ProtocolError, match="does not have the root that the outcome names"):
        begin_at(world, 0)
    assert_not_begun(world, 0)


def test_a_total_other_than_the_signed_one_is_refused(
    world: OnDisk, show: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    show(*cohorts_of(world))
    fetch = Direct.fetch_total

    def changed(client: Direct, round_id: bytes, length: int, target: Path) -> None:
        fetch(client, round_id, length, target)
        target.write_bytes(bytes([target.read_bytes()[0] ^ 1]) + target.read_bytes()[1:])

    monkeypatch.setattr(Direct, "fetch_total", changed)
    with pytest.raises(ProtocolError, match="does not have the root that the outcome names"):
        begin_at(world, 0)
    assert_not_begun(world, 0)


def test_a_stage_without_any_release_before_it_is_refused(world: OnDisk, show: Show) -> None:
    show()
    with pytest.raises(ProtocolError, match="expected disjoint cohorts in a release, found a member twice or none"):
        begin_at(world, 0)
    assert_not_begun(world, 0)


def test_one_cohort_that_is_shown_twice_is_refused(world: OnDisk, show: Show) -> None:
    show(*cohorts_of(world) * 2)
    with pytest.raises(ProtocolError, match="expected each round once"):
        begin_at(world, 0)
    assert_not_begun(world, 0)


def test_sites_that_were_shown_other_cohorts_take_part_in_no_round_together(
    tmp_path: Path, show: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator would learn how one model trains at some sites and another at the rest; no sum comes of it."""
    monkeypatch.setattr(participant.patience, "BACKOFF_S", (0.0,))
    world = OnDisk(tmp_path, 8, staged(2))
    run_stage(world, 1)
    world.wait(1)
    world.run()
    world.begin(2)
    first, _ = cohorts_of(world)
    show(first, to={3, 4, 5, 6, 7})
    world.train()
    starts = [world.site(i).start_digest(world.job, 2) for i in range(8)]
    assert len(set(starts)) == 2
    world.ready(0, 1, 2, 3, 4, 5, 6, 7)
    for i in range(8):
        world.tell(i)
    world.wait(10)
    aborted = world.rounds[0].machine.phase
    assert isinstance(aborted, phases.Aborted)
    assert aborted.reason.startswith("expected at least 4 members to join, found")
    joined = [i for i in range(8) if any(isinstance(r, Joined) and r.header.stage == 2 for r in world.records(i))]
    assert set(joined) <= {0, 1, 2}
    assert not any(isinstance(r, Spent) and r.header.stage == 2 for i in range(8) for r in world.records(i))


def test_a_site_starts_no_stage_a_second_time_from_other_totals(
    tmp_path: Path, show: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(participant.patience, "BACKOFF_S", (0.0,))
    world = OnDisk(tmp_path, 8, staged(2))
    run_stage(world, 1)
    world.wait(1)
    world.run()
    world.begin(2)
    begin_at(world, 0)
    digest = world.site(0).start_digest(world.job, 2)
    show(cohorts_of(world)[0])
    begin_at(world, 0)  # what is here is not asked for again
    shutil.rmtree(world.site(0).store.directory("toy", 2) / "start")
    with pytest.raises(Refusal, match=r"stage 2 of plan 'toy' started here at .*; the coordinator now shows"):
        begin_at(world, 0)
    assert world.site(0).start_digest(world.job, 2) == digest


# --- headers of other stages ------------------------------------------------------------------------------------------


@pytest.fixture
def trained(world: OnDisk) -> OnDisk:
    world.train()
    return world


def offered(world: OnDisk, header: Header, stage: int = 2) -> None:
    join(world.site(0), world.daemons[0].client, world.job, stage, ROUND, Offer(header, ()))


def test_the_header_of_the_first_stage_is_none_of_the_second(trained: OnDisk) -> None:
    first = trained.engine.stage_rounds(trained.digest, 1)[0].machine.context.header
    second = trained.job.header(2, 1, trained.engine.start(trained.digest, 2))
    for header, said in (
        (first, "expected stage 2, found 1"),
        (replace(first, stage=2), "expected start"),
        (replace(first, start=second.start), "expected stage 2, found 1"),
        (replace(second, start=bytes(32)), "expected start"),
    ):
        with pytest.raises(Refusal, match=f"M0: {said}"):
            offered(trained, header)
    before = len(trained.sent(0))
    offered(trained, second)
    assert len(trained.sent(0)) == before + 1


def test_nobody_goes_back_to_a_stage_that_is_over(tmp_path: Path) -> None:
    """Member 4 was late for stage 1 and began stage 2: its delta of stage 1 stays where it is."""
    world = OnDisk(tmp_path, plan=staged(2, stage_s=5000))
    world.ready(0, 1, 2, 3)
    world.wait(10)
    world.run()
    world.begin(2)
    world.train()
    offer = Offer(world.job.header(1, 2, bytes.fromhex(world.job.plan.adapter.digest)), ())
    with pytest.raises(Refusal, match="M0: stage 2 of plan 'toy' has begun here: stage 1 is over"):
        join(world.site(4), world.daemons[4].client, world.job, 1, ROUND, offer)


def test_a_delta_of_the_second_stage_is_spent_whatever_start_the_coordinator_names_then(trained: OnDisk) -> None:
    world = trained
    world.ready()
    world.run(phases.Signing)
    world.away = set(range(5))
    world.run()
    assert isinstance(world.phase, phases.Aborted)
    world.restart(0)
    header = world.job.header(2, 2, world.engine.start(world.digest, 2))
    with pytest.raises(Refusal, match="the delta was spent in round 1; expected a proof about that round"):
        offered(world, header)
    world.put_vector(0, world.vector_of(0, 1), stage=2)
    with pytest.raises(Refusal, match="a retrained delta is never masked"):
        offered(world, header)


def test_a_delta_that_was_trained_from_another_start_is_neither_masked_nor_trained_again(trained: OnDisk) -> None:
    """Files of a backup beside records that are newer: what lies here is not what this stage is about."""
    world, site = trained, trained.site(0)
    header = world.job.header(2, 1, world.engine.start(world.digest, 2))
    start = start_of(site, world.daemons[0].client, world.job, 2)
    for other in ("9" * 64, ""):
        kept = site.store.trained("toy", 2)
        assert kept is not None
        site.store.keep_trained("toy", 2, world.vector_of(0, 2), replace(kept, start=other))
        with pytest.raises(Refusal, match="the delta of stage 2 that lies here was trained from another start adapter"):
            offered(world, header)
    world.restart(0)
    world.put_vector(0, world.vector_of(0, 2), stage=2)
    world.ready()
    world.run(phases.Signing)
    kept = site.store.trained("toy", 2)
    assert kept is not None
    site.store.keep_trained("toy", 2, world.vector_of(0, 2), replace(kept, start="9" * 64))
    with pytest.raises(Refusal, match="the delta of plan 'toy' is spent under another start adapter"):
        prepare(world.site(0), world.job, 2, None, start)


def test_another_plan_file_of_the_name_does_not_free_a_spent_stage(trained: OnDisk) -> None:
    world = trained
    world.ready()
    world.run(phases.Signing)
    world.restart(0)
    job = Job.of(parse_plan(staged(2) + b"\n# a comment\n"), world.engine.roster)
    site = world.site(0)
    assert site.stage_begun(job) == 1
    assert len(site.spent(job, 2)) == 1
    with pytest.raises(Refusal, match="spent under another plan file"):
        prepare(site, job, 1)
    with pytest.raises(Refusal, match="has not computed where stage 2"):
        join(site, world.daemons[0].client, job, 2, ROUND, Offer(job.header(2, 2, bytes(32)), ()))


# --- announcements ----------------------------------------------------------------------------------------------------


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stages for which a site was about to train."""
    found: list[int] = []

    def train(_site: Any, _job: Job, stage: int, *_: object) -> None:
        found.append(stage)
        raise Refusal("this test trains nothing")

    monkeypatch.setattr(participant.daemon, "prepare", train)
    return found


def announce(world: OnDisk, stage: int, member: int = 0) -> str:
    """What a site's daemon makes of a plan that is said to be in this stage."""
    daemon = world.daemons[member]
    daemon._consider(OfferedPlan(world.plan, "released", "", stage))
    return str(daemon.site.notes()["toy"]["reason"])


@pytest.mark.parametrize("stage", [0, 3, 2**63])
def test_a_stage_that_the_plan_does_not_have_is_refused(world: OnDisk, trainings: list[int], stage: int) -> None:
    assert f"expected a stage from 1 to 2, found {stage} at the coordinator" in announce(world, stage)
    assert trainings == []


def test_an_announced_stage_is_trained_only_from_a_certified_start(
    world: OnDisk, show: Show, trainings: list[int]
) -> None:
    (cohort,) = cohorts_of(world)
    show(replace(cohort, evidence=replace(cohort.evidence, votes=(), projection=())), to={0})
    assert "no outcome certificate" in announce(world, 2)
    assert trainings == []
    assert announce(world, 2, member=1) == "this test trains nothing"
    assert trainings == [2]


def test_a_coordinator_that_announces_an_earlier_stage_again_is_refused(trained: OnDisk, trainings: list[int]) -> None:
    assert "expected a stage from 2 to 2, found 1 at the coordinator" in announce(trained, 1)
    assert trainings == []
