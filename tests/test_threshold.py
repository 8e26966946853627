"""The counting rules of section 5, against their meaning rather than their formula."""

from __future__ import annotations

import pytest

from privacy.secagg.threshold import MAX_COMPLETE_GRAPH, abort_quorum, smallest_survivors, threshold

ALL = [(n, c) for n in range(2, MAX_COMPLETE_GRAPH + 1) for c in range(n - 1)]


def test_two_certified_lists_would_need_more_honest_signers_than_there_are() -> None:
    for n, c in ALL:
        t = threshold(n, c)
        assert 2 * (t - c) > n - c, (n, c)


def test_the_threshold_is_the_smallest_that_allows_only_one_list() -> None:
    for n, c in ALL:
        t = threshold(n, c) - 1
        assert 2 * (t - c) <= n - c, (n, c)


def test_the_threshold_can_be_reached_by_all_members_together() -> None:
    assert all(threshold(n, c) <= n for n, c in ALL if n >= c + 2)


def test_colluders_alone_stay_below_the_threshold() -> None:
    assert all(threshold(n, c) > c for n, c in ALL if n >= c + 2)


def test_an_abort_certificate_leaves_fewer_than_t_holders_that_may_release() -> None:
    for n, c in ALL:
        quorum = abort_quorum(n, c)
        honest_promises = quorum - c
        assert n - honest_promises < threshold(n, c), (n, c)
        assert n - (honest_promises - 1) >= threshold(n, c), (n, c)


@pytest.mark.parametrize(("n", "c", "lost"), [(3, 1, 0), (5, 1, 1), (10, 2, 3), (64, 6, 28)])
def test_as_many_members_may_be_lost_as_the_protocol_says(n: int, c: int, lost: int) -> None:
    assert n - threshold(n, c) == lost


MINIMA = {
    "nobody colludes, but every member is curious": (0, False, 3),
    "one colluder": (1, False, 3),
    "two colluders": (2, False, 4),
    "six colluders": (6, False, 8),
    "two members, by explicit opt-in": (0, True, 2),
    "two members are never enough beside a colluder": (1, True, 3),
}


@pytest.mark.parametrize(("colluders", "pairs", "least"), MINIMA.values(), ids=MINIMA.keys())
def test_smallest_survivor_counts(colluders: int, pairs: bool, least: int) -> None:
    assert smallest_survivors(colluders, pairs) == least


def test_sums_of_two_are_never_the_default() -> None:
    assert smallest_survivors(0) == 3
