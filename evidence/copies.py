"""Held-out texts that begin like a training text: how many, and the bars without them. ``python -m evidence.copies``.

A model sees the first tokens of an article. Two articles that share most of those are one text to it, though the
corpora keep only whole copies on one side of the division (:mod:`evidence.corpora`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evidence.bars import best, one_shot_arms, points, pooled_arms
from evidence.bases import base_of
from evidence.bench import corpus_of
from evidence.grid import SPLITS, grid
from evidence.results import Results, collect
from evidence.run import OUT
from evidence.stats import Answers, difference
from participant.data import Examples
from participant.loading import load_base
from participant.training import tokenise
from privacy.errors import UserError

#: Shared tokens over all tokens of two texts (Jaccard), from which on they count as copies of one another.
ALIKE = 0.8


def tokens(base: Path, examples: Examples, max_length: int) -> list[frozenset[int]]:
    """What the model sees of each text, without order."""
    _, tokenizer, _ = load_base(base, 2)
    return [frozenset(one.tolist()) for one in tokenise(tokenizer, examples.texts, max_length)]


def alike(one: frozenset[int], other: frozenset[int]) -> bool:
    """Are two texts copies of one another?"""
    return len(one & other) >= ALIKE * len(one | other)


def copied(held_out: Sequence[frozenset[int]], train: Sequence[frozenset[int]]) -> list[int]:
    """Positions of held-out texts that are like a training text, or like a held-out text before them."""
    found = []
    for position, text in enumerate(held_out):
        if any(alike(text, other) for other in (*train, *held_out[:position])):
            found.append(position)
    return found


def without(answers: Answers, positions: Sequence[int]) -> Answers:
    """The answers on the other records."""
    return {seed: np.delete(row, positions) for seed, row in answers.items()}


def bars_without(results: Results, corpus: str, positions: Sequence[int]) -> list[str]:
    """The best one-shot arm against the best pooled one on each split, with all test records and without those."""
    lines = []
    for split in SPLITS:
        where = (corpus, "pretrained", split)
        one, pooled = best(results, one_shot_arms(), where), best(results, pooled_arms(), where)
        if one is None or pooled is None:
            continue
        pair = results.answers(one, where), results.answers(pooled, where)
        whole, rest = difference(*pair), difference(*(without(answers, positions) for answers in pair))
        if whole is not None and rest is not None:
            lines.append(f"  {split}: {one} minus {pooled} {points(whole)}, without them {points(rest)}")
    return lines


def main() -> int:
    """Print it for both corpora; the exit status."""
    found = grid(OUT)
    results, base = collect(OUT, found.ready, found.waiting), base_of("pretrained", OUT)
    for name in ("bbc", "icd"):
        corpus = corpus_of(name)
        seen = [tokens(base, part, corpus.max_length) for part in (corpus.train, corpus.validation, corpus.test)]
        counts = [copied(part, seen[0]) for part in seen[1:]]
        print(
            f"{name}: {len(counts[0])} of {len(seen[1])} validation records and {len(counts[1])} of {len(seen[2])} "
            "test records are like a training record or one before them"
        )
        print("\n".join(bars_without(results, name, counts[1])), flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"{error} ({error.hint})")
