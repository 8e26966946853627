"""Methods whose adapter comes from factors or products: core between frozen factors, and the sum of B A itself."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from coordinator.publish import CohortTotal, publish
from participant import ranks, sending
from privacy.adapter import a_name, b_name, check_tensors, flatten, layout_of, start_digest
from privacy.audit import audit_release
from privacy.errors import UserError
from privacy.factors import factored, factors_file, in_name, out_name
from privacy.methods import merged, sent
from privacy.outcome import combine
from privacy.plan import parse_plan
from tests.analytic import evidence_of, run_round
from tests.methods import (
    MODULES,
    RANK,
    WEIGHTS,
    Matrix,
    base_factors,
    base_weights,
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
)

# --- core -----------------------------------------------------------------------------------------------------------


def test_factors_are_the_leading_singular_directions() -> None:
    found = base_factors()
    for module, weight in base_weights():
        u, s, v = np.linalg.svd(weight.astype(np.float64))
        left, right = found[out_name(module)], found[in_name(module)]
        np.testing.assert_allclose(left.T @ left, np.eye(RANK), atol=1e-6)
        np.testing.assert_allclose(left @ left.T, u[:, :RANK] @ u[:, :RANK].T, atol=1e-5)
        np.testing.assert_allclose(right.T @ right, v[:RANK].T @ v[:RANK], atol=1e-5)
        np.testing.assert_allclose(left.T @ weight @ right.T, np.diag(s[:RANK]), atol=1e-5)


def test_their_digest_is_the_same_on_every_machine() -> None:
    """A known answer: integers in, IEEE 754 operations in a fixed order, these very bits out."""
    weight = (np.arange(20 * 30, dtype=np.int64) ** 3 % 97 - 48).reshape(20, 30).astype(np.float32)
    assert start_digest(factored([("m", weight)], 4, bytes(32))).hex() == KNOWN_FACTORS


KNOWN_FACTORS = "122af500924bb1f3578352b902983667b40566ce51cd6546501375c33acdebcb"


@pytest.mark.parametrize("server_lr", [1.0, 0.5])
def test_core_releases_the_mean_of_what_lies_between_the_factors(server_lr: float, tmp_path: Path) -> None:
    job = the_job("core", server_lr=server_lr)
    everybody, weights = sites(job), list(WEIGHTS)
    combined, start, factors_ = released(job, everybody, tmp_path), job.start_tensors(), job.factors()
    assert factors_ is not None
    for module in MODULES:
        products = [factors(site, module)[0] @ factors(site, module)[1] for site in everybody]
        b, a = combined.tensors[b_name(module)], combined.tensors[a_name(module)]
        close(b.astype(np.float64) @ a, server_lr * mean_of(products, weights), RANK * unit(job) + 1e-6)
        assert np.array_equal(a, start[a_name(module)])
        assert np.array_equal(a, factors_[in_name(module)])
    assert combined.facts == {"method": "core"}


def test_a_base_model_of_too_small_a_rank_is_refused() -> None:
    weight = np.outer(np.arange(1, 8), np.arange(1, 10)).astype(np.float32)
    with pytest.raises(ValueError, match="expected weights of rank 3 or more in module 'm', found a smaller rank"):
        factored([("m", weight)], 3, bytes(32))
    with pytest.raises(ValueError, match="expected a rank of at most 2 for module 'm', found 3"):
        factored([("m", weight[:2])], 3, bytes(32))


def test_other_factors_than_the_plans_are_refused() -> None:
    job = the_job("core")
    assert job.factors_directory is not None
    assert job.plan.aggregation.core is not None
    path = factors_file(job.factors_directory, job.plan.aggregation.core.factors)
    good = path.read_bytes()
    others = base_factors()
    others[in_name("block.query")] = np.nextafter(others[in_name("block.query")], np.float32(9))
    for content, message in (
        (safetensors.numpy.save(others), "expected the factors "),
        (safetensors.numpy.save({}), "expected the factors "),
        (good[:-4], "expected factors, found"),
        (b"", "expected factors, found"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            job.factors()
    path.unlink()
    with pytest.raises(UserError, match="expected the factors of plan 'sums', found: No such file"):
        job.start_tensors()
    with pytest.raises(UserError, match="expected a directory with its factors"):
        replace(job, factors_directory=None).factors()


def test_a_release_carries_its_factors_for_the_auditor(tmp_path: Path) -> None:
    job = the_job("core")
    evidence = evidence_of(job, quantised(job, sites(job)), tmp_path / "total", {})
    round_id = evidence.outcome.transcript.header.hash()
    publish(job, 1, [CohortTotal(1, round_id, evidence, tmp_path / "total")], tmp_path)
    directory = tmp_path / "sums" / "stage-1"
    (path,) = (directory / "factors").iterdir()
    assert path.name.startswith(start_digest(base_factors()).hex())
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="expected the factors"):
        audit_release(directory)


# --- dense ----------------------------------------------------------------------------------------------------------


def best_of_rank(matrix: Matrix, rank: int) -> Matrix:
    """The nearest matrix of that rank, by LAPACK."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(u[:, :rank] * s[:rank] @ v[:rank])


@pytest.mark.parametrize("server_lr", [1.0, 0.5])
def test_dense_releases_the_nearest_product_to_the_mean_of_the_products(server_lr: float, tmp_path: Path) -> None:
    job = the_job("dense", server_lr=server_lr)
    everybody, weights = sites(job), list(WEIGHTS)
    combined = released(job, everybody, tmp_path)
    lost = size = 0.0
    for module in MODULES:
        mean = server_lr * mean_of([factors(s, module)[0] @ factors(s, module)[1] for s in everybody], weights)
        b, a = (combined.tensors[name(module)].astype(np.float64) for name in (b_name, a_name))
        best = best_of_rank(mean, RANK)
        close(b @ a, best, 1e-5)
        np.testing.assert_allclose(a @ a.T, np.eye(RANK), atol=1e-6)
        lost, size = lost + float(np.sum((mean - best) ** 2)), size + float(np.sum(mean**2))
    found = combined.facts["truncation"]
    assert found["relative_error"] == pytest.approx(math.sqrt(lost / size), rel=1e-4)
    assert found["relative_error"] > 0.05
    assert 0 < found["of_rounding"] < 1e-4
    if server_lr == 1.0:
        check_head(job, combined, everybody, weights)


def test_products_that_fit_the_rank_together_lose_nothing(tmp_path: Path) -> None:
    """Sites with one A and different B: their mean has the plan's rank."""
    job = the_job("dense")
    everybody = sites(job)
    for site in everybody:
        for module in MODULES:
            site.after[a_name(module)] = everybody[0].after[a_name(module)]
    found = released(job, everybody, tmp_path).facts["truncation"]
    assert found["relative_error"] < 3 * found["of_rounding"] + 1e-6


def test_sites_of_different_ranks_are_summed_exactly(tmp_path: Path) -> None:
    job = the_job("dense")
    plan, start = job.plan, job.start_tensors()
    rng = np.random.default_rng(2)
    vectors, products = [], []
    for rank, weight in zip((1, 2, 3, 2, 1), WEIGHTS, strict=True):
        narrow, cut = ranks.narrowed(plan, start, rank)
        assert narrow.adapter.alpha / rank == pytest.approx(plan.adapter.alpha / RANK)
        layout = layout_of(narrow.adapter)
        check_tensors(dict(cut), layout)
        after = dict(cut)
        for name, shape in layout.trained:
            after[name] = (cut[name] + 0.2 * rng.normal(size=shape)).astype(np.float32)
        parts = sending.dense(narrow, {n: after[n] - cut[n] for n, _ in layout.trained}, cut, after)
        vectors.append(job.quantizer.quantize(flatten(parts, sent(plan)), weight, {"weight": weight, "loss": 0}))
        products.append({m: after[b_name(m)].astype(np.float64) @ after[a_name(m)] for m in MODULES})
    combined = combine(job, [run_round(job, vectors, tmp_path / "total", {})])
    for module in MODULES:
        mean = mean_of([found[module] for found in products], list(WEIGHTS))
        b, a = (combined.tensors[name(module)].astype(np.float64) for name in (b_name, a_name))
        close(b @ a, best_of_rank(mean, RANK), 1e-5)


def test_only_dense_sums_different_ranks() -> None:
    job = the_job("both")
    plan, start = job.plan, job.start_tensors()
    assert ranks.narrowed(plan, start, None) == ranks.narrowed(plan, start, RANK) == (plan, start)
    with pytest.raises(ValueError, match='needs the method "dense", found "both"'):
        ranks.narrowed(plan, start, 2)


def test_dense_goes_on_from_a_later_start(tmp_path: Path) -> None:
    """What a site adds to B A is added to that of the start, also where it knows only its first directions."""
    job = the_job("dense")
    first = released(job, sites(job), tmp_path).tensors
    narrow, cut = ranks.narrowed(job.plan, first, 2)
    after = {name: (value + np.float32(0.1)).astype(np.float32) for name, value in cut.items()}
    delta = {name: after[name] - cut[name] for name, _ in layout_of(narrow.adapter).trained}
    vector = flatten(sending.dense(narrow, delta, cut, after), sent(job.plan))
    found = merged(first, vector, job.plan).tensors
    for module in MODULES:
        a, b = a_name(module), b_name(module)
        exact = first[b].astype(np.float64) @ first[a] + after[b].astype(np.float64) @ after[a] - cut[b] @ cut[a]
        close(found[b].astype(np.float64) @ found[a], best_of_rank(exact, RANK), 1e-5)


def test_an_adapter_that_does_nothing_loses_nothing() -> None:
    job = the_job("dense")
    found = merged(job.start_tensors(), np.zeros(job.quantizer.size, np.float32), job.plan)
    assert found.facts["truncation"] == {"relative_error": 0.0, "of_rounding": 0.0}
    assert not any(np.any(found.tensors[b_name(module)]) for module in MODULES)


def test_dense_of_a_large_model_is_refused() -> None:
    text = plan_text("dense").replace("[7, 9]", "[8192, 4097]")
    with pytest.raises(
        UserError, match=r'expected at most 33554432 numbers in the modules for "dense", found 33562654'
    ):
        parse_plan(text.encode())
