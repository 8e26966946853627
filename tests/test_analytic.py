"""The analytic head is the ridge solution of all records together, however they lie at the sites."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.publish import CohortTotal, publish
from participant.analytic import means_of
from privacy import analytic
from privacy.adapter import load_peft, save_peft, start_adapter, start_digest
from privacy.audit import audit_release
from privacy.errors import ProtocolError, UserError
from privacy.job import Job
from privacy.outcome import Combined, combine, manifest
from privacy.plan import parse_plan
from tests.analytic import (
    CLASSES,
    FEATURES,
    SITES,
    Matrix,
    Part,
    evidence_of,
    job_for,
    part_of,
    plan_text,
    records,
    run_round,
    vector_of,
)

EVERYTHING = records()


def pooled_solution(job: Job, part: Part) -> Matrix:
    """(inputs, classes) by LAPACK, from the records themselves and nothing of the product but the plan's constants."""
    settings = job.plan.aggregation.analytic
    assert settings is not None
    scaled = np.clip(part[0] / settings.feature_clip, -1, 1)
    z = np.concatenate([scaled, np.ones((len(scaled), 1))], axis=1)
    targets = np.zeros((len(z), CLASSES))
    targets[np.arange(len(z)), np.array(part[1], int)] = 1
    gram = z.T @ z / len(z) + settings.ridge * np.eye(FEATURES + 1)
    return np.asarray(np.linalg.solve(gram, z.T @ targets / len(z)))


def head_in(combined: Combined, job: Job) -> Matrix:
    """(inputs, classes): the released head, as it acts on scaled features."""
    settings = job.plan.aggregation.analytic
    assert settings is not None
    weight = combined.tensors["base_model.model.classifier.weight"].astype(np.float64)
    bias = combined.tensors["base_model.model.classifier.bias"].astype(np.float64)
    return np.concatenate([weight.T * settings.feature_clip, bias[None]])


def tolerance(job: Job, survivors: int, weight: int, exact: Matrix) -> float:
    """What rounding can move the solution, in the Frobenius norm: |dW| <= (|dB| + |dG| |W|) / ridge.

    Every coordinate of the mean is off by less than ``unit`` for each survivor, and by half a unit in the last place
    of float32 at the site, in the mean and in the released head.
    """
    settings, inputs = job.plan.aggregation.analytic, FEATURES + 1
    assert settings is not None
    entry = survivors * job.quantizer.max_weight / (job.quantizer.qmax * weight) + 2 * 2.0**-24
    size = float(np.linalg.norm(exact))
    return entry * (math.sqrt(inputs * CLASSES) + inputs * size) / settings.ridge + 2.0**-23 * size


#: Sentence -> who holds which records.
SPLITS: dict[str, list[list[int]]] = {
    "evenly": [list(range(i, 240, SITES)) for i in range(SITES)],
    "by class, and two of the sites have nearly none": [
        [i for i in range(237) if EVERYTHING[1][i] == c] for c in range(CLASSES)
    ]
    + [[237], [238, 239]],
    "nearly all at one site": [list(range(236)), [236], [237], [238], [239]],
}


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_the_release_is_the_ridge_solution_of_the_pooled_records(
    split: list[list[int]], bits: int, tmp_path: Path
) -> None:
    job = job_for(plan_text(bits))
    vectors = [vector_of(job, part_of(EVERYTHING, part)) for part in split]
    cohort = run_round(job, vectors, tmp_path / "total", {})
    combined, exact = combine(job, [cohort]), pooled_solution(job, EVERYTHING)
    assert combined.weight == 240
    assert combined.facts["ridge"] == 1e-3
    error = float(np.linalg.norm(head_in(combined, job) - exact))
    assert error <= tolerance(job, SITES, 240, exact)
    assert error <= (2e-2 if bits == 24 else 1e-4) * np.linalg.norm(exact)
    assert start_digest(combine(job, [cohort]).tensors) == start_digest(combined.tensors)
    found = manifest(job, 1, [cohort], combined)
    assert (found["head"], found["ridge"], found["coordinates"]) == ("analytic", 1e-3, 13 * 14 // 2 + 13 * 3)
    assert "training_loss" not in {*found, *found["cohorts"][0]}


@settings(max_examples=8)
@given(st.lists(st.integers(0, SITES - 1), min_size=240, max_size=240))
def test_any_split_gives_the_pooled_solution(holders: list[int]) -> None:
    job = job_for(plan_text())
    sites = [[i for i in range(240) if holders[i] == site] for site in range(SITES)]
    vectors = [vector_of(job, part_of(EVERYTHING, part)).astype(np.int64) for part in sites if part]
    words = np.add.reduce(vectors).astype(np.uint32)
    decoded = job.quantizer.decode(words, len(vectors))
    tensors, _ = analytic.solved(start_adapter(job.plan.adapter), decoded.mean, job.plan)
    exact = pooled_solution(job, EVERYTHING)
    error = np.linalg.norm(head_in(Combined(tensors, 240, 0.0), job) - exact)
    assert error <= min(tolerance(job, len(vectors), 240, exact), 1e-4 * float(np.linalg.norm(exact)))


def test_a_site_that_drops_out_is_not_in_the_solution_and_the_others_are(tmp_path: Path) -> None:
    job = job_for(plan_text())
    split = SPLITS["evenly"]
    vectors = [vector_of(job, part_of(EVERYTHING, part)) for part in split]
    cohort = run_round(job, vectors, tmp_path / "total", {2: "M5"})
    rest = part_of(EVERYTHING, [i for k, part in enumerate(split) if k != 2 for i in part])
    combined, exact = combine(job, [cohort]), pooled_solution(job, rest)
    error = float(np.linalg.norm(head_in(combined, job) - exact))
    assert error <= tolerance(job, 4, len(rest[1]), exact)
    assert error < float(np.linalg.norm(head_in(combined, job) - pooled_solution(job, EVERYTHING))) / 100


def test_all_but_the_head_stays_as_it_started(tmp_path: Path) -> None:
    job = job_for(plan_text())
    vectors = [vector_of(job, part_of(EVERYTHING, part)) for part in SPLITS["evenly"]]
    tensors, start = (
        combine(job, [run_round(job, vectors, tmp_path / "t", {})]).tensors,
        start_adapter(job.plan.adapter),
    )
    assert tensors.keys() == start.keys()
    moved = {name for name in start if not np.array_equal(start[name], tensors[name])}
    assert moved == {"base_model.model.classifier.bias", "base_model.model.classifier.weight"}


def test_an_auditor_solves_for_the_same_bits_and_sees_a_changed_head(tmp_path: Path) -> None:
    job = job_for(plan_text())
    vectors = [vector_of(job, part_of(EVERYTHING, part)) for part in SPLITS["evenly"]]
    evidence = evidence_of(job, vectors, tmp_path / "total", {})
    round_id = evidence.outcome.transcript.header.hash()
    facts = publish(job, 1, [CohortTotal(1, round_id, evidence, tmp_path / "total")], tmp_path)
    report = audit_release(tmp_path / "sums" / "stage-1", job.roster_file.hash)
    assert report.facts["adapter_digest"] == facts["adapter_digest"]
    assert report.facts["ridge"] == 1e-3
    directory = tmp_path / "sums" / "stage-1" / "adapter"
    tensors = load_peft(directory)
    name = "base_model.model.classifier.bias"
    tensors[name] = np.nextafter(tensors[name], np.float32(9))
    save_peft(directory, tensors, adapter=job.plan.adapter, base_name="tiny")
    with pytest.raises(ProtocolError, match="the adapter is not the one that the totals give"):
        audit_release(tmp_path / "sums" / "stage-1")


# --- tampered statistics --------------------------------------------------------------------------------------------


def test_a_site_cannot_send_a_statistic_beyond_its_range() -> None:
    job = job_for(plan_text())
    features = np.full((4, FEATURES), 1e9)
    features[1:] *= -1
    part = (features, (0, 0, 1, 2))
    gram, products = means_of(*part, job.plan)
    assert max(np.abs(gram).max(), np.abs(products).max()) == 1.0
    vector = vector_of(job, part)
    assert np.abs(vector).max() <= job.quantizer.qmax * 4 // 512 + 1


#: Sentence -> (what one site's first coordinate becomes, what the refusal says); Qmax is about 2**28.7.
TAMPERED = {
    "a coordinate beyond the range of four sites": (2**31 - 2**28, r"beyond \|U3\| \* Qmax"),
    "a mean beyond 1": (2**28, "expected means of statistics within 1"),
    "a negative square": (-(2**27), "no records have this Gram matrix"),
}


@pytest.mark.parametrize(("value", "reason"), TAMPERED.values(), ids=TAMPERED.keys())
def test_tampered_statistics_are_refused(value: int, reason: str, tmp_path: Path) -> None:
    job = job_for(plan_text())
    vectors = [vector_of(job, part_of(EVERYTHING, part)) for part in SPLITS["evenly"]]
    vectors[1][0] = value
    with pytest.raises(ProtocolError, match=reason):
        combine(job, [run_round(job, vectors, tmp_path / "total", {4: "M5"})])


# --- the solver -----------------------------------------------------------------------------------------------------


def test_it_solves_as_lapack_does() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(90, 40)), rng.normal(size=(90, 4))
    gram, products = x.T @ x / 90, x.T @ y / 90
    found = analytic.solve(gram, products, 0.01)
    np.testing.assert_allclose(found, np.linalg.solve(gram + 0.01 * np.eye(40), products), rtol=1e-10, atol=1e-12)


def test_its_bits_are_the_same_on_every_machine() -> None:
    """A known answer: integers in, IEEE 754 operations in a fixed order, these very bits out."""
    x = (np.arange(35 * 20, dtype=np.int64) ** 3 % 101 - 50).reshape(35, 20)
    gram, products = (x.T @ x).astype(np.float64), (x.T @ (x[:, :3] ** 2)).astype(np.float64)
    found = analytic.solve(gram, products, 0.1)
    assert hashlib.sha256(found.astype("<f8").tobytes()).hexdigest() == KNOWN


KNOWN = "7c9fb1bd7564a86d8794c9b5a891eab2415e3d27a04f1020fdd6e7d70c364859"


def test_only_the_upper_triangle_counts() -> None:
    gram = np.array([[2.0, 1.0], [-99.0, 3.0]])
    products = np.array([[1.0], [2.0]])
    whole = np.array([[2.0, 1.0], [1.0, 3.0]])
    np.testing.assert_array_equal(analytic.solve(gram, products, 0.0), analytic.solve(whole, products, 0.0))


@pytest.mark.parametrize("gram", [[[0.0]], [[1.0, 2.0], [2.0, 1.0]], [[float("nan")]]])
def test_a_matrix_that_is_not_positive_definite_is_refused(gram: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="expected a positive definite matrix"):
        analytic.solve(np.array(gram), np.ones((len(gram), 1)), 0.0)


def test_the_ridge_never_falls_below_the_rounding(tmp_path: Path) -> None:
    """With few bits a tiny ridge would leave a rounded matrix indefinite: the least one is computed, and published."""
    job = job_for(plan_text(16, 1e-9))
    vectors = [vector_of(job, part_of(EVERYTHING, part)) for part in SPLITS["evenly"]]
    cohort = run_round(job, vectors, tmp_path / "total", {})
    unit = 512 / (job.quantizer.qmax * 240)
    ridge = combine(job, [cohort]).facts["ridge"]
    trace = float(np.trace(means_of(*EVERYTHING, job.plan)[0]))
    assert ridge == pytest.approx(2 * unit * np.sqrt(SITES * (FEATURES + 1)) + 2**-23 * trace, rel=1e-5)
    assert ridge > 1e-3


def test_copies_of_one_record_have_a_solution() -> None:
    """A Gram matrix of rank one, rounded to float32 only, and the smallest ridge that a plan may have."""
    job = job_for(plan_text(32, 1e-9))
    part = (np.repeat(EVERYTHING[0][:1], 50, axis=0), (0,) * 50)
    vector = analytic.pack(*means_of(*part, job.plan), 0.5)
    tensors, ridge = analytic.solved(start_adapter(job.plan.adapter), vector, job.plan)
    assert 1e-9 < ridge < 2**-23 * 13
    head = head_in(Combined(tensors, 50, 0.0), job)
    said = np.append(np.clip(part[0][0] / 2, -1, 1), 1.0) @ head
    np.testing.assert_allclose(said, (1, 0, 0), atol=1e-3)


def test_statistics_come_back_from_the_vector() -> None:
    job = job_for(plan_text())
    gram, products = means_of(*EVERYTHING, job.plan)
    vector = analytic.pack(gram, products, 0.5)
    assert vector.shape == (analytic.head_of(job.plan).size,) == (job.quantizer.size,)
    again, there = analytic.unpack(vector, analytic.head_of(job.plan), 0.5)
    np.testing.assert_allclose(again, gram, atol=1e-7)
    np.testing.assert_allclose(there, products, atol=1e-7)
    assert np.abs(vector).max() <= 0.5


# --- plans ----------------------------------------------------------------------------------------------------------

PRIVACY = """[privacy]
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
    "under privacy": (
        "epochs = 1\nlearning_rate = 0.001\nbatch_size = 4|[round]",
        "learning_rate = 0.001|" + PRIVACY,
        "statistics of records have no noise",
    ),
    "beside a trained adapter": ('train = "head"', 'train = "all"', 'expected "head" beside an analytic head'),
    "with sites that count the same": (
        "[aggregation]",
        '[aggregation]\nweights = "uniform"',
        "counts every record once",
    ),
    "with a server rate": ("[aggregation]", "[aggregation]\nserver_lr = 0.5", "counts every record once"),
    "without its section": (
        "[aggregation.analytic]\nridge = 0.001\nfeature_clip = 2.0\nmin_class_count = 3\n",
        "",
        "expected this section",
    ),
    "its section alone": ('head = "analytic"', 'head = "trained"', "expected this section"),
    "without a ridge": ("ridge = 0.001", "ridge = 0.0", "aggregation.analytic.ridge"),
    "without a minimum": ("min_class_count = 3", "min_class_count = 0", "aggregation.analytic.min_class_count"),
    "a head of two layers": ('"classifier.bias" = [3]', '"dense.weight" = [12, 12]', "expected one linear layer"),
    "a bias of another size": ('"classifier.bias" = [3]', '"classifier.bias" = [4]', "expected one linear layer"),
    "more rows than labels": ("[3, 12]", "[4, 12]", "expected one linear layer"),
    "too many features": ("[3, 12]", "[3, 4097]", "expected at most 4096 features"),
}


@pytest.mark.parametrize(("lines", "instead", "fragment"), BAD.values(), ids=BAD.keys())
def test_a_bad_plan_is_refused(lines: str, instead: str, fragment: str) -> None:
    text = plan_text()
    for old, new in zip(lines.split("|"), instead.split("|"), strict=True):
        assert old in text
        text = text.replace(old, new, 1)
    with pytest.raises(UserError, match=r"^plan\.toml: ") as refused:
        parse_plan(text.encode(), "plan.toml")
    assert fragment in str(refused.value)


def test_a_head_without_a_bias_has_no_constant() -> None:
    job = job_for(plan_text().replace('"classifier.bias" = [3]\n', ""))
    head = analytic.head_of(job.plan)
    assert (head.bias, head.inputs, job.quantizer.size) == (False, 12, 12 * 13 // 2 + 12 * 3)
    gram, products = means_of(*EVERYTHING, job.plan)
    assert (gram.shape, products.shape) == ((12, 12), (12, 3))
    tensors, _ = analytic.solved({}, analytic.pack(gram, products, 0.5), job.plan)
    assert list(tensors) == ["base_model.model.classifier.weight"]
