"""The report: bars at the top, then tables and plots, all from the kept results and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evidence import plots
from evidence.arms import ARMS, LADDER, counterpart
from evidence.bars import DESKS, Bar, all_bars, baseline, percent, seeds_in_words, wire
from evidence.bars import points as in_points
from evidence.grid import SEEDS, TUNED_SEED, TUNED_SPLIT, Grid
from evidence.mechanism import mechanism, tau_words
from evidence.method import method
from evidence.results import Results, Where, collect, published
from evidence.stats import Answers, Interval, difference, mean_accuracy, recovered

TITLES = {
    "bbc": "BBC News, five desks",
    "icd": "ICD-10 diagnoses, ten chapters",
    "desks": "articles of five desks, five sites",
    "smollm2": "SmolLM2-135M-Instruct",
    "pretrained": "all-MiniLM-L6-v2",
    "random": "the same network with random weights",
    "iid": "even",
    "natural": "80 % of a class at its own sites",
    "dirichlet-0.5": "Dirichlet 0.5",
    "dirichlet-0.1": "Dirichlet 0.1",
}

RESULTS = "results.jsonl"
PUBLISHED = f"""\
This page, its plots and [{RESULTS}]({RESULTS}), which has all cells, were written by `python -m evidence.run --publish
docs/evidence` after `make evidence`. A later `make evidence` begins with these cells; `--afresh` measures all anew.
"""


def write(out: Path, found: Grid) -> Path:
    """Write ``report.md`` and its plots below ``out``; the path of the report."""
    results = collect(out, found.ready, found.waiting)
    pictures = plots.draw(out, results)
    path = out / "report.md"
    path.write_text("\n".join(lines(results, all_bars(results), pictures)) + "\n")
    return path


def publish(out: Path, found: Grid, directory: Path) -> Path:
    """Write the report as ``README.md`` of a directory, with its plots and, a line a cell, what was measured."""
    directory.mkdir(parents=True, exist_ok=True)
    report = write(out, found)
    results = collect(out, found.ready, found.waiting)
    for picture in plots.draw(directory, results):
        assert picture.name in report.read_text(), picture
    (directory / RESULTS).write_text(published(results))
    readme = directory / "README.md"
    readme.write_text(report.read_text() + "\n" + PUBLISHED)
    return readme


def lines(results: Results, bars: Sequence[Bar], pictures: Sequence[Path] = ()) -> list[str]:
    """The report as Markdown."""
    done, missing = len(results.reported) + len(results.tuned), len(results.missing)
    text = ["# Is one round enough?", "", *verdict(bars), "", *beside(results)]
    if missing:
        text += [f"**{missing} of {done + missing} cells are not measured yet**; the tables show what is there.", ""]
    text += [f"![{picture.stem}]({picture.name})" for picture in pictures] + [""]
    for where in results.places:
        text += [*section(results, where), ""]
    return [*text, *mechanism(results), "", *tuning(results), "", *method(results)]


def verdict(bars: Sequence[Bar]) -> list[str]:
    """What fails first, then what is not measured, then what holds."""
    order = ("FAILS", "not measured", "holds")
    counts = {state: sum(bar.holds == state for bar in bars) for state in order}
    failing = [bar.promise for bar in bars if bar.holds == "FAILS"]
    if failing:
        head = f"**{len(failing)} of {len(bars)} bars FAIL**: {'; '.join(failing)}."
    elif counts["not measured"]:
        head = f"**No bar fails so far; {counts['not measured']} of {len(bars)} are not measured.**"
    else:
        head = f"**All {len(bars)} bars hold.**"
    rows = [f"| {bar.holds} | {bar.promise} | {bar.found} |" for state in order for bar in bars if bar.holds == state]
    return [head, "", "| bar | promise | found |", "|---|---|---|", *rows]


def beside(results: Results) -> list[str]:
    """The baseline that the bars leave out: a head on frozen features trains no adapter."""
    rows = baseline(results)
    if not rows:
        return []
    text = "Beside the bars, the baseline to beat: `analytic`, a head from sums on frozen features, in one upload."
    head = "| where | best arm of one upload that trains the adapter | minus `analytic` |"
    return [text, "", head, "|---|---|---|", *rows, ""]


def section(results: Results, where: Where) -> list[str]:
    """The table of one corpus, base and split."""
    corpus, weights, split = where
    text = corpus == "desks"
    head = [f"## {_title(corpus)}, {_title(weights)}: {_title(split)}", ""]
    measure = "nats a token" if text else "accuracy"
    columns = (
        f"| arm | seeds | {measure} | by seed | minus multi-round | minus pooled | minus analytic | rho "
        "| bytes a site | tau sites, release |"
    )
    rows = [table_row(results, arm, where) for arm in results.arms_at(where)]
    return [*head, columns, "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|", *rows]


def _title(name: str) -> str:
    return TITLES.get(name, name)


def table_row(results: Results, arm: str, where: Where) -> str:
    """One arm that was measured."""
    by_seed, about = results.of(arm, where), ARMS[arm]
    answers, text = results.answers(arm, where, SEEDS), where == DESKS
    mean = mean_accuracy(answers)
    assert mean is not None

    def minus(other: str) -> str:
        return apart(answers, results.answers(other, where), nats if text else in_points)

    multi = pooled = analytic = rho = sent = ""
    if about.kind == "rounds" and about.rounds == 1:
        multi = minus(counterpart("multi", arm))
        several, base = (results.answers(name, where, SEEDS) for name in (counterpart("multi", arm), "base"))
        share = recovered(answers, several, base, lower=text)
        rho = nats(share) if share else ""
    if about.kind not in ("base", "pooled"):
        pooled = minus(counterpart("pooled", arm))
    if about.kind not in ("base", "analytic"):
        analytic = minus("analytic")
    if any(result.get("rounds") for result in by_seed.values()):
        sent = f"{np.mean([wire(r) for r in by_seed.values()]):,.0f}"
    seeds = ", ".join(
        f"{m:.3f}" if text else f"{100 * m:.1f}" for m in (float(answers[s].mean()) for s in sorted(by_seed))
    )
    number, tau = (nats if text else percent)(mean), tau_words(list(by_seed.values()), "adapted")
    cells = [arm, len(by_seed), number, seeds if len(by_seed) > 1 else "", multi, pooled, analytic, rho, sent, tau]
    return f"| {' | '.join(map(str, cells))} |"


def apart(one: Answers, other: Answers, words: Callable[[Interval], str]) -> str:
    """A difference, and over how many seeds where that is not all of them; empty where there is none."""
    gap, seeds = difference(one, other), len(one.keys() & other.keys())
    if gap is None:
        return ""
    return words(gap) + (f" ({seeds_in_words(seeds)})" if seeds < len(one) else "")


def nats(interval: Interval) -> str:
    """A loss, or a difference of losses, with its interval."""
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def tuning(results: Results) -> list[str]:
    """What was tried on the validation records."""
    text = [
        "## Learning rates",
        "",
        f"Tried on the validation records, seed {TUNED_SEED}, split `{TUNED_SPLIT}`; the best is used everywhere else.",
        "Where the best was the lowest or highest tried, the next was tried too. A star: there was no next.",
        "",
        "| corpus | weights | arm | validation accuracy, and loss, by rate |",
        "|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[tuple[float, dict[str, Any]]]] = {}
    for cell, result in results.tuned:
        groups.setdefault((cell.corpus, cell.weights, cell.arm), []).append((cell.rate, result))
    return text + [f"| {' | '.join(group)} | {_tried(sorted(groups[group], key=lambda t: t[0]))} |" for group in groups]


def _tried(tried: Sequence[tuple[float, dict[str, Any]]]) -> str:
    winner = min(tried, key=lambda one: (-one[1]["accuracy"], one[1]["loss"], one[0]))[0]
    edge = "*" if winner in (LADDER[0], LADDER[-1]) else ""
    words = [f"{rate:g}: {result['accuracy']:.3f} ({result['loss']:.3f} nats)" for rate, result in tried]
    return ", ".join(
        f"**{word}{edge}**" if rate == winner else word for word, (rate, _) in zip(words, tried, strict=True)
    )
