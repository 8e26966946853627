"""Numbers weighted by squared gradients: the release is the plain computation on the sites' own tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from demo.federation import Federation
from participant import sending
from participant.policy import admit
from participant.prepare import prepare
from participant.training import load_model, log_prior, logits_of, read_adapter, tokenise, train
from privacy.adapter import a_name, flatten, layout_of, release, start_adapter, trained_part, unflatten
from privacy.errors import ProtocolError, Refusal, UserError
from privacy.job import Job
from privacy.methods import fisher_name, merged, sent
from privacy.outcome import combine
from privacy.plan import parse_plan
from tests.analytic import run_round
from tests.helpers_learning import LABELS, SPELLINGS, spelled, tiny_base, tiny_plan, word_examples
from tests.methods import (
    MODULES,
    WEIGHTS,
    Trained,
    close,
    mean_of,
    plan_text,
    quantised,
    released,
    sites,
    the_job,
    unit,
    vector_of,
)
from tests.test_methods_site import job_of, site_with


def weights_of(job: Job, site: Trained, name: str) -> np.ndarray[Any, Any]:
    """What a number of a tensor counts at a site, written out once more."""
    fisher = job.plan.aggregation.fisher
    assert fisher is not None
    squares = site.squares[name].astype(np.float64)
    return np.asarray(np.clip(squares / (fisher.reach * squares.mean()), 0, 1) + fisher.ridge)


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_fisher_weights_each_number(ridge: float, tmp_path: Path) -> None:
    job = the_job("fisher", ridge=ridge)
    everybody, start = sites(job), job.start_tensors()
    combined = released(job, everybody, tmp_path)
    for name, _ in layout_of(job.plan.adapter).trained:
        weights = [weights_of(job, site, name) for site in everybody]
        deltas = [site.after[name].astype(np.float64) - start[name] for site in everybody]
        above = mean_of([w * d for w, d in zip(weights, deltas, strict=True)], list(WEIGHTS))
        exact = above / mean_of(weights, list(WEIGHTS))
        # Both sums are off by a unit, relative to weights of at least ridge / (1 + ridge).
        within = 3 * unit(job) * (1 + ridge) / ridge
        close(combined.tensors[name] - start[name], exact, within)
        assert np.abs(exact - mean_of(deltas, list(WEIGHTS))).max() > 10 * within
    for module in MODULES:
        assert np.array_equal(combined.tensors[a_name(module)], start[a_name(module)])
    assert combined.facts == {"method": "fisher"}


def test_numbers_that_rounding_hides_are_counted_in_the_manifest(tmp_path: Path) -> None:
    job = the_job("fisher", ridge=1e-6, bits=16)
    everybody = sites(job)
    for site in everybody:
        for squares in site.squares.values():
            squares.flat[::2] = 0
    combined, start = released(job, everybody, tmp_path), job.start_tensors()
    lost = combined.facts["numbers_lost_in_rounding"]
    names = [name for name, _ in layout_of(job.plan.adapter).trained]
    assert 0 < lost <= sum(int((combined.tensors[name] == start[name]).sum()) for name in names)


def test_a_large_ridge_gives_the_plain_mean(tmp_path: Path) -> None:
    job = the_job("fisher", ridge=1e5)
    everybody = sites(job)
    combined = released(job, everybody, tmp_path)
    for name, _ in layout_of(job.plan.adapter).trained:
        close(combined.tensors[name], mean_of([site.after[name] for site in everybody], list(WEIGHTS)), 1e-4)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 0.01, 10.0]))
def test_a_weighted_mean_lies_between_the_sites(seed: int, ridge: float) -> None:
    job = the_job("fisher", ridge=ridge)
    rng, start = np.random.default_rng(seed), job.start_tensors()
    everybody = sites(job)
    for site in everybody:
        for name in site.squares:
            site.squares[name][:] = rng.exponential(size=site.squares[name].shape) * 10.0 ** rng.integers(-9, 3)
    mean = np.mean([vector_of(job, site).astype(np.float64) for site in everybody], axis=0).astype(np.float32)
    found = merged(start, mean, job.plan)
    for name, _ in layout_of(job.plan.adapter).trained:
        stacked = np.stack([site.after[name] for site in everybody]).astype(np.float64)
        assert (found.tensors[name] <= stacked.max(axis=0) + 1e-4).all()
        assert (found.tensors[name] >= stacked.min(axis=0) - 1e-4).all()


def test_a_tensor_without_gradients_counts_as_the_ridge_says() -> None:
    job = the_job("fisher")
    site = sites(job)[0]
    for squares in site.squares.values():
        squares[:] = 0
    parts = unflatten(vector_of(job, site), sent(job.plan))
    for name, _ in layout_of(job.plan.adapter).trained:
        np.testing.assert_allclose(parts[fisher_name(name)] / job.plan.round.clip, 0.01 / 1.01, rtol=1e-6)


#: Sentence -> (part, value relative to Qmax, the refusal).
TAMPERED = {
    "a negative weight": ("base_model.model.classifier.bias.fisher", -1.5, "expected weights from 0 to 1"),
    "a weight beyond 1": ("base_model.model.classifier.bias.fisher", 1.5, "expected weights from 0 to 1"),
    "more than its weight": ("base_model.model.classifier.bias", 1.5, "expected weighted numbers within"),
}


@pytest.mark.parametrize(("part", "value", "reason"), TAMPERED.values(), ids=TAMPERED.keys())
def test_weights_of_no_sites_are_refused(part: str, value: float, reason: str, tmp_path: Path) -> None:
    job = the_job("fisher")
    vectors = quantised(job, sites(job))
    at = 0
    for name, shape in sent(job.plan).trained:
        if name == part:
            break
        at += int(np.prod(shape))
    vectors[1][at] = int(value * job.quantizer.qmax)
    with pytest.raises(ProtocolError, match=reason):
        combine(job, [run_round(job, vectors, tmp_path / "total", {})])


BAD = {
    "without its section": ("freeze_a", '"freeze_a"', '"fisher"', "fisher: expected this section"),
    "its section alone": ("fisher", '"fisher"', '"freeze_a"', "fisher: expected this section"),
    "without a ridge": ("fisher", "ridge = 0.01", "ridge = 0.0", "aggregation.fisher.ridge"),
    "with a counted head": (
        "fisher",
        'method = "fisher"',
        'method = "fisher"\nhead = "counted"\ncounted = { min_class_count = 1 }',
        'expected "trained" with method "fisher"',
    ),
}


@pytest.mark.parametrize(("method", "old", "new", "fragment"), BAD.values(), ids=BAD.keys())
def test_a_bad_plan_is_refused(method: str, old: str, new: str, fragment: str) -> None:
    text = plan_text(method)
    assert old in text
    with pytest.raises(UserError) as refused:
        parse_plan(text.replace(old, new, 1).encode(), "plan.toml")
    assert fragment in str(refused.value)


# --- at a site -------------------------------------------------------------------------------------------------------


def test_squares_are_those_of_each_record_alone(tmp_path: Path) -> None:
    """Against one record after another, from the model as a site trained it."""
    base, examples = tiny_base(tmp_path), word_examples((6, 4, 3))
    plan, plain = (tiny_plan(base, method=method, epochs=1) for method in ("fisher", "freeze_a"))
    start, about = start_adapter(plan.adapter), {"base": base, "examples": examples, "device": "cpu", "threads": 1}
    parts = unflatten(train(plan=plan, start=start, **about).delta, sent(plan))  # type: ignore[arg-type]
    delta = train(plan=plain, start=start, **about).delta  # type: ignore[arg-type]
    loaded = load_model(plan, base, release(start, delta, 1.0, layout_of(plan.adapter)), "cpu")
    texts, prior = tokenise(loaded.tokenizer, examples.texts, 8), log_prior(examples.labels, 3)
    trained = {n: p for n, p in loaded.model.named_parameters() if p.requires_grad}
    squares = {name: torch.zeros_like(p) for name, p in trained.items()}
    for text, label in zip(texts, examples.labels, strict=True):
        loaded.model.zero_grad()
        cross_entropy(logits_of(loaded, [text]) + prior, torch.tensor([label])).backward()  # type: ignore[no-untyped-call]
        for name, parameter in trained.items():
            assert parameter.grad is not None
            squares[name] += parameter.grad**2 / len(texts)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(squares[name])
    layout = layout_of(plan.adapter)
    expected = sending.by_fisher(plan, unflatten(delta, layout), trained_part(read_adapter(loaded.model), layout))
    np.testing.assert_allclose(flatten(parts, sent(plan)), flatten(expected, sent(plan)), rtol=1e-3, atol=1e-6)


def test_a_site_opts_in_to_fisher(set_up: Federation, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path, "")
    with pytest.raises(Refusal, match=r"sums statistics of the records; this site has not opted in \(min_texts\)"):
        admit(job_of(site, "fisher"), site.home.settings)


def test_a_site_with_too_few_texts_sits_out(set_up: Federation, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path, "min_texts = 73\n")
    with pytest.raises(UserError, match="expected at least 73 different texts"):
        prepare(site, job_of(site, "fisher"), 1)


@pytest.mark.parametrize("method", ["fisher", "regmean"])
@pytest.mark.parametrize("kind", SPELLINGS)
def test_a_site_with_spellings_of_few_texts_sits_out(
    kind: str, method: str, set_up: Federation, tmp_path: Path
) -> None:
    site = site_with(set_up, tmp_path, "")
    lines = [{"text": text, "label": LABELS[i % 3]} for i, text in enumerate(("a pear", *spelled(kind, 24)))]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"at least 20 different texts \(min_texts\), found 2"):
        prepare(site, job_of(site, method), 1)
