"""Every method's release is what a plain computation on the sites' own tensors gives, through the masked round."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.publish import CohortTotal, publish
from privacy import methods
from privacy.adapter import a_name, b_name, layout_of, load_peft, save_peft, start_digest
from privacy.aggregation import METHODS
from privacy.audit import audit_release
from privacy.errors import ProtocolError, UserError
from privacy.job import Job
from privacy.methods import PROBES, Rounding, merged, probes, sent
from privacy.outcome import combine, manifest
from privacy.plan import parse_plan
from tests.analytic import evidence_of, job_for, run_round
from tests.methods import (
    MODULES,
    RANK,
    SITES,
    WEIGHTS,
    Matrix,
    Trained,
    check_head,
    close,
    factors,
    mean_of,
    plan_text,
    quantised,
    released,
    sites,
    the_job,
    unit,
    vector_of,
)

# --- what is sent ---------------------------------------------------------------------------------------------------

LOWER = sum(outputs * RANK for outputs, _ in MODULES.values()) + 3 + 12
SIZES = {
    "freeze_a": LOWER,
    "both": LOWER + sum(inputs * RANK + PROBES * outputs for outputs, inputs in MODULES.values()),
    "regmean": LOWER + len(MODULES) * RANK * (RANK + 1) // 2,
    "fisher": 2 * LOWER,
    "core": 3 + 12 + len(MODULES) * RANK**2,
    "dense": 3 + 12 + sum(outputs * inputs for outputs, inputs in MODULES.values()),
}


@pytest.mark.parametrize(("method", "size"), SIZES.items())
def test_the_vector_has_the_parts_of_the_method(method: str, size: int) -> None:
    job = the_job(method)
    assert job.quantizer.size == sent(job.plan).size == size
    names = [name for name, _ in sent(job.plan).trained]
    assert names == sorted(names)


def test_the_public_directions_are_signs_from_the_plans_seed() -> None:
    plan = the_job("both").plan
    found = {module: probes(plan, module) for module in MODULES}
    for module, v in found.items():
        assert v.shape == (PROBES, MODULES[module][1])
        assert np.array_equal(np.abs(v), np.full_like(v, 1 / math.sqrt(RANK)))
    signs = np.sign(found["block.query"]).astype(int).tolist()
    assert signs == KNOWN_SIGNS
    other = plan.model_copy(update={"adapter": plan.adapter.model_copy(update={"seed": "08" * 32})})
    assert not np.array_equal(probes(other, "block.query"), found["block.query"])


KNOWN_SIGNS = [[-1, 1, -1, 1, -1, -1, 1, 1, -1], [-1, -1, -1, -1, -1, 1, -1, 1, 1]]


# --- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server_lr", [1.0, 0.5])
def test_both_releases_the_means_of_the_factors_apart(server_lr: float, tmp_path: Path) -> None:
    job = the_job("both", server_lr=server_lr)
    everybody, weights = sites(job), list(WEIGHTS)
    combined, start = released(job, everybody, tmp_path), job.start_tensors()
    for name, _ in layout_of(job.plan.adapter).trained:
        mean = mean_of([s.after[name].astype(np.float64) - start[name] for s in everybody], weights)
        close(combined.tensors[name], start[name] + server_lr * mean, unit(job))
    assert combined.facts["method"] == "both"
    facts = manifest(job, 1, [], combined)
    assert facts["probe"] == combined.facts["probe"]


def error_of(everybody: list[Trained], weights: list[int]) -> float:
    """|mean(B) mean(A) - mean(B A)| / |mean(B A)| over all modules, from the sites' own factors: no probe."""
    gap = size = 0.0
    for module in MODULES:
        pairs = [factors(site, module) for site in everybody]
        product = mean_of([b @ a for b, a in pairs], weights)
        apart = mean_of([b for b, _ in pairs], weights) @ mean_of([a for _, a in pairs], weights)
        gap += float(np.sum((apart - product) ** 2))
        size += float(np.sum(product**2))
    return math.sqrt(gap / size)


@pytest.mark.parametrize("apart", [1.0, 0.3])
def test_the_probe_measures_the_error_of_both(apart: float, tmp_path: Path) -> None:
    job = the_job("both")
    everybody = sites(job, apart)
    probe = released(job, everybody, tmp_path).facts["probe"]
    # In the plan's own directions it is exact ...
    gap = size = 0.0
    for module in MODULES:
        v, pairs = probes(job.plan, module).T, [factors(site, module) for site in everybody]
        mean = mean_of([b @ a @ v for b, a in pairs], list(WEIGHTS))
        apart_mean = mean_of([b for b, _ in pairs], list(WEIGHTS)) @ mean_of([a for _, a in pairs], list(WEIGHTS)) @ v
        gap, size = gap + float(np.sum((apart_mean - mean) ** 2)), size + float(np.sum(mean**2))
    assert probe["relative_error"] == pytest.approx(math.sqrt(gap / size), rel=1e-4)
    assert probe["directions"] == PROBES
    assert 0 < probe["of_rounding"] < 1e-5
    # ... and an estimate of the error itself.
    assert 0.5 < probe["relative_error"] / error_of(everybody, list(WEIGHTS)) < 2


def test_the_probe_is_right_on_average() -> None:
    """Over many public seeds the squares of what the probe sees are those of the Frobenius norms."""
    job = the_job("both")
    everybody = sites(job)
    exact, gaps, sizes = error_of(everybody, list(WEIGHTS)), [], []
    for seed in range(200):
        adapter = job.plan.adapter.model_copy(update={"seed": f"{seed:064x}"})
        plan = job.plan.model_copy(update={"adapter": adapter})
        for module in MODULES:
            v, pairs = probes(plan, module).T, [factors(site, module) for site in everybody]
            mean = mean_of([b @ a @ v for b, a in pairs], list(WEIGHTS))
            b, a = (mean_of([p[i] for p in pairs], list(WEIGHTS)) for i in (0, 1))
            gaps.append(np.sum((b @ a @ v - mean) ** 2))
            sizes.append(np.sum(mean**2))
    assert math.sqrt(sum(gaps) / sum(sizes)) == pytest.approx(exact, rel=0.05)


def test_sites_that_moved_alike_have_no_error_but_that_of_rounding(tmp_path: Path) -> None:
    job = the_job("both", bits=16)
    probe = released(job, sites(job, 0.0), tmp_path).facts["probe"]
    assert 0 < probe["relative_error"] < 3 * probe["of_rounding"]
    assert probe["of_rounding"] > 1e-4


def test_an_adapter_that_does_nothing_has_no_error() -> None:
    job = the_job("both")
    start, zero = job.start_tensors(), np.zeros(job.quantizer.size, np.float32)
    found = merged(start, zero, job.plan)
    assert found.facts["probe"] == {"directions": PROBES, "relative_error": 0.0, "of_rounding": 0.0}
    assert all(np.array_equal(found.tensors[name], start[name]) for name in start)


# --- regmean --------------------------------------------------------------------------------------------------------


def regmean_of(job: Job, everybody: list[Trained], weights: list[int], module: str) -> Matrix:
    """(out, rank) from the sites' own tensors by LAPACK."""
    settings = job.plan.aggregation.regmean
    assert settings is not None
    ridged = [site.grams[module] + settings.ridge * np.eye(RANK) for site in everybody]
    above = mean_of([factors(s, module)[0] @ g for s, g in zip(everybody, ridged, strict=True)], weights)
    return np.asarray(np.linalg.solve(mean_of(ridged, weights), above.T).T)


@pytest.mark.parametrize("silent", [{}, {2: "M5"}], ids=["all", "one drops out"])
def test_regmean_weights_each_site_by_its_gram_matrix(silent: dict[int, str], tmp_path: Path) -> None:
    job = the_job("regmean")
    everybody, start = sites(job), job.start_tensors()
    combined = released(job, everybody, tmp_path, silent)
    present = [site for i, site in enumerate(everybody) if i not in silent]
    weights = [site.weight for site in present]
    for module in MODULES:
        exact = regmean_of(job, present, weights, module)
        # |dB| <= (|dS| + |B| |dG|) / ridge, each entry of S and G off by at most a unit (of G, relative to the clip).
        within = (
            (1 + float(np.abs(exact).sum(axis=1).max()) / job.quantizer.clip) * RANK * unit(job, sum(weights)) / 0.01
        )
        close(combined.tensors[b_name(module)], exact, within)
        assert within < 1e-3 < np.abs(exact - mean_of([factors(s, module)[0] for s in present], weights)).max()
        assert np.array_equal(combined.tensors[a_name(module)], start[a_name(module)])
    check_head(job, combined, present, weights)
    assert combined.facts == {"method": "regmean", "ridge": 0.01}


def test_a_large_ridge_gives_the_plain_mean(tmp_path: Path) -> None:
    job = the_job("regmean", ridge=1000.0)  # what is sent stays within the usual clipping range
    everybody = sites(job)
    combined = released(job, everybody, tmp_path)
    for module in MODULES:
        plain = mean_of([factors(site, module)[0] for site in everybody], list(WEIGHTS))
        close(combined.tensors[b_name(module)], plain, 1e-3)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 0.01, 10.0]))
def test_sites_with_the_same_b_keep_it(seed: int, ridge: float) -> None:
    """Whatever the Gram matrices are, a weighted mean of one thing is that thing."""
    job = the_job("regmean", ridge=ridge)
    rng = np.random.default_rng(seed)
    everybody = sites(job)
    shared = everybody[0].after
    vectors = []
    for _ in everybody:
        grams = {}
        for module in MODULES:
            z = rng.uniform(-1, 1, size=(8, RANK))
            grams[module] = z.T @ z / 8
        vectors.append(vector_of(job, Trained(shared, grams, {}, 1)))
    mean = np.mean(np.stack(vectors).astype(np.float64), axis=0).astype(np.float32)
    found = merged(job.start_tensors(), mean, job.plan)
    for module in MODULES:
        close(found.tensors[b_name(module)], shared[b_name(module)].astype(np.float64), 2e-3)


def test_the_ridge_of_regmean_never_falls_below_the_rounding(tmp_path: Path) -> None:
    job = the_job("regmean", ridge=1e-9, bits=16)
    everybody = sites(job)
    ridge = released(job, everybody, tmp_path).facts["ridge"]
    least = 2 * 256 / (job.quantizer.qmax * sum(WEIGHTS)) * math.sqrt(SITES * RANK)
    trace = max(float(np.trace(mean_of([s.grams[m] for s in everybody], list(WEIGHTS)))) for m in MODULES)
    assert ridge == pytest.approx(least + 2**-23 * trace, rel=1e-6)
    assert ridge > 1e-4


#: Sentence -> (entry of the Gram matrix that one site changes, to what, the refusal).
TAMPERED = {
    "a mean beyond 1": (1, 2**29, "expected means of statistics within 1"),
    "a negative square": (0, -(2**28), "no records have this Gram matrix"),
}


@pytest.mark.parametrize(("entry", "value", "reason"), TAMPERED.values(), ids=TAMPERED.keys())
def test_a_gram_matrix_of_no_records_is_refused(entry: int, value: int, reason: str, tmp_path: Path) -> None:
    job = the_job("regmean")
    vectors = quantised(job, sites(job))
    at = 0
    for name, shape in sent(job.plan).trained:
        if name == methods.gram_name("block.query"):
            break
        at += math.prod(shape)
    vectors[1][at + entry] = value
    with pytest.raises(ProtocolError, match=reason):
        combine(job, [run_round(job, vectors, tmp_path / "total", {})])


# --- every method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SIZES)
def test_an_auditor_finds_the_same_release_and_sees_a_changed_one(method: str, tmp_path: Path) -> None:
    job = the_job(method)
    everybody = sites(job)
    evidence = evidence_of(job, quantised(job, everybody), tmp_path / "total", {})
    round_id = evidence.outcome.transcript.header.hash()
    facts = publish(job, 1, [CohortTotal(1, round_id, evidence, tmp_path / "total")], tmp_path)
    report = audit_release(tmp_path / "sums" / "stage-1", job.roster_file.hash)
    for key in ("adapter_digest", "method", "probe", "ridge", "truncation", "coordinates"):
        assert report.facts.get(key) == facts.get(key)
    assert facts.get("method", "freeze_a") == method
    directory = tmp_path / "sums" / "stage-1" / "adapter"
    tensors = load_peft(directory)
    name = b_name("block.value")
    tensors[name] = np.nextafter(tensors[name], np.float32(9))
    save_peft(directory, tensors, adapter=job.plan.adapter, base_name="tiny")
    with pytest.raises(ProtocolError, match="the adapter is not the one that the totals give"):
        audit_release(tmp_path / "sums" / "stage-1")


@pytest.mark.parametrize("method", SIZES)
def test_the_same_totals_give_the_same_bits(method: str) -> None:
    job = the_job(method)
    rng = np.random.default_rng(1)
    start = job.start_tensors()
    mean = (vector_of(job, sites(job)[0]) + 1e-4 * rng.random(job.quantizer.size)).astype(np.float32)
    digests = {
        start_digest(merged(start, mean.copy(), job.plan, Rounding(1e-4, 5), job.factors()).tensors) for _ in range(3)
    }
    assert len(digests) == 1


# --- the plan -------------------------------------------------------------------------------------------------------

PRIVACY = """[privacy]
unit = "record"
sigma = "1.0"
delta = "1e-4"
clip = "1.0"
rate = "0.25"
steps = 12
nominal_batch = 6
nominal_size = 24

[round]"""

#: Sentence -> (method, old text, new text, fragment of the refusal).
BAD = {
    "an unknown method": ("both", '"both"\nserver_lr', '"mean"\nserver_lr', "aggregation.method"),
    "both, A frozen": ("both", 'train = "both"', 'train = "all"', "expected 'both' with method \"both\", found 'all'"),
    "freeze_a, A trained": ("freeze_a", 'train = "all"', 'train = "both"', "expected 'all' or 'head' with method"),
    "regmean of the head alone": ("regmean", 'train = "all"', 'train = "head"', "expected 'all' with method"),
    "regmean without its section": ("freeze_a", '"freeze_a"', '"regmean"', "regmean: expected this section"),
    "its section alone": ("regmean", '"regmean"', '"freeze_a"', "regmean: expected this section"),
    "without a ridge": ("regmean", "ridge = 0.01", "ridge = 0.0", "aggregation.regmean.ridge"),
    "core without its section": ("freeze_a", '"freeze_a"', '"core"', "core: expected this section"),
    "core of the head alone": ("core", 'train = "all"', 'train = "head"', "expected 'all' with method"),
    "without a minimum": ("regmean", "min_texts = 3", "min_texts = 0", "aggregation.regmean.min_texts"),
}


@pytest.mark.parametrize(("method", "old", "new", "fragment"), BAD.values(), ids=BAD.keys())
def test_a_bad_plan_is_refused(method: str, old: str, new: str, fragment: str) -> None:
    text = plan_text(method, factors="0" * 64)
    assert old in text
    with pytest.raises(UserError, match=r"^plan\.toml: ") as refused:
        parse_plan(text.replace(old, new, 1).encode(), "plan.toml")
    assert fragment in str(refused.value)


@pytest.mark.parametrize("method", [m for m in SIZES if m != "freeze_a"])
def test_under_privacy_b_alone_is_summed(method: str) -> None:
    text = (
        plan_text(method, factors="0" * 64)
        .replace("epochs = 1\n", "")
        .replace("batch_size = 4\n", "")
        .replace("[round]", PRIVACY)
    )
    with pytest.raises(UserError, match=r'aggregation\.method: expected "freeze_a" under'):
        parse_plan(text.encode())


@pytest.mark.parametrize(("method", "counted"), [*((method, False) for method in METHODS), ("freeze_a", True)])
def test_two_cohorts_give_what_all_sites_together_would(method: str, counted: bool, tmp_path: Path) -> None:
    """Whatever a method divides by is summed over the cohorts first."""
    job = the_job(method, counted=counted)
    shares = ((0.5, 0.5, 0.0), (0.1, 0.2, 0.7))
    both = [
        [replace(site, shares=own) if counted else site for site in sites(job, apart)]
        for apart, own in zip((1.0, 0.6), shares, strict=True)
    ]
    first, second = (run_round(job, quantised(job, one), tmp_path / f"{k}", {}) for k, one in enumerate(both))
    found = combine(job, [first, replace(second, survivors=tuple(range(SITES, 2 * SITES)))])
    everybody = [*both[0], *both[1]]
    mean = mean_of([vector_of(job, site) for site in everybody], [site.weight for site in everybody])
    exact = merged(job.start_tensors(), mean.astype(np.float32), job.plan, factors=job.factors())
    alone = combine(job, [first]).tensors
    assert found.weight == 2 * sum(WEIGHTS)
    for name in exact.tensors:
        close(found.tensors[name], exact.tensors[name].astype(np.float64), 1e-3)
    assert any(np.abs(alone[name] - found.tensors[name]).max() > 0.02 for name in alone)


def test_with_even_weights_every_site_counts_the_same(tmp_path: Path) -> None:
    text = plan_text("freeze_a").replace('method = "freeze_a"', 'method = "freeze_a"\nweights = "uniform"')
    job = job_for(text.replace("max_weight = 256", "max_weight = 1"))
    everybody = [replace(site, weight=1) for site in sites(job)]
    combined = released(job, everybody, tmp_path)
    assert combined.weight == SITES
    for name, _ in job.layout.trained:
        close(combined.tensors[name], np.mean([site.after[name] for site in everybody], axis=0), 1e-4)
