"""The kept results, sorted for the report: who measured what on which split, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evidence.arms import ARMS
from evidence.cells import Cell, load_result
from evidence.stats import Answers

Where = tuple[str, str, str]  # corpus, weights, split


@dataclass(frozen=True)
class Results:
    """Every reported cell with its result, and every tuning cell with its own."""

    reported: tuple[tuple[Cell, dict[str, Any]], ...] = ()
    tuned: tuple[tuple[Cell, dict[str, Any]], ...] = ()
    missing: tuple[Cell, ...] = field(default=())

    @property
    def places(self) -> list[Where]:
        """(corpus, weights, split) of which something was measured, in the order of the cells."""
        found = dict.fromkeys((c.corpus, c.weights, c.split) for c, _ in self.reported if c.split != "none")
        return list(found)

    def of(self, arm: str, where: Where) -> dict[int, dict[str, Any]]:
        """Seed -> result of an arm at a place; an arm without sites is the same on every split."""
        corpus, weights, split = where
        return {
            cell.seed: result
            for cell, result in self.reported
            if (cell.arm, cell.corpus, cell.weights) == (arm, corpus, weights) and cell.split in ("none", split)
        }

    def answers(self, arm: str, where: Where, seeds: Sequence[int] = ()) -> Answers:
        """Seed -> what :func:`by_record` says. The base model's is the same with each seed, and repeated."""
        found = {seed: by_record(result) for seed, result in self.of(arm, where).items()}
        if ARMS[arm].kind == "base" and found:
            return dict.fromkeys(seeds, next(iter(found.values())))
        return found


def by_record(result: dict[str, Any]) -> NDArray[np.float64]:
    """(records,) whose mean is the accuracy; of a language model, whose mean is the loss in nats a token."""
    if "right" in result:
        return np.array(result["right"], np.float64)
    tokens = np.array(result["tokens"], np.float64)
    share: NDArray[np.float64] = np.array(result["nats"], np.float64) / tokens.mean()
    return share


def collect(out: Path, ready: Sequence[Cell], waiting: Sequence[Cell]) -> Results:
    """What is kept below ``out`` of the cells of a grid."""
    reported: list[tuple[Cell, dict[str, Any]]] = []
    tuned: list[tuple[Cell, dict[str, Any]]] = []
    missing = list(waiting)
    for cell in ready:
        result = load_result(out, cell)
        if result is None:
            missing.append(cell)
        else:
            (reported if cell.part == "test" else tuned).append((cell, result))
    return Results(tuple(reported), tuple(tuned), tuple(missing))
