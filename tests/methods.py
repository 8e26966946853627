"""A federation whose plan names one of the methods, and made-up sites: what they trained, and what they send."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from participant import sending
from privacy.adapter import Tensors, Vector, a_name, b_name, flatten, layout_of, start_digest
from privacy.aggregation import TRAINS_A
from privacy.factors import factored, first_start, keep_factors, out_name
from privacy.job import Job
from privacy.methods import core_name, sent
from privacy.outcome import Combined, combine
from privacy.sections import Adapter
from tests.analytic import job_for, run_round

SITES = 5
SEED = "07" * 32
RANK = 3
MODULES = {"block.query": (7, 9), "block.value": (5, 6)}
HEAD = {"classifier.bias": (3,), "classifier.weight": (3, 4)}
WEIGHTS = (40, 10, 25, 60, 105)
FISHER = """[aggregation.fisher]
ridge = {ridge}
reach = 4.0
min_texts = 3
"""
REGMEAN = """[aggregation.regmean]
ridge = {ridge}
feature_clip = 2.0
min_texts = 3
"""

#: Directories with factors, deleted at the end.
KEPT: list[tempfile.TemporaryDirectory[str]] = []
COUNTED = """head = "counted"
[aggregation.counted]
min_class_count = 3
"""
CORE = """[aggregation.core]
factors = "{factors}"
"""

PLAN = """name = "sums"
task = "classification"
[base]
name = "tiny"
digest = "{zero}"
[adapter]
rank = 3
alpha = 6.0
seed = "{seed}"
digest = "{digest}"
train = "{train}"
[adapter.modules]
"block.query" = [7, 9]
"block.value" = [5, 6]
[adapter.head]
"classifier.bias" = [3]
"classifier.weight" = [3, 4]
[data]
dataset = "toy"
labels = ["a", "b", "c"]
[training]
epochs = 1
learning_rate = 0.001
batch_size = 4
[aggregation]
method = "{method}"
server_lr = {server_lr}
{counted}{section}
[round]
max_cohort = 5
min_cohort = 4
min_survivors = 3
max_colluders = 1
bits = {bits}
clip = {clip}
max_weight = 256
"""

Matrix = NDArray[np.float64]


def plan_text(
    method: str,
    *,
    factors: str = "",
    train: str = "",
    bits: int = 32,
    ridge: float = 0.01,
    server_lr: float = 1.0,
    clip: float = 4.0,
    counted: bool = False,
) -> str:
    """A plan file with a correct start digest; no base model is needed, since what sites trained is made up."""
    zero = "0" * 64
    adapter = Adapter(rank=RANK, alpha=6.0, seed=SEED, digest=zero, modules=MODULES, head=HEAD)
    return PLAN.format(
        zero=zero,
        seed=SEED,
        digest=start_digest(first_start(adapter, base_factors() if factors else None)).hex(),
        train=train or ("both" if method in TRAINS_A else "all"),
        method=method,
        section={
            "regmean": REGMEAN.format(ridge=ridge),
            "fisher": FISHER.format(ridge=ridge),
            "core": CORE.format(factors=factors),
        }.get(method, ""),
        counted=COUNTED if counted else "",
        bits=bits,
        server_lr=server_lr,
        clip=clip,
    )


def base_weights() -> list[tuple[str, NDArray[np.float32]]]:
    """Of the adapted modules of a made-up base model."""
    rng = np.random.default_rng(5)
    return [(module, rng.standard_normal(shape, np.float32)) for module, shape in sorted(MODULES.items())]


def base_factors() -> Tensors:
    """The factors of the method "core" for it."""
    return factored(base_weights(), RANK, bytes.fromhex(SEED))


def the_job(method: str, **changes: float) -> Job:
    """:func:`plan_text` under a roster of the simulation's members; "core" has a directory with its factors."""
    if method != "core":
        return job_for(plan_text(method, **changes))  # type: ignore[arg-type]
    KEPT.append(tempfile.TemporaryDirectory())
    directory = Path(KEPT[-1].name)
    digest = keep_factors(directory, base_factors())
    return replace(job_for(plan_text(method, factors=digest, **changes)), factors_directory=directory)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Trained:
    """A made-up site after training."""

    after: Tensors
    #: Module -> (rank, rank) mean of z z^T.
    grams: dict[str, Matrix]
    #: What was added to each R, of the method "core".
    cores: Tensors
    weight: int
    #: Of each class among the records.
    shares: tuple[float, ...] = ()
    #: Mean squared gradients of the trained tensors.
    squares: Tensors = field(default_factory=dict)


def sites(job: Job, apart: float = 1.0) -> list[Trained]:
    """Adapters near the start; ``apart``: 0 for sites that moved alike, 1 for sites that have nothing in common."""
    start, layout = job.start_tensors(), layout_of(job.plan.adapter)
    rng = np.random.default_rng(11)
    common = {name: rng.normal(size=shape) for name, shape in layout.trained}
    found = []
    for weight in WEIGHTS:
        after = dict(start)
        for name, shape in layout.trained:
            own = math.sqrt(1 - apart**2) * common[name] + apart * rng.normal(size=shape)
            after[name] = (start[name] + 0.2 * own).astype(np.float32)
        cores = {}
        if (factors := job.factors()) is not None:
            for module in MODULES:
                cores[core_name(module)] = (0.2 * rng.normal(size=(RANK, RANK))).astype(np.float32)
                after[b_name(module)] = factors[out_name(module)] @ cores[core_name(module)]
        grams = {}
        for module in MODULES:
            z = np.clip(rng.normal(size=(50, RANK)) * rng.uniform(0.05, 0.5, RANK), -1, 1)
            grams[module] = z.T @ z / len(z)
        squares = {name: (rng.normal(size=shape) ** 4).astype(np.float32) for name, shape in layout.trained}
        found.append(Trained(after, grams, cores, weight, squares=squares))
    return found


def vector_of(job: Job, site: Trained) -> Vector:
    """What a site sends, before it is quantised, by the code that sites run."""
    plan, layout = job.plan, layout_of(job.plan.adapter)
    start = job.start_tensors()
    parts = {name: site.after[name] - start[name] for name, _ in layout.trained}
    if plan.aggregation.counted is not None:
        parts |= sending.counted(plan, parts, site.shares)
    if plan.aggregation.method == "both":
        parts |= sending.probed(plan, site.after)
    elif plan.aggregation.method == "regmean":
        parts |= sending.weighted(plan, parts, site.grams)
    elif plan.aggregation.method == "fisher":
        parts |= sending.by_fisher(plan, parts, site.squares)
    elif plan.aggregation.method == "dense":
        parts = sending.dense(plan, parts, start, site.after)
    elif plan.aggregation.method == "core":
        parts = {name: part for name, part in parts.items() if "lora_B" not in name} | site.cores
    return flatten(parts, sent(plan))


def quantised(job: Job, everybody: list[Trained]) -> list[NDArray[np.int32]]:
    """What the sites mask and upload."""
    return [job.quantizer.quantize(vector_of(job, s), s.weight, {"weight": s.weight, "loss": 0}) for s in everybody]


def mean_of(arrays: list[NDArray[Any]], weights: list[int]) -> Matrix:
    """Weighted mean in float64: the plain computation to compare with."""
    return np.asarray(sum(w * a.astype(np.float64) for w, a in zip(weights, arrays, strict=True)) / sum(weights))


def factors(site: Trained, module: str) -> tuple[Matrix, Matrix]:
    """(B, A) of a site."""
    return site.after[b_name(module)].astype(np.float64), site.after[a_name(module)].astype(np.float64)


HEAD_NAMES = ("base_model.model.classifier.bias", "base_model.model.classifier.weight")


def released(job: Job, everybody: list[Trained], path: Path, silent: dict[int, str] | None = None) -> Combined:
    """One masked round, verified as every site does, and the release of it."""
    return combine(job, [run_round(job, quantised(job, everybody), path / "total", silent or {})])


def unit(job: Job, weight: int = sum(WEIGHTS), survivors: int = SITES) -> float:
    """Most that rounding can move a coordinate of the mean: the quantiser of each site, and float32, three times."""
    quantizer = job.quantizer
    return survivors * quantizer.clip * quantizer.max_weight / (quantizer.qmax * weight) + 3 * 2.0**-24


def close(found: NDArray[Any], expected: Matrix, within: float) -> None:
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=0, atol=within)


def check_head(job: Job, combined: Combined, everybody: list[Trained], weights: list[int]) -> None:
    """The head is the plain mean, whatever the method."""
    for name in HEAD_NAMES:
        close(combined.tensors[name], mean_of([s.after[name] for s in everybody], weights), unit(job, sum(weights)))
