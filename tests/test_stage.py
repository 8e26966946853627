"""When a cohort closes, and with whom."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.stage import is_over, next_cohort
from privacy.roster import Rules

RULES = Rules(cohort=5, colluders=1, min_cohort=4, min_survivors=3, bits=24)


def cohort(ready: dict[int, float], done: set[int] | None = None, *, members: int = 8, now: float = 0.0) -> object:
    return next_cohort(ready, done or set(), members, RULES, now, 60.0)


def since(*members: int) -> dict[int, float]:
    return {m: float(i) for i, m in enumerate(members)}


@pytest.mark.parametrize(
    ("ready", "done", "now", "expected"),
    [
        (since(0, 1, 2), set(), 1e9, None),  # too few, however long they wait
        (since(0, 1, 2, 3), set(), 59.0, None),  # enough, and others may still come
        (since(0, 1, 2, 3), set(), 60.0, (0, 1, 2, 3)),  # the first of them has waited long enough
        (since(3, 2, 1, 0), {4, 5, 6, 7}, 0.0, (0, 1, 2, 3)),  # everybody who is left is ready
        (since(0, 1, 2, 3, 4), {4, 5, 6, 7}, 0.0, (0, 1, 2, 3)),  # a released member is not counted again
        (since(7, 6, 5, 4, 3, 2), set(), 60.0, (3, 4, 5, 6, 7)),  # six make no two cohorts: the first five go
        (since(7, 6, 5, 4, 3, 2, 1, 0), set(), 0.0, (4, 5, 6, 7)),  # eight make two cohorts of four
    ],
)
def test_a_cohort_opens(ready: dict[int, float], done: set[int], now: float, expected: object) -> None:
    assert cohort(ready, done, now=now) == expected


def test_no_cohort_is_larger_than_the_plan_allows() -> None:
    for count in range(4, 30):
        found = next_cohort(since(*range(count)), set(), count, RULES, 0.0, 60.0)
        assert found is not None
        assert 4 <= len(found) <= 5


@pytest.mark.parametrize(
    ("largest", "ready", "expected"),
    [
        (8, 8, 8),  # all fit: nobody is left
        (7, 8, 4),  # one would be left alone: two cohorts of four
        (7, 7, 7),
        (5, 6, 5),  # six make no two cohorts: one waits
        (4, 8, 4),
        (9, 12, 8),  # three would be left: the rest gets a fourth
        (9, 13, 9),  # four are left, enough
    ],
)
def test_the_rest_is_left_enough_for_a_cohort_of_its_own(largest: int, ready: int, expected: int) -> None:
    rules = replace(RULES, cohort=largest)
    assert next_cohort(since(*range(ready)), set(), ready, rules, 0.0, 60.0) == tuple(range(expected))


@pytest.mark.parametrize(
    ("done", "first_release", "now", "over"),
    [
        (5, 100.0, 100.0, True),  # everybody
        (4, 100.0, 159.9, False),  # one is late, and waited for
        (4, 100.0, 160.0, True),
        (0, None, 1e9, False),  # no release, nothing to go on from
        (5, None, 1e9, False),
    ],
)
def test_a_stage_is_over_when_everybody_is_in_it_or_was_waited_for(
    done: int, first_release: float | None, now: float, over: bool
) -> None:
    assert is_over(done, 5, first_release, now, 60.0) is over
