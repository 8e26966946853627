"""A site's side of an adapter behind an analytic head: a small model is trained, and only B moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from typer.testing import CliRunner

from demo.federation import Federation
from participant.analytic import collect
from participant.cli import app
from participant.drafting import draft_plan
from participant.evaluation import accuracy
from participant.policy import admit
from participant.prepare import kept_vector, prepare
from participant.site import Site
from participant.starts import keep_start
from participant.training import load_model, train
from privacy.adapter import Tensors, load_peft, start_adapter, start_digest
from privacy.aligned import METHODS, plan_at
from privacy.analytic import head_of, unpack
from privacy.errors import UserError
from privacy.job import Job
from privacy.methods import merged, vector_size
from privacy.plan import Plan, parse_plan
from privacy.stages import Start
from tests.helpers_learning import LABELS, regression_plan, tiny_base, tiny_plan, word_examples, word_numbers
from tests.test_analytic_site import EXAMPLES, site_with

MINIMUM = "min_class_count = 5\nmin_texts = 5\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def the_plan(base: Path, **changes: Any) -> Plan:
    return tiny_plan(base, **{"head": "analytic", "stages": 2, "max_weight": 1024, "clip": 8.0} | changes)


def headed(plan: Plan, base: Path, examples: Any) -> Tensors:
    """What stage 1 releases of one site's records."""
    first, start = plan_at(plan, 1), start_adapter(plan.adapter)
    found = collect(plan=first, base=base, start=start, examples=examples, device="cpu", threads=1)
    return merged(start, found.delta, first).tensors


def is_b(name: str) -> bool:
    return name.endswith("lora_B.weight")


@pytest.mark.parametrize("method", METHODS)
def test_behind_a_fixed_head_only_b_is_trained_and_the_loss_falls(base: Path, method: Any) -> None:
    plan, examples = the_plan(base, method=method, rank=2), word_examples((20, 12, 9))
    start, second = headed(plan, base, examples), plan_at(plan, 2)
    losses: list[float] = []
    found = train(
        plan=second,
        base=base,
        start=start,
        examples=examples,
        device="cpu",
        threads=1,
        progress=lambda _, __, loss: losses.append(loss),
    )
    assert found.delta.shape == (vector_size(second),)
    assert found.loss < np.mean(losses[:6])
    released = merged(start, found.delta, second).tensors
    assert released.keys() == start.keys()
    for name in start:
        assert is_b(name) != np.array_equal(released[name], start[name]), name
    before, after = (
        accuracy(plan=plan, base=base, adapter=tensors, examples=examples, device="cpu")
        for tensors in (start, released)
    )
    assert after.accuracy >= before.accuracy > 0.9


def test_what_is_trained_is_b_alone(base: Path) -> None:
    plan = plan_at(the_plan(base), 2)
    loaded = load_model(plan, base, start_adapter(plan.adapter), "cpu")
    names = [name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad]
    assert len(names) == 4
    assert all("lora_B" in name for name in names)


@pytest.mark.parametrize("loss", ["cross_entropy", "logit_adjusted"])
def test_the_loss_takes_sharpened_scores_for_logits(base: Path, loss: Any) -> None:
    plan, examples = plan_at(the_plan(base, epochs=1, batch_size=64, loss=loss), 2), word_examples((20, 12, 9))
    zero = start_adapter(plan.adapter)
    bias = "base_model.model.classifier.bias"
    start = zero | {bias: np.array([0.5, 0.25, 0.0], np.float32), bias.replace("bias", "weight"): _small(zero)}
    found = train(plan=plan, base=base, start=start, examples=examples, device="cpu", threads=1)
    counts = np.array([20, 12, 9])
    logits = 10 * np.array([0.5, 0.25, 0.0]) + (np.log(counts / 41) if loss == "logit_adjusted" else 0)
    nats = np.log(np.exp(logits).sum()) - logits
    assert found.loss == pytest.approx((counts * nats).sum() / 41, abs=1e-3)


def _small(start: Tensors) -> Any:
    """A head that hardly says anything, and is not zero."""
    return np.full_like(start["base_model.model.classifier.weight"], 1e-6)


def test_behind_the_head_of_a_regression_the_squared_error_falls(base: Path) -> None:
    plan = regression_plan(base, head="analytic", stages=2, max_weight=1024, clip=8.0, learning_rate=1e-3)
    assert (plan.aligned, plan.training.loss, plan.training.sharpness) == (True, "squared", None)
    examples, second = word_numbers((20, 12, 9)), plan_at(plan, 2)
    start = headed(plan, base, examples)
    found = train(plan=second, base=base, start=start, examples=examples, device="cpu", threads=1)
    released = merged(start, found.delta, second).tensors
    assert all(is_b(name) != np.array_equal(released[name], start[name]) for name in start)
    before, after = (
        accuracy(plan=plan, base=base, adapter=tensors, examples=examples, device="cpu").loss
        for tensors in (start, released)
    )
    assert after < before


def test_a_site_with_one_class_trains_too_if_the_loss_lets_it(base: Path) -> None:
    plan = the_plan(base, loss="cross_entropy")
    start = headed(plan, base, word_examples((20, 12, 9)))
    one = word_examples((10, 0, 0))
    result = train(plan=plan_at(plan, 2), base=base, start=start, examples=one, device="cpu", threads=1)
    assert np.any(result.delta)


def test_one_mean_of_skewed_sites_helps_where_the_base_models_features_do_not(tmp_path: Path) -> None:
    """Three sites, four fifths of each of one class; of six features alone a head gets two of three right."""
    base = tiny_base(tmp_path, hidden=6)
    plan, everything = the_plan(base, rank=2, epochs=12), word_examples((40, 40, 40))
    start, second = headed(plan, base, everything), plan_at(plan, 2)
    deltas = [
        train(plan=second, base=base, start=start, examples=word_examples(own), device="cpu", threads=1).delta
        for own in ((32, 4, 4), (4, 32, 4), (4, 4, 32))
    ]
    released = merged(start, np.mean(deltas, axis=0, dtype=np.float32), second).tensors
    before, after = (
        accuracy(plan=plan, base=base, adapter=tensors, examples=everything, device="cpu").accuracy
        for tensors in (start, released)
    )
    assert after > before + 0.08


# --- a draft ----------------------------------------------------------------------------------------------------------


def test_a_draft_of_several_stages_with_an_analytic_head_is_such_a_plan(base: Path) -> None:
    about = [
        "--name",
        "p",
        "--base-name",
        "tiny",
        "--dataset",
        "d",
        *(w for label in LABELS for w in ("--label", label)),
    ]
    found = CliRunner().invoke(app, ["draft", str(base), *about, "--head", "analytic", "--stages", "2"])
    assert found.exit_code == 0, found.output
    plan = parse_plan(found.stdout.encode()).plan
    assert plan.aligned
    assert (plan.adapter.train, plan.training.sharpness, plan.round.bits) == ("lora", 10.0, 32)
    first, second = (vector_size(plan_at(plan, stage)) for stage in (1, 2))
    assert (first, second) == (33 * 34 // 2 + 33 * 3, 4 * 32 * 8)
    assert f"# {first} in stage 1, and then {second:,} coordinates are sent." in found.stdout
    assert "That is stage 1; in the later ones [training] applies, to B." in found.stdout


# --- at a site --------------------------------------------------------------------------------------------------------


def job_of(site: Site, **changes: Any) -> Job:
    about: dict[str, Any] = {"base_name": "tiny", "dataset": "words", "labels": LABELS, "max_length": 8}
    about |= {"name": "aligned", "head": "analytic", "stages": 2, "epochs": 1, "max_weight": 1024} | changes
    return Job.of(parse_plan(draft_plan(base=site.home.directory / "base", **about).encode()), site.roster)


def test_a_class_that_is_rare_at_a_site_is_left_out_of_the_statistics_alone(set_up: Federation, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path, MINIMUM)
    job = job_of(site)
    admit(job, site.home.settings)
    first = prepare(site, job, 1)
    one = load_peft(site.local_directory("aligned", 1))
    start = Start(one, start_digest(one), ((1, bytes(32)),))
    keep_start(site, job, 2, start)
    second = prepare(site, job, 2, later=start)
    assert (first.weight, second.weight, first.loss) == (32, 34, 0.0)
    assert second.loss > 0
    assert (second.plan, second.start) == (first.plan, start.digest.hex())
    for stage in (1, 2):
        staged = job.at(stage)
        vector = np.concatenate(list(kept_vector(site, staged, stage)))
        assert vector.shape == (staged.quantizer.total_size,)
    two = load_peft(site.local_directory("aligned", 2))
    assert all(is_b(name) != np.array_equal(one[name], two[name]) for name in one)
    book = site.ledger("words").book
    models = [j.reserve.model for j in book.jobs.values()]
    assert [m["trained"] for m in models] == [str(33 * 3), str(4 * 32 * 8)]
    assert prepare(site, job, 2, later=start) == second


def test_records_that_are_held_out_do_not_count_for_a_class(set_up: Federation, tmp_path: Path) -> None:
    """Six texts of the last class, some of them held out: the sum would be over fewer than the minimum."""
    site = site_with(set_up, tmp_path, "min_class_count = 6\n", word_examples((30, 30, 6)))
    job = job_of(site, stages=1, holdout=0.5)
    prepare(site, job, 1)
    decoded = job.quantizer.decode(np.concatenate(list(kept_vector(site, job, 1))).astype(np.uint32), 1)
    _, products = unpack(decoded.mean, head_of(job.plan), job.plan.round.clip)
    counts = products[-1] * decoded.weight
    assert counts[2] == pytest.approx(0, abs=1e-3)
    assert all(10 < count < 25 for count in counts[:2])


def test_a_site_with_too_few_texts_for_a_later_stage_is_not_in_the_first(set_up: Federation, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path, MINIMUM.replace("min_texts = 5", "min_texts = 500"))
    with pytest.raises(UserError, match=r"expected at least 500 different texts \(min_texts\), found 34"):
        prepare(site, job_of(site, method="regmean"), 1)
    assert len(EXAMPLES) == 34


def test_who_judges_needs_no_records_to_train_on(
    set_up: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site below the minimum of a class, with more records than a weight may say, still counts right answers."""
    site = site_with(set_up, tmp_path, "min_class_count = 500\nmin_texts = 5\n")
    job = job_of(site, stages=1, holdout=0.5, max_weight=8)
    with pytest.raises(UserError, match="expected a class with at least 500"):
        prepare(site, job, 1)
    judged = mock.Mock()
    monkeypatch.setattr("participant.prepare.judge", judged)
    monkeypatch.setattr("participant.prepare._start", lambda *_: ({}, "where the judging starts"))
    monkeypatch.setattr(type(site), "spent", lambda *_: ())
    for step in ("reserve", "start"):
        monkeypatch.setattr(f"participant.charging.{step}", mock.Mock())
    assert prepare(site, job, 2, later=mock.Mock()) is judged.return_value
