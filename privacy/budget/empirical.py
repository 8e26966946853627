"""A lower bound on epsilon from one training run: who guesses better than epsilon allows has shown it to be wrong.

Canaries are put into the training data, each with probability 1/2; afterwards some are guessed in or out by their
scores. Two bounds on how many guesses may be right, both for one run: for any (epsilon, delta) mechanism (Steinke,
Nasr and Jagielski 2023, arXiv:2305.08846), and for one whose trade-off curve is a Gaussian's (Mahloujifar, Melis and
Chaudhuri 2024, arXiv:2410.22235), which is tighter. A large lower bound convicts; a small one proves nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dp_accounting
import numpy as np
from scipy.stats import binom, norm

from privacy.budget.entries import strict_json
from privacy.budget.events import DpSgd, mechanism_from_json
from privacy.errors import ProtocolError

#: Shares of the canaries that are guessed; fixed before any score is seen, so Bonferroni over them is enough.
SHARES = (0.05, 0.1, 0.2, 0.4, 0.8)
CONFIDENCE = 0.95
MAX_CANARIES = 100_000
#: Beyond this a lower bound is only called larger.
MAX_EPSILON = 64.0


@dataclass(frozen=True)
class Scores:
    """What an audited training leaves: per canary whether it was in, and how much lower its loss became."""

    mechanism: DpSgd
    included: tuple[bool, ...]
    scores: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON of a scores file: numbers are decimal strings."""
        canaries = [{"in": i, "score": f"{s:.9f}"} for i, s in zip(self.included, self.scores, strict=True)]
        return {"v": 1, "mechanism": self.mechanism.to_json(), "canaries": canaries}


def read_scores(raw: bytes) -> Scores:
    """A scores file.

    Raises:
        ProtocolError: something else, or a mechanism that is out of range.
    """
    try:
        found = strict_json(raw)
        if found.keys() != {"v", "mechanism", "canaries"} or found["v"] != 1:
            raise ValueError("expected the keys v, mechanism and canaries")
        mechanism = mechanism_from_json(found["mechanism"])
        rows = [(row["in"], float(row["score"])) for row in found["canaries"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ProtocolError(f"expected the scores of an audited training, found: {error}") from error
    if not isinstance(mechanism, DpSgd):
        raise ProtocolError("expected the scores of a private training, found one without privacy")
    if not 20 <= len(rows) <= MAX_CANARIES or not all(type(i) is bool and math.isfinite(s) for i, s in rows):
        raise ProtocolError(f"expected 20 to {MAX_CANARIES} canaries with finite scores")
    return Scores(mechanism, tuple(i for i, _ in rows), tuple(s for _, s in rows))


def p_value(m: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Most probable that an (epsilon, delta) mechanism lets so many of ``guesses`` about ``m`` canaries be right.

    Theorem 5.2 of arXiv:2305.08846, in the closed form of its appendix.
    """
    q = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(right - 1, guesses, q))
    i = np.arange(1, right + 1)
    sums = binom.sf(right - i - 1, guesses, q) - beta  # P[right - i <= X < right]
    alpha = float(np.max(sums / i, initial=0.0))
    return min(1.0, beta + alpha * delta * 2 * m)


def is_gaussian_refuted(m: int, guesses: int, right: int, mu: float, significance: float) -> bool:
    """Would a mechanism with the trade-off curve of N(0,1) against N(mu,1) hardly let so many guesses be right?

    The recursion of Algorithm 3 of arXiv:2410.22235 for two classes, from the observed count downwards.
    """
    r, h = significance * right / m, significance * (guesses - right) / m
    for i in range(right - 1, -1, -1):
        higher = max(h, float(norm.cdf(norm.ppf(r) - mu)))
        if higher == h:
            break  # neither changes any more
        r, h = min(1.0, r + i / (guesses - i) * (higher - h)), higher
    return r + h > guesses / m


def _largest_refuted(refuted: Callable[[float], bool]) -> float:
    """The largest epsilon that is refuted, to 1e-4, given that smaller ones are too."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
        if low >= MAX_EPSILON:
            return MAX_EPSILON
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def lower_bound(m: int, guesses: int, right: int, delta: float, significance: float = 1 - CONFIDENCE) -> float:
    """Epsilon that is refuted by so many right guesses, for any (epsilon, delta) mechanism."""
    return _largest_refuted(lambda epsilon: p_value(m, guesses, right, epsilon, delta) < significance)


def gaussian_lower_bound(m: int, guesses: int, right: int, delta: float, significance: float = 1 - CONFIDENCE) -> float:
    """As :func:`lower_bound`, for a mechanism whose trade-off curve is a Gaussian's with that epsilon at ``delta``."""

    def refuted(epsilon: float) -> bool:
        mu = 1 / dp_accounting.get_sigma_gaussian(epsilon, delta)
        return is_gaussian_refuted(m, guesses, right, mu, significance)

    return _largest_refuted(refuted)


@dataclass(frozen=True)
class Bounds:
    """Lower bounds at one confidence, and what they could have been at most."""

    general: float
    gaussian: float
    ceiling: float  # of the general bound, had every guess been right
    guesses: int  # of the best share
    right: int


def bounds(scores: Scores, confidence: float = CONFIDENCE) -> Bounds:
    """Guess the highest scores in and the lowest out, for each share; the best bound, corrected for their number."""
    m, delta = len(scores.scores), float(scores.mechanism.delta)
    significance = (1 - confidence) / len(SHARES)
    counted = [_guess(scores, share) for share in SHARES]
    general = [lower_bound(m, guesses, right, delta, significance) for guesses, right in counted]
    gaussian = [gaussian_lower_bound(m, guesses, right, delta, significance) for guesses, right in counted]
    best = max(range(len(SHARES)), key=lambda i: (general[i], gaussian[i]))
    ceiling = max(lower_bound(m, guesses, guesses, delta, significance) for guesses, _ in counted)
    return Bounds(general[best], max(gaussian), ceiling, *counted[best])


def _guess(scores: Scores, share: float) -> tuple[int, int]:
    """(guesses, right ones) when this share of the canaries is guessed, half of it in and half out."""
    half = max(1, int(len(scores.scores) * share / 2))
    order = np.argsort(-np.array(scores.scores), kind="stable")
    included = np.array(scores.included)
    return 2 * half, int(included[order[:half]].sum() + (~included[order[-half:]]).sum())


def as_bytes(scores: Scores) -> bytes:
    """A scores file's content."""
    return json.dumps(scores.to_json(), indent=1).encode() + b"\n"
