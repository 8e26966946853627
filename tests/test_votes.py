"""Counts of right answers as a vector, what their sum says, and which records are held out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from participant.data import Examples
from participant.holdout import split
from privacy.errors import ProtocolError, UserError
from privacy.evaluation import (
    MAX_RECORDS,
    Counts,
    candidates_of,
    counts_quantizer,
    elected,
    encode_counts,
    results_of,
)
from privacy.plan import Plan, parse_plan
from tests.test_guarantee import PRIVATE
from tests.test_plan import PLAN

SECTION = "\n[evaluation]\nholdout = 0.2\nserver_lr = [0.5, 1.0, 2.0]\n"


def plan_of(section: str = SECTION, base: str = PLAN) -> Plan:
    return parse_plan((base + section).encode()).plan


def test_the_candidates_are_the_start_and_the_release_at_each_rate() -> None:
    names = ["base", "server_lr 0.5", "server_lr 1", "server_lr 2"]
    assert [c.name for c in candidates_of(plan_of())] == names
    assert [c.name for c in candidates_of(plan_of("\n[evaluation]\nholdout = 0.1\n"))] == ["base", "server_lr 1"]


@pytest.mark.parametrize("stages", [2, 3])
def test_where_the_last_of_several_stages_started_is_a_candidate(stages: int) -> None:
    several = PLAN.replace('task = "classification"', f'task = "classification"\nstages = {stages}')
    assert [c.name for c in candidates_of(plan_of(base=several))][:3] == ["base", "previous", "server_lr 0.5"]


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ("\n[evaluation]\nholdout = 0.6\n", "holdout"),
        ("\n[evaluation]\nholdout = 0\n", "holdout"),
        ("\n[evaluation]\nholdout = 0.2\nserver_lr = [1.0, 1.0]\n", "expected distinct numbers"),
        ("\n[evaluation]\nholdout = 0.2\nserver_lr = [0.0]\n", "server_lr"),
    ],
)
def test_an_evaluation_that_is_none_is_refused(section: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        plan_of(section)


def test_counts_have_no_noise_and_totals_need_a_certificate() -> None:
    with pytest.raises(UserError, match=r"expected none under \[privacy\]"):
        plan_of(base=PRIVATE)
    spot = PLAN.replace("max_colluders = 1", 'max_colluders = 1\naudit = "spot"')
    assert spot != PLAN
    with pytest.raises(UserError, match=r'expected round\.audit "divided"'):
        plan_of(base=spot)


@given(
    st.lists(
        st.tuples(st.integers(1, 10**6), st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(0, 50)),
        min_size=2,
        max_size=4,
    )
)
def test_the_sum_of_sites_is_exact(sites: list[tuple[int, list[float], float]]) -> None:
    plan = plan_of()
    quantizer = counts_quantizer(plan)
    total = np.zeros(quantizer.total_size, np.int64)
    counts = [[Counts(round(share * n), loss * n) for share in shares] for n, shares, loss in sites]
    for (records, _, _), one in zip(sites, counts, strict=True):
        total += quantizer.quantize(np.empty(0, np.float32), records, encode_counts(records, one))
    packed = (total % (1 << 32)).astype(np.uint32) & np.uint32((1 << quantizer.bits) - 1)
    extras = quantizer.decode(packed, len(sites)).extras
    results = results_of(plan, extras)
    everybody = sum(records for records, _, _ in sites)
    for number, result in enumerate(results):
        assert (result.records, result.correct) == (everybody, sum(one[number].correct for one in counts))
        assert result.loss == pytest.approx(sum(one[number].loss for one in counts) / everybody, abs=1e-4)


def test_the_release_with_most_right_answers_is_elected_never_a_start() -> None:
    plan = plan_of()

    def results(*correct: int, loss: tuple[float, ...] = (1, 1, 1, 1)) -> str:
        found = encode_counts(100, [Counts(c, 100 * x) for c, x in zip(correct, loss, strict=True)])
        return elected(results_of(plan, found)).candidate.name

    assert results(99, 50, 60, 55) == "server_lr 1"
    assert results(0, 60, 60, 60, loss=(1, 0.7, 0.9, 0.6)) == "server_lr 2"
    assert results(0, 60, 60, 60) == "server_lr 0.5"


def test_as_many_records_and_as_much_loss_as_there_can_be_are_no_garbage() -> None:
    found = encode_counts(MAX_RECORDS, [Counts(MAX_RECORDS, float("inf"))] * 4)
    assert {(r.correct, r.loss) for r in results_of(plan_of(), found)} == {(MAX_RECORDS, 256.0)}


def test_garbled_counts_are_refused() -> None:
    plan = plan_of()
    honest = encode_counts(10, [Counts(5, 1.0)] * 4)
    for wrong in ({"correct-2": 11}, {"loss-0": 10 * 256 * 65536 + 1}):
        with pytest.raises(ProtocolError, match="garbled counts"):
            results_of(plan, honest | wrong)
    for records, counts in ((0, Counts(0, 0.0)), (3, Counts(4, 0.0)), (3, Counts(-1, 0.0))):
        with pytest.raises(ValueError, match="expected right answers"):
            encode_counts(records, [counts] * 4)


def test_a_loss_that_is_no_number_counts_as_the_largest() -> None:
    found = encode_counts(2, [Counts(0, float("nan")), Counts(0, float("inf")), Counts(0, 1e9), Counts(0, 0.5)])
    assert [found[f"loss-{k}"] for k in range(4)] == [2 * 256 * 65536] * 3 + [32768]


# --- held out ---------------------------------------------------------------------------------------------------------


def examples(count: int) -> Examples:
    return Examples(tuple(f"text {i}" for i in range(count)), tuple(i % 2 for i in range(count)))


def test_about_the_share_is_held_out_and_nothing_is_lost() -> None:
    whole = examples(2000)
    kept, out = split(whole, plan_of())
    assert 340 < len(out) < 460  # six standard deviations
    assert sorted(zip(kept.texts + out.texts, kept.labels + out.labels, strict=True)) == sorted(
        zip(whole.texts, whole.labels, strict=True)
    )
    assert split(whole, plan_of(SECTION.replace("[0.5, 1.0, 2.0]", "[1.0]"))) == (kept, out)


def test_a_record_more_moves_no_other_and_equal_texts_stay_together() -> None:
    whole = examples(200)
    kept, out = split(whole, plan_of())
    for extra in (out.texts[0], kept.texts[0], "a new one"):
        more = Examples((*whole.texts, extra), (*whole.labels, 0))
        now_kept, now_out = split(more, plan_of())
        assert set(out.texts) <= set(now_out.texts)
        assert set(kept.texts) <= set(now_kept.texts)
        assert not set(now_kept.texts) & set(now_out.texts)


def test_without_an_evaluation_nothing_is_held_out() -> None:
    whole = examples(20)
    assert split(whole, plan_of("")) == (whole, Examples((), ()))


def test_too_few_records_are_said_so() -> None:
    with pytest.raises(UserError, match="expected records for training and some held out, found"):
        split(examples(1), plan_of())
