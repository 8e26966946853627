"""What a plan's method sums, and the release that the mean of it gives (docs/aggregation.md).

A site sends one vector of named parts, in sorted-name order, each row-major; a plan fixes their names and shapes. The
mean over all sites, each by its weight, is all that is ever known; what is made of it here is the same computation at
coordinator, sites and auditors, bit for bit (``privacy/linear.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy import analytic
from privacy.adapter import (
    PREFIX,
    Keystream,
    Layout,
    Matrix,
    Tensors,
    Vector,
    a_name,
    b_name,
    flatten,
    layout_of,
    release,
    unflatten,
)
from privacy.aggregation import Method
from privacy.errors import ProtocolError
from privacy.factors import out_name
from privacy.linear import leading, product, sum_of_squares
from privacy.plan import Plan
from privacy.sections import Adapter

PROBE_LABEL = b"veilsum/1/probe\0"
#: Public directions v in which method "both" measures its error, for each module.
PROBES = 2

#: Name of the part that has the share of each class among a site's records, (classes,), for a counted head.
SHARES = "shares"

Start = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Rounding:
    """How far the quantiser may have moved a mean."""

    #: Largest error of one site in one coordinate of the mean, relative to the clipping range.
    unit: float = 0.0
    survivors: int = 1

    def deviation(self, clip: float) -> float:
        """Standard deviation of a coordinate of the mean, at most: that of stochastic rounding is half a unit."""
        return clip * self.unit * math.sqrt(self.survivors) / 2.0


@dataclass(frozen=True)
class Merged:
    """The whole adapter of a release, and what its manifest says of how it was made."""

    tensors: Tensors
    facts: dict[str, Any] = field(default_factory=dict)


def sent(plan: Plan) -> Layout:
    """The parts of the vector that a plan's sites send, extras not counted; none of them is frozen."""
    counted = len(plan.data.labels) if plan.aggregation.counted is not None else 0
    return parts_of(plan.adapter, plan.aggregation.method, counted)


def parts_of(adapter: Adapter, method: Method, counted: int = 0) -> Layout:
    """As :func:`sent`, of a plan that is still to be written; ``counted``: classes of a counted head."""
    parts, rank = dict(layout_of(adapter).trained), adapter.rank
    if counted:
        parts[SHARES] = (counted,)
    if method == "fisher":
        parts |= {fisher_name(name): shape for name, shape in parts.items()}
    for module, shape in adapter.modules.items():
        outputs = shape[0]
        if method == "both":
            parts[probe_name(module)] = (PROBES, outputs)
        elif method == "regmean":
            parts[gram_name(module)] = (rank * (rank + 1) // 2,)
        elif method == "core":
            del parts[b_name(module)]
            parts[core_name(module)] = (rank, rank)
        elif method == "dense":
            del parts[a_name(module)], parts[b_name(module)]
            parts[dense_name(module)] = shape
    return Layout((), tuple(sorted(parts.items())))


def vector_size(plan: Plan) -> int:
    """d: coordinates of the vector that a plan's sites send, extras not counted."""
    return sent(plan).size if plan.aggregation.analytic is None else analytic.head_of(plan).size


def probe_name(module: str) -> str:
    """Name of the part that has B (A v) of a site, (PROBES, out_features)."""
    return f"{PREFIX}{module}.probe"


def gram_name(module: str) -> str:
    """Name of the part that has the upper triangle of a site's mean of z z^T, row by row."""
    return f"{PREFIX}{module}.gram"


def fisher_name(name: str) -> str:
    """Name of the part that has the weight of each number of a tensor, of its shape."""
    return f"{name}.fisher"


def core_name(module: str) -> str:
    """Name of the part that has what was added to R, (rank, rank)."""
    return f"{PREFIX}{module}.core"


def dense_name(module: str) -> str:
    """Name of the part that has what was added to B A, (out_features, in_features)."""
    return f"{PREFIX}{module}.dense"


def probes(plan: Plan, module: str) -> Matrix:
    """(PROBES, in_features) v, entries +-1 / sqrt(rank) from the public seed: so B (A v) is about as large as B."""
    inputs = plan.adapter.modules[module][1]
    stream = Keystream(bytes.fromhex(plan.adapter.seed), PROBE_LABEL + module.encode())
    signs = np.where(stream.integers(PROBES * inputs) < 0, -1.0, 1.0)
    return np.divide(signs, math.sqrt(plan.adapter.rank)).reshape(PROBES, inputs)


def merged(
    start: Start,
    mean: Vector,
    plan: Plan,
    rounding: Rounding = Rounding(),
    factors: Start | None = None,
) -> Merged:
    """The adapter that a mean of sites' vectors gives.

    Args:
        start: the whole start adapter of the stage, under PEFT's names.
        mean: (d,) float32, of :func:`vector_size`; it may be overwritten.
        rounding: of the mean; none for a single site's own vector.
        factors: those that the method "core" pins.

    Raises:
        ProtocolError: no sites have vectors with such a mean.
    """
    method, rate, layout = plan.aggregation.method, plan.aggregation.server_lr, layout_of(plan.adapter)
    if plan.aggregation.analytic is not None:
        inputs = analytic.head_of(plan).inputs
        least = analytic.rounding_ridge(inputs, rounding.unit, rounding.survivors)
        tensors, ridge = analytic.solved(start, mean, plan, least)
        return Merged(tensors, {"head": "analytic", "ridge": ridge})
    if method == "freeze_a" and plan.aggregation.counted is None:
        return Merged(release(start, mean, rate, layout, in_place=True))
    parts = unflatten(mean, sent(plan))
    facts: dict[str, Any] = {} if method == "freeze_a" else {"method": method}
    if plan.aggregation.counted is not None:
        lost = _counted(parts, plan, rounding)
        facts |= {"head": "counted"} | ({"classes_lost_in_rounding": lost} if lost else {})
    if method == "dense":
        tensors, facts["truncation"] = _truncated(start, parts, plan, rounding)
        return Merged(tensors, facts)
    if method == "both":
        facts["probe"] = _probed(start, parts, plan, rounding)
    elif method == "regmean":
        facts["ridge"] = _regmean(parts, plan, rounding)
    elif method == "fisher":
        numbers = 0
        for name, _ in layout.trained:
            weights = np.divide(parts.pop(fisher_name(name)).astype(np.float64), plan.round.clip)
            parts[name] = _ratio(parts[name], weights, plan, rounding)
            numbers += int(np.count_nonzero(weights <= _slack(rounding)))  # no site sent a weight of zero
        facts |= {"numbers_lost_in_rounding": numbers} if numbers else {}
    elif method == "core":
        assert factors is not None, "whoever merges cores has the factors"
        _unfold(parts, plan, factors)
    delta = flatten({name: parts[name] for name, _ in layout.trained}, layout)
    return Merged(release(start, delta, rate, layout, in_place=True), facts)


def shown(value: float) -> float:
    """A figure for the manifest: six digits."""
    return float(f"{value:.6g}")


# --- a counted head: rows count by the records of their class -------------------------------------------------------


def head_parts(plan: Plan) -> list[str]:
    """Names of the tensors of the head, one row or entry for each label."""
    return [f"{PREFIX}{name}" for name in sorted(plan.adapter.head)]


def _counted(parts: Tensors, plan: Plan, rounding: Rounding) -> list[str]:
    """Puts sum(c D) / sum(c) in the place of the mean of share * D, for each row D of the head and its class.

    c are the records of the class that a site has, share is c over all its records, and all of it weighted by these:
    so a site without a class has no say in its row. A class that nobody counts keeps its row; so does one whose share
    is no larger than what rounding makes of nothing, and these labels are returned.

    Raises:
        ProtocolError: no sites have such shares and rows.
    """
    shares = np.divide(parts.pop(SHARES).astype(np.float64), plan.round.clip)
    if math.fsum(shares.tolist()) > 1.0 + len(shares) * _slack(rounding):
        raise ProtocolError("garbled total: expected shares of classes of at most 1 together, found others")
    for name in head_parts(plan):
        share = shares.reshape(-1, *[1] * (parts[name].ndim - 1))
        parts[name] = _ratio(parts[name], share, plan, rounding)
    # Quantisers leave an exact zero as it is, so what is above one was counted by somebody.
    return [
        k for k, s in zip(plan.data.labels, shares.tolist(), strict=True) if analytic.FLOAT32 < s <= _slack(rounding)
    ]


def _slack(rounding: Rounding) -> float:
    """Most that quantisers and float32 may have moved a mean, relative to the clipping range."""
    return rounding.survivors * rounding.unit + analytic.FLOAT32


def _ratio(above: Vector, below: Matrix, plan: Plan, rounding: Rounding) -> Vector:
    """mean(w D) / mean(w), elementwise, for weights w from 0 to 1 and D within the clipping range; 0 where w is.

    Raises:
        ProtocolError: no sites have such weights and numbers.
    """
    clip, slack, found = plan.round.clip, _slack(rounding), above.astype(np.float64)
    if below.min() < -slack or below.max() > 1.0 + slack:
        raise ProtocolError("garbled total: expected weights from 0 to 1, found others")
    if (np.abs(found) > np.multiply(clip, np.add(below, 2.0 * slack))).any():
        raise ProtocolError("garbled total: expected weighted numbers within the clipping range, found larger ones")
    counts = np.greater(below, slack)
    return np.where(counts, np.divide(found, np.where(counts, below, 1.0)), 0.0).astype(np.float32)


# --- both: the mean of B times the mean of A is not the mean of B A -------------------------------------------------


def _probed(start: Start, parts: Tensors, plan: Plan, rounding: Rounding) -> dict[str, Any]:
    """How far mean(B) mean(A) is from mean(B A), relative, as seen in public directions, and the part of rounding.

    E |M v|^2 over random signs v is the squared Frobenius norm of M (Hutchinson 1990); the two norms are estimated from
    all modules together. At a server rate other than 1 the release is another product; this is of the means alone.
    """
    gap, size, noise = [], [], []
    for module in sorted(plan.adapter.modules):
        v = probes(plan, module)
        a = _moved(start, parts, a_name(module))
        b = _moved(start, parts, b_name(module))
        inner = product(a, np.ascontiguousarray(v.T))  # (rank, PROBES)
        mean = parts[probe_name(module)].astype(np.float64)
        gap.append(sum_of_squares(np.subtract(mean, product(b, inner).T)))
        size.append(sum_of_squares(mean))
        noise.append(mean.size + len(b) * sum_of_squares(inner) + sum_of_squares(b) * sum_of_squares(v))
    whole = math.sqrt(math.fsum(size))
    if whole == 0.0:
        return {"directions": PROBES, "relative_error": 0.0, "of_rounding": 0.0}
    deviation = rounding.deviation(plan.round.clip) * math.sqrt(math.fsum(noise))
    return {
        "directions": PROBES,
        "relative_error": shown(math.sqrt(math.fsum(gap)) / whole),
        "of_rounding": shown(deviation / whole),
    }


def _moved(start: Start, parts: Tensors, name: str) -> Matrix:
    """start + mean delta of one tensor, in float64."""
    return np.add(start[name].astype(np.float64), parts[name].astype(np.float64))


# --- regmean: sites count by what they have seen --------------------------------------------------------------------


def _regmean(parts: Tensors, plan: Plan, rounding: Rounding) -> float:
    """Puts D with D (G + ridge I) = (1 + ridge) S in the place of each S, of the means G and S; the largest ridge used.

    Each site sent S_i = D_i (G_i + ridge I) / (1 + ridge), with D_i what it added to B and G_i its mean of z z^T: D is
    the mean of the D_i, each weighted by G_i + ridge I (RegMean, Jin et al. 2023, arXiv 2212.09849, inputs seen through
    the frozen A). A large ridge makes it the plain mean; the division keeps S within the clipping range.

    Raises:
        ProtocolError: no records have such statistics.
    """
    settings = plan.aggregation.regmean
    assert settings is not None
    rank, used = plan.adapter.rank, settings.ridge
    least = analytic.rounding_ridge(rank, rounding.unit, rounding.survivors)
    for module in sorted(plan.adapter.modules):
        gram = whole_gram(parts[gram_name(module)], rank, plan.round.clip)
        ridge = max(settings.ridge, least + analytic.FLOAT32 * math.fsum(np.diagonal(gram)))
        if (largest := float(np.abs(gram).max())) > 1.0 + ridge:
            raise ProtocolError(f"garbled total: expected means of statistics within 1, found {largest:.3g}")
        name = b_name(module)
        try:
            moments = np.multiply(1.0 + settings.ridge, parts[name].T.astype(np.float64))
            solution = analytic.solve(gram, moments, ridge)
        except ValueError as error:
            raise ProtocolError(f"garbled total: no records have this Gram matrix: {error}") from error
        parts[name] = np.ascontiguousarray(solution.T, np.float32)
        used = max(used, ridge)
    return used


def whole_gram(triangle: Vector, rank: int, clip: float) -> Matrix:
    """(rank, rank) from its upper triangle, scaled back from the +-clip of the quantiser to [-1, 1]."""
    gram, upper = np.zeros((rank, rank)), np.triu_indices(rank)
    gram[upper] = gram[upper[::-1]] = triangle.astype(np.float64) / clip
    return gram


# --- core: r x r between frozen factors -----------------------------------------------------------------------------


def _unfold(parts: Tensors, plan: Plan, factors: Start) -> None:
    """Puts U R, what is added to B, in the place of each mean R: linear in R, so the sum is exact."""
    for module in sorted(plan.adapter.modules):
        core = parts.pop(core_name(module)).astype(np.float64)
        parts[b_name(module)] = product(factors[out_name(module)].astype(np.float64), core).astype(np.float32)


# --- dense: the sum of the products themselves ----------------------------------------------------------------------


def _truncated(start: Start, parts: Tensors, plan: Plan, rounding: Rounding) -> tuple[Tensors, dict[str, float]]:
    """The mean of the products B A is exact, whatever the ranks they have; only its leading directions are released.

    Of M = what was there + server_lr * mean, each module's A gets the leading right singular directions as rows, and B
    = M A^T: the nearest product of the plan's rank. The manifest has what is lost, relative to all M together.
    """
    layout, rate = layout_of(plan.adapter), plan.aggregation.server_lr
    delta = {name: np.zeros(shape, np.float32) for name, shape in layout.trained}
    head = delta.keys() & parts.keys()
    delta |= {name: parts[name] for name in head}
    tensors = release(start, flatten(delta, layout), rate, layout, in_place=True)
    lost, size, seed = [], [], bytes.fromhex(plan.adapter.seed)
    for module in sorted(plan.adapter.modules):
        before = product(start[b_name(module)].astype(np.float64), start[a_name(module)].astype(np.float64))
        whole = np.add(before, np.multiply(rate, parts[dense_name(module)].astype(np.float64)))
        b, a = (factor.astype(np.float32) for factor in leading(whole, plan.adapter.rank, seed, module))
        tensors[b_name(module)], tensors[a_name(module)] = b, a
        kept = product(b.astype(np.float64), a.astype(np.float64))
        lost.append(sum_of_squares(np.subtract(whole, kept)))
        size.append(sum_of_squares(whole))
    norm, count = math.sqrt(math.fsum(size)), sum(o * i for o, i in plan.adapter.modules.values())
    error, floor = (math.sqrt(math.fsum(lost)), rate * rounding.deviation(plan.round.clip) * math.sqrt(count))
    if norm == 0.0:
        error, floor, norm = 0.0, 0.0, 1.0
    return tensors, {"relative_error": shown(error / norm), "of_rounding": shown(floor / norm)}
