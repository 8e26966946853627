"""A site's side of the methods: a small model is trained, what it sends is checked, and PEFT loads every release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft
import pytest
import torch
from typer.testing import CliRunner

from coordinator.cli import app as coordinator_app
from coordinator.config import load_home
from coordinator.daemon import open_engine
from demo.federation import Federation
from participant import fetch, sending
from participant.data import Examples
from participant.drafting import draft_plan
from participant.evaluation import accuracy
from participant.factors import ensure_factors
from participant.policy import admit
from participant.prepare import prepare
from participant.site import Site
from participant.training import load_classifier, load_model, logits_of, tokenise, train
from privacy.adapter import (
    Tensors,
    a_name,
    b_name,
    check_start,
    check_tensors,
    layout_of,
    load_peft,
    save_peft,
    start_adapter,
    unflatten,
)
from privacy.aggregation import METHODS
from privacy.errors import Refusal, UserError
from privacy.factors import first_start, in_name, keep_factors, load_factors, out_name
from privacy.job import Job
from privacy.methods import (
    PROBES,
    core_name,
    dense_name,
    gram_name,
    merged,
    probe_name,
    probes,
    sent,
    vector_size,
    whole_gram,
)
from privacy.plan import Plan, parse_plan
from tests.helpers_learning import LABELS, tiny_base, tiny_plan, word_examples
from tests.methods import base_factors, plan_text

EXAMPLES = word_examples((24, 24, 24))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def the_plan(base: Path, method: str, **changes: Any) -> Plan:
    if method == "core":
        changes = {"factors_to": base.parent, "learning_rate": 0.1, "rank": 8} | changes
    return tiny_plan(base, method=method, clip=8.0, **changes)


def factors_of(plan: Plan, base: Path) -> Tensors | None:
    """Where drafting left them."""
    return None if plan.aggregation.core is None else load_factors(base.parent, plan)


def start_of(plan: Plan, base: Path) -> Tensors:
    return first_start(plan.adapter, factors_of(plan, base))


def released(plan: Plan, base: Path, vector: np.ndarray[Any, Any]) -> Tensors:
    """What one site's vector gives."""
    return merged(start_of(plan, base), vector.copy(), plan, factors=factors_of(plan, base)).tensors


def vector_of(plan: Plan, base: Path, examples: Examples = EXAMPLES) -> np.ndarray[Any, Any]:
    start, factors = start_of(plan, base), factors_of(plan, base)
    return train(plan=plan, base=base, start=start, examples=examples, device="cpu", threads=1, factors=factors).delta


@pytest.fixture(scope="module")
def trained(base: Path) -> dict[str, tuple[Plan, np.ndarray[Any, Any]]]:
    """Method -> plan and the vector of one site; not to be changed."""
    return {method: (plan := the_plan(base, method), vector_of(plan, base)) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_a_draft_is_a_plan_of_the_method(base: Path, method: Any) -> None:
    about: dict[str, Any] = {"base_name": "tiny", "name": "p", "dataset": "d", "labels": LABELS}
    text = draft_plan(base=base, method=method, factors_to=base.parent, **about)
    plan = parse_plan(text.encode()).plan
    assert plan.aggregation.method == method
    assert f"# {vector_size(plan):,} coordinates are sent." in text
    check_start(start_of(plan, base), plan.adapter)


@pytest.mark.parametrize("method", METHODS)
def test_the_release_of_one_site_has_learnt_and_peft_loads_it(
    base: Path, method: str, trained: dict[str, tuple[Plan, Any]], tmp_path: Path
) -> None:
    plan, vector = trained[method]
    assert (vector.shape, vector.dtype) == ((vector_size(plan),), np.float32)
    found = released(plan, base, vector)
    check_tensors(found, layout_of(plan.adapter))
    assert accuracy(plan=plan, base=base, adapter=found, examples=EXAMPLES, device="cpu").accuracy > 0.8
    save_peft(tmp_path / "released", found, adapter=plan.adapter, base_name="tiny")
    plain, tokenizer, _ = load_classifier(base, len(LABELS))
    loaded: Any = peft.PeftModel.from_pretrained(plain, str(tmp_path / "released"))
    state = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert all(state[name].numpy().tobytes() == found[name].tobytes() for name in found)
    ours = load_model(plan, base, found, "cpu").model
    inputs = tokenizer(["the apple", "the rhine"], return_tensors="pt")
    assert torch.equal(loaded.eval()(**inputs).logits, ours(**inputs).logits)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_plan_and_data_give_the_same_vector(
    base: Path, method: str, trained: dict[str, tuple[Plan, Any]]
) -> None:
    plan, vector = trained[method]
    assert np.array_equal(vector_of(plan, base), vector)


def test_both_trains_a_as_well(trained: dict[str, tuple[Plan, Any]]) -> None:
    plan, vector = trained["both"]
    parts, start = unflatten(vector, sent(plan)), start_adapter(plan.adapter)
    for module in plan.adapter.modules:
        assert np.any(parts[a_name(module)])
        a, b = start[a_name(module)] + parts[a_name(module)], parts[b_name(module)]
        v = probes(plan, module)
        assert parts[probe_name(module)].shape == (PROBES, 32)
        np.testing.assert_allclose(parts[probe_name(module)], v @ a.T @ b.T, atol=1e-5)
    frozen = unflatten(trained["freeze_a"][1], sent(trained["freeze_a"][0]))
    assert not any("lora_A" in name for name in frozen)


def test_a_probe_beyond_the_clipping_range_is_logged(
    trained: dict[str, tuple[Plan, Any]], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, vector = trained["both"]
    after = released(plan, base, vector)
    sending.probed(plan, after)
    assert "clipping the probe" not in capsys.readouterr().out
    tight = plan.model_copy(update={"round": plan.round.model_copy(update={"clip": 1e-3})})
    sending.probed(tight, after)
    assert "clipping the probe" in capsys.readouterr().out


# --- core -----------------------------------------------------------------------------------------------------------


def test_core_trains_what_lies_between_the_factors(base: Path, trained: dict[str, tuple[Plan, Any]]) -> None:
    plan, vector = trained["core"]
    found, factors = released(plan, base, vector), factors_of(plan, base)
    parts = unflatten(vector, sent(plan))
    assert factors is not None
    for module in plan.adapter.modules:
        core = parts[core_name(module)]
        assert core.shape == (8, 8)
        assert np.any(core)
        np.testing.assert_allclose(found[b_name(module)], factors[out_name(module)] @ core, atol=1e-5)
        np.testing.assert_array_equal(found[a_name(module)], factors[in_name(module)])
    assert vector_size(plan) == 4 * 64 + 3 * 32 + 3


def test_a_later_stage_adds_to_the_core(base: Path, trained: dict[str, tuple[Plan, Any]]) -> None:
    plan, vector = trained["core"]
    first, factors = released(plan, base, vector), factors_of(plan, base)
    second = train(plan=plan, base=base, start=first, examples=EXAMPLES, device="cpu", factors=factors)
    after = merged(first, second.delta.copy(), plan, factors=factors).tensors
    assert factors is not None
    for module in plan.adapter.modules:
        left, b = factors[out_name(module)], after[b_name(module)]
        np.testing.assert_allclose(left @ (left.T @ b), b, atol=1e-4)
        assert np.any(b != first[b_name(module)])


def test_core_without_its_factors_is_no_training(base: Path) -> None:
    plan = the_plan(base, "core")
    with pytest.raises(ValueError, match="needs the factors"):
        train(plan=plan, base=base, start=start_of(plan, base), examples=EXAMPLES, device="cpu")
    with pytest.raises(UserError, match="draft: expected a directory for the factors"):
        tiny_plan(base, method="core")
    with pytest.raises(UserError, match="expected a rank of at most 32 for module"):
        tiny_plan(base, method="core", factors_to=base.parent, targets=("layer.0.output.dense",), rank=33)


# --- dense ----------------------------------------------------------------------------------------------------------


def test_a_site_may_train_fewer_directions(base: Path, trained: dict[str, tuple[Plan, Any]]) -> None:
    plan, vector = trained["dense"]
    start = start_of(plan, base)
    found = train(plan=plan, base=base, start=start, examples=EXAMPLES, device="cpu", threads=1, rank=1)
    assert found.delta.shape == vector.shape
    narrow, wide = unflatten(found.delta, sent(plan)), unflatten(vector, sent(plan))
    for module in plan.adapter.modules:
        assert np.linalg.matrix_rank(narrow[dense_name(module)], tol=1e-5) == 1
        assert np.linalg.matrix_rank(wide[dense_name(module)], tol=1e-5) == 4
    tensors = released(plan, base, found.delta)
    assert accuracy(plan=plan, base=base, adapter=tensors, examples=EXAMPLES, device="cpu").accuracy > 0.5


def test_the_product_released_acts_as_what_the_site_trained(base: Path, trained: dict[str, tuple[Plan, Any]]) -> None:
    """One site of the plan's own rank: nothing is cut off."""
    plan, vector = trained["dense"]
    parts, found = unflatten(vector, sent(plan)), released(plan, base, vector)
    for module in plan.adapter.modules:
        np.testing.assert_allclose(found[b_name(module)] @ found[a_name(module)], parts[dense_name(module)], atol=1e-5)


def test_a_site_with_a_largest_rank_takes_dense_plans_alone(set_up: Federation, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path, "", "max_rank = 2\n")
    with pytest.raises(Refusal, match=r"has rank 8; this site trains at most 2 \(max_rank\), which only the method"):
        admit(job_of(site, "both"), site.home.settings)
    job = job_of(site, "dense")
    admit(job, site.home.settings)
    prepare(site, job, 1)
    local = load_peft(site.local_directory("sums", 1))
    for module in job.plan.adapter.modules:
        assert np.linalg.matrix_rank(local[b_name(module)], tol=1e-5) == 2


# --- regmean --------------------------------------------------------------------------------------------------------


def test_gram_matrices_are_those_of_what_a_says_of_the_tokens(base: Path) -> None:
    plan = the_plan(base, "regmean")
    settings = plan.aggregation.regmean
    assert settings is not None
    start = start_adapter(plan.adapter)
    loaded = load_model(plan, base, start, "cpu")
    texts = tokenise(loaded.tokenizer, EXAMPLES.texts, 8)
    assert len({len(text) for text in texts}) > 1, "some are padded"
    found = sending.gram_means(plan, loaded.model, texts, lambda batch: logits_of(loaded, batch))
    module = "bert.encoder.layer.0.attention.self.value"
    inputs: list[torch.Tensor] = []
    layer = dict(loaded.model.named_modules())[f"base_model.model.{module}.base_layer"]
    handle = layer.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    grams = []
    with torch.no_grad():
        for text in texts:
            logits_of(loaded, [text])  # alone, so without padding
            z = inputs[-1][0].double().numpy() @ start[a_name(module)].T.astype(np.float64)
            z = np.clip(z / settings.feature_clip, -1, 1)
            grams.append(z.T @ z / len(z))
    handle.remove()
    np.testing.assert_allclose(found[module], np.mean(grams, axis=0), rtol=1e-5, atol=1e-8)
    assert found.keys() == plan.adapter.modules.keys()


def test_a_site_sends_its_gram_matrix_and_b_times_it(trained: dict[str, tuple[Plan, Any]]) -> None:
    plan, vector = trained["regmean"]
    plain = unflatten(trained["freeze_a"][1], sent(trained["freeze_a"][0]))
    parts = unflatten(vector, sent(plan))
    settings = plan.aggregation.regmean
    assert settings is not None
    for module in plan.adapter.modules:
        gram = whole_gram(parts[gram_name(module)], 4, plan.round.clip)
        assert 0 < gram.trace() < 4
        np.testing.assert_allclose(
            parts[b_name(module)],
            plain[b_name(module)] @ (gram + settings.ridge * np.eye(4)) / (1 + settings.ridge),
            atol=1e-6,
        )


def test_one_site_alone_gets_its_own_b_back(base: Path, trained: dict[str, tuple[Plan, Any]]) -> None:
    """What a site's own vector gives is what freeze_a gives it."""
    plan, vector = trained["regmean"]
    alone, plain = released(plan, base, vector), released(*trained["freeze_a"][:1], base, trained["freeze_a"][1])
    for name in plain:
        np.testing.assert_allclose(alone[name], plain[name], atol=1e-4)


def test_what_is_beyond_the_clipping_range_is_logged(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = the_plan(base, "regmean", epochs=1)
    assert plan.aggregation.regmean is not None
    tight = plan.aggregation.regmean.model_copy(update={"feature_clip": 0.1})
    plan = plan.model_copy(update={"aggregation": plan.aggregation.model_copy(update={"regmean": tight})})
    vector_of(plan, base)
    assert "feature_clip=0.1" in capsys.readouterr().out


SITE = """device = "cpu"
threads = 1
[models]
tiny = "base"
[datasets.words]
path = "words.jsonl"
format = "jsonl"
[policy]
plans = ["*"]
"""


def site_with(set_up: Federation, directory: Path, policy: str, own: str = "") -> Site:
    for path in set_up.site("site-1").iterdir():
        if path.is_file():
            (directory / path.name).write_bytes(path.read_bytes())
            (directory / path.name).chmod(0o600)
    head = (directory / "participant.toml").read_text().split("keep_plain_vector")[0]
    (directory / "participant.toml").write_text(head + own + SITE + policy)
    tiny_base(directory / "base")
    texts = zip(EXAMPLES.texts, EXAMPLES.labels, strict=True)
    (directory / "words.jsonl").write_text(
        "".join(
            json.dumps({"text": f"{text} {i}", "label": LABELS[label]}) + "\n" for i, (text, label) in enumerate(texts)
        )
    )
    return Site.open(directory)


def job_of(site: Site, method: Any, **changes: Any) -> Job:
    about: dict[str, Any] = {"base_name": "tiny", "dataset": "words", "labels": LABELS, "max_length": 8, "epochs": 1}
    drafts = site.home.directory / "drafts"
    text = draft_plan(
        base=site.home.directory / "base",
        name="sums",
        method=method,
        max_weight=1024,
        factors_to=drafts,
        **about | changes,
    )
    return Job.of(parse_plan(text.encode()), site.roster, site.home.factors)


@pytest.mark.parametrize("method", METHODS)
def test_a_site_keeps_its_vector_and_what_it_gives_alone(set_up: Federation, method: str, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path, "min_texts = 20\n")
    job = job_of(site, method)
    admit(job, site.home.settings)
    assert prepare(site, job, 1).weight == 72
    local = load_peft(site.local_directory("sums", 1))
    check_tensors(local, job.layout)
    assert all(np.any(local[name]) for name, _ in job.layout.trained)


def test_a_site_computes_the_factors_from_its_own_base_model(set_up: Federation, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path, "")
    job = job_of(site, "core")
    with pytest.raises(UserError, match="expected the factors of plan"):
        job.factors()
    ensure_factors(site, job)
    (path,) = site.home.factors.iterdir()
    assert path.read_bytes() == (tmp_path / "drafts" / path.name).read_bytes()
    ensure_factors(site, job)
    raw = job.plan_file.raw.replace(path.stem.encode(), b"0" * 64)
    with pytest.raises(UserError, match=f"expected factors {'0' * 64}, found {path.stem} from the base model"):
        ensure_factors(site, Job.of(parse_plan(raw), site.roster, site.home.factors))


def test_a_site_that_comes_late_computes_the_factors_too(set_up: Federation, tmp_path: Path) -> None:
    """It needs the start of stage 1 before it prepares anything."""
    site = site_with(set_up, tmp_path, "")
    job = job_of(site, "core")
    assert not site.home.factors.exists() or not list(site.home.factors.iterdir())
    start = fetch.start_of(site, mock.Mock(), job, 1)
    assert start.digest.hex() == job.plan.adapter.digest


def test_a_site_without_a_minimum_of_its_own_takes_no_regmean(set_up: Federation, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path, "")
    with pytest.raises(Refusal, match=r"sums statistics of the records; this site has not opted in \(min_texts\)"):
        admit(job_of(site, "regmean"), site.home.settings)


def test_a_site_with_too_few_texts_sits_out(set_up: Federation, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path, "min_texts = 73\n")
    with pytest.raises(UserError, match="expected at least 73 different texts"):
        prepare(site, job_of(site, "regmean"), 1)


def test_the_coordinator_takes_a_plan_with_its_factors_alone(tmp_path: Path) -> None:
    names = [f"m{i}" for i in range(5)]
    federation = Federation(
        tmp_path / "f",
        names,
        {"max_colluders": 1, "min_cohort": 4, "min_survivors": 3},
        dict.fromkeys(names, ""),
    )
    federation.create()
    home = load_home(federation.coordinator)
    digest = keep_factors(tmp_path, base_factors(), private=False)
    plan = tmp_path / "plan.toml"
    plan.write_text(plan_text("core", factors=digest))
    engine = open_engine(home)
    with pytest.raises(UserError, match="expected the factors of plan 'sums'"):
        engine.submit_plan(plan.read_bytes())
    assert not engine.store.plans()
    submit = ["plan", "submit", str(plan), "--dir", str(federation.coordinator)]
    (tmp_path / "elsewhere").mkdir()
    missing = CliRunner().invoke(coordinator_app, [*submit, "--factors", str(tmp_path / "elsewhere")])
    assert "expected the factors of plan 'sums'" in str(missing.exception)
    offered = CliRunner().invoke(coordinator_app, submit)
    assert "expected a coordinator running" in str(offered.exception), "none runs; the factors are there by now"
    engine.submit_plan(plan.read_bytes())
    assert engine.store.plans()[0].name == "sums"
    engine.store.close()
