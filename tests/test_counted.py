"""Rows of a counted head are weighted by the records of their class, whoever has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demo.federation import Federation
from participant import sending
from participant.data import Examples
from participant.drafting import draft_plan
from participant.policy import admit
from participant.training import train
from privacy.adapter import b_name, layout_of, start_adapter, unflatten
from privacy.aggregation import METHODS
from privacy.errors import ProtocolError, Refusal, UserError
from privacy.job import Job
from privacy.methods import SHARES, Rounding, head_parts, merged, sent
from privacy.outcome import combine
from privacy.plan import parse_plan
from tests.analytic import run_round
from tests.helpers_learning import LABELS, SPELLINGS, spelled, tiny_base, tiny_plan, word_examples
from tests.methods import WEIGHTS, Trained, close, plan_text, quantised, released, sites, the_job, unit, vector_of
from tests.test_methods_site import job_of, site_with

#: Records of each class at each site: the last class is at one site only.
COUNTS = ((20, 20, 0), (10, 0, 0), (0, 25, 0), (59, 1, 0), (50, 50, 5))
HEAD = ("base_model.model.classifier.bias", "base_model.model.classifier.weight")


def counted_sites(job: Job, counts: tuple[tuple[int, ...], ...] = COUNTS) -> list[Trained]:
    """Made-up sites whose records add up to their weights."""
    return [
        replace(site, shares=tuple(c / site.weight for c in own)) for site, own in zip(sites(job), counts, strict=True)
    ]


def rows_of(job: Job, everybody: list[Trained], name: str, counts: Any) -> np.ndarray[Any, Any]:
    """sum(c row) / sum(c) in float64; the start where nobody counts."""
    start, c = job.start_tensors()[name].astype(np.float64), np.array(counts, np.float64)
    deltas = np.stack([site.after[name].astype(np.float64) - start for site in everybody])
    shape = (len(everybody), -1, *[1] * (start.ndim - 1))
    total = c.sum(axis=0).reshape(shape[1:])
    above = (deltas * c.reshape(shape)).sum(axis=0)
    return np.asarray(start + np.where(total > 0, above / np.where(total > 0, total, 1), 0.0))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "fisher"])
def test_rows_count_by_the_records_of_their_class(method: str, tmp_path: Path) -> None:
    job = the_job(method, counted=True)
    everybody = counted_sites(job)
    combined = released(job, everybody, tmp_path)
    for name in HEAD:
        exact = rows_of(job, everybody, name, COUNTS)
        # A row and its share are off by a unit each; the smallest share is 5 of 240.
        within = 4 * unit(job) * 240 / 5
        close(combined.tensors[name], exact, within)
        plain = sum(s.weight * s.after[name].astype(np.float64) for s in everybody) / sum(WEIGHTS)
        assert np.abs(exact - plain).max() > 100 * within, "another mean than the plain one"
    assert combined.facts["head"] == "counted"
    assert combined.facts.get("method", "freeze_a") == method
    other = the_job(method)
    same = released(other, everybody, tmp_path).tensors
    assert all(
        np.array_equal(combined.tensors[n], same[n]) or np.allclose(combined.tensors[n], same[n], atol=1e-4)
        for n in same
        if n not in HEAD
    )


def test_a_row_that_nobody_counts_stays(tmp_path: Path) -> None:
    job = the_job("freeze_a", counted=True)
    nobody = tuple((a, b, 0) for a, b, _ in COUNTS)
    everybody = counted_sites(job, nobody)
    combined, start = released(job, everybody, tmp_path), job.start_tensors()
    for name in HEAD:
        assert np.array_equal(combined.tensors[name][2], start[name][2])
        close(combined.tensors[name], rows_of(job, everybody, name, nobody), 10 * unit(job))


@pytest.mark.parametrize(("bits", "lost"), [(16, ["c"]), (32, [])])
def test_a_class_that_rounding_hides_is_named(bits: int, lost: list[str], tmp_path: Path) -> None:
    """Its row stays at the start, and the manifest says that somebody had counted it."""
    job = the_job("freeze_a", counted=True, bits=bits)
    # With 16 bits 2.7 times what the quantiser moves one site's share by at most: never rounded to 0, less than five.
    few = (*((a, b, 0) for a, b, _ in COUNTS[:4]), (50, 50, 0.1))
    combined = released(job, counted_sites(job, few), tmp_path)  # type: ignore[arg-type]
    start, name = job.start_tensors(), HEAD[1]
    assert combined.facts == {"head": "counted"} | ({"classes_lost_in_rounding": lost} if lost else {})
    assert np.array_equal(combined.tensors[name][2], start[name][2]) == bool(lost)


@settings(max_examples=25)
@given(st.lists(st.tuples(*[st.integers(0, 50)] * 3), min_size=5, max_size=5))
def test_any_counts_give_the_weighted_rows(counts: list[tuple[int, int, int]]) -> None:
    job = the_job("freeze_a", counted=True)
    everybody = [
        replace(site, shares=tuple(c / max(1, sum(own)) for c in own), weight=sum(own))
        for site, own in zip(sites(job), counts, strict=True)
        if sum(own)
    ]
    present = [own for own in counts if sum(own)]
    if not everybody:
        return
    total = np.add.reduce([v.astype(np.int64) for v in quantised(job, everybody)])
    decoded = job.quantizer.decode(total.astype(np.uint32), len(everybody))
    # As the product tells it: the share of a class that is all of a small cohort may be rounded to a little above 1.
    rounding = Rounding(job.quantizer.max_weight / (job.quantizer.qmax * decoded.weight), len(everybody))
    found = merged(job.start_tensors(), decoded.mean, job.plan, rounding)
    for name in HEAD:
        close(found.tensors[name], rows_of(job, everybody, name, present), 1e-3)


#: Sentence -> (part, entry, factor of Qmax, the refusal).
TAMPERED = {
    "a negative share": (SHARES, 1, -0.9, "expected weights from 0 to 1"),
    "more than all records": (SHARES, 1, 2.0, "expected shares of classes of at most 1 together"),
    "a row beyond the clipping range": (HEAD[0], 2, 0.9, "expected weighted numbers within the clipping range"),
}


@pytest.mark.parametrize(("part", "entry", "value", "reason"), TAMPERED.values(), ids=TAMPERED.keys())
def test_rows_of_no_sites_are_refused(part: str, entry: int, value: float, reason: str, tmp_path: Path) -> None:
    job = the_job("freeze_a", counted=True)
    vectors = quantised(job, counted_sites(job))
    at = 0
    for name, shape in sent(job.plan).trained:
        if name == part:
            break
        at += int(np.prod(shape))
    vectors[1][at + entry] = int(value * job.quantizer.qmax)
    with pytest.raises(ProtocolError, match=reason):
        combine(job, [run_round(job, vectors, tmp_path / "total", {})])


def test_one_site_alone_gets_its_own_head_back() -> None:
    job = the_job("freeze_a", counted=True)
    site = replace(sites(job)[0], shares=(0.5, 0.5, 0.0))
    found = merged(job.start_tensors(), vector_of(job, site), job.plan).tensors
    for name in HEAD:
        close(found[name][:2], site.after[name][:2].astype(np.float64), 1e-6)
        assert not found[name][2].any()


# --- at a site -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def test_a_class_with_few_texts_has_no_share(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tiny_plan(base, head="counted")
    texts = tuple(f"the apple {i}" for i in range(6)) + ("iron",) * 9 + tuple(f"elbe {i}" for i in range(5))
    examples = Examples(texts, (0,) * 6 + (1,) * 9 + (2,) * 5)
    assert sending.class_shares(examples, plan, 1, texts) == [6 / 20, 0.0, 5 / 20]
    assert "metal" in capsys.readouterr().out, "nine copies of one text"
    assert sending.class_shares(examples, plan, 6, texts) == [6 / 20, 0.0, 0.0]
    assert sending.class_shares(examples, tiny_plan(base), 6, texts) == []


def test_a_site_sends_its_rows_by_their_share(base: Path) -> None:
    plain, plan = (tiny_plan(base, head=head, epochs=1) for head in ("trained", "counted"))
    examples = word_examples((12, 24, 2))
    about: dict[str, Any] = {"base": base, "examples": examples, "device": "cpu", "threads": 1}
    start = start_adapter(plan.adapter)
    parts = unflatten(train(plan=plan, start=start, **about).delta, sent(plan))
    other = unflatten(train(plan=plain, start=start, **about).delta, layout_of(plain.adapter))
    np.testing.assert_allclose(parts[SHARES] / plan.round.clip, (12 / 38, 24 / 38, 0.0), rtol=1e-6)
    for name in head_parts(plan):
        share = np.array((12 / 38, 24 / 38, 0.0)).reshape(-1, *[1] * (other[name].ndim - 1))
        np.testing.assert_allclose(parts[name], other[name] * share, rtol=1e-5, atol=1e-9)
    some = b_name(min(plan.adapter.modules))
    assert np.array_equal(parts[some], other[some])


@pytest.mark.parametrize("kind", SPELLINGS)
def test_a_class_with_spellings_of_one_text_has_no_share(base: Path, kind: str) -> None:
    plan, examples = tiny_plan(base, head="counted", epochs=1), word_examples((12, 24, 0))
    examples = Examples((*examples.texts, *spelled(kind, 9)), (*examples.labels, *[2] * 9))
    start = start_adapter(plan.adapter)
    parts = unflatten(
        train(plan=plan, base=base, start=start, examples=examples, device="cpu", threads=1).delta, sent(plan)
    )
    np.testing.assert_allclose(parts[SHARES] / plan.round.clip, (12 / 45, 24 / 45, 0.0), rtol=1e-6)
    assert not any(parts[name][2].any() for name in head_parts(plan))


@pytest.mark.parametrize("method", ["freeze_a", "regmean"])
def test_a_draft_with_a_counted_head_is_a_plan(base: Path, method: Any) -> None:
    about: dict[str, Any] = {"base_name": "tiny", "name": "p", "dataset": "d", "labels": LABELS}
    text = draft_plan(base=base, head="counted", method=method, **about)
    plan = parse_plan(text.encode()).plan
    assert plan.aggregation.counted is not None
    assert (plan.aggregation.head, plan.aggregation.method, plan.round.bits) == ("counted", method, 32)
    assert f"# {sent(plan).size:,} coordinates are sent." in text


def test_a_site_without_a_minimum_of_its_own_counts_nothing(set_up: Federation, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path, "")
    job = job_of(site, "freeze_a", head="counted")
    with pytest.raises(Refusal, match=r"has not opted in \(min_class_count\)"):
        admit(job, site.home.settings)


#: Sentence -> (old text, new text, fragment of the refusal).
BAD = {
    "without its section": ("[aggregation.counted]\nmin_class_count = 3\n", "", "counted: expected this section"),
    "its section alone": ('head = "counted"\n', "", "counted: expected this section"),
    "with sites that count the same": (
        "[aggregation]",
        '[aggregation]\nweights = "uniform"',
        '"counted" counts records',
    ),
    "without a minimum": ("min_class_count = 3", "min_class_count = 0", "aggregation.counted.min_class_count"),
    "a head of two layers": ('"classifier.bias" = [3]', '"dense.weight" = [4, 4]', "expected one linear layer"),
}


@pytest.mark.parametrize(("old", "new", "fragment"), BAD.values(), ids=BAD.keys())
def test_a_bad_plan_is_refused(old: str, new: str, fragment: str) -> None:
    text = plan_text("freeze_a", counted=True)
    assert old in text
    with pytest.raises(UserError, match=r"^plan\.toml: ") as refused:
        parse_plan(text.replace(old, new, 1).encode(), "plan.toml")
    assert fragment in str(refused.value)
