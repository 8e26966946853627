"""Products and leading directions agree with LAPACK's, and are the same bits on every machine."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.adapter import Matrix
from privacy.linear import leading, product, sum_of_squares

SEED = bytes(range(32))


def decaying(rows: int, columns: int, ratio: float, rank: int | None = None) -> Matrix:
    """Singular values 1, ratio, ratio^2, ...; at most ``rank`` of them."""
    rng = np.random.default_rng(5)
    u, s, v = np.linalg.svd(rng.normal(size=(rows, columns)), full_matrices=False)
    values = ratio ** np.arange(len(s))
    values[len(s) if rank is None else rank :] = 0.0
    return np.asarray(u @ np.diag(values) @ v)


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_a_product_is_a_product(m: int, k: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(m, k)), rng.normal(size=(k, n))
    np.testing.assert_allclose(product(a, b), a @ b, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(product(b.T, a.T), (a @ b).T, rtol=1e-12, atol=1e-12)
    assert sum_of_squares(a) == pytest.approx(float(np.sum(a**2)))


#: Sentence -> (matrix, rank).
MATRICES = {
    "of exactly the rank": (decaying(30, 40, 0.5, 4), 4),
    "of a smaller rank": (decaying(30, 40, 0.9, 3), 6),
    "of a falling spectrum": (decaying(60, 50, 0.8), 5),
    "with strong and very weak directions": (decaying(40, 40, 0.05), 4),
    "of a flat spectrum": (decaying(64, 64, 1.0), 8),
    "of fewer rows than the rank": (decaying(3, 20, 0.5), 5),
    "of one column more than the rank": (decaying(20, 6, 0.9), 5),
    "zero": (np.zeros((6, 9)), 3),
}


@pytest.mark.parametrize(("matrix", "rank"), MATRICES.values(), ids=MATRICES.keys())
def test_leading_directions_are_as_good_as_lapacks(matrix: Matrix, rank: int) -> None:
    left, right = leading(matrix, rank, SEED, "m")
    assert (left.shape, right.shape) == ((matrix.shape[0], rank), (rank, matrix.shape[1]))
    np.testing.assert_allclose(right @ right.T, np.eye(rank), atol=1e-12)
    inner = left.T @ left
    np.testing.assert_allclose(inner, np.diag(np.diagonal(inner)), atol=1e-10)
    lengths = np.linalg.norm(left, axis=0)
    assert (np.diff(lengths) <= 1e-12).all(), "the longest first"
    best = math.sqrt(float(np.sum(np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2)))
    assert np.linalg.norm(matrix - left @ right) <= 1.005 * best + 1e-10


def test_singular_values_with_a_gap_are_found() -> None:
    left, _ = leading(decaying(60, 50, 0.5), 5, SEED, "m")
    np.testing.assert_allclose(np.linalg.norm(left, axis=0), 0.5 ** np.arange(5), rtol=1e-10)


def test_their_bits_are_the_same_on_every_machine() -> None:
    """A known answer: integers in, IEEE 754 operations in a fixed order, these very bits out."""
    matrix = (np.arange(24 * 31, dtype=np.int64) ** 3 % 103 - 51).reshape(24, 31).astype(np.float64)
    left, right = leading(matrix, 4, SEED, "m")
    assert hashlib.sha256(left.astype("<f8").tobytes() + right.astype("<f8").tobytes()).hexdigest() == KNOWN
    assert not np.array_equal(leading(matrix, 4, SEED, "n")[1], right)


KNOWN = "6416ec07f45e5915866e4bbe63f37c35e2b90be80ed2561a35a71be68b6d78d1"


def test_more_directions_than_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a rank of at most 3, found 4"):
        leading(np.ones((5, 3)), 4, SEED, "m")
