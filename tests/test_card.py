"""The model card of a release: what it says, what no plan can make it say, and that it is the same for everybody."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors import safe_open
from typer.testing import CliRunner

from coordinator.cli import app as coordinator_app
from participant.fetch import fetch_release
from privacy.adapter import CARD_FILE, a_name, b_name, save_peft, start_adapter
from privacy.audit import audit_release
from privacy.card import LAYOUT, model_card
from privacy.cli import app
from privacy.errors import ProtocolError
from privacy.job import Job
from privacy.outcome import Facts
from privacy.plan import Plan, PlanFile
from privacy.roster import Rules, parse_roster
from privacy.secagg.keys import identity_public
from privacy.statement import privacy_statement
from tests.helpers_learning import LABELS, TARGET, private_plan, regression_plan, tiny_base, tiny_plan
from tests.helpers_text import text_plan, tiny_causal
from tests.on_disk import OnDisk
from tests.simulation import identity
from tests.staged import released, run_stage, staged

NAMES = ("northern-clinic", "southern-clinic", "eastern-clinic", "western-clinic")
HOSTILE = (
    "a\n---\nlicense: mit\n---\n# Safe",
    "<script>alert(1)</script>",
    "`</code><img src=x onerror=alert(1)>`",
    "[click](https://evil.example) | **bold** https://evil.example",
    'x"\n- inference: true #',
    "```\n\n## Privacy\n\nEpsilon 0.1\n",
    "\u202eevil\u2028\x1b[31m\x00 \\n \\",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("card") / "tiny")


def job_of(plan: Plan, policy: str = "max_colluders = 1\nmin_cohort = 4\nmin_survivors = 3") -> Job:
    lines = ["federation = 'f'", f"coordinator = '{'9' * 64}'", "[policy]", policy]
    for number, name in enumerate(NAMES):
        lines += ["[[members]]", f"name = '{name}'", f"key = '{identity_public(identity(number)).hex()}'"]
    return Job.of(PlanFile(plan, b""), parse_roster("\n".join(lines).encode()))


def changed(plan: Plan, **changes: dict[str, Any]) -> Plan:
    """The plan with other keys in some sections, and validated again where it is not only words that change."""
    fields = plan.model_dump()
    for section, keys in changes.items():
        fields[section] = (fields[section] or {}) | keys
    return Plan.model_validate(fields)


def facts_of(job: Job, stage: int = 1, **more: Any) -> Facts:
    """In the form of :func:`privacy.outcome.manifest`."""
    cohort = {"round": 7, "survivors": list(NAMES[:3]), "total_weight": 321, "certified": True}
    return {
        "plan": job.plan.name,
        "plan_digest": job.plan_file.digest.hex(),
        "stage": stage,
        "adapter_digest": "ab" * 32,
        "training_loss": 0.25,
        "cohorts": [cohort],
    } | more


def card_of(plan: Plan, stage: int = 1, **more: Any) -> str:
    job = job_of(plan)
    return model_card(job, facts_of(job, stage, **more)).decode()


def as_hub(card: str) -> Any:
    """The card as the Hub's own library parses it."""
    return ModelCard(card)


def flowing(text: str) -> str:
    """The text with lines joined, as it reads."""
    return " ".join(text.split())


# --- what it says ----------------------------------------------------------------------------------------------------


def test_the_header_is_what_the_hub_reads(base: Path) -> None:
    data = as_hub(card_of(tiny_plan(base))).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("tiny", "peft", "text-classification")
    assert data.tags == ["lora", "federated-learning", "secure-aggregation", "veilsum"]
    assert "differential-privacy" in as_hub(card_of(private_plan(base))).data.tags
    local = changed(tiny_plan(base), base={"name": "./a directory"})
    assert as_hub(card_of(local)).data.base_model is None, "the Hub refuses a card with such a name"


def test_numbers_of_members_are_told_and_never_their_names(base: Path) -> None:
    text = card_of(tiny_plan(base))
    assert "| 7 | 3 | 321 |" in text
    assert not any(name in text for name in NAMES)


def test_base_labels_and_digests_are_told(base: Path) -> None:
    plan = tiny_plan(base)
    text = card_of(plan)
    for word in (
        plan.base.digest,
        "ab" * 32,
        "`fruit`, `metal`, `river`",
        "rank 4, alpha 8",
        "Mean loss of training: 0.25",
    ):
        assert word in text


def test_a_regression_tells_its_range(base: Path) -> None:
    text = card_of(regression_plan(base), target=list(TARGET))
    assert "a number from 10.0 to 50.0" in text
    assert "Labels" not in text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"probe": {"directions": 2, "relative_error": 0.31, "of_rounding": 4.2e-07}}, "averaging apart: 0.31 of"),
        ({"truncation": {"relative_error": 0.12, "of_rounding": 3.1e-06}}, "cutting back to the rank: 0.12 of"),
        ({"ridge": 0.001}, "Ridge that was used: 0.001."),
    ],
    ids=["both", "dense", "ridge"],
)
def test_a_methods_own_error_is_told(base: Path, more: Facts, said: str) -> None:
    assert said in card_of(tiny_plan(base), **more)
    assert said not in card_of(tiny_plan(base))


def test_an_evaluation_is_a_table_with_the_elected_one_marked(base: Path) -> None:
    plan = changed(tiny_plan(base), evaluation={"holdout": 0.2})
    rows = [
        {"candidate": name, "records": 40, "correct": correct, "accuracy": correct / 40, "loss": 0.5}
        for name, correct in (("base", 10), ("server_lr 1", 30))
    ]
    text = card_of(plan, 2, evaluation={"elected": "server_lr 1", "candidates": rows})
    assert "| base | 40 | 10 | 0.2500 | 0.5000 |" in text
    assert "| server_lr 1 (this one) | 40 | 30 | 0.7500 | 0.5000 |" in text
    assert "how many of the held-out answers were right" in text
    assert "Evaluation" not in card_of(tiny_plan(base))


# --- the privacy statement -------------------------------------------------------------------------------------------


def test_without_privacy_no_epsilon_is_claimed(base: Path) -> None:
    text = flowing(card_of(tiny_plan(base)))
    assert "**No differential privacy:**" in text
    assert "epsilon" not in text.lower()
    assert "over at least 3 members, of whom at most 1 were assumed to work with the coordinator" in text
    assert "the sum of at least 2 others" in text


def test_the_numbers_of_the_policy_are_told_not_those_of_a_plan_that_asks_for_less(base: Path) -> None:
    job = job_of(tiny_plan(base), "max_colluders = 2\nmin_cohort = 4\nmin_survivors = 4")
    text = flowing(model_card(job, facts_of(job)).decode())
    assert "over at least 4 members, of whom at most 2 were assumed" in text


def test_the_guarantee_is_the_plans_own(base: Path) -> None:
    plan = private_plan(base, epsilon="8", sigma=None)
    text = flowing(card_of(plan))
    assert "calibrated for epsilon 8 and delta 1e-4" in text
    assert "for adding or removing one record of that site's data set" in text
    assert "No differential privacy" not in text
    assert "Mean loss of training" not in text, "a site sends none under privacy"
    user = flowing(card_of(private_plan(base, epsilon="8", sigma=None, unit="user", max_records_per_unit=4)))
    assert "adding or removing all records of one user, at most 4, of that site's data set" in user
    zero = flowing(card_of(private_plan(base, epsilon="8", sigma=None, adjacency="zero-out")))
    assert "replacing one record by nothing of that site's data set" in zero


def test_several_trainings_are_added_up(base: Path) -> None:
    plan = private_plan(base, epsilon="2.5", sigma=None).model_copy(update={"stages": 3})
    assert "follows 3 such trainings of a site: together at most epsilon 7.5, delta 0.0003" in flowing(card_of(plan, 3))
    assert "such trainings" not in card_of(plan, 1)


def test_noise_without_an_epsilon_is_told_as_noise(base: Path) -> None:
    text = flowing(card_of(private_plan(base)))
    assert "a multiplier of 1.0 at delta 1e-4, and no epsilon" in text
    assert "calibrated" not in text


def test_a_sum_of_two_is_said_to_hide_nothing_from_its_members(base: Path) -> None:
    said = "A member of a cohort of two knows the other's update"
    assert said in flowing("\n".join(privacy_statement(tiny_plan(base), Rules(4, 0, 2, 2, 24), 1)))
    assert said not in flowing(card_of(tiny_plan(base)))


def test_sums_of_statistics_are_told(base: Path) -> None:
    plan = changed(tiny_plan(base), aggregation={"head": "counted", "counted": {"min_class_count": 5}})
    text = flowing(card_of(plan, head="counted"))
    assert "They contain statistics of records" in text
    assert "Head `counted`: each row of the head counts by a site's records of its class." in text
    assert "statistics of records" not in card_of(tiny_plan(base))


# --- what no plan can make it say ------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", HOSTILE)
def test_words_of_a_plan_stay_words(base: Path, word: str) -> None:
    """Neither header nor structure of a card depends on what base model and labels are called."""
    plain, plan = tiny_plan(base), tiny_plan(base)
    names: dict[str, dict[str, Any]] = {"base": {"name": word}, "data": {"labels": (word, "metal", "river")}}
    text, usual = card_of(changed(plan, **names)), card_of(changed(plain, base={"name": "no hub name"}))
    assert as_hub(text).data.to_dict() == as_hub(usual).data.to_dict()

    def structure(card: str) -> list[tuple[str, str]]:
        tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(as_hub(card).text)
        flat = [one for token in tokens for one in (token, *(token.children or ()))]
        return [(t.type, t.tag) for t in flat if t.type not in ("text", "softbreak")]

    assert structure(text) == structure(usual)
    assert not any(kind.startswith(("html", "link", "image")) for kind, _ in structure(text))
    assert all(c.isprintable() or c == "\n" for c in text)


def test_letters_of_any_script_can_be_read(base: Path) -> None:
    plan = changed(tiny_plan(base), data={"labels": ("Économie", "経済", "наука & R")})
    assert "`Économie`, `経済`, `наука & R`" in card_of(plan)


# --- one card for everybody ------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> Iterator[OnDisk]:
    found = OnDisk(tmp_path, plan=staged(2))
    run_stage(found, 1)
    yield found
    found.engine.store.close()


def test_coordinator_sites_and_auditor_have_the_same_bytes(world: OnDisk) -> None:
    run_stage(world, 2)
    for stage in (1, 2):
        card = (released(world, stage) / "adapter" / CARD_FILE).read_bytes()
        assert audit_release(released(world, stage), world.job.roster_file.hash).card == "holds"
        assert f"stage {stage} of 2".encode() in card
        for i in range(world.n):
            assert fetch_release(world.site(i), world.daemons[i].client, world.job, stage)
            assert (world.site(i).release_directory("toy", stage) / "adapter" / CARD_FILE).read_bytes() == card


def test_a_changed_card_is_named_and_a_release_without_one_is_valid(world: OnDisk) -> None:
    directory, pin = released(world, 1), world.job.roster_file.hash
    path = directory / "adapter" / CARD_FILE
    card = path.read_bytes()
    path.write_bytes(card.replace(b"No differential privacy", b"Full differential privacy"))
    with pytest.raises(ProtocolError, match=r"README\.md: expected the model card that plan and totals give"):
        audit_release(directory, pin)
    path.unlink()
    assert audit_release(directory, pin).card == "none"
    shown = CliRunner().invoke(app, ["transcript", str(directory)])
    assert "the model card was not compared: the release has none" in shown.output


def test_a_card_of_another_layout_is_not_taken_for_compared(world: OnDisk) -> None:
    directory = released(world, 1)
    path = directory / "adapter" / CARD_FILE
    path.write_bytes(path.read_bytes().replace(b"layout %d." % LAYOUT, b"layout %d." % (LAYOUT + 1)))
    assert audit_release(directory).card == f"layout {LAYOUT + 1}"
    found = json.loads(CliRunner().invoke(app, ["transcript", str(directory), "--json"]).output)
    assert f"it says it is of layout {LAYOUT + 1}" in " ".join(found["not_shown"])
    path.write_bytes(path.read_bytes() + b"more\n")
    with pytest.raises(ProtocolError, match="expected the model card"):
        audit_release(directory)


def test_the_operator_is_told_where_it_lies(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    from coordinator.report import report

    found = json.loads(report(world.engine, "toy"))
    monkeypatch.setattr(
        "coordinator.cli._operator", lambda _: type("Told", (), {"report": staticmethod(lambda _: found)})()
    )
    shown = CliRunner().invoke(coordinator_app, ["show", "toy"])
    card = released(world, 1) / "adapter" / CARD_FILE
    assert f"  model card: {card}" in shown.output
    assert card.exists()
    del found["release"]["card"]
    assert "model card" not in CliRunner().invoke(coordinator_app, ["show", "toy"]).output


def test_adapter_and_card_are_replaced_together(base: Path, tmp_path: Path) -> None:
    plan, target = tiny_plan(base), tmp_path / "adapter"
    tensors = start_adapter(plan.adapter)

    def save(card: bytes) -> int:
        save_peft(target, tensors, adapter=plan.adapter, base_name="tiny", card=card)
        assert (target / CARD_FILE).read_bytes() == card
        return target.stat().st_ino

    first = save(b"one")
    assert save(b"one") == first
    assert save(b"two") != first
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# --- what it says of loading is so -----------------------------------------------------------------------------------


def saved(plan: Plan, directory: Path) -> dict[str, Any]:
    """A release with random numbers and its card in ``directory``; what the card's Python leaves when it runs there."""
    job, chance = job_of(plan), np.random.default_rng(0)
    start = start_adapter(plan.adapter)
    tensors = {n: t if "lora_A" in n else chance.normal(0, 0.3, t.shape).astype(np.float32) for n, t in start.items()}
    card = model_card(job, facts_of(job))
    save_peft(directory / "adapter", tensors, adapter=plan.adapter, base_name=plan.base.name, card=card)
    lines = re.findall(r"```python\n(.*?)```", card.decode(), re.DOTALL)
    assert len(lines) == 1
    (directory / "load.py").write_text(lines[0])
    return runpy.run_path(str(directory / "load.py")) | {"tensors": tensors}


def assert_loaded(left: dict[str, Any]) -> None:
    state = peft.get_peft_model_state_dict(left["model"], save_embedding_layers=False)
    assert state.keys() == left["tensors"].keys()
    assert all(np.array_equal(state[name].numpy(), tensor) for name, tensor in left["tensors"].items())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which the names of the cards' Python are those of real files."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_of_a_card_classifies(here: Path) -> None:
    left = saved(tiny_plan(tiny_base(here / "tiny")), here)
    assert_loaded(left)
    assert left["answer"][0]["label"] in LABELS
    answers = [left["ask"](f"the {word}")[0] for word in ("apple", "iron", "rhine")]
    inputs = left["tokenizer"](["the apple", "the iron", "the rhine"], return_tensors="pt")
    logits = left["model"](**inputs).logits
    assert [LABELS[int(row.argmax())] for row in logits] == [one["label"] for one in answers]
    assert "vLLM serves adapters of language models only" in (here / "adapter" / CARD_FILE).read_text()


def test_the_python_of_a_card_estimates_in_the_targets_own_unit(here: Path) -> None:
    left = saved(regression_plan(tiny_base(here / "tiny")), here)
    assert_loaded(left)
    said = left["model"](**left["tokenizer"]("A text", return_tensors="pt")).logits.item()
    low, high = TARGET
    assert left["answer"] == pytest.approx((low + high) / 2 + said * (high - low) / 2, rel=1e-4)


@pytest.mark.parametrize("template", ["model", "chatml", "none"])
def test_the_python_of_a_card_generates(here: Path, template: str) -> None:
    left = saved(text_plan(tiny_causal(here / "tiny"), template=template), here)
    assert_loaded(left)
    assert left["answer"][0]["generated_text"]


def test_the_adapter_of_a_language_model_has_the_layout_that_vllm_reads(here: Path) -> None:
    """The rules of vLLM's ``PEFTHelper``, ``parse_fine_tuned_lora_name`` and ``MaxLoRARanks``; it was not run."""
    plan = text_plan(tiny_causal(here / "tiny"), rank=6)
    saved(plan, here)
    directory = here / "adapter"
    assert {path.name for path in directory.iterdir()} == {
        CARD_FILE,
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((directory / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert (config["bias"], config["modules_to_save"], config["use_dora"]) == ("none", None, False)
    with safe_open(directory / "adapter_model.safetensors", "np") as file:
        names = set(file.keys())
    modules = {m[1] for name in names if (m := re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", name))}
    assert names == {make(module) for module in modules for make in (a_name, b_name)}
    assert modules == set(config["target_modules"])
    assert "--max-lora-rank 8 --lora-modules tiny-text=adapter" in (directory / CARD_FILE).read_text()
