"""A site's side of regression: a small model learns a number, privately or not, and its errors are told in its unit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from typer.testing import CliRunner

from demo.federation import Federation
from participant import cli, dp_sgd, regression
from participant.canaries import audit_training
from participant.checking import check_data
from participant.compare import compare
from participant.drafting import draft_plan
from participant.evaluation import Fit, accuracy
from participant.judging import judge
from participant.measured import Measured
from participant.policy import admit
from participant.prepare import kept_vector, prepare
from participant.self_test import SelfTest
from participant.site import Site
from participant.training import load_model, logits_of, tokenise, train
from privacy.adapter import Tensors, layout_of, release, save_peft, start_adapter
from privacy.errors import Refusal, UserError
from privacy.evaluation import candidates_of, results_of
from privacy.job import Job
from privacy.plan import Plan, parse_plan
from privacy.stages import first_start
from tests.helpers_learning import (
    SPELLINGS,
    TARGET,
    VOCABULARY,
    private_plan,
    regression_plan,
    spelled,
    tiny_base,
    word_numbers,
)

EXAMPLES = word_numbers((24, 24, 24))
#: Base model, plan and data set in a site's own file.
SITE = """device = "cpu"
threads = 1
[models]
tiny = "base"
[datasets.words]
path = "words.jsonl"
format = "jsonl"
target = "weight"
[policy]
plans = ["*"]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def trained(plan: Plan, base: Path, examples: Measured = EXAMPLES) -> Tensors:
    start = start_adapter(plan.adapter)
    result = train(plan=plan, base=base, start=start, examples=examples, device="cpu", threads=1)
    assert result.examples == len(examples)
    assert 0 < result.loss < 1
    return release(start, result.delta, 1.0, layout_of(plan.adapter))


def errors(plan: Plan, base: Path, adapter: Tensors | None, examples: Measured = EXAMPLES) -> Fit:
    found = accuracy(plan=plan, base=base, adapter=adapter, examples=examples, device="cpu", threads=1)
    assert isinstance(found, Fit)
    return found


# --- training --------------------------------------------------------------------------------------------------------


def test_a_trained_head_learns_the_number(base: Path) -> None:
    plan = regression_plan(base, epochs=20)
    before, after = errors(plan, base, None), errors(plan, base, trained(plan, base))
    middle = [value - 30 for value in EXAMPLES.targets]
    assert before.mean_squared == pytest.approx(np.mean(np.square(middle)), rel=1e-6)
    assert before.mean_absolute == pytest.approx(np.mean(np.abs(middle)), rel=1e-6)
    assert before.r2 is not None
    assert before.r2 < 0.1
    assert after.r2 is not None
    assert after.r2 > 0.8
    assert after.mean_squared < before.mean_squared / 4


def test_the_errors_are_those_of_one_text_at_a_time_in_the_targets_unit(base: Path) -> None:
    plan = regression_plan(base, holdout=0.2, tolerance=3.0)
    adapter = trained(plan, base)
    found = errors(plan, base, adapter)
    loaded = load_model(plan, base, adapter, "cpu")
    with torch.inference_mode():
        said = [30 + 20 * float(logits_of(loaded, [one])) for one in tokenise(loaded.tokenizer, EXAMPLES.texts, 8)]
    off = np.array(said) - EXAMPLES.targets
    assert found.total == len(EXAMPLES)
    assert found.correct == int((np.abs(off) <= 3.0).sum())
    assert 0 < found.correct < found.total
    assert found.mean_squared == pytest.approx(float(np.mean(off**2)), rel=1e-4)
    assert found.mean_absolute == pytest.approx(float(np.mean(np.abs(off))), rel=1e-4)
    assert found.loss == pytest.approx(found.mean_squared / 400, rel=1e-4)
    assert found.r2 == pytest.approx(1 - np.mean(off**2) / np.var(EXAMPLES.targets), rel=1e-4)


def test_of_equal_numbers_there_is_no_r2(base: Path) -> None:
    found = errors(regression_plan(base), base, None, Measured(("the apple", "the pear"), (31.0, 31.0)))
    assert found.r2 is None
    assert found.correct == 0  # there is no tolerance
    assert found.mean_squared == pytest.approx(1)
    assert found.mean_absolute == pytest.approx(1)


def test_a_range_as_wide_as_floats_has_errors(base: Path) -> None:
    plan = regression_plan(base, target=(0.0, 1.7e308))
    found = errors(plan, base, None, Measured(("the apple", "the pear"), (0.0, 1.7e308)))
    assert (found.loss, found.r2) == (1.0, 0.0)
    assert found.mean_absolute == 8.5e307
    assert found.mean_squared == math.inf


@pytest.mark.parametrize("method", ["both", "regmean", "fisher"])
def test_the_methods_take_it(method: str, base: Path) -> None:
    plan = regression_plan(base, method=method, clip=8.0, epochs=1)
    start = start_adapter(plan.adapter)
    result = train(plan=plan, base=base, start=start, examples=EXAMPLES, device="cpu", threads=1)
    assert np.isfinite(result.delta).all()
    assert result.delta.any()


def test_peft_loads_a_release_with_one_output(base: Path, tmp_path: Path) -> None:
    plan = regression_plan(base)
    adapter = trained(plan, base)
    save_peft(tmp_path / "adapter", adapter, adapter=plan.adapter, base_name=str(base))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=1)
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    loaded = load_model(plan, base, adapter, "cpu")
    ids = tokenise(loaded.tokenizer, EXAMPLES.texts[:1], 8)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(input_ids=ids[0][None]).logits, logits_of(loaded, ids))


# --- private training ------------------------------------------------------------------------------------------------


def private(base: Path, **changes: Any) -> Plan:
    fields = private_plan(base, **changes).model_dump()
    ours = regression_plan(base).model_dump()
    fields |= {"task": "regression", "data": ours["data"]}
    fields["adapter"] = ours["adapter"] | {"train": changes.get("train", "all")}
    fields["training"] = {"learning_rate": 0.02, "loss": "squared"}
    return Plan.model_validate(fields)


@pytest.mark.parametrize("train", ["all", "head"])
def test_private_training_passes_its_self_test_and_learns(train: str, base: Path) -> None:
    plan = private(base, train=train, sigma="0.3", rate="1", steps=100, nominal_batch=72, nominal_size=72)
    start, tests = start_adapter(plan.adapter), list[SelfTest]()
    result = dp_sgd.train_private(
        plan=plan, base=base, start=start, examples=EXAMPLES, device="cpu", threads=1, on_selftest=tests.append
    )
    assert tests[0].passed
    assert result.loss == 0.0
    adapter = release(start, result.delta, 1.0, layout_of(plan.adapter))
    after, before = errors(plan, base, adapter), errors(plan, base, None)
    assert after.mean_squared < before.mean_squared / 2


def test_a_private_loss_is_of_each_record_by_itself(base: Path) -> None:
    plan = private(base)
    loaded = load_model(plan, base, start_adapter(plan.adapter), "cpu")
    texts = tokenise(loaded.tokenizer, EXAMPLES.texts, 8)
    targets = regression.targets_of(plan, EXAMPLES, loaded.device)
    with torch.no_grad():
        found = regression.private_losses(loaded, texts, targets)([3, 40])
    wanted = [((EXAMPLES.targets[i] - 30) / 20) ** 2 for i in (3, 40)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_prior_of_classes_and_the_audit_of_a_training_are_refused(base: Path) -> None:
    with pytest.raises(ValueError, match="expected none with the loss 'squared'"):
        private(base, prior=(0.25, 0.25, 0.5))
    with pytest.raises(UserError, match="expected a plan for classification, found one for regression"):
        audit_training(plan=private(base), base=base, count=4)


# --- at a site -------------------------------------------------------------------------------------------------------


def site_with(set_up: Federation, directory: Path, policy: str = "", examples: Measured = EXAMPLES) -> Site:
    for path in set_up.site("site-1").iterdir():
        if path.is_file():
            (directory / path.name).write_bytes(path.read_bytes())
            (directory / path.name).chmod(0o600)
    head = (directory / "participant.toml").read_text().split("keep_plain_vector")[0]
    (directory / "participant.toml").write_text(head + SITE + policy)
    tiny_base(directory / "base")
    rows = [{"text": text, "weight": value} for text, value in zip(examples.texts, examples.targets, strict=True)]
    (directory / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Site.open(directory)


def job_of(site: Site, **changes: Any) -> Job:
    about: dict[str, Any] = {"base_name": "tiny", "dataset": "words", "max_length": 8, "epochs": 1, "name": "p"}
    about |= {"task": "regression", "target": TARGET, "max_weight": 1024}
    text = draft_plan(base=site.home.directory / "base", **about | changes)
    return Job.of(parse_plan(text.encode()), site.roster)


def test_a_site_trains_and_tells_its_errors(set_up: Federation, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path)
    job = job_of(site, epochs=8, learning_rate=0.02)
    admit(job, site.home.settings)
    assert prepare(site, job, 1).weight == len(EXAMPLES)
    found = compare(site, job.plan, tmp_path / "words.jsonl", ["base", "local"])
    assert found["local"]["mean_squared_error"] < found["base"]["mean_squared_error"]
    assert found["local"]["mean_absolute_error"] < found["base"]["mean_absolute_error"]
    assert found["local"]["r2"] > found["base"]["r2"]
    assert (found["local"]["total"], found["local"]["of"]) == (len(EXAMPLES), "numbers")
    json.dumps(found, allow_nan=False)
    assert "within_tolerance" not in found["local"]
    (tmp_path / "plan.toml").write_bytes(job.plan_file.raw)
    command = ["evaluate", str(tmp_path / "plan.toml"), "--data", str(tmp_path / "words.jsonl"), "--dir", str(tmp_path)]
    shown = CliRunner().invoke(cli.app, [*command, "--adapter", "base"])
    base = found["base"]
    assert shown.output == (
        f"base: mean squared error {base['mean_squared_error']:.6g}, mean absolute error "
        f"{base['mean_absolute_error']:.6g}, R2 {base['r2']:.4f} (72 numbers)\n"
    )


def test_a_plan_with_a_tolerance_is_told_how_many_answers_are_right(set_up: Federation, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path)
    job = job_of(site, holdout=0.2, tolerance=6.0)
    within = sum(abs(value - 30) <= 6 for value in EXAMPLES.targets)
    found = compare(site, job.plan, tmp_path / "words.jsonl", ["base"])
    assert 0 < found["base"]["within_tolerance"] == within < len(EXAMPLES)
    (tmp_path / "plan.toml").write_bytes(job.plan_file.raw)
    command = ["evaluate", str(tmp_path / "plan.toml"), "--data", str(tmp_path / "words.jsonl"), "--dir", str(tmp_path)]
    assert (
        f"(72 numbers, {within} within the tolerance)"
        in CliRunner().invoke(cli.app, [*command, "--adapter", "base"]).output
    )


def test_a_data_set_is_checked_against_the_plan(set_up: Federation, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path, examples=Measured((*EXAMPLES.texts, "the apple"), (*EXAMPLES.targets, 20.0)))
    assert check_data(site, "words", job_of(site).plan) == {
        "records": 73,
        "different texts": len(set(EXAMPLES.texts)) + 1,
    }
    with pytest.raises(UserError, match=r"line 1: expected a number from 0\.0 to 1\.0"):
        check_data(site, "words", job_of(site, target=(0, 1)).plan)


def test_an_evaluation_counts_what_is_within_the_tolerance(set_up: Federation, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path)
    job = job_of(site, holdout=0.2, tolerance=6.0)
    start = first_start(job)
    first = EXAMPLES.some(range(20, 30))
    candidates = type(start)(start.tensors, start.digest, (), lambda _: start.tensors)
    kept = judge(site, job, 2, candidates, first)
    assert kept.weight == 10
    quantizer = job.at(2).quantizer
    vector = np.concatenate(list(kept_vector(site, job.at(2), 2)))
    extras = quantizer.decode_extras(vector.astype(np.int64), 1)
    results = results_of(job.plan, extras)
    assert [result.candidate for result in results] == list(candidates_of(job.plan))
    off = [value - 30 for value in first.targets]
    assert {result.correct for result in results} == {sum(abs(one) <= 6 for one in off)}
    assert 0 < results[0].correct < 10
    assert results[0].loss == pytest.approx(np.mean(np.square(off)) / 400, abs=1e-4)


# --- statistics: the site's consent ----------------------------------------------------------------------------------


def test_a_site_that_has_not_opted_in_takes_no_plan_that_sums_statistics(set_up: Federation, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path, "min_class_count = 1\n")
    with pytest.raises(Refusal, match=r"has not opted in \(min_texts\)"):
        admit(job_of(site, head="analytic"), site.home.settings)
    admit(job_of(site), site.home.settings)


@pytest.mark.parametrize(
    ("own", "texts", "least"), [(1, 19, 20), (40, 39, 40)], ids=["by the plan", "by the site's own file"]
)
def test_a_site_with_too_few_different_texts_sits_out(
    own: int, texts: int, least: int, set_up: Federation, tmp_path: Path
) -> None:
    names = [f"{a} {b}" for a in VOCABULARY[7:] for b in VOCABULARY[7:]][:texts]
    copies = Measured((*names, *names), tuple(map(float, [*range(10, 10 + texts)] * 2)))
    site = site_with(set_up, tmp_path, f"min_texts = {own}\n", copies)
    job = job_of(site, head="analytic")
    admit(job, site.home.settings)
    with pytest.raises(UserError, match=rf"at least {least} different texts \(min_texts\), found {texts}"):
        prepare(site, job, 1)


@pytest.mark.parametrize(("others", "is_refused"), [(0, False), (1, True), (19, True), (20, False)])
def test_a_site_where_few_records_have_another_number_sits_out(
    others: int, is_refused: bool, set_up: Federation, tmp_path: Path
) -> None:
    """Else the sum of z (y - c) is a sum over these few."""
    names = tuple(f"{a} {b}" for a in VOCABULARY[7:] for b in VOCABULARY[7:])[:60]
    numbers = tuple(20.0 if number >= others else 21.0 + number for number in range(60))
    site = site_with(set_up, tmp_path, "min_texts = 1\n", Measured((*names, names[0]), (*numbers, numbers[0])))
    job = job_of(site, head="analytic")
    if not is_refused:
        assert prepare(site, job, 1).weight == 61
        return
    with pytest.raises(UserError, match=rf"with another number than 20\.0, .*, found {others}$"):
        prepare(site, job, 1)


@pytest.mark.parametrize("kind", SPELLINGS)
def test_a_site_with_spellings_of_few_texts_sits_out(kind: str, set_up: Federation, tmp_path: Path) -> None:
    names = tuple(f"{a} {b}" for a in VOCABULARY[7:] for b in VOCABULARY[7:])[:10]
    records = Measured((*names, *spelled(kind, 24)), tuple(map(float, range(10, 44))))
    site = site_with(set_up, tmp_path, "min_texts = 1\n", records)
    job = job_of(site, head="analytic")
    with pytest.raises(UserError, match=r"at least 20 different texts \(min_texts\), found 11"):
        prepare(site, job, 1)
    assert check_data(site, "words", job.plan) == {"records": 34, "different texts": 11}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_spellings_of_one_text_do_not_hide_that_few_have_another_number(
    kind: str, set_up: Federation, tmp_path: Path
) -> None:
    names = tuple(f"{a} {b}" for a in VOCABULARY[7:] for b in VOCABULARY[7:])[:60]
    records = Measured((*names, *spelled(kind, 24)), (*[19.0] * 60, *map(float, range(20, 44))))
    site = site_with(set_up, tmp_path, "min_texts = 1\n", records)
    with pytest.raises(UserError, match=r"with another number than 19\.0, .*, found 1$"):
        prepare(site, job_of(site, head="analytic"), 1)


def test_a_check_without_the_base_model_goes_by_how_texts_look(set_up: Federation, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path, "", Measured(("the apple", "The  apple", "the pear"), (20.0, 21.0, 22.0)))
    plan = job_of(site, base_name="another").plan
    assert check_data(site, "words", plan) == {"records": 3, "different texts": 2}


def test_the_texts_that_count_are_those_that_are_not_held_out(set_up: Federation, tmp_path: Path) -> None:
    names = tuple(f"{a} {b}" for a in VOCABULARY[7:] for b in VOCABULARY[7:])[:22]
    site = site_with(set_up, tmp_path, "min_texts = 1\n", Measured(names, tuple(map(float, range(20, 42)))))
    with pytest.raises(UserError, match=r"at least 20 different texts \(min_texts\), found 1\d"):
        prepare(site, job_of(site, head="analytic", holdout=0.4, tolerance=1.0), 1)


# --- drafts ----------------------------------------------------------------------------------------------------------

DRAFT = ("--name", "p", "--base-name", "tiny", "--dataset", "words", "--task", "regression")


def draft(base: Path, *more: str) -> tuple[int, str, str]:
    found = CliRunner().invoke(cli.app, ["draft", str(base), *DRAFT, *more])
    return found.exit_code, found.output, str(found.exception or "")


def test_a_draft_is_a_plan(base: Path) -> None:
    code, text, _ = draft(base, "--range", "-3.5", "10", "--holdout", "0.25", "--tolerance", "0.5")
    assert code == 0
    plan = parse_plan(text.encode()).plan
    assert (plan.task, plan.data.target, plan.training.loss, plan.outputs) == ("regression", (-3.5, 10.0), "squared", 1)
    assert plan.evaluation is not None
    assert plan.evaluation.tolerance == 0.5
    assert plan.adapter.head == {"classifier.weight": (1, 32), "classifier.bias": (1,)}


def test_a_draft_with_an_analytic_head_is_a_plan(base: Path) -> None:
    code, text, _ = draft(base, "--range", "0", "1", "--head", "analytic")
    assert code == 0
    plan = parse_plan(text.encode()).plan
    assert plan.aggregation.analytic is not None
    assert (plan.aggregation.min_texts, plan.aggregation.analytic.min_class_count) == (20, None)
    assert f"# {33 * 34 // 2 + 33} coordinates are sent." in text


#: Sentence -> (options, what the error says).
REFUSED = {
    "no range": ((), "expected --range LOW HIGH with --task regression"),
    "a label": (("--range", "0", "1", "--label", "a"), "expected no --label with --task regression"),
    "an evaluation without a tolerance": (("--range", "0", "1", "--holdout", "0.2"), "expected --tolerance with"),
    "a tolerance without an evaluation": (("--range", "0", "1", "--tolerance", "0.2"), "expected --tolerance with"),
    "a template": (("--range", "0", "1", "--template", "chatml"), "with --task generation only"),
    "a range upside down": (("--range", "1", "0"), "expected [low, high] with low < high"),
    "another task": (("--task", "ranking"), "expected --task classification, generation or regression, found"),
}


@pytest.mark.parametrize(("options", "fragment"), REFUSED.values(), ids=REFUSED.keys())
def test_a_draft_is_refused(options: tuple[str, ...], fragment: str, base: Path) -> None:
    code, _, error = draft(base, *options)
    assert code == 1
    assert fragment in error


def test_the_loss_of_one_number_is_bounded_in_the_counts() -> None:
    """A model that says an absurd number costs its candidate no more than the field of the counts holds."""
    from privacy.evaluation import Counts, encode_counts
    from privacy.secagg.quantize import LOSS_SCALE, MAX_LOSS

    for loss in (1e30, math.inf, math.nan):
        assert encode_counts(3, [Counts(0, loss)])["loss-0"] == 3 * MAX_LOSS * LOSS_SCALE
