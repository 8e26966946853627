"""The harness of the evidence: splits, cells that survive a kill, and a report that says what fails."""

from __future__ import annotations

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

from evidence import report, run
from evidence.arms import ARMS, LADDER
from evidence.bars import secure_is_plain
from evidence.cells import Cell, cell_path, load_result, save_result
from evidence.grid import CHEAPER_ARMS, HEAD_ARMS, RANDOM_ARMS, best_rate, estimate, grid, tuning_cell, tuning_cells
from evidence.report import RESULTS
from evidence.results import Results
from privacy.errors import UserError
from tests.evidence_toy import fake, fake_grid, register, toy_cell

ROOT = Path(__file__).resolve().parent.parent

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
    script += f"sys.exit(run.main(['--out', {str(tmp_path)!r}, '--workers', '1', '--afresh'], fake_grid))"
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
    assert run.main(["--out", str(tmp_path), "--workers", "2", "--afresh"], fake_grid) == 130
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
    assert run.main(["--out", str(tmp_path), "--workers", "2", "--afresh"], fake_grid) == 1
    assert (
        "FAILED toy/pretrained/natural/one-freeze_a/test seed=3 lr=0.003: error: it diverged" in capsys.readouterr().out
    )
    assert len(list((tmp_path / "cells").glob("*.json"))) == 5


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    with run.alone_in(tmp_path), pytest.raises(UserError, match="expected no other run"), run.alone_in(tmp_path):
        pass


def test_only_list_and_hours_choose_what_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--out", str(tmp_path), "--afresh", "--list", "--only", "*seed=2*", "*seed=4*"], fake_grid) == 0
    listed = capsys.readouterr().out
    assert "seed=2" in listed
    assert "seed=3" not in listed
    assert "2 cells" in listed
    assert run.main(["--out", str(tmp_path), "--hours", "0", "--afresh"], fake_grid) == 0
    assert not list((tmp_path / "cells").glob("*.json")) if (tmp_path / "cells").exists() else True


def test_a_run_begins_with_what_is_published_unless_it_is_told_not_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first"
    first.mkdir()
    for cell in fake_grid(first).ready:
        fake(first, cell)
    monkeypatch.setattr(run, "PUBLISHED", report.publish(first, fake_grid(first), tmp_path / "docs").parent / RESULTS)
    assert run.main(["--out", str(tmp_path / "afresh"), "--list", "--afresh"], fake_grid) == 0
    assert "taken over" not in capsys.readouterr().out
    assert run.main(["--out", str(tmp_path / "second"), "--list"], fake_grid) == 0
    assert "taken over: 6 cells" in capsys.readouterr().out
    assert all(load_result(tmp_path / "second", cell) for cell in fake_grid(first).ready)


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
        ("one-core", 1),
        ("one-fisher", 1),
        ("one-regmean", 1),
        ("multi-freeze_a", 3),
        ("multi-both", 3),
        ("one-head", 1),
        ("multi-head", 3),
        ("aligned", 2),
    ):
        found = measured(toy_cell(arm, rate=0.01 if arm == "one-core" else 0.003), toy_out)
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
    from evidence import bench, measure

    first = measured(toy_cell(seed=5), toy_out)
    trained: list[object] = []
    monkeypatch.setattr(bench, "train", lambda **given: trained.append(given))
    again = measure.measure(toy_cell(seed=5), toy_out)
    assert trained == []
    assert again["right"] == first["right"]
    twice = measure.measure(toy_cell("one-x2", seed=5), toy_out)
    assert twice["tau"]["adapted"] == pytest.approx(2 * first["tau"]["adapted"], rel=1e-3)
    assert twice["rounds"][0]["tau_sites"] == first["rounds"][0]["tau_sites"]
    even = measure.measure(toy_cell("one-uniform", seed=5), toy_out)
    assert even["tau"]["adapted"] == pytest.approx(first["tau"]["adapted"], rel=0.2)
    counted = measure.measure(toy_cell("one-counted", seed=5), toy_out)
    assert counted["rounds"][0]["coordinates"] == first["rounds"][0]["coordinates"] + 3, "the shares of three classes"
    assert counted["rounds"][0]["tau_sites"] == pytest.approx(first["rounds"][0]["tau_sites"])
    alone = measure.measure(toy_cell("alone", seed=5), toy_out)
    regmean = measure.measure(toy_cell("one-regmean", seed=5), toy_out)
    assert regmean["rounds"][0]["coordinates"] > first["rounds"][0]["coordinates"], "the Gram matrices"
    assert trained == []
    assert len(alone["by_site"]) == 5


@pytest.mark.parametrize("arm", ["one-regmean", "one-counted"])
def test_what_is_sent_of_another_arms_training_is_what_a_site_would_send(toy_out: Path, arm: str) -> None:
    from evidence.measure import bench_of, trained_as
    from tests.helpers_learning import word_examples

    bench = bench_of(toy_cell(arm), toy_out)
    plan, examples = bench.plan(epochs=2).plan, word_examples((9, 12, 2))  # of the last class too few to be counted
    start = bench.start(plan)
    delta = bench.train(trained_as(plan), start, examples).delta
    sent = bench.vector(plan, start, delta, examples)
    assert sent.size > delta.size
    np.testing.assert_allclose(sent, bench.train(plan, start, examples).delta, rtol=1e-5, atol=1e-7)


def test_a_masked_mean_that_is_not_the_plain_one_fails_the_bar(toy_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evidence import measure, rounds

    real = rounds.plain_mean
    monkeypatch.setattr(rounds, "plain_mean", lambda *given: real(*given) + 1e-3)
    result = measure.measure(toy_cell(), toy_out)
    assert secure_is_plain(Results(((toy_cell(), result),))).holds == "FAILS"


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


@pytest.mark.parametrize(("best", "tried"), [(0, (0, 5)), (5, (2, 7)), (2, (1, 5))])
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
        if about.kind in ("rounds", "alone", "analytic", "aligned"):
            random = 2 if arm in RANDOM_ARMS else 1 if arm in HEAD_ARMS else 0
            for weights, splits in (("pretrained", 4 if arm in CHEAPER_ARMS else 2), ("random", random)):
                assert sum(c.arm == arm and c.weights == weights for c in cells) == 3 * splits
    assert {"one-freeze_a", "one-both", "one-core", "one-regmean", "multi-freeze_a", "multi-both"} < set(RANDOM_ARMS)
    assert all(estimate(cell) > 0 for cell in cells)


def test_the_whole_grid_fits_a_night_on_two_cores(tmp_path: Path) -> None:
    found = grid(tmp_path)
    assert sum(map(estimate, (*found.ready, *found.waiting))) / 2 < 8 * 3600
