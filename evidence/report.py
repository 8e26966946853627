"""The report: bars at the top, then tables and plots, all from the kept results and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evidence import plots
from evidence.arms import ALPHA, ARMS, BATCH, HEAD_RATE, LADDER, RANK, counterpart
from evidence.bars import DESKS, Bar, all_bars, wire
from evidence.bars import points as in_points
from evidence.cells import EPOCHS, SITES
from evidence.grid import SEEDS, TUNED_SEED, TUNED_SPLIT, Grid
from evidence.results import Results, Where, collect, published
from evidence.stats import Interval, difference, mean_accuracy, recovered

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

METHOD = """\
## How it was measured

`make evidence`; without a graphics card, one thread a cell. It can be stopped at any time and goes on.

* {sites} sites, {epochs} local epochs in all: one round of {epochs}, or {epochs} rounds of one.
* LoRA of rank {rank} and alpha {alpha:g} on query and value of all six layers, and a head that starts at zero; AdamW,
  batches of {batch}, the logit-adjusted loss. The alpha is the demo's. It was chosen by looking at the demo's test
  data, another division of the same articles: for BBC News it is not a choice made without the test records.
* The division into training, validation and test records is the same for all seeds. A seed deals the training records
  to the sites, draws the frozen A, and orders the records. Copies of a text, and diagnoses under one three-character
  code, stay on one side.
* `base` has a head of zeros: its accuracy is the share of the first class, which makes rho flattering. Read the
  differences.
* `analytic` is a head from sums on frozen features; `alone` is the mean over the sites, each with its own records.
* `aligned` is one plan of two stages, of one upload each: the head from sums, and then all epochs of the adapter behind
  that head, which stays as it is. It trains in one round and is no one-shot arm: the bars do not count it.
* `one-head`, `multi-head` and `pooled-head` train the head at {head_rate:g} times the adapter's rate, and are compared
  with one another; `one-head-counted` and `one-head-uniform` take what the sites of `one-head` trained.
* `one-counted`, `one-uniform`, `one-x1.5` and `one-x2` take what the sites of `one-freeze_a` trained, with its rate: a
  head averaged by the records of each class, even weights, and a mean times 1.5 or 2. `one-fisher` takes its rate.
* SmolLM2: five sites, 24 articles of each desk dealt 80 : 20, the first 128 tokens of each, batches of 4, alpha 16; A
  frozen. Loss in nats a token on 60 other articles; lower is better. A fixed and small budget of tokens.
* A later round is a federation of its own; its deltas are relative to the release before, and the release is what the
  product's `combine` makes of that and the verified total. Learning rate and warm-up begin anew in each round.
* A Dirichlet deal gives every site at least 20 records of at least two classes; deals without are drawn anew, which
  makes 0.1 a little milder than it would be.
* Intervals: 95 % of a paired bootstrap over test records and seeds. Three seeds say little about seeds.
* The bars speak of the best one-shot arm; best is taken on the test records themselves, and so is the best pooled arm.
* Every aggregation ran masked, through the real state machines, the coordinator's engine and the sites' daemons in one
  process, without gRPC and TLS. Bytes are those of the protobuf messages and chunks, both ways, audit included. Beside
  it the same mean was computed in the clear, from floats; a cell fails where they differ by more than rounding.
* `tls-freeze_a` is one cell between processes, over gRPC and mutual TLS; its bytes are counted by the service.
* tau is the Frobenius norm of what the adapter adds over that of the adapted matrices."""


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
    text = ["# Is one round enough?", "", *verdict(bars), ""]
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


def section(results: Results, where: Where) -> list[str]:
    """The table of one corpus, base and split."""
    corpus, weights, split = where
    text = corpus == "desks"
    head = [f"## {_title(corpus)}, {_title(weights)}: {_title(split)}", ""]
    measure = "nats a token" if text else "accuracy"
    columns = (
        f"| arm | seeds | {measure} | minus multi-round | minus pooled | rho | bytes a site | tau sites, release |"
    )
    rows = [row for arm in ARMS if (row := table_row(results, arm, where))]
    return [*head, columns, "|---|---:|---:|---:|---:|---:|---:|---:|", *rows]


def _title(name: str) -> str:
    return TITLES.get(name, name)


def table_row(results: Results, arm: str, where: Where) -> str:
    """One arm; empty where nothing was measured."""
    by_seed = results.of(arm, where)
    if not by_seed:
        return ""
    answers = results.answers(arm, where, SEEDS)
    mean = mean_accuracy(answers)
    assert mean is not None
    number, points = (nats, nats) if where == DESKS else (percent, in_points)
    cells = [arm, str(len(by_seed)), number(mean), "", "", "", "", ""]
    if ARMS[arm].kind == "rounds" and ARMS[arm].rounds == 1:
        multi = results.answers(counterpart("multi", arm), where)
        base = results.answers("base", where, SEEDS)
        gap, rho = difference(answers, multi), recovered(answers, multi, base)
        cells[3] = points(gap) if gap else ""
        cells[5] = f"{rho.value:.3f} [{rho.low:.3f}, {rho.high:.3f}]" if rho else ""
    if ARMS[arm].kind not in ("base", "pooled"):
        gap = difference(answers, results.answers(counterpart("pooled", arm), where))
        cells[4] = points(gap) if gap else ""
    if any(result.get("rounds") for result in by_seed.values()):
        cells[6] = f"{np.mean([wire(r) for r in by_seed.values()]):,.0f}"
    cells[7] = tau_words(list(by_seed.values()))
    return f"| {' | '.join(cells)} |"


def percent(interval: Interval) -> str:
    """An accuracy in per cent with its interval."""
    p = interval.scaled(100)
    return f"{p.value:.1f} [{p.low:.1f}, {p.high:.1f}]"


def nats(interval: Interval) -> str:
    """A loss, or a difference of losses, with its interval."""
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def tau_words(found: Sequence[dict[str, Any]]) -> str:
    """tau over the adapted matrices: mean over sites in the first round, and of the release."""
    sites = [r["rounds"][0]["tau_sites"]["adapted"] for r in found if "tau_sites" in (r.get("rounds") or [{}])[0]]
    ends = [r["tau"]["adapted"] for r in found if "tau" in r]
    words = [f"{np.mean(values):.3f}" if values else "" for values in (sites, ends)]
    return ", ".join(filter(None, words))


def mechanism(results: Results) -> list[str]:
    """Pretrained against random weights: the gap, and how far the weights move."""
    text = [
        "## The mechanism: pretraining",
        "",
        "The claim is that one round is enough because a pretrained network moves little (small tau) through a flat",
        "landscape, so that the gap between one round and many is far larger on the same network with random weights.",
        "",
    ]
    columns = "| corpus, split, arm | weights | multi-round | one minus multi | tau of a site | tau of the release |"
    rows, gaps = [], []
    for corpus, weights, split in results.places:
        for arm, about in ARMS.items():
            if weights != "random" or about.kind != "rounds" or about.rounds != 1 or about.source:
                continue
            pair = [_gap(results, arm, (corpus, kind, split)) for kind in ("pretrained", "random")]
            found = [(gap, row) for gap, row in pair if gap is not None]
            rows += [row for _, row in found]
            if len(found) == 2:
                gaps.append((found[0][0], found[1][0]))
    if not rows:
        return [*text, "Not measured yet."]
    larger = sum(random.value < pretrained.value for pretrained, random in gaps)
    apart = sum(random.high < pretrained.low for pretrained, random in gaps)
    says = f"One round loses more on random weights in {larger} of {len(gaps)} pairs measured, and in {apart} of them"
    return [*text, columns, "|---|---|---:|---:|---:|---:|", *rows, "", says, "the intervals do not overlap."]


def _gap(results: Results, arm: str, where: Where) -> tuple[Interval | None, str]:
    """(one round minus several, the row of the table); None where one of them was not measured."""
    kind, (corpus, weights, split) = arm.removeprefix("one-"), where
    one, multi = (results.answers(name, where) for name in (arm, counterpart("multi", arm)))
    gap, mean = difference(one, multi), mean_accuracy(multi)
    if gap is None or mean is None:
        return None, ""
    tau = " | ".join(([*tau_words(list(results.of(arm, where).values())).split(", "), "", ""])[:2])
    return gap, f"| {corpus}, {split}, {kind} | {weights} | {percent(mean)} | {in_points(gap)} | {tau} |"


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


def method(results: Results) -> list[str]:
    """How it was measured."""
    abouts = [result["about"] for _, result in (*results.reported, *results.tuned) if "about" in result]
    commits = ", ".join(sorted({about["commit"] for about in abouts})) or "none"
    spent = sum(result.get("cpu_s", 0.0) for _, result in (*results.reported, *results.tuned)) / 3600
    versions = sorted({f"Python {about['python']}, torch {about['torch']}, {about['machine']}" for about in abouts})
    return [
        *METHOD.format(
            sites=SITES, epochs=EPOCHS, rank=RANK, alpha=ALPHA, batch=BATCH, head_rate=HEAD_RATE
        ).splitlines(),
        f"* Commits: {commits}. {'; '.join(versions)}. {spent:.1f} CPU hours so far.",
    ]
