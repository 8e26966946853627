"""Plots of the report, as SVG files that do not change while the results do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor looked for

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evidence.arms import ARMS, counterpart
from evidence.bars import DESKS
from evidence.grid import SEEDS
from evidence.results import Results, Where
from evidence.stats import difference, gained, mean_accuracy

matplotlib.rcParams["svg.hashsalt"] = "veilsum"  # identifiers in the file do not come from chance
COLOURS = {"base": "#c9d1d9", "analytic": "#8b949e", "pooled": "#2da44e", "alone": "#d4a72c", "rounds": "#1f6feb"}


def draw(out: Path, results: Results) -> list[Path]:
    """Draw what there are results for; the files, below ``out``."""
    groups: dict[tuple[str, str], list[Where]] = {}
    for where in results.places:
        if where == DESKS:
            continue
        groups.setdefault(where[:2], []).append(where)
    found = [_accuracies(out, results, places) for places in groups.values()]
    gaps = _gaps(out, results)
    return [*found, *([gaps] if gaps else [])]


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def _accuracies(out: Path, results: Results, places: Sequence[Where]) -> Path:
    """Accuracy by split, a bar for each arm, with its interval."""
    corpus, weights, _ = places[0]
    shown = {where: results.arms_at(where) for where in places}
    arms = [arm for arm in ARMS if any(arm in found for found in shown.values())]
    figure, axes = pyplot.subplots(figsize=(3 + 2.4 * len(places), 4), layout="constrained")
    width = 0.85 / max(1, len(arms))
    for position, arm in enumerate(arms):
        means = [(i, mean_accuracy(results.answers(arm, w))) for i, w in enumerate(places) if arm in shown[w]]
        known = [(i, mean) for i, mean in means if mean is not None]
        colour = COLOURS[ARMS[arm].kind] if ARMS[arm].rounds != 1 else "#54aeff"
        axes.bar(
            [i + (position - (len(arms) - 1) / 2) * width for i, _ in known],
            [mean.value for _, mean in known],
            width * 0.92,
            yerr=[[m.value - m.low for _, m in known], [m.high - m.value for _, m in known]],
            label=arm,
            color=COLOURS["alone"] if ARMS[arm].kind == "alone" else colour,
            error_kw={"linewidth": 0.8},
        )
    axes.set_xticks(range(len(places)), [split for _, _, split in places])
    axes.set_ylim(0, 1)
    axes.set_ylabel("accuracy on the test records")
    axes.set_title(f"{corpus}, {weights} weights")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, out / f"accuracy-{corpus}-{weights}.svg")


def _gaps(out: Path, results: Results) -> Path | None:
    """tau of a site against what one round loses, where several rounds learned anything; None without a pair."""
    found = [
        (where, arm)
        for where in results.places
        for arm, about in ARMS.items()
        if where != DESKS  # losses, not points
        and about.kind == "rounds"
        and about.rounds > 1
        and results.of(counterpart("one", arm), where).keys() & results.of(arm, where).keys()
        and gained(results.answers(arm, where), results.answers("base", where, SEEDS))
    ]
    if not found:
        return None
    figure, sides = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axes, over in zip(sides, ("adapted", "network"), strict=True):
        for where, arm in found:
            _gap(axes, results, where, arm, over)
        what = "the adapted matrices" if over == "adapted" else "all weights"
        axes.set_xlabel(f"tau of a site in one round, over {what}")
        axes.axhline(0, color="#8b949e", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    sides[0].set_ylabel("multi-round minus one-shot, points")
    sides[0].set_title("blue: pretrained, red: random weights", fontsize=8, loc="left")
    return _save(figure, out / "tau-and-gap.svg")


def _gap(axes: Axes, results: Results, where: Where, arm: str, over: str) -> None:
    """One point: an arm of several rounds and its counterpart of one."""
    one = counterpart("one", arm)
    gap = difference(results.answers(arm, where), results.answers(one, where))
    assert gap is not None
    taus = [r["rounds"][0]["tau_sites"][over] for r in results.of(one, where).values()]
    colour = "#1f6feb" if where[1] == "pretrained" else "#cf222e"
    tau, p = sum(taus) / len(taus), gap.scaled(100)
    axes.errorbar(tau, p.value, yerr=[[p.value - p.low], [p.high - p.value]], marker="o", color=colour)
    axes.annotate(f"{where[0]} {where[2]} {arm.removeprefix('multi-')}", (tau, p.value), fontsize=6)
