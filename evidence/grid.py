"""The whole grid: which cells are tuned, which are reported, in what order, and how long they take.

A reported cell takes the learning rate that its arm was best with on the validation records, on one seed and one
split; until that is known the cell waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from evidence.arms import ARMS, LADDER
from evidence.cells import SITES, Cell, load_result

SEEDS = (0, 1, 2)
TUNED_SEED, TUNED_SPLIT = 0, "natural"
SPLITS = ("natural", "dirichlet-0.1", "iid", "dirichlet-0.5")
RANDOM_SPLITS = ("natural", "dirichlet-0.1")
#: Arms of the language model; it has no head, and little time.
TEXT_ARMS = ("base", "pooled-freeze_a", "one-freeze_a", "one-regmean", "multi-freeze_a", "alone")
#: Without those that are measured only on the one corpus and the two splits that the bars are about.
CHEAPER_ARMS = tuple(name for name, arm in ARMS.items() if arm.method != "fisher" and arm.head_rate == 1.0)
#: On random weights, where only the methods themselves are compared; merging otherwise than by the mean is left out.
RANDOM_ARMS = ("base", "analytic", *(n for n in CHEAPER_ARMS if ARMS[n].rates and ARMS[n].kind != "aligned"))
#: With a faster head, on one split: behind one that hardly moves, an adapter on random weights learns little.
HEAD_ARMS = tuple(name for name, arm in ARMS.items() if arm.head_rate != 1.0 and arm.rates)
#: (corpus, weights, splits, arms), in the order of measuring: what the bars are about comes first.
BLOCKS: list[tuple[str, str, tuple[str, ...], Sequence[str]]] = [
    ("bbc", "pretrained", SPLITS[:2], tuple(ARMS)),
    ("desks", "smollm2", SPLITS[:1], TEXT_ARMS),
    ("icd", "pretrained", SPLITS[:2], CHEAPER_ARMS),
    ("bbc", "random", RANDOM_SPLITS, RANDOM_ARMS),
    ("bbc", "random", SPLITS[:1], HEAD_ARMS),
    ("bbc", "pretrained", SPLITS[2:], CHEAPER_ARMS),
    ("icd", "pretrained", SPLITS[2:], CHEAPER_ARMS),
]
#: Arms that no site takes part in: the same for every split.
UNSPLIT = ("base", "pooled")
#: Where the arm over TLS is measured: corpus, weights, split, seed.
ONCE = ("bbc", "pretrained", "natural", 0)

#: For estimates, measured on one core with AVX-512, both cores at work: milliseconds of a training step, and of an
#: answer, per record; seconds to load.
TRAIN_MS = {"bbc": 31.0, "icd": 11.0, "desks": 870.0}
ANSWER_MS = {"bbc": 10.5, "icd": 3.5, "desks": 360.0}
LOAD_S = 4.0
#: Training, validation and test records.
RECORDS = {"bbc": (1551, 226, 448), "icd": (1450, 243, 436), "desks": (120, 30, 60)}
#: Of a corpus that is not known here.
SMALL = (100, 30, 30)


@dataclass
class Grid:
    """What can be measured now, and what waits for a learning rate (with a stand-in, for estimates only)."""

    ready: list[Cell] = field(default_factory=list)
    waiting: list[Cell] = field(default_factory=list)


def tuning_cell(corpus: str, weights: str, arm: str, rate: float) -> Cell:
    """The cell that tries one learning rate of an arm."""
    split = "none" if ARMS[arm].kind in UNSPLIT else TUNED_SPLIT
    return Cell(arm, corpus, weights, split, TUNED_SEED, rate, "validation", sites_of(corpus))


def sites_of(corpus: str) -> int:
    """Ten, as where the claim was made; of the few articles of the language model, a site for each desk."""
    return 5 if corpus == "desks" else SITES


def tuning_cells(out: Path, corpus: str, weights: str, arm: str) -> list[Cell]:
    """One cell for every rate to try, from the lowest: the arm's own, and beyond them while the best lies at an edge.

    None for an arm that takes its rate from another, or has none.
    """
    rates = ARMS[arm].rates
    while (winner := _winner(out, corpus, weights, arm, rates)) is not None:
        first, last = LADDER.index(rates[0]), LADDER.index(rates[-1])
        if winner == rates[0] and first > 0:
            rates = LADDER[first - 1 : last + 1]
        elif winner == rates[-1] and last + 1 < len(LADDER):
            rates = LADDER[first : last + 2]
        else:
            break
    return [tuning_cell(corpus, weights, arm, rate) for rate in rates]


def _winner(out: Path, corpus: str, weights: str, arm: str, rates: tuple[float, ...]) -> float | None:
    """The rate with most right answers, of equals that with the lower loss; None while cells are missing."""
    results = [load_result(out, tuning_cell(corpus, weights, arm, rate)) for rate in rates]
    found = [(-r["accuracy"], r["loss"], rate) for rate, r in zip(rates, results, strict=True) if r is not None]
    return min(found)[2] if found and len(found) == len(rates) else None


def best_rate(out: Path, corpus: str, weights: str, arm: str) -> float | None:
    """The rate that an arm is reported with; None while it is being tuned, 0 for an arm without training."""
    arm = ARMS[arm].source or arm
    rates = tuple(cell.rate for cell in tuning_cells(out, corpus, weights, arm))
    return _winner(out, corpus, weights, arm, rates) if rates else 0.0


def reported(corpus: str, weights: str, split: str, arms: Sequence[str]) -> Iterator[Cell]:
    """The cells of one split, seed by seed, without their rates."""
    for seed in SEEDS:
        for arm in arms:
            about = ARMS[arm]
            where = "none" if about.kind in UNSPLIT else split
            if about.kind == "tls" and (corpus, weights, split, seed) != ONCE:
                continue
            if about.kind != "base" or seed == SEEDS[0]:  # a zero head says the same with every seed
                yield Cell(arm, corpus, weights, where, seed, 0.0, "test", sites_of(corpus))


def grid(out: Path) -> Grid:
    """All cells in the order of measuring, each once."""
    found, seen = Grid(), set()
    for corpus, weights, splits, arms in BLOCKS:
        rates = {arm: best_rate(out, corpus, weights, arm) for arm in arms}
        cells = [(cell, False) for arm in arms for cell in tuning_cells(out, corpus, weights, arm)]
        for arm, rate in rates.items():
            if ARMS[arm].kind == "rounds" and ARMS[arm].source and rate is not None:
                cells.append((tuning_cell(corpus, weights, arm, rate), False))  # so that it can be chosen, too
        for split in splits:
            for cell in reported(corpus, weights, split, arms):
                rate = rates[cell.arm]
                rates_tried = ARMS[ARMS[cell.arm].source or cell.arm].rates
                stand_in = rates_tried[len(rates_tried) // 2] if rates_tried else 0.0
                cells.append((replace(cell, rate=stand_in if rate is None else rate), rate is None))
        for cell, waits in cells:
            if (cell.digest, waits) not in seen:
                seen.add((cell.digest, waits))
                (found.waiting if waits else found.ready).append(cell)
    return found


def shares_training(arm: str) -> bool:
    """Does another arm train the same at the sites?"""
    about = ARMS[arm]
    return about.method == "regmean" or (about.source is not None and ARMS[about.source].method == about.method)


def estimate(cell: Cell) -> float:
    """Seconds on one quiet core."""
    arm = ARMS[cell.arm]
    train, validation, test = RECORDS.get(cell.corpus, SMALL)
    train_s, answer_s = TRAIN_MS.get(cell.corpus, 1.0) / 1000, ANSWER_MS.get(cell.corpus, 1.0) / 1000
    answers = (test if cell.part == "test" else validation) * answer_s
    statistics = train * answer_s + cell.sites if arm.method == "regmean" else 0.0
    training = cell.epochs * train * train_s
    return (
        LOAD_S
        + {
            "base": answers,
            "alone": cell.sites * answers,
            "pooled": training + answers,
            "tls": training + cell.sites * 12.0 + answers,
            "rounds": (0.0 if shares_training(cell.arm) else training) + statistics + 2 * answers + 3.0 * arm.rounds,
            "analytic": 2 * train * answer_s + answers,
            "aligned": 2 * train * answer_s + training + 2 * answers + 6.0,
        }[arm.kind]
    )
