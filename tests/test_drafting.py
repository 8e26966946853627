"""A draft is a complete plan, true to the model's files; the demo's plan and split are as they are said to be."""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from demo.corpus import LABELS as DESKS
from demo.corpus import articles, base_model, split
from demo.private import SITE_TOML
from participant.base_model import base_digest
from participant.cli import app
from participant.data import Examples, load_examples
from participant.dp_sgd import train_private
from participant.drafting import draft_plan
from participant.training import train
from privacy.adapter import check_start, layout_of, start_adapter
from privacy.budget.accounting import epsilon_of_rdp, pld_epsilon, rdp
from privacy.budget.events import DpSgd
from privacy.budget.terms import mechanism
from privacy.errors import UserError
from privacy.plan import load_plan, parse_plan
from tests.helpers_learning import LABELS, VOCABULARY, tiny_base, tiny_plan

DEMO_PLAN = Path(__file__).parent.parent / "demo" / "plan.toml"
PRIVATE_PLAN = DEMO_PLAN.with_name("plan-private.toml")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def draft(base: Path, **changes: Any) -> str:
    arguments: dict[str, Any] = {"base": base, "base_name": "tiny", "name": "p", "dataset": "d", "labels": LABELS}
    return draft_plan(**arguments | changes)


def test_a_draft_is_a_plan_with_the_models_facts(base: Path) -> None:
    plan = parse_plan(draft(base, rank=2, seed=bytes(32)).encode()).plan
    assert plan.base.digest == base_digest(base)
    assert plan.adapter.modules == {
        f"bert.encoder.layer.{layer}.attention.self.{name}": (32, 32) for layer in (0, 1) for name in ("query", "value")
    }
    assert plan.adapter.head == {"classifier.bias": (3,), "classifier.weight": (3, 32)}
    assert plan.adapter.alpha == 4.0
    assert plan.training.loss == "logit_adjusted"
    check_start(start_adapter(plan.adapter), plan.adapter)


def test_the_command_drafts_for_as_many_members_as_there_are(base: Path) -> None:
    names = ["draft", str(base), "--name", "p", "--base-name", "tiny", "--dataset", "d", "--label", "a", "--label", "b"]
    few = CliRunner().invoke(app, [*names, "--min-cohort", "3", "--max-cohort", "5", "--min-survivors", "3"])
    found = parse_plan(few.stdout.encode()).plan.round
    assert (found.min_cohort, found.max_cohort, found.min_survivors) == (3, 5, 3)
    impossible = CliRunner().invoke(app, [*names, "--min-cohort", "9"])
    assert "expected min_survivors <= min_cohort <= max_cohort, found 3, 9, 8" in str(impossible.exception)


def test_every_draft_has_its_own_seed_unless_one_is_given(base: Path) -> None:
    assert draft(base) != draft(base)
    assert draft(base, seed=bytes(32)) == draft(base, seed=bytes(32))


def test_labels_that_need_escaping_survive(base: Path) -> None:
    labels = ('say "no"', "back\\slash", "tab\there", "naïve \x7f")
    assert parse_plan(draft(base, labels=labels).encode()).plan.data.labels == labels


def test_other_targets_can_be_adapted(base: Path) -> None:
    modules = parse_plan(draft(base, targets=("output.dense",)).encode()).plan.adapter.modules
    assert modules["bert.encoder.layer.0.output.dense"] == (32, 64)
    assert modules["bert.encoder.layer.0.attention.output.dense"] == (32, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("q_proj",)}, r"linear modules named 'q_proj', found dense, key, query, value"),
        ({"targets": ("classifier",)}, r"linear modules named 'classifier'"),
        ({"rank": 33}, r"expected rank <= 32 for 'bert\..*', found 33"),
        ({"rank": 0}, r"draft: key 'rank': .* greater than or equal to 1, found 0"),
        ({"name": "No Such Name"}, r"draft: key 'name'"),
        ({"min_cohort": 9}, r"expected min_survivors <= min_cohort <= max_cohort"),
        ({"labels": ("a", "a")}, r"labels must be distinct"),
    ],
    ids=[
        "no such module",
        "the head is no target",
        "a rank too large",
        "no rank",
        "a bad name",
        "a bad cohort",
        "labels repeat",
    ],
)
def test_what_cannot_be_drafted_is_named(base: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        draft(base, **changes)


def test_a_base_model_without_pooler_cannot_be_drafted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"all but one linear head, found without weights: bert\.pooler"):
        draft(tiny_base(tmp_path, pooler=False))


def test_a_broken_weights_file_cannot_be_drafted(tmp_path: Path) -> None:
    (tiny_base(tmp_path) / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="expected a base model for sequence classification, found: ") as caught:
        draft(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_head_of_two_layers_cannot_be_drafted(tmp_path: Path) -> None:
    """RoBERTa's head starts with a dense layer: from zero it would never learn."""
    tiny_base(tmp_path)
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    transformers.RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"found without weights: classifier\.dense\.bias"):
        draft(tmp_path)


def test_the_demos_plan_fits_the_demos_model_and_start() -> None:
    plan = load_plan(DEMO_PLAN).plan
    assert plan.base.digest == base_digest(base_model())
    assert plan.data.labels == DESKS
    check_start(start_adapter(plan.adapter), plan.adapter)
    assert layout_of(plan.adapter).size == 12 * 384 * 8 + 5 * 384 + 5
    assert plan.round.max_weight > max(len(site) for site in split(articles()).sites)


def test_the_demos_private_plan_fits_the_model_and_the_sites_budgets() -> None:
    plan, usual = load_plan(PRIVATE_PLAN).plan, load_plan(DEMO_PLAN).plan
    check_start(start_adapter(plan.adapter), plan.adapter)
    assert (plan.base, plan.data.labels, plan.round.max_cohort) == (usual.base, usual.data.labels, 5)
    assert layout_of(plan.adapter).size == 5 * 384 + 5
    terms = mechanism(plan)
    assert isinstance(terms, DpSgd)
    budget = tomllib.loads(SITE_TOML.format(base_name="b", base="b", dataset="d", data="d", plan="p"))["datasets"]["d"]
    assert budget["budget"] == {"epsilon": "8", "delta": "1e-4"}
    assert f"{epsilon_of_rdp(rdp(terms, 3), 3, 1e-4):.2f}" == "7.94"
    assert f"{pld_epsilon([terms], 1e-4):.2f}" == "7.13"


@pytest.mark.slow
def test_the_demos_private_plan_trains_within_its_clipping_range() -> None:
    plan = load_plan(PRIVATE_PLAN).plan
    some = split(articles()).sites[0][:32]
    examples = Examples(tuple(a.text for a in some), tuple(DESKS.index(a.label) for a in some))
    start = start_adapter(plan.adapter)
    result = train_private(
        plan=plan,
        base=base_model(),
        start=start,
        examples=examples,
        device="cpu",
        threads=1,
        on_selftest=lambda _: None,
    )
    assert 0 < abs(result.delta).max() < plan.round.clip / 2


@pytest.mark.slow
def test_a_drafted_private_head_trains_within_its_clipping_range() -> None:
    """Its weights grow when they are taken back to the model's own features; a third of them was once clipped."""
    names = ["--name", "p", "--base-name", "b", "--dataset", "d", *(word for d in DESKS for word in ("--label", d))]
    privacy = ["--train", "head", "--epsilon", "8", "--size", "350"]
    drafted = CliRunner().invoke(app, ["draft", str(base_model()), *names, *privacy])
    assert drafted.exit_code == 0, drafted.output
    plan = parse_plan(drafted.stdout.encode()).plan
    assert (plan.aggregation.weights, plan.round.max_weight) == ("uniform", 1)
    some = split(articles()).sites[0][:32]
    result = train_private(
        plan=plan,
        base=base_model(),
        start=start_adapter(plan.adapter),
        examples=Examples(tuple(a.text for a in some), tuple(DESKS.index(a.label) for a in some)),
        device="cpu",
        threads=1,
        on_selftest=lambda _: None,
    )
    assert 0.5 < abs(result.delta).max() < plan.round.clip / 2


@pytest.mark.slow
def test_the_demos_plan_trains_the_demos_model_within_its_clipping_range() -> None:
    plan = load_plan(DEMO_PLAN).plan
    some = split(articles()).sites[0][:32]
    examples = Examples(tuple(a.text for a in some), tuple(DESKS.index(a.label) for a in some))
    result = train(
        plan=plan, base=base_model(), start=start_adapter(plan.adapter), examples=examples, device="cpu", threads=1
    )
    assert result.examples == 32
    assert 0 < abs(result.delta).max() < plan.round.clip


def test_the_demos_split_is_skewed_and_holds_a_fifth_out() -> None:
    found = articles()
    dealt = split(found)
    assert len(found) == 2225 == sum(map(len, dealt.sites)) + len(dealt.test)
    assert 0.2 <= len(dealt.test) / len(found) < 0.21
    for number, site in enumerate(dealt.sites):
        counts = Counter(article.label for article in site)
        assert 0.75 < counts[DESKS[number]] / len(site) < 0.85
        assert len(counts) == len(DESKS)
    known = {article.text for site in dealt.sites for article in site}
    assert known.isdisjoint(article.text for article in dealt.test)
    assert dealt == split(found)
    assert dealt != split(found, seed=1)


def test_the_demos_files_are_read_as_written(tmp_path: Path) -> None:
    from demo.corpus import write

    dealt = write(tmp_path)
    examples = load_examples(tmp_path / "site-1.jsonl", "jsonl", "text", "label", DESKS)
    assert examples.texts == tuple(article.text for article in dealt.sites[0])
    assert [DESKS[number] for number in examples.labels] == [article.label for article in dealt.sites[0]]
    assert {path.name for path in tmp_path.iterdir()} == {*(f"site-{i}.jsonl" for i in range(1, 6)), "test.jsonl"}


def test_the_tiny_plan_of_the_other_tests_is_a_draft(base: Path) -> None:
    assert tiny_plan(base).data.labels == LABELS


def test_the_chart_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from demo.chart import bar_chart

    summary = {"accuracy": {"base": 0.2, "alone_mean": 0.7, "alone_best": 0.8, "one_shot": 0.9}}
    bar_chart(summary, tmp_path / "new" / "accuracy.png")
    assert (tmp_path / "new" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_a_draft_of_several_stages_with_an_evaluation(base: Path) -> None:
    plan = parse_plan(draft(base, stages=3, holdout=0.25, rates=(0.5, 1.0)).encode()).plan
    assert (plan.stages, plan.last) == (3, 4)
    assert plan.evaluation is not None
    assert (plan.evaluation.holdout, plan.evaluation.server_lr) == (0.25, (0.5, 1.0))
    assert parse_plan(draft(base).encode()).plan.last == 1
    assert parse_plan(draft(base, holdout=0.25).encode()).plan.last == 2


def test_rates_to_vote_on_need_records_to_judge_by(base: Path) -> None:
    about = ["--name", "n", "--base-name", "b", "--dataset", "d", "--label", "a", "--label", "b"]
    with pytest.raises(UserError, match="expected --server-lr with --holdout"):
        CliRunner().invoke(app, ["draft", str(base), *about, "--server-lr", "0.5"], catch_exceptions=False)
