"""Accuracies with paired bootstrap intervals: test records and seeds are drawn anew, the same for all arms compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
SEED = 2026

#: Seed -> (records,) share of right answers of one arm, record by record.
Answers = Mapping[int, NDArray[np.float64]]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % percentile interval."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        """Such as in points."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)


def common_seeds(*arms: Answers) -> list[int]:
    """Seeds that every arm was measured with."""
    return sorted(set.intersection(*(set(arm) for arm in arms))) if arms else []


def bootstrap(statistic: Callable[..., float], *arms: Answers) -> Interval | None:
    """``statistic`` of the arms' mean accuracies over their common seeds; None if they have none.

    Each draw takes seeds and test records with replacement and applies both to every arm, so what the arms have in
    common cancels. With three seeds the interval says little about seeds; it is what three seeds can give.
    """
    seeds = common_seeds(*arms)
    if not seeds:
        return None
    tables = [np.stack([arm[seed] for seed in seeds]) for arm in arms]
    shares_of_seeds, shares_of_records = _draws(len(seeds), tables[0].shape[1])
    drawn = [((shares_of_seeds @ table) * shares_of_records).sum(axis=1) for table in tables]
    values = [statistic(*means) for means in zip(*(d.tolist() for d in drawn), strict=True)]
    exact = statistic(*(float(table.mean()) for table in tables))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return Interval(exact, float(low), float(high))


@lru_cache(maxsize=8)
def _draws(seeds: int, records: int) -> tuple[Matrix, Matrix]:
    """(draws, seeds) and (draws, records): the share each has in every draw with replacement."""
    rng = np.random.default_rng(SEED)
    of_seeds = rng.multinomial(seeds, [1 / seeds] * seeds, size=DRAWS) / seeds
    return of_seeds, rng.multinomial(records, [1 / records] * records, size=DRAWS) / records


def mean_accuracy(arm: Answers) -> Interval | None:
    """Mean over seeds and records."""
    return bootstrap(lambda mean: mean, arm)


def difference(one: Answers, other: Answers) -> Interval | None:
    """Accuracy of one arm minus that of another, paired."""
    return bootstrap(lambda a, b: a - b, one, other)


def gained(after: Answers, before: Answers, *, lower: bool = False) -> bool:
    """Is one arm better than another, beyond its interval? ``lower``: these are losses."""
    gap = difference(after, before)
    return gap is not None and (gap.high < 0 if lower else gap.low > 0)


def recovered(one_shot: Answers, multi: Answers, base: Answers, *, lower: bool = False) -> Interval | None:
    """rho = (one-shot - base) / (multi-round - base), of mean accuracies, or of losses (``lower``).

    None where several rounds did not clearly gain anything: a share of nothing says nothing.
    """
    if not gained(multi, base, lower=lower):
        return None
    return bootstrap(lambda a, b, c: (a - c) / (b - c) if b != c else float("nan"), one_shot, multi, base)
