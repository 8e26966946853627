"""Pretrained against random weights: the gap between one round and several, and how far the weights move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evidence.arms import ARMS, counterpart
from evidence.bars import percent, points
from evidence.grid import SEEDS
from evidence.results import Results, Where
from evidence.stats import Answers, Interval, difference, gained, mean_accuracy

CLAIM = """\
## The mechanism: pretraining

The claim is that one round is enough because a pretrained network moves little (small tau) through a flat
landscape, so that the gap between one round and many is far larger on the same network with random weights.
tau is told over the adapted matrices, and in brackets over all weights of the network."""
COLUMNS = (
    "| corpus, split, arm | weights | base | multi-round | one minus multi | tau of a site | tau of the release |",
    "|---|---|---:|---:|---:|---:|---:|",
)


def mechanism(results: Results) -> list[str]:
    """The section of the report: all pairs, and of those where there was something to lose, how many say so."""
    rows: list[str] = []
    gaps: list[tuple[Interval, Interval]] = []
    nothing = 0
    for corpus, weights, split in results.places:
        for arm, about in ARMS.items():
            if weights != "random" or about.kind != "rounds" or about.rounds != 1 or about.source:
                continue
            pair = [(corpus, kind, split) for kind in ("pretrained", "random")]
            rows += [row for where in pair if (row := _row(results, arm, where))]
            found = [gap for where in pair if (gap := _gap(results, arm, where)) is not None]
            if len(found) == 2 and all(_learned(results, arm, where) for where in pair):
                gaps.append((found[0], found[1]))
            nothing += len(found) == 2 and not _learned(results, arm, pair[1])
    if not rows:
        return [*CLAIM.splitlines(), "", "Not measured yet."]
    return [*CLAIM.splitlines(), "", *COLUMNS, *rows, "", said(gaps, nothing)]


def said(gaps: Sequence[tuple[Interval, Interval]], nothing: int) -> str:
    """What the pairs (pretrained, random) come to, and how many have nothing to say."""
    words = []
    if nothing:
        words.append(
            f"In {nothing} pairs several rounds on random weights are not clearly better than the untrained network: "
            "nothing was learned that one round could lose. Their learning rates are the best of rates that learned "
            "nothing, so tau on random weights is that of an arbitrary one."
        )
    if gaps:
        larger = sum(random.value < pretrained.value for pretrained, random in gaps)
        clear = sum(random.high < pretrained.low for pretrained, random in gaps)
        words.append(
            f"Of {len(gaps)} pairs where there was something to lose, one round loses more on random weights in "
            f"{larger}, and in {clear} of them the intervals do not overlap."
        )
    return " ".join(words) or "No pair is complete yet."


def _pair(results: Results, arm: str, where: Where) -> tuple[Answers, Answers]:
    return results.answers(arm, where), results.answers(counterpart("multi", arm), where)


def _gap(results: Results, arm: str, where: Where) -> Interval | None:
    """One round minus several; None where one of them was not measured."""
    return difference(*_pair(results, arm, where))


def _learned(results: Results, arm: str, where: Where) -> bool:
    """Did several rounds get anywhere?"""
    return gained(_pair(results, arm, where)[1], results.answers("base", where, SEEDS))


def _row(results: Results, arm: str, where: Where) -> str:
    """The row of the table; empty where one of the two was not measured."""
    gap, base = _gap(results, arm, where), mean_accuracy(results.answers("base", where, SEEDS))
    mean = mean_accuracy(_pair(results, arm, where)[1])
    if gap is None or mean is None or base is None:
        return ""
    corpus, weights, split = where
    ones = list(results.of(arm, where).values())
    both = [tau_words(ones, over).split(", ") for over in ("adapted", "network")]
    taus = " | ".join(f"{adapted} ({network})" for adapted, network in zip(*both, strict=True))
    name = f"{corpus}, {split}, {arm.removeprefix('one-')}"
    return f"| {name} | {weights} | {100 * base.value:.1f} | {percent(mean)} | {points(gap)} | {taus} |"


def tau_words(found: Sequence[dict[str, Any]], over: str) -> str:
    """tau over the "adapted" matrices or the "network": mean over the sites in the first round, and of the release."""
    sites = [r["rounds"][0]["tau_sites"][over] for r in found if "tau_sites" in (r.get("rounds") or [{}])[0]]
    ends = [r["tau"][over] for r in found if "tau" in r]
    digits = 3 if over == "adapted" else 4
    words = [f"{np.mean(values):.{digits}f}" if values else "" for values in (sites, ends)]
    return ", ".join(filter(None, words))
