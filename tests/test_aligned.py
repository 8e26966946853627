"""An analytic head, and the adapter with that head fixed: what each stage sees of the plan, and whole runs of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import participant.evaluation
import participant.patience
from coordinator import phases
from coordinator.publish import verified
from participant.data import Examples
from participant.evaluation import Evaluation
from participant.fetch import fetch_release, start_of
from participant.judging import judge
from participant.policy import admit
from participant.records import Spent
from participant.running import join
from privacy.adapter import flatten, load_peft, save_peft, start_adapter, start_digest, trained_part
from privacy.aggregation import Aggregation
from privacy.aligned import plan_at
from privacy.audit import audit_release
from privacy.errors import ProtocolError, Refusal, UserError
from privacy.job import Job
from privacy.plan import Plan, parse_plan
from privacy.roster import parse_roster
from privacy.secagg.masking import BLOCK
from privacy.secagg.messages import Offer
from privacy.secagg.quantize import quantizer_for
from privacy.stages import first_start, next_start
from tests.aligned import CONSENT, FEATURES, HEAD, Aligned, B, adapter_of, aligned_plan, pooled_head, world_of
from tests.on_disk import Direct
from tests.staged import manifest, released, run_stage
from tests.test_policy import ROSTER, site


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(participant.patience, "BACKOFF_S", (0.0,))


# --- the plan ---------------------------------------------------------------------------------------------------------

REGMEAN = b'method = "regmean"\nregmean = { ridge = 0.1, feature_clip = 4.0, min_texts = 3 }\nhead = "analytic"'
FISHER = b'method = "fisher"\nfisher = { ridge = 0.1, reach = 16.0, min_texts = 3 }\nhead = "analytic"'
CORE = b'method = "core"\ncore = { factors = "%s" }\nhead = "analytic"' % (b"0" * 64)
PRIVACY = b"""[privacy]
unit = "record"
sigma = "1.0"
delta = "1e-5"
clip = "1.0"
rate = "0.25"
steps = 4
nominal_batch = 6
nominal_size = 24
[round]"""

#: Sentence -> (what of the plan, what instead, what the error says).
BAD = {
    "the head alone in all stages": (b'"lora"', b'"head"', 'expected "lora" beside an analytic head and 2 stages, fou'),
    "head and B": (b'train = "lora"', b'train = "all"', 'expected "lora" beside an analytic head and 2 stages, found'),
    "scores taken for logits": (b"sharpness = 10.0\n", b"", "training.sharpness: expected this key with head"),
    "no sharpness at all": (b"sharpness = 10.0", b"sharpness = 0.5", "key 'training.sharpness'"),
    "A and B": (b'head = "analytic"', b'method = "both"\nhead = "analytic"', "expected freeze_a, regmean or fisher"),
    "products": (b'head = "analytic"', b'method = "dense"\nhead = "analytic"', "expected freeze_a, regmean or fisher"),
    "a core": (b'head = "analytic"', CORE, "aggregation.method: expected freeze_a, regmean or fisher"),
    "uniform weights": (b'head = "analytic"', b'weights = "uniform"\nhead = "analytic"', 'expected weights "examples"'),
    "a head of two layers": (b'"classifier.weight" = [2, 8]', b'"x.weight" = [3, 8]', "expected one linear layer"),
    "a spot audit": (b"max_weight", b'audit = "spot"\nmax_weight', 'round.audit: expected "divided" with 2 stages'),
}


@pytest.mark.parametrize(("old", "new", "fragment"), BAD.values(), ids=BAD.keys())
def test_a_plan_that_does_not_fit_is_refused(old: bytes, new: bytes, fragment: str) -> None:
    with pytest.raises(UserError, match=r"^plan\.toml: ") as refused:
        parse_plan(aligned_plan(2, 100, (old, new)), "plan.toml")
    assert fragment in str(refused.value)


def test_statistics_have_no_noise_in_any_stage() -> None:
    changes = ((b"[round]", PRIVACY), (b"epochs = 1\n", b""), (b"batch_size = 4\n", b""))
    with pytest.raises(UserError, match="statistics of records have no noise"):
        parse_plan(aligned_plan(2, 100, *changes))


@pytest.mark.parametrize("stages", [1, 2])
def test_a_head_is_fixed_only_where_it_was_computed_before(stages: int) -> None:
    if stages == 1:
        raw = aligned_plan(1, 100, (b'train = "head"', b'train = "lora"'))
    else:
        changes = (b'head = "analytic"\n', b""), (b"\nsharpness = 10.0", b"")
        raw = aligned_plan(2, 100, *changes).split(b"[aggregation.analytic]")[0]
        raw += b"[round]" + aligned_plan(2).split(b"[round]")[1]
    with pytest.raises(
        UserError, match=r'adapter\.train: expected .* found "lora"|adapter\.train: expected "lora" with'
    ):
        parse_plan(raw)


def test_logits_are_not_sharpened() -> None:
    sharp = (b"epochs = 1", b"epochs = 1\nsharpness = 10.0")
    with pytest.raises(UserError, match=r"training\.sharpness: expected this key with head = .* and only with both"):
        parse_plan(aligned_plan(1, 100, sharp))


def test_one_stage_is_the_head_alone_and_is_no_mean_to_be_scaled() -> None:
    plan = parse_plan(aligned_plan(1)).plan
    assert not plan.aligned
    assert plan_at(plan, 1) is plan
    rate = (b'head = "analytic"', b'server_lr = 0.5\nhead = "analytic"')
    with pytest.raises(UserError, match=r"counts every record once: expected server_lr 1\.0"):
        parse_plan(aligned_plan(1, 100, rate))
    assert parse_plan(aligned_plan(2, 100, rate)).plan.aggregation.server_lr == 0.5
    section = b"\n[evaluation]\nholdout = 0.2\nserver_lr = [0.5, 1.0]\n"
    with pytest.raises(UserError, match=r"evaluation\.server_lr: expected none for an analytic head"):
        parse_plan(aligned_plan(1) + section)
    assert parse_plan(aligned_plan(2) + section).plan.last == 3


# --- what each stage sees of it ---------------------------------------------------------------------------------------


def job_of(raw: bytes) -> Job:
    return Job.of(parse_plan(raw), parse_roster(ROSTER.encode()))


@pytest.mark.parametrize(
    ("section", "size"),
    [(b'head = "analytic"', 12), (REGMEAN, 12 + 3), (FISHER, 2 * 12)],
    ids=["freeze_a", "regmean", "fisher"],
)
def test_each_stage_has_a_plan_and_a_vector_of_its_own(section: bytes, size: int) -> None:
    rate = (b'head = "analytic"', section + b"\nserver_lr = 0.5")
    job = job_of(aligned_plan(3, 100, rate) + b"\n[evaluation]\nholdout = 0.2\n")
    first, second, third, judged = (job.at(stage) for stage in (1, 2, 3, 4))
    assert (first.plan.adapter.train, first.plan.aggregation.head) == ("head", "analytic")
    assert (second.plan.adapter.train, second.plan.aggregation.head) == ("lora", "trained")
    assert [j.quantizer.size for j in (first, second, third, judged)] == [
        FEATURES * (FEATURES + 1) // 2 + FEATURES * 2,
        size,
        size,
        0,
    ]
    assert [name for name, _ in first.layout.trained] == [HEAD]
    assert [name for name, _ in second.layout.trained] == [B]
    assert second.plan == third.plan != first.plan
    assert judged.judging
    assert judged.plan == job.plan
    for at in (first, second, judged):
        assert [at.at(stage).plan for stage in (1, 2, 3, 4)] == [first.plan, second.plan, third.plan, job.plan]
        assert [at.at(stage).judging for stage in (1, 2, 3, 4)] == [False, False, False, True]
        assert at.at(4).quantizer == judged.quantizer
        assert at.plan_file is job.plan_file
        assert at.header(2, 7, bytes(32)) == job.header(2, 7, bytes(32))
        assert at.rules == job.rules
    assert second.at(2) is second


def test_what_a_stage_sees_is_a_plan_as_one_reads_it_from_a_file() -> None:
    """Made by copying, without the checks of a file; this is what these would have made of it."""
    rate = (b'head = "analytic"', REGMEAN + b"\nserver_lr = 0.5")
    plan = parse_plan(aligned_plan(2, 100, rate)).plan
    first, second = plan_at(plan, 1), plan_at(plan, 2)
    plain = plan.training.model_copy(update={"sharpness": None})
    alone = first.model_copy(update={"stages": 1, "training": plain})
    assert Plan.model_validate(alone.model_dump()) == alone
    assert Aggregation.model_validate(second.aggregation.model_dump()) == second.aggregation
    unfixed = second.adapter.model_copy(update={"train": "all"})
    trained = second.model_copy(update={"adapter": unfixed, "training": plain})
    assert Plan.model_validate(trained.model_dump()) == trained
    assert quantizer_for(first, 5).max_weight == quantizer_for(second, 5).max_weight == plan.round.max_weight


def test_another_plan_is_the_same_in_every_stage() -> None:
    plan = parse_plan(aligned_plan(1)).plan
    job = job_of(aligned_plan(1))
    assert plan_at(plan, 1) is plan
    assert job.at(1) is job


def test_consent_is_to_all_that_any_stage_sends() -> None:
    job = job_of(aligned_plan(2, 100, (b'head = "analytic"', REGMEAN)))
    minimum = {"min_class_count": 3}
    settings = site()
    with pytest.raises(Refusal, match=r"not opted in \(min_class_count\)"):
        admit(job, settings)
    settings = settings.model_copy(update={"policy": settings.policy.model_copy(update=minimum)})
    with pytest.raises(Refusal, match=r"not opted in \(min_texts\)"):
        admit(job, settings)
    settings = settings.model_copy(update={"policy": settings.policy.model_copy(update={"min_texts": 3})})
    admit(job, settings)
    with pytest.raises(Refusal, match=r"has rank 2; this site trains at most 1"):
        admit(job, settings.model_copy(update={"max_rank": 1}))


# --- whole runs -------------------------------------------------------------------------------------------------------


def assert_everybody_has(world: Aligned, stage: int) -> None:
    """An audit accepts the release, and each site computes the same bits."""
    audit_release(released(world, stage), world.job.roster_file.hash)
    digest = start_digest(adapter_of(world, stage))
    for i in range(world.n):
        site = world.site(i)
        assert fetch_release(site, world.daemons[i].client, world.job, stage)
        assert start_digest(load_peft(site.release_directory("toy", stage) / "adapter")) == digest


def test_the_head_of_all_records_and_then_the_adapter_behind_that_very_head(tmp_path: Path) -> None:
    world = world_of(tmp_path, aligned_plan(3))
    for stage in (1, 2, 3):
        run_stage(world, stage)
        assert_everybody_has(world, stage)
    world.assert_exact()
    first, second, third = (adapter_of(world, stage) for stage in (1, 2, 3))
    np.testing.assert_allclose(first[HEAD], pooled_head((0, 1, 2, 3, 4)), rtol=0, atol=1e-4)
    start = start_adapter(world.job.plan.adapter)
    assert all(np.array_equal(first[name], start[name]) for name in start if name != HEAD)
    for before, after in ((first, second), (second, third)):
        assert not np.array_equal(before[B], after[B])
        assert all(np.array_equal(before[name], after[name]) for name in before if name != B)
    job = world.job.at(2)
    moved = flatten(trained_part(second, job.layout), job.layout)
    weight = sum(100 + i for i in range(5))
    plain = world.plain_sum((0, 1, 2, 3, 4), 2)[: job.quantizer.size]
    scale = job.plan.round.clip * job.quantizer.max_weight / (job.quantizer.qmax * weight)
    np.testing.assert_allclose(moved, plain * scale, rtol=0, atol=1e-7)
    one, two = manifest(world, 1), manifest(world, 2)
    assert (one["head"], one["coordinates"], two["coordinates"]) == ("analytic", 36 + 16, 12)
    assert ("head" in two, "training_loss" in two, "training_loss" in one) == (False, True, False)
    assert one["plan_digest"] == two["plan_digest"] == world.job.plan_file.digest.hex()
    assert two["start"]["digest"] == one["adapter_digest"]


def test_the_first_stage_alone_gives_the_same_head(tmp_path: Path) -> None:
    """Their statistics are rounded alike, so to the bit."""
    world = world_of(tmp_path / "alone", aligned_plan(1))
    run_stage(world, 1)
    other = world_of(tmp_path / "first", aligned_plan(2))
    run_stage(other, 1)
    assert start_digest(adapter_of(world, 1)) == start_digest(adapter_of(other, 1))


def test_a_late_site_has_no_part_in_the_head_and_trains_behind_it(tmp_path: Path) -> None:
    world = world_of(tmp_path, aligned_plan(2, stage_s=5000))
    world.ready(0, 1, 2, 3)
    world.wait(10)
    world.run()
    run_stage(world, 2)
    assert [survivors for survivors, _ in world.totals(1)] == [(0, 1, 2, 3)]
    assert [survivors for survivors, _ in world.totals(2)] == [(0, 1, 2, 3, 4)]
    np.testing.assert_allclose(adapter_of(world, 1)[HEAD], pooled_head((0, 1, 2, 3)), rtol=0, atol=1e-4)
    assert np.array_equal(adapter_of(world, 1)[HEAD], adapter_of(world, 2)[HEAD])
    assert_everybody_has(world, 2)
    assert not any(isinstance(r, Spent) and r.header.stage == 1 for r in world.records(4))


def test_a_later_stage_closes_by_certificates_over_its_own_vector(tmp_path: Path) -> None:
    """Statistics of two blocks, a B of one: asked for certificates over two, stage 3 would never begin."""
    wide = (b'"classifier.weight" = [2, 8]', b'"classifier.weight" = [2, 362]')
    raw = aligned_plan(3, 100_000, wide)
    adapter = parse_plan(raw).plan.adapter
    world = world_of(
        tmp_path, raw.replace(adapter.digest.encode(), start_digest(start_adapter(adapter)).hex().encode())
    )
    assert world.job.at(1).quantizer.size > BLOCK > world.job.at(2).quantizer.size
    for stage in (1, 2, 3):
        run_stage(world, stage)
    assert isinstance(world.phase, phases.Released)


def test_head_alone_and_head_with_adapter_are_judged_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = (0.25, 0.5, 2.0)
    section = b"[evaluation]\nholdout = 0.2\nserver_lr = [0.25, 0.5, 2.0]\n"
    world = world_of(tmp_path, aligned_plan(2) + section)
    for stage in (1, 2):
        run_stage(world, stage)
    job, engine = world.job, world.engine
    first = first_start(job)
    second = next_start(job, 2, first, verified(job, 1, first, engine.released(world.digest, 1)))
    assert start_digest(second.tensors) == start_digest(adapter_of(world, 1))
    found = next_start(job, 3, second, verified(job, 2, second, engine.released(world.digest, 2)))
    assert found.candidate is not None
    expected = [found.candidate(k) for k in range(2 + len(rates))]
    assert start_digest(expected[0]) == start_digest(first.tensors)
    assert start_digest(expected[1]) == start_digest(adapter_of(world, 1))
    step = adapter_of(world, 2)[B].astype(np.float64)
    for rate, tensors in zip(rates, expected[2:], strict=True):
        np.testing.assert_allclose(tensors[B], rate * step, rtol=1e-6)
        assert np.array_equal(tensors[HEAD], adapter_of(world, 1)[HEAD])
    correct = dict(zip(map(start_digest, expected), (1, 3, 4, 6, 2), strict=True))

    def accuracy(*, adapter: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]], **_: object) -> Evaluation:
        return Evaluation(correct[start_digest(adapter)], 10, 0.5)

    monkeypatch.setattr(participant.evaluation, "accuracy", accuracy)
    world.begin(3)
    for i in range(world.n):
        start = start_of(world.site(i), world.daemons[i].client, job, 3)
        judge(world.site(i), job.at(3), 3, start, Examples(tuple("0123456789"), (0,) * 10))
    world.ready()
    world.run()
    told = manifest(world, 3)["evaluation"]
    assert [c["candidate"] for c in told["candidates"]] == ["base", "previous", *(f"server_lr {r:g}" for r in rates)]
    assert [c["correct"] for c in told["candidates"]] == [5 * c for c in correct.values()]
    assert told["elected"] == "server_lr 0.5"
    assert start_digest(adapter_of(world, 3)) == start_digest(expected[3])
    assert_everybody_has(world, 3)


def test_a_second_stage_from_another_head_is_refused_by_auditor_and_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two cohorts of statistics one is left out: the other is certified, and another start."""
    world = Aligned(tmp_path, 8, aligned_plan(2), site_toml=CONSENT)
    run_stage(world, 1)
    world.wait(1)
    world.run()
    world.begin(2)
    liar, honest = world.daemons[0].client, Direct.releases
    monkeypatch.setattr(
        Direct, "releases", lambda self, plan, stage: honest(self, plan, stage)[: 1 if self is liar else None]
    )
    world.train()
    world.ready(*range(8))
    round_id, offer = world.message_for(0)
    assert isinstance(offer, Offer)
    with pytest.raises(Refusal, match="start"):
        join(world.site(0), liar, world.job.at(2), 2, round_id, offer)
    world.run()
    assert 0 not in world.totals(2)[0][0]
    directory, pin = released(world, 2), world.job.roster_file.hash
    audit_release(directory, pin)
    kept = tmp_path / "kept"
    (released(world, 1) / "rounds" / "2").rename(kept)
    with pytest.raises(ProtocolError, match="of another plan, stage, roster or start adapter"):
        audit_release(directory, pin)
    kept.rename(released(world, 1) / "rounds" / "2")
    tensors = adapter_of(world, 2)
    tensors[HEAD] = tensors[HEAD] + np.float32(0.125)
    save_peft(directory / "adapter", tensors, adapter=world.job.plan.adapter, base_name="tiny")
    with pytest.raises(ProtocolError, match="the adapter is not the one that the totals give"):
        audit_release(directory, pin)
