"""The language model's arms of the evidence, on a tiny one: the same rounds, judged by held-out loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from evidence import measure, text
from evidence.cells import Cell
from evidence.corpora import Corpus, desks
from evidence.grid import TEXT_ARMS, grid, reported
from evidence.results import by_record
from participant.data import Examples
from tests.helpers_text import tiny_causal


def few(count: int, first: int = 0) -> Examples:
    desks = ("rates rise", "a film opens", "votes are cast", "the match ends", "a chip ships")
    numbers = range(first, first + count)
    return Examples(tuple(f"{desks[i % 5]} on day {i}, it is said" for i in numbers), tuple(i % 5 for i in numbers))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = tiny_causal(tmp_path / "base")
    corpus = Corpus("desks", ("a", "b", "c", "d", "e"), 48, few(40), few(5, 40), few(10, 45))
    monkeypatch.setattr(text, "smollm2", lambda _out: base)
    monkeypatch.setattr(measure, "corpus_of", lambda _name: corpus)
    return tmp_path / "out"


def cell(arm: str, rate: float = 0.03) -> Cell:
    split = "natural" if arm.startswith(("one", "multi", "alone")) else "none"
    return Cell(arm, "desks", "smollm2", split, 0, rate, "test", 5)


def test_one_round_and_several_lower_the_held_out_loss_and_equal_the_sum_in_the_clear(tiny: Path) -> None:
    found = {arm: measure.measure(cell(arm), tiny) for arm in TEXT_ARMS}
    for arm, rounds in (("one-freeze_a", 1), ("one-regmean", 1), ("multi-freeze_a", 3)):
        result = found[arm]
        assert len(result["rounds"]) == rounds
        assert all(0 < r["difference"] <= r["tolerance"] for r in result["rounds"])
        assert result["loss"] < found["base"]["loss"]
        assert result["clear"]["loss"] == pytest.approx(result["loss"], abs=1e-3)
    assert found["pooled-freeze_a"]["loss"] < found["base"]["loss"]
    alone = found["alone"]
    assert len(alone["by_site"]) == 5
    assert alone["tokens"] == found["base"]["tokens"]
    assert by_record(alone).mean() == pytest.approx(alone["loss"]) != found["one-freeze_a"]["loss"]
    one = found["one-freeze_a"]
    assert sum(one["nats"]) / sum(one["tokens"]) == pytest.approx(one["loss"])
    assert by_record(one).mean() == pytest.approx(one["loss"])


def test_the_language_model_has_a_site_for_each_desk_and_a_fixed_budget(tmp_path: Path) -> None:
    cells = [c for c in (*grid(tmp_path).ready, *grid(tmp_path).waiting) if c.corpus == "desks"]
    assert {c.sites for c in cells} == {5}
    assert {c.arm for c in cells} == set(TEXT_ARMS)
    assert len(list(reported("desks", "smollm2", "natural", TEXT_ARMS))) == 3 * (len(TEXT_ARMS) - 1) + 1
    corpus = desks()
    assert [corpus.train.labels.count(k) for k in range(5)] == [24] * 5
    assert [corpus.test.labels.count(k) for k in range(5)] == [12] * 5
    assert corpus.max_length == 128
