"""Products, sums of squares and leading directions of matrices, the same bits on every machine.

Coordinator, sites and auditors publish and compare one release, so whatever they compute for it must agree bit for bit.
BLAS and LAPACK promise nothing of the kind: their results depend on the processor and on the number of threads. Here
there are elementwise multiplications, additions, subtractions, divisions and square roots of NumPy in a fixed order,
which IEEE 754 defines exactly, and sums by ``math.fsum``, which are correctly rounded (docs/decisions/0012).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from privacy.adapter import Keystream, Matrix, orthonormal

LEADING_LABEL = b"veilsum/1/leading-directions\0"

#: Directions carried along beside those asked for, and steps of the iteration, see :func:`leading`.
OVERSAMPLING, STEPS = 8, 8
#: Off-diagonal entry, relative to the whole, at which the rotations of :func:`_diagonal` end; sweeps at most.
SMALL, SWEEPS = 2.0**-50, 30


def product(a: Matrix, b: Matrix) -> Matrix:
    """(m, n) a @ b: for each entry the products are added one by one, in the order of the inner index."""
    total = np.zeros((a.shape[0], b.shape[1]))
    piece = np.empty_like(total)
    for column, row in zip(np.ascontiguousarray(a.T), np.ascontiguousarray(b), strict=True):
        np.multiply(column[:, None], row, out=piece)
        np.add(total, piece, out=total)
    return total


def sum_of_squares(matrix: NDArray[np.float64]) -> float:
    """Of all entries: that of each row correctly rounded, and their sum again."""
    rows = matrix.reshape(-1, matrix.shape[-1])
    return math.fsum(math.fsum(np.multiply(row, row).tolist()) for row in rows)


def leading(matrix: Matrix, rank: int, seed: bytes, name: str) -> tuple[Matrix, Matrix]:
    """(m, rank) L and (rank, n) V with L V close to the best approximation of the matrix of that rank.

    V has orthonormal rows and L = matrix V^T, with orthogonal columns, the longest first: their lengths are nearly the
    leading singular values. Subspace iteration with oversampling (Halko, Martinsson, Tropp 2011, algorithm 4.4) from a
    public seed, and a Rayleigh-Ritz step. It is exact, to rounding, if the matrix has no larger rank than rank +
    OVERSAMPLING; otherwise close, and whoever uses it measures how close.

    Raises:
        ValueError: rank > n; so many orthonormal rows do not exist.
    """
    inputs = matrix.shape[1]
    if rank > inputs:
        raise ValueError(f"expected a rank of at most {inputs}, found {rank}")
    count = min(rank + OVERSAMPLING, inputs)
    stream = Keystream(seed, LEADING_LABEL + name.encode())
    right = orthonormal(_drawn(stream, inputs), count)
    transposed = np.ascontiguousarray(matrix.T)
    for _ in range(STEPS):
        left = product(right, transposed)  # (count, m)
        # Both halves of a step are made orthonormal, or the weak directions would drown in the strong ones.
        if count <= left.shape[1]:
            left = orthonormal(_chain(left, _drawn(stream, left.shape[1])), count)
        right = orthonormal(_chain(product(left, matrix), _drawn(stream, inputs)), count)
    left = product(right, transposed)
    order, turn = _diagonal(product(left, left.T))
    right = product(np.ascontiguousarray(turn.T)[order[:rank]], right)
    return np.ascontiguousarray(product(right, transposed).T), right


def _drawn(stream: Keystream, size: int) -> Iterator[NDArray[np.float64]]:
    while True:
        yield stream.integers(size)


def _chain(first: Iterable[NDArray[np.float64]], then: Iterator[NDArray[np.float64]]) -> Iterator[NDArray[np.float64]]:
    """Rows that lie in the span of those before them are replaced by drawn ones."""
    yield from first
    yield from then


def _diagonal(symmetric: Matrix) -> tuple[list[int], Matrix]:
    """Order of the eigenvalues, largest first, and (n, n) eigenvectors as columns.

    Cyclic Jacobi (Golub and Van Loan 2013, section 8.5), each rotation a few elementwise operations.
    """
    work, turn, count = symmetric.copy(), np.eye(len(symmetric)), len(symmetric)
    limit = SMALL * math.sqrt(sum_of_squares(symmetric)) / count
    for _ in range(SWEEPS):
        moved = False
        for p in range(count - 1):
            for q in range(p + 1, count):
                if abs(work[p, q]) > limit:
                    _rotate(work, turn, p, q)
                    moved = True
        if not moved:
            break
    values = np.diagonal(work)
    return sorted(range(count), key=lambda i: (-values[i], i)), turn


def _rotate(work: Matrix, turn: Matrix, p: int, q: int) -> None:
    """One rotation, in place, after which work[p, q] is zero."""
    tau = float((work[q, q] - work[p, p]) / (2.0 * work[p, q]))
    t = (1.0 if tau >= 0 else -1.0) / (abs(tau) + math.sqrt(1.0 + tau * tau))
    c = 1.0 / math.sqrt(1.0 + t * t)
    s = t * c
    for matrix in (work.T, turn.T, work):  # columns of both, then rows of work
        first, second = matrix[p].copy(), matrix[q].copy()
        matrix[p] = np.subtract(np.multiply(c, first), np.multiply(s, second))
        matrix[q] = np.add(np.multiply(s, first), np.multiply(c, second))
    work[p, q] = work[q, p] = 0.0
