"""Secret randomness: Gaussian, Poisson, and never the same twice."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from scipy import stats

from participant import noise
from participant.noise import SecretRandom


def test_the_noise_is_gaussian_at_every_length() -> None:
    random = SecretRandom()
    drawn = random.normal(200_001)
    assert drawn.shape == (200_001,)
    assert stats.kstest(drawn, "norm").pvalue > 1e-9
    assert abs(drawn.mean()) < 6 / math.sqrt(len(drawn))
    assert len(random.normal(1)) == 1
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 6 / math.sqrt(len(drawn))


def test_four_gaussians_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two uniform numbers alone the result could be traced back to them."""
    asked: list[int] = []

    def counted(_: SecretRandom, count: int) -> noise.Floats:
        asked.append(count)
        return np.full(count, 0.25)

    monkeypatch.setattr(SecretRandom, "uniform", counted)
    SecretRandom().normal(10)
    assert asked == [5] * 8


def test_no_two_streams_are_alike_and_none_survives_a_fork() -> None:
    random = SecretRandom()
    assert not np.array_equal(random.uniform(8), SecretRandom().uniform(8))
    assert not np.array_equal(random.uniform(8), random.uniform(8))
    random._process = os.getppid()
    with pytest.raises(RuntimeError, match="does not survive a fork"):
        random.uniform(1)


def test_uniform_numbers_lie_inside_the_interval() -> None:
    class Ends:
        def update(self, zeros: bytes) -> bytes:
            return (bytes(8) + b"\xff" * 8)[: len(zeros)]

    random = SecretRandom()
    random._stream = Ends()  # type: ignore[assignment]
    low, high = random.uniform(2)
    assert 0 < low < high < 1
    assert np.isfinite(random.normal(2)).all()


def test_subsets_are_poisson() -> None:
    random = SecretRandom()
    sizes = [len(random.subset(1000, 0.3)) for _ in range(400)]
    assert abs(np.mean(sizes) - 300) < 6 * math.sqrt(210 / 400)
    assert 210 / 2 < np.var(sizes) < 210 * 2
    assert random.subset(5, 1.0) == [0, 1, 2, 3, 4]
    assert random.subset(0, 0.5) == []
