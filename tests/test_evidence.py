"""The harness of the evidence: splits, cells that survive a kill, and a report that says what fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evidence import run
from evidence.arms import ARMS, LADDER
from evidence.bars import all_bars, near_pooled
from evidence.cells import Cell, cell_path, load_result, save_result
from evidence.corpora import Record, bbc, divide, icd
from evidence.grid import Grid, best_rate, estimate, grid, tuning_cell, tuning_cells
from evidence.report import lines
from evidence.results import Results, collect
from evidence.splits import LEAST_CLASSES, LEAST_RECORDS, OWN_SHARE, deal
from evidence.stats import bootstrap, difference, recovered
from privacy.errors import UserError
from tests.evidence_toy import fake_grid, register, toy_cell

ROOT = Path(__file__).resolve().parent.parent

# --- who holds what


@pytest.mark.parametrize("split", ["iid", "natural", "dirichlet-0.5", "dirichlet-0.1"])
@pytest.mark.parametrize(("classes", "sites"), [(5, 10), (10, 10), (7, 5)])
def test_a_deal_gives_each_record_to_one_site_and_is_the_same_again(split: str, classes: int, sites: int) -> None:
    labels = [i % classes for i in range(600)]
    dealt = deal(split, labels, classes, sites, 0)
    assert sorted(number for part in dealt for number in part) == list(range(600))
    assert dealt == deal(split, labels, classes, sites, 0)
    assert dealt != deal(split, labels, classes, sites, 1)


def test_the_deals_do_not_change_between_versions() -> None:
    labels = [i % 3 for i in range(200)]
    firsts = {s: deal(s, labels, 3, 4, 7)[0][:6] for s in ("iid", "natural", "dirichlet-0.5")}
    assert firsts == PINNED


PINNED = {
    "iid": (26, 135, 155, 7, 118, 82),
    "natural": (185, 75, 0, 150, 147, 192),
    "dirichlet-0.5": (151, 173, 147, 55, 132, 54),
}


def test_a_natural_deal_keeps_most_of_a_class_at_its_own_sites() -> None:
    labels = [i % 5 for i in range(1000)]
    dealt = deal("natural", labels, 5, 10, 3)
    for label in range(5):
        own = sum(labels[n] == label for site in (label, label + 5) for n in dealt[site])
        assert own == OWN_SHARE * 200


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_dirichlet_deal_leaves_every_site_something_to_learn(seed: int) -> None:
    labels = [i % 5 for i in range(1500)]
    for part in deal("dirichlet-0.1", labels, 5, 10, seed):
        assert len(part) >= LEAST_RECORDS
        assert len({labels[number] for number in part}) >= LEAST_CLASSES


def test_a_smaller_concentration_is_more_skewed() -> None:
    labels = [i % 5 for i in range(1500)]

    def largest_share(split: str) -> float:
        dealt = deal(split, labels, 5, 10, 0)
        return float(np.mean([max(np.bincount([labels[n] for n in part])) / len(part) for part in dealt]))

    assert largest_share("iid") < largest_share("dirichlet-0.5") < largest_share("dirichlet-0.1")


def test_an_unknown_split_and_too_few_records_are_refused() -> None:
    with pytest.raises(ValueError, match="expected iid, natural or dirichlet-ALPHA, found 'even'"):
        deal("even", [0, 1], 2, 2, 0)
    with pytest.raises(ValueError, match="no draw"):
        deal("dirichlet-0.1", [0, 1] * 10, 2, 10, 0)


def test_the_division_keeps_groups_together_and_takes_no_record_twice() -> None:
    import random

    records = [Record(f"text {i}", i % 2, f"group {i // 4}") for i in range(400)]
    parts = divide(records, 2, 100, random.Random(0))
    groups = [{int(text.split()[1]) // 4 for text in part.texts} for part in parts]
    labels = [set(part.labels) for part in parts]
    assert labels == [{0, 1}] * 3
    # Records of one group and different labels are divided class by class; within a class no group is torn.
    for label in (0, 1):
        sides = [
            {g for t, found in zip(p.texts, p.labels, strict=True) if found == label for g in [int(t.split()[1]) // 4]}
            for p in parts
        ]
        assert not sides[0] & sides[1]
        assert not sides[0] & sides[2]
        assert not sides[1] & sides[2]
    assert all(groups)
    texts = [text for part in parts for text in part.texts]
    assert len(texts) == len(set(texts))
    assert 200 <= len(texts) <= 212


def test_the_real_corpora_are_what_the_results_were_measured_on() -> None:
    for corpus, classes, records in ((bbc(), 5, (1551, 226, 448)), (icd(), 10, (2124, 333, 636))):
        assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == records
        assert set(corpus.test.labels) == set(range(classes)) == set(range(len(corpus.labels)))
        assert not set(corpus.train.texts) & set(corpus.test.texts)
        assert corpus.digest == {"bbc": BBC_DIGEST, "icd": ICD_DIGEST}[corpus.name]


BBC_DIGEST = "4470f2e3e05da3f6fb663f077215cb9bebc236082ba3ecdebcffe98826c36026"
ICD_DIGEST = "f9dd2b4cf671f1139a726fd656916594d77950299e0c0d14c659c76a83372cb1"


# --- cells


def test_every_part_of_a_definition_is_in_the_digest() -> None:
    cell = toy_cell()
    others: dict[str, object] = {
        "arm": "multi-freeze_a",
        "corpus": "bbc",
        "weights": "random",
        "split": "iid",
        "seed": 1,
        "rate": 0.03,
        "part": "validation",
        "sites": 6,
        "epochs": 6,
    }
    assert set(others) == {f.name for f in fields(Cell)}
    digests = {replace(cell, **{name: value}).digest for name, value in others.items()}  # type: ignore[arg-type]
    assert len(digests | {cell.digest}) == len(others) + 1


def test_a_result_is_kept_under_its_definition_and_no_other(tmp_path: Path) -> None:
    cell, other = toy_cell(), toy_cell(seed=1)
    assert load_result(tmp_path, cell) is None
    save_result(tmp_path, cell, {"accuracy": 0.5})
    assert load_result(tmp_path, cell) == {"accuracy": 0.5}
    assert load_result(tmp_path, other) is None
    cell_path(tmp_path, cell).rename(cell_path(tmp_path, other))
    with pytest.raises(UserError, match="expected the result of toy/pretrained/natural/one-freeze_a/test seed=1"):
        load_result(tmp_path, other)
    cell_path(tmp_path, cell).write_text("{")
    with pytest.raises(UserError, match="found no JSON"):
        load_result(tmp_path, cell)


def test_a_killed_run_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    script = "from evidence import run; import sys\nfrom tests.evidence_toy import fake_grid\n"
    script += "run.COMMAND = (sys.executable, '-m', 'tests.evidence_toy', '--fake')\n"
    script += f"sys.exit(run.main(['--out', {str(tmp_path)!r}, '--workers', '1'], fake_grid))"
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, start_new_session=True)

    def kept() -> list[Path]:
        return sorted((tmp_path / "cells").glob("*.json"))

    deadline = time.monotonic() + 60
    while len(kept()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    time.sleep(2 * 0.3)  # a cell that was under way may end; it is kept, or measured again
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").glob("*.json")}
    assert 2 <= len(before) < 6
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert len(kept()) == 6
    assert {name: (tmp_path / "cells" / name).stat().st_mtime_ns for name in before} == before
    attempts = (tmp_path / "attempts").read_text().split()
    assert set(attempts) == set("012345")
    assert len(attempts) - 6 <= 1, "only what was under way is measured twice"
    assert done.stdout.count("accuracy") == 6 - len(before)
    assert "h" in done.stdout.splitlines()[0]
    assert (tmp_path / "report.md").exists()


def test_an_interrupted_run_ends_its_workers_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(real(*arguments, **options))
        return started[-1]

    def interrupted(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "COMMAND", (sys.executable, "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(time, "sleep", interrupted)
    assert run.main(["--out", str(tmp_path), "--workers", "2"], fake_grid) == 130
    assert [process.poll() for process in started] == [-signal.SIGTERM] * 2
    assert "goes on" in capsys.readouterr().out


def test_a_cell_that_fails_is_said_and_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = "import sys, json; from pathlib import Path; from evidence.cells import Cell\n"
    body += "from tests.evidence_toy import fake\ncell = Cell(**json.loads(sys.argv[2]))\n"
    body += "sys.exit('error: it diverged') if cell.seed == 3 else fake(Path(sys.argv[1]), cell)"
    monkeypatch.setattr(run, "COMMAND", (sys.executable, "-c", body))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert run.main(["--out", str(tmp_path), "--workers", "2"], fake_grid) == 1
    assert (
        "FAILED toy/pretrained/natural/one-freeze_a/test seed=3 lr=0.003: error: it diverged" in capsys.readouterr().out
    )
    assert len(list((tmp_path / "cells").glob("*.json"))) == 5


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    with run.alone_in(tmp_path), pytest.raises(UserError, match="expected no other run"), run.alone_in(tmp_path):
        pass


def test_only_list_and_hours_choose_what_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--out", str(tmp_path), "--list", "--only", "*seed=2*", "*seed=4*"], fake_grid) == 0
    listed = capsys.readouterr().out
    assert "seed=2" in listed
    assert "seed=3" not in listed
    assert "2 cells" in listed
    assert run.main(["--out", str(tmp_path), "--hours", "0"], fake_grid) == 0
    assert not list((tmp_path / "cells").glob("*.json")) if (tmp_path / "cells").exists() else True


# --- what is measured, on a toy


@pytest.fixture(scope="module")
def toy_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    register()
    return tmp_path_factory.mktemp("evidence")


def measured(cell: Cell, out: Path) -> dict[str, Any]:
    from evidence.measure import measure

    result = measure(cell, out)
    save_result(out, cell, result)
    return result


def test_one_and_many_rounds_are_masked_and_equal_the_sum_in_the_clear(toy_out: Path) -> None:
    for arm, rounds in (
        ("one-freeze_a", 1),
        ("one-both", 1),
        ("one-regmean", 1),
        ("multi-freeze_a", 3),
        ("multi-both", 3),
    ):
        found = measured(toy_cell(arm), toy_out)
        assert len(found["rounds"]) == rounds
        for one in found["rounds"]:
            assert 0 < one["difference"] <= one["tolerance"] < 1e-3
            assert one["clipped"] == 0
            assert one["sent"] > 3 * one["coordinates"]
        assert found["clear"]["other_answers"] == 0
        assert found["accuracy"] == sum(found["right"]) / 30 > 0.5
        assert found["tau"]["adapted"] > found["tau"]["network"] > 0
    assert not list((toy_out / "local").glob("later-*")), "what later rounds trained is of no further use"


def test_the_other_arms_are_measured_too(toy_out: Path) -> None:
    base = measured(toy_cell("base", split="none", rate=0.0), toy_out)
    pooled = measured(toy_cell("pooled-freeze_a", split="none"), toy_out)
    analytic = measured(toy_cell("analytic", rate=0.0), toy_out)
    alone = measured(toy_cell("alone"), toy_out)
    assert base["accuracy"] == pytest.approx(1 / 3)
    assert pooled["accuracy"] > base["accuracy"]
    assert analytic["accuracy"] > base["accuracy"]
    assert len(alone["by_site"]) == 5
    assert alone["accuracy"] == pytest.approx(np.mean(alone["right"]))


def test_the_same_cell_gives_the_same_numbers_and_trains_no_site_twice(
    toy_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evidence import measure

    first = measured(toy_cell(seed=5), toy_out)
    trained: list[object] = []
    monkeypatch.setattr(measure, "train", lambda **given: trained.append(given))
    again = measure.measure(toy_cell(seed=5), toy_out)
    assert trained == []
    assert again["right"] == first["right"]
    alone = measure.measure(toy_cell("alone", seed=5), toy_out)
    assert trained == []
    assert len(alone["by_site"]) == 5


def test_a_masked_mean_that_is_not_the_plain_one_ends_the_cell(toy_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evidence import measure, rounds

    real = rounds.plain_mean
    monkeypatch.setattr(rounds, "plain_mean", lambda *given: real(*given) + 1e-3)
    with pytest.raises(AssertionError):
        measure.measure(toy_cell(), toy_out)


def test_bytes_over_tls_are_those_of_all_attempts_and_of_every_site() -> None:
    from evidence.tls import _facts, largest_difference

    traffic = {f"site-{i}": {"sent": 100 * i, "received": 10, "upload": 1} for i in (1, 2)}
    one = {"coordinates": 7, "traffic": traffic, "survivors": ["site-1", "site-2"]}
    facts = _facts([{"coordinates": 7, "traffic": traffic}, one], 2)
    assert facts == {"attempts": 2, "coordinates": 7, "sent": 300.0, "received": 20.0}
    with pytest.raises(UserError, match="expected 3 sites in the total, found 2"):
        _facts([one], 3)
    zero, other = np.zeros(3, np.float32), np.array([0, -0.5, 0.25], np.float32)
    assert largest_difference({"a": zero, "b": other}, {"a": zero, "b": zero}) == 0.5


# --- the grid


def test_a_reported_cell_waits_for_its_learning_rate(tmp_path: Path) -> None:
    arm = "one-freeze_a"
    found = grid(tmp_path)
    assert [c for c in found.ready if c.part == "test" and c.arm == arm] == []
    assert {c.arm for c in found.waiting} == {name for name, about in ARMS.items() if about.rates or about.source}
    for corpus, weights in {(c.corpus, c.weights) for c in found.ready}:
        rates = ARMS[arm].rates
        for rate in rates:
            result = {"accuracy": 0.9 if rate == rates[1] else 0.8, "loss": 1.0}
            save_result(tmp_path, tuning_cell(corpus, weights, arm, rate), result)
        assert best_rate(tmp_path, corpus, weights, arm) == rates[1]
    found = grid(tmp_path)
    assert {c.rate for c in found.ready if c.part == "test" and c.arm in (arm, "alone")} == {rates[1]}
    assert len({c.digest for c in found.ready}) == len(found.ready)


@pytest.mark.parametrize(("best", "tried"), [(0, (0, 5)), (5, (2, 6)), (2, (1, 5))])
def test_a_best_rate_at_the_edge_is_not_the_last_one_tried(tmp_path: Path, best: int, tried: tuple[int, int]) -> None:
    arm = "one-freeze_a"
    for i, rate in enumerate(LADDER):
        save_result(
            tmp_path, tuning_cell("bbc", "pretrained", arm, rate), {"accuracy": 0.9 - abs(i - best) / 10, "loss": 1.0}
        )
    assert best_rate(tmp_path, "bbc", "pretrained", arm) == LADDER[best]
    rates = [cell.rate for cell in tuning_cells(tmp_path, "bbc", "pretrained", arm)]
    assert rates == list(LADDER[tried[0] : tried[1]])


def test_every_split_and_seed_of_every_arm_is_in_the_grid(tmp_path: Path) -> None:
    found = grid(tmp_path)
    cells = [c for c in (*found.ready, *found.waiting) if c.part == "test" and c.corpus == "bbc"]
    for arm, about in ARMS.items():
        if about.kind in ("rounds", "alone", "analytic"):
            for weights, splits in (("pretrained", 4), ("random", 2)):
                assert sum(c.arm == arm and c.weights == weights for c in cells) == 3 * splits
    assert all(estimate(cell) > 0 for cell in cells)


# --- statistics and verdicts, with made-up numbers


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


def test_the_report_is_written_with_its_plots(tmp_path: Path) -> None:
    from evidence import report

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
    json.loads(cell_path(tmp_path, cells[0]).read_text())
