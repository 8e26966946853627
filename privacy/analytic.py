"""The analytic head: the ridge solution of all sites' records together, from sums of statistics, whatever the split.

Of its features z, clipped to a public range and divided by it, with a constant 1 behind them where the head has a bias,
and of y, one-hot labels or the scaled target, a site sends the means of z z^T (upper triangle) and of z y^T as the
coordinates of its vector, weighted by its number of records. The mean over sites is that over all records, and the head
is the solution W of

    (mean z z^T + ridge I) W = mean z y^T

Nothing here depends on how the records lie at the sites but the rounding of the quantiser. Coordinator, sites and
auditors must agree bit for bit, so there is no BLAS: elimination in a fixed order, one elementwise multiplication,
subtraction or division at a time, which IEEE 754 defines exactly (docs/decisions/0005).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy.adapter import Matrix, Tensors, Vector
from privacy.errors import ProtocolError
from privacy.plan import Plan
from privacy.sections import linear_head

#: Relative error of an entry that was rounded to float32 twice: at its site, and as a mean.
FLOAT32 = 2.0**-23


@dataclass(frozen=True)
class Head:
    """The linear layer that is solved for."""

    module: str
    bias: bool
    features: int
    #: One for each label, or the one number of a regression.
    classes: int

    @property
    def inputs(self) -> int:
        """Features, and the constant of the bias."""
        return self.features + self.bias

    @property
    def size(self) -> int:
        """Coordinates of the statistics: upper triangle of the Gram matrix, then (inputs, classes) row by row."""
        return self.inputs * (self.inputs + 1) // 2 + self.inputs * self.classes


def head_of(plan: Plan) -> Head:
    """The head of a plan with ``aggregation.head = "analytic"``; every other plan may raise ValueError."""
    return Head(*linear_head(plan.adapter, plan.outputs), plan.outputs)


def pack(gram: Matrix, products: Matrix, clip: float) -> Vector:
    """(size,) float32: the means, scaled from [-1, 1] to the +-clip of the quantiser.

    Args:
        gram: (inputs, inputs), mean z z^T; only the upper triangle is read.
        products: (inputs, classes), mean z y^T.
    """
    upper = gram[np.triu_indices(len(gram))]
    return (clip * np.concatenate([upper, products.reshape(-1)])).astype(np.float32)


def unpack(mean: Vector, head: Head, clip: float) -> tuple[Matrix, Matrix]:
    """The inverse of :func:`pack`; the Gram matrix is whole."""
    scaled = mean.astype(np.float64) / clip
    triangle = head.size - head.inputs * head.classes
    gram = np.zeros((head.inputs, head.inputs))
    upper = np.triu_indices(head.inputs)
    gram[upper] = gram[upper[::-1]] = scaled[:triangle]
    return gram, scaled[triangle:].reshape(head.inputs, head.classes)


def solve(gram: Matrix, products: Matrix, ridge: float) -> Matrix:
    """(inputs, classes) W with (gram + ridge I) W = products, the same bits on every machine.

    Gaussian elimination without pivoting, which is stable for a positive definite matrix (Higham 2002, section 10.1).

    Raises:
        ValueError: gram + ridge I is not positive definite.
    """
    count = len(gram)
    rows = np.concatenate([gram, products], axis=1)
    rows[np.arange(count), np.arange(count)] += ridge
    for k in range(count):
        row = rows[k, k:].copy()
        if not row[0] > 0:
            raise ValueError(f"expected a positive definite matrix, found pivot {row[0]} at {k}")
        factors = np.divide(row[1 : count - k], row[0])
        rows[k + 1 :, k + 1 :] -= np.multiply(factors[:, None], row[1:])
    found = rows[:, count:]
    for k in reversed(range(count)):
        found[k] = np.divide(found[k], rows[k, k])
        found[:k] -= np.multiply(rows[:k, k, None], found[k])
    return found


def rounding_ridge(inputs: int, unit: float, survivors: int) -> float:
    """The least ridge that keeps a rounded Gram matrix positive definite.

    Each survivor's stochastic rounding is off by less than a ``unit``, with a standard deviation of at most half of it,
    so the error is a symmetric random matrix of norm about ``unit * sqrt(survivors * inputs)`` (Wigner): twice that.
    """
    return 2.0 * unit * math.sqrt(survivors * inputs)


def solved(
    start: Mapping[str, NDArray[np.float32]], mean: Vector, plan: Plan, least: float = 0.0
) -> tuple[Tensors, float]:
    """The adapter with the head that a mean of statistics gives, and the ridge that was used.

    Args:
        start: the whole start adapter, under PEFT's names; all but the head stay as they are.
        mean: (size,) float32, as :func:`pack` makes it.
        least: see :func:`rounding_ridge`. With what float32 may add to it, 2**-23 of each entry, hence of the trace
            (Cauchy-Schwarz), it is used where the plan's ridge is smaller.

    Raises:
        ProtocolError: no records have such statistics.
    """
    settings, head = plan.aggregation.analytic, head_of(plan)
    assert settings is not None
    gram, products = unpack(mean, head, plan.round.clip)
    ridge = max(settings.ridge, least + FLOAT32 * math.fsum(np.diagonal(gram)))
    largest = max(float(np.abs(gram).max()), float(np.abs(products).max()))
    if largest > 1.0 + ridge:
        raise ProtocolError(f"garbled total: expected means of statistics within 1, found {largest:.3g}")
    try:
        weights = solve(gram, products, ridge)
    except ValueError as error:
        raise ProtocolError(f"garbled total: no records have this Gram matrix: {error}") from error
    tensors = dict(start)
    scaled = np.divide(weights[: head.features].T, settings.feature_clip)
    tensors[f"base_model.model.{head.module}.weight"] = np.ascontiguousarray(scaled, np.float32)
    if head.bias:
        tensors[f"base_model.model.{head.module}.bias"] = weights[head.features].astype(np.float32)
    return tensors, ridge
