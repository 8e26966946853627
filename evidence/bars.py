"""The bars: what was promised of one round, and whether it holds in what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from evidence.arms import ARMS, counterpart
from evidence.grid import SEEDS
from evidence.results import Results, Where
from evidence.stats import Interval, bootstrap, common_seeds, difference, mean_accuracy, recovered

Holds = Literal["holds", "FAILS", "not measured"]
#: Measured on the wire, one round over T rounds must be 1 / T up to this factor.
BYTES_SLACK = 0.1
#: Where the language model is measured.
DESKS: Where = ("desks", "smollm2", "natural")


@dataclass(frozen=True)
class Bar:
    """One promise: ``found`` says in words what was measured."""

    promise: str
    holds: Holds
    found: str


def one_shot_arms() -> list[str]:
    """Arms of one round that train the adapter; heads on frozen features are no adapters."""
    return [name for name, arm in ARMS.items() if arm.kind == "rounds" and arm.rounds == 1]


def pooled_arms() -> list[str]:
    """The same training on all records together."""
    return [name for name, arm in ARMS.items() if arm.kind == "pooled"]


def best(results: Results, arms: Sequence[str], where: Where) -> str | None:
    """The arm with the highest mean accuracy on the test records, of those with most seeds; None if there is none."""
    means = {arm: mean_accuracy(results.answers(arm, where)) for arm in arms}
    found = [(len(results.of(arm, where)), mean.value, arm) for arm, mean in means.items() if mean is not None]
    return max(found)[2] if found else None


def chosen_arm(results: Results, where: Where) -> str | None:
    """The one-shot arm that did best on the validation records of the corpus, with its best rate; None without any."""
    found = [
        (result["accuracy"], -result["loss"], cell.arm)
        for cell, result in results.tuned
        if (cell.corpus, cell.weights) == where[:2] and cell.arm in one_shot_arms()
    ]
    return max(found)[2] if found else None


def points(interval: Interval) -> str:
    """A difference in points."""
    p = interval.scaled(100)
    return f"{p.value:+.1f} points [{p.low:+.1f}, {p.high:+.1f}]"


def percent(interval: Interval) -> str:
    """An accuracy in per cent with its interval."""
    p = interval.scaled(100)
    return f"{p.value:.1f} [{p.low:.1f}, {p.high:.1f}]"


def near_pooled(results: Results, where: Where, most: float, promise: str) -> Bar:
    """The best one-shot arm is at most ``most`` (as a share) below the best pooled arm."""
    one, pooled = best(results, one_shot_arms(), where), best(results, pooled_arms(), where)
    if one is None or pooled is None:
        return Bar(promise, "not measured", "no result of a one-shot arm and a pooled one yet")
    gap = difference(results.answers(one, where), results.answers(pooled, where))
    if gap is None:
        return Bar(promise, "not measured", "no seed that both were measured with yet")
    seeds = len(set(results.of(one, where)) & set(results.of(pooled, where)))
    words = f"{one} against {pooled}: {points(gap)}, {seeds_in_words(seeds)}{by_seed(results, one, pooled, where)}"
    chosen = chosen_arm(results, where)
    if chosen is not None and chosen != one:
        other = difference(results.answers(chosen, where), results.answers(pooled, where))
        words += f"; {chosen}, best on the validation records: {points(other)}" if other else ""
    aligned = difference(results.answers("aligned", where), results.answers(pooled, where))
    words += f"; beside it aligned, of two uploads: {points(aligned)}" if aligned else ""
    absent = [arm for arm in one_shot_arms() if len(results.of(arm, where)) < seeds]
    words += f"; not yet measured: {', '.join(absent)}" if absent else ""
    # A hundredth of a point is far below one record; it only keeps binary fractions from deciding.
    return Bar(promise, judged(gap.value >= -most - 1e-4, seeds), words)


def by_seed(results: Results, one: str, other: str, where: Where) -> str:
    """The difference of two arms with each seed, in points; three seeds are few, and an interval does not show that."""
    first, second = results.answers(one, where), results.answers(other, where)
    found = [100 * float(first[seed].mean() - second[seed].mean()) for seed in common_seeds(first, second)]
    return f" ({', '.join(f'{value:+.1f}' for value in found)})"


def baseline(results: Results) -> list[str]:
    """What training the adapter in one upload brings over a head from sums on frozen features, place by place."""
    found = []
    for where in results.places:
        one = best(results, one_shot_arms(), where)
        gap = difference(results.answers(one, where), results.answers("analytic", where)) if one else None
        if one is not None and gap is not None:
            found.append(f"| {', '.join(where)} | {one} | {points(gap)} |")
    return found


def text_learns(results: Results) -> Bar:
    """Several rounds lower the language model's held-out loss by at least 5 %."""
    promise = "SmolLM2, held-out loss on the five desks: several rounds lower that of the base model by at least 5 %"
    multi, base = results.answers("multi-freeze_a", DESKS), results.answers("base", DESKS, SEEDS)
    gain = bootstrap(lambda after, before: 1 - after / before, multi, base)
    if gain is None:
        return Bar(promise, "not measured", "no result of several rounds and of the base model yet")
    p = gain.scaled(100)
    words = f"by {p.value:.1f} % [{p.low:.1f}, {p.high:.1f}], {seeds_in_words(len(multi))}"
    return Bar(promise, judged(gain.value >= 0.05 - 1e-9, len(multi)), words)


def text_keeps(results: Results) -> Bar:
    """One round keeps at least 0.8 of what several gain."""
    promise = "SmolLM2: one round reaches rho >= 0.8 at equal epochs"
    one, multi = results.answers("one-freeze_a", DESKS), results.answers("multi-freeze_a", DESKS)
    base, seeds = results.answers("base", DESKS, SEEDS), len(one.keys() & multi.keys())
    if not seeds or not base:
        return Bar(promise, "not measured", "no result of one round, of several, and of the base model yet")
    rho = recovered(one, multi, base, lower=True)
    if rho is None:
        return Bar(promise, judged(False, seeds), "several rounds gain nothing to keep")
    words = f"rho = {rho.value:.3f} [{rho.low:.3f}, {rho.high:.3f}], {seeds_in_words(seeds)}"
    return Bar(promise, judged(rho.value >= 0.8 - 1e-9, seeds), words)


def judged(reached: bool, seeds: int) -> Holds:
    """Nothing is said to hold, or to fail, on fewer seeds than the bars ask for."""
    if seeds < len(SEEDS):
        return "not measured"
    return "holds" if reached else "FAILS"


def seeds_in_words(count: int) -> str:
    """A number of seeds."""
    return f"{count} seed{'s' if count != 1 else ''}" + (f" of {len(SEEDS)} so far" if count < len(SEEDS) else "")


def fewer_bytes(results: Results) -> Bar:
    """Bytes of one round over those of T rounds, both counted on the wire, are about 1 / T."""
    promise = "bytes on the wire: one round takes about 1/T of T rounds"
    ratios = []
    for where in results.places:
        for arm, about in ARMS.items():
            if about.kind == "rounds" and about.rounds > 1:
                one = counterpart("one", arm)
                shared = results.of(one, where).keys() & results.of(arm, where).keys()
                ratios += [
                    about.rounds * wire(results.of(one, where)[s]) / wire(results.of(arm, where)[s]) for s in shared
                ]
    if not ratios:
        return Bar(promise, "not measured", "no pair of arms yet")
    holds = all(abs(ratio - 1) <= BYTES_SLACK for ratio in ratios)
    words = f"T times the ratio is {min(ratios):.3f} to {max(ratios):.3f} over {len(ratios)} pairs"
    return Bar(promise, "holds" if holds else "FAILS", words)


def wire(result: dict[str, object]) -> float:
    """Bytes a site sends and receives in all rounds of a result."""
    rounds = result["rounds"]
    assert isinstance(rounds, list)
    return float(sum(r["sent"] + r["received"] for r in rounds))


def secure_is_plain(results: Results) -> Bar:
    """Every masked mean is that in the clear, up to rounding."""
    promise = "every masked aggregation gives what it gives in the clear, within the quantiser's rounding"
    rounds = [r for _, result in (*results.reported, *results.tuned) for r in result.get("rounds", ())]
    if not rounds:
        return Bar(promise, "not measured", "no round yet")
    worst = max(r["difference"] / r["tolerance"] for r in rounds)
    clipped = sum(r["clipped"] > 0 for r in rounds)
    clear = [r["clear"] for _, r in (*results.reported, *results.tuned) if "clear" in r]
    others = [c["other_answers"] for c in clear if "other_answers" in c]
    words = f"{len(rounds)} rounds; largest difference {worst:.2f} of what rounding can make; {clipped} with clipping"
    if others:
        words += f"; of {len(others)} releases {sum(n > 0 for n in others)} answer otherwise in the clear, at most"
        words += f" {max(others)} of the held-out records"
    return Bar(promise, "holds" if worst <= 1 else "FAILS", words)


def all_bars(results: Results) -> list[Bar]:
    """Every bar, judged."""
    natural, skewed = ("bbc", "pretrained", "natural"), ("bbc", "pretrained", "dirichlet-0.1")
    checks: list[Callable[[], Bar]] = [
        lambda: near_pooled(
            results,
            natural,
            0.01,
            "BBC News, 80 % of each desk at its own sites: best one-shot within 1 point of pooled",
        ),
        lambda: near_pooled(results, skewed, 0.03, "BBC News, Dirichlet 0.1: best one-shot within 3 points of pooled"),
        lambda: text_learns(results),
        lambda: text_keeps(results),
        lambda: fewer_bytes(results),
        lambda: secure_is_plain(results),
    ]
    return [check() for check in checks]
