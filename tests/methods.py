"""A federation whose plan names one of the methods, and made-up sites: what they trained, and what they send."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from participant import sending
from privacy.adapter import Tensors, Vector, a_name, b_name, flatten, layout_of, start_adapter, start_digest
from privacy.job import Job
from privacy.methods import sent
from privacy.plan import Adapter, parse_plan
from tests.analytic import job_for

SITES = 5
RANK = 3
MODULES = {"block.query": (7, 9), "block.value": (5, 6)}
HEAD = {"classifier.bias": (3,), "classifier.weight": (3, 4)}
WEIGHTS = (40, 10, 25, 60, 105)
REGMEAN = """[aggregation.regmean]
ridge = {ridge}
feature_clip = 2.0
min_texts = 3
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
{section}
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
    method: str, *, train: str = "", bits: int = 32, ridge: float = 0.01, server_lr: float = 1.0, clip: float = 4.0
) -> str:
    """A plan file with a correct start digest; no base model is needed, since what sites trained is made up."""
    zero, seed = "0" * 64, "07" * 32
    adapter = Adapter(rank=RANK, alpha=6.0, seed=seed, digest=zero, modules=MODULES, head=HEAD)
    return PLAN.format(
        zero=zero,
        seed=seed,
        digest=start_digest(start_adapter(adapter)).hex(),
        train=train or ("both" if method == "both" else "all"),
        method=method,
        section=REGMEAN.format(ridge=ridge) if method == "regmean" else "",
        bits=bits,
        server_lr=server_lr,
        clip=clip,
    )


def the_job(method: str, **changes: float) -> Job:
    """:func:`plan_text` under a roster of the simulation's members."""
    return job_for(plan_text(method, **changes))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Trained:
    """A made-up site after training."""

    after: Tensors
    #: Module -> (rank, rank) mean of z z^T.
    grams: dict[str, Matrix]
    weight: int


def sites(job: Job, apart: float = 1.0) -> list[Trained]:
    """Adapters near the start; ``apart``: 0 for sites that moved alike, 1 for sites that have nothing in common."""
    start, layout = start_adapter(job.plan.adapter), layout_of(job.plan.adapter)
    rng = np.random.default_rng(11)
    common = {name: rng.normal(size=shape) for name, shape in layout.trained}
    found = []
    for weight in WEIGHTS:
        after = dict(start)
        for name, shape in layout.trained:
            own = math.sqrt(1 - apart**2) * common[name] + apart * rng.normal(size=shape)
            after[name] = (start[name] + 0.2 * own).astype(np.float32)
        grams = {}
        for module in MODULES:
            z = np.clip(rng.normal(size=(50, RANK)) * rng.uniform(0.05, 0.5, RANK), -1, 1)
            grams[module] = z.T @ z / len(z)
        found.append(Trained(after, grams, weight))
    return found


def vector_of(job: Job, site: Trained) -> Vector:
    """What a site sends, before it is quantised, by the code that sites run."""
    plan, layout = job.plan, layout_of(job.plan.adapter)
    start = start_adapter(plan.adapter)
    parts = {name: site.after[name] - start[name] for name, _ in layout.trained}
    if plan.aggregation.method == "both":
        parts |= sending.probed(plan, site.after)
    elif plan.aggregation.method == "regmean":
        parts |= sending.weighted(plan, parts, site.grams)
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


def parsed(text: str) -> Job:
    """A job of an edited plan."""
    return job_for(parse_plan(text.encode()).raw.decode())
