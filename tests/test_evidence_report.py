"""What the report of the evidence says of made-up numbers: intervals, bars that hold and fail, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evidence import report, stats
from evidence.bars import all_bars, near_pooled
from evidence.cells import Cell, load_result, save_result
from evidence.grid import Grid
from evidence.mechanism import mechanism
from evidence.report import lines
from evidence.results import Results, collect, restore
from evidence.stats import bootstrap, difference, recovered
from privacy.errors import UserError
from tests.evidence_toy import toy_cell


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(stats, "DRAWS", 200)
    stats._draws.cache_clear()
    yield
    stats._draws.cache_clear()


def answers(accuracy: float, seeds: int = 3, records: int = 400) -> dict[int, Any]:
    right = np.zeros(records)
    right[: round(accuracy * records)] = 1
    return dict.fromkeys(range(seeds), right)


def test_a_difference_is_paired() -> None:
    one = answers(0.8)
    same = difference(one, one)
    assert same is not None
    assert (same.value, same.low, same.high) == (0, 0, 0)
    gap = difference(one, answers(0.7))
    assert gap is not None
    assert gap.value == pytest.approx(0.1)
    assert 0.05 < gap.low < gap.value < gap.high < 0.15


def test_rho_is_the_share_of_the_gain_that_one_round_keeps() -> None:
    rho = recovered(answers(0.7), answers(0.8), answers(0.3))
    assert rho is not None
    assert rho.value == pytest.approx(0.8)
    assert rho.low < 0.8 < rho.high
    assert bootstrap(lambda mean: mean, {}) is None
    assert difference({0: np.ones(4)}, {1: np.ones(4)}) is None


def test_a_share_of_nothing_is_no_rho() -> None:
    others = {seed: row[::-1] for seed, row in answers(0.31).items()}  # right where the untrained network is wrong
    assert recovered(answers(0.3), others, answers(0.3)) is None
    assert recovered(answers(0.3), answers(0.2), answers(0.3)) is None
    losses = [{0: np.full(10, loss)} for loss in (3.6, 3.5, 4.0)]
    rho = recovered(*losses, lower=True)
    assert rho is not None
    assert rho.value == pytest.approx(0.8)
    assert recovered(*losses) is None


def made_up(one: float, pooled: float, multi: float = 0.9, **changes: Any) -> Results:
    """Three seeds on both splits that the bars are about."""
    reported = []
    wire = {"difference": 1e-7, "tolerance": 1e-6, "clipped": 0.0, "coordinates": 10, "sent": 100.0, "received": 200.0}
    rounds = wire | {"tau_sites": {"adapted": 0.1, "network": 0.01}} | changes
    for split in ("natural", "dirichlet-0.1"):
        for seed in range(3):
            for arm, accuracy, count in (
                ("one-freeze_a", one, 1),
                ("multi-freeze_a", multi, 3),
                ("pooled-freeze_a", pooled, 0),
                ("base", 0.2, 0),
            ):
                right = [float(v) for v in answers(accuracy)[0]]
                result: dict[str, Any] = {"accuracy": accuracy, "loss": 1.0, "right": right, "cpu_s": 1.0}
                result |= {"rounds": [rounds] * count, "tau": {"adapted": 0.1, "network": 0.01}} if count else {}
                where = split if count else "none"
                reported.append((Cell(arm, "bbc", "pretrained", where, seed, 0.003, "test"), result))
    return Results(tuple(reported))


@pytest.mark.parametrize(
    ("one", "pooled", "natural", "skewed"),
    [
        (0.95, 0.95, "holds", "holds"),
        (0.94, 0.95, "holds", "holds"),
        (0.935, 0.95, "FAILS", "holds"),
        (0.92, 0.95, "FAILS", "holds"),
        (0.915, 0.95, "FAILS", "FAILS"),
    ],
)
def test_a_bar_holds_up_to_its_bound_and_not_beyond(one: float, pooled: float, natural: str, skewed: str) -> None:
    bars = all_bars(made_up(one, pooled))
    assert [bar.holds for bar in bars[:2]] == [natural, skewed]


def test_the_report_says_at_its_top_what_fails() -> None:
    results = made_up(0.80, 0.95)
    text = lines(results, all_bars(results))
    assert text[0].startswith("# ")
    assert "**2 of" in text[2]
    assert "FAIL**" in text[2]
    assert "within 1 point of pooled" in text[2]
    table = [line for line in text if line.startswith("| FAILS")]
    assert "one-freeze_a against pooled-freeze_a: -15.0 points" in table[0]
    assert "\n".join(text).index("FAILS") < "\n".join(text).index("## ")


def test_what_is_not_measured_is_not_said_to_hold() -> None:
    nothing = Results()
    text = lines(nothing, all_bars(nothing))
    assert "No bar fails so far" in text[2]
    assert {bar.holds for bar in all_bars(nothing)} == {"not measured"}
    missing = replace(made_up(0.95, 0.95), missing=(toy_cell(),))
    assert any("cells are not measured yet" in line for line in lines(missing, all_bars(missing)))


def text_results(base: float, one: float, multi: float) -> Results:
    reported = []
    for seed in range(3):
        for arm, loss in (("base", base), ("one-freeze_a", one), ("multi-freeze_a", multi)):
            nats = [loss * 100 * (1 + 0.01 * i) for i in range(-10, 11)]
            result: dict[str, Any] = {"accuracy": 0.3, "loss": loss, "nats": nats, "tokens": [100] * len(nats)}
            wire = {"difference": 0.0, "tolerance": 1.0, "clipped": 0.0, "sent": 1.0, "received": 1.0}
            result["rounds"] = [wire] * {"base": 0, "one-freeze_a": 1, "multi-freeze_a": 3}[arm]
            split = "none" if arm == "base" else "natural"
            reported.append((Cell(arm, "desks", "smollm2", split, seed, 0.003, "test", 5), result))
    return Results(tuple(reported))


@pytest.mark.parametrize(
    ("multi", "one", "learns", "keeps"),
    [
        (3.5, 3.6, "holds", "holds"),  # by 12.5 %, rho 0.8
        (3.5, 3.61, "holds", "FAILS"),
        (3.79, 3.7, "holds", "holds"),  # one round may be the better one
        (3.81, 3.81, "FAILS", "holds"),
    ],
)
def test_the_language_model_has_bars_of_its_own(multi: float, one: float, learns: str, keeps: str) -> None:
    bars = all_bars(text_results(4.0, one, multi))
    assert (find(bars, "at least 5 %").holds, find(bars, "rho >= 0.8").holds) == (learns, keeps)
    text = "\n".join(lines(text_results(4.0, one, multi), bars))
    assert f"| one-freeze_a | 3 | {one:.3f} [" in text


def test_a_bar_is_not_judged_on_fewer_seeds_than_it_asks_for() -> None:
    results = made_up(0.80, 0.95)
    two = Results(tuple((cell, result) for cell, result in results.reported if cell.seed < 2))
    bar = all_bars(two)[0]
    assert bar.holds == "not measured"
    assert "-15.0 points" in bar.found
    assert bar.found.split("; ")[0].endswith("2 seeds of 3 so far (-15.0, -15.0)")


def test_the_mechanism_is_said_as_it_is_found() -> None:
    pretrained = made_up(0.90, 0.95, multi=0.92)
    worse = [(replace(c, weights="random"), r) for c, r in made_up(0.30, 0.95, multi=0.50).reported]
    better = [(replace(c, weights="random"), r) for c, r in made_up(0.50, 0.95, multi=0.40).reported]
    nothing = [(replace(c, weights="random"), r) for c, r in made_up(0.15, 0.95, multi=0.20).reported]
    for random, text in (
        (
            worse,
            "Of 2 pairs where there was something to lose, one round loses more on random weights in 2, and in 2 of",
        ),
        (
            better,
            "Of 2 pairs where there was something to lose, one round loses more on random weights in 0, and in 0 of",
        ),
        (nothing, "In 2 pairs several rounds on random weights are not clearly better than the untrained network"),
    ):
        assert text in "\n".join(mechanism(Results((*pretrained.reported, *random))))
    assert "something to lose" not in "\n".join(mechanism(Results((*pretrained.reported, *nothing))))
    assert "| 0.100 (0.0100) | 0.100 (0.0100) |" in "\n".join(mechanism(Results((*pretrained.reported, *worse))))


def find(bars: list[Any], word: str) -> Any:
    return next(bar for bar in bars if word in bar.promise)


def test_bytes_and_rounding_have_bars_too() -> None:
    assert find(all_bars(made_up(0.9, 0.9)), "bytes").holds == "holds"
    assert find(all_bars(made_up(0.9, 0.9)), "masked").holds == "holds"
    assert find(all_bars(made_up(0.9, 0.9, difference=2e-6)), "masked").holds == "FAILS"
    uneven = made_up(0.9, 0.9)
    for cell, result in uneven.reported:
        if cell.arm == "multi-freeze_a":
            result["rounds"] = result["rounds"][:2]
    assert find(all_bars(uneven), "bytes").holds == "FAILS"


def test_the_best_one_shot_arm_is_compared_with_the_best_pooled_one() -> None:
    results = made_up(0.95, 0.95)
    bar = near_pooled(results, ("bbc", "pretrained", "natural"), 0.01, "promise")
    assert bar.found.startswith("one-freeze_a against pooled-freeze_a: +0.0 points [+0.0, +0.0], 3 seeds")


def test_the_arm_that_the_validation_records_choose_is_named_where_it_is_another() -> None:
    results = made_up(0.95, 0.95)
    tuned = [
        (Cell(arm, "bbc", "pretrained", "natural", 0, 0.003, "validation"), {"accuracy": accuracy, "loss": 1.0})
        for arm, accuracy in (("one-freeze_a", 0.90), ("one-both", 0.92), ("pooled-freeze_a", 0.99))
    ]
    worse = [
        (replace(cell, arm="one-both"), result | {"right": [float(v) for v in answers(0.91)[0]]})
        for cell, result in results.reported
        if cell.arm == "one-freeze_a"
    ]
    bar = all_bars(Results((*results.reported, *worse), tuple(tuned)))[0]
    assert bar.holds == "holds"
    assert "one-freeze_a against pooled-freeze_a" in bar.found
    assert "one-both, best on the validation records: -4.0 points" in bar.found


def test_the_report_is_written_with_its_plots(tmp_path: Path) -> None:
    cells = []
    for cell, result in made_up(0.93, 0.95).reported:
        save_result(tmp_path, cell, result)
        cells.append(cell)
    path = report.write(tmp_path, Grid(cells))
    text = path.read_text()
    assert "| one-freeze_a | 3 | 93.0 [" in text
    pictures = sorted(tmp_path.glob("*.svg"))
    assert [p.name for p in pictures] == ["accuracy-bbc-pretrained.svg", "tau-and-gap.svg"]
    first = pictures[0].read_bytes()
    report.write(tmp_path, Grid(cells))
    assert pictures[0].read_bytes() == first
    assert collect(tmp_path, cells, []).missing == ()
    page = report.publish(tmp_path, Grid(cells), tmp_path / "docs")
    assert page.read_text().startswith(text)
    assert sorted(p.name for p in page.parent.iterdir()) == sorted(
        [*(p.name for p in pictures), "README.md", "results.jsonl"]
    )
    assert len((page.parent / "results.jsonl").read_text().splitlines()) == len(cells)


def test_a_later_run_goes_on_from_what_is_published(tmp_path: Path) -> None:
    first, later = tmp_path / "first", tmp_path / "later"
    for cell, result in made_up(0.93, 0.95).reported:
        save_result(first, cell, result)
    cells = list({cell.digest: cell for cell, _ in made_up(0.93, 0.95).reported}.values())
    file = report.publish(first, Grid(cells), tmp_path / "docs").parent / report.RESULTS
    other = dict(json.loads(file.read_text().splitlines()[0]))
    file.write_text(file.read_text() + json.dumps(other | {"digest": "0" * 24}) + "\n")
    save_result(later, cells[0], {"accuracy": 0.5})
    assert restore(later, file) == len(cells) - 1, "what is kept stays, and what is defined otherwise now is not taken"
    assert load_result(later, cells[0]) == {"accuracy": 0.5}
    assert all(load_result(later, cell) == load_result(first, cell) for cell in cells[1:])
    assert restore(later, file) == restore(later, tmp_path / "none") == 0
    file.write_text('{"cell": {}}\n')
    with pytest.raises(UserError, match="line 1: expected a published cell"):
        restore(later, file)
