"""The kept results, sorted for the report: who measured what on which split, and what is missing.

They are published as one file, a line a cell, from which a later run goes on where an earlier one stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evidence.arms import ARMS, counterpart
from evidence.cells import SETTINGS, Cell, load_result, save_result
from evidence.stats import Answers
from privacy.errors import UserError

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

    def arms_at(self, where: Where) -> list[str]:
        """Arms to show at a place: those measured there, of the pooled ones those that any of them is compared with."""
        measured = [arm for arm in ARMS if self.of(arm, where)]
        others = {"pooled-freeze_a", *(counterpart("pooled", arm) for arm in measured if ARMS[arm].kind != "pooled")}
        return [arm for arm in measured if ARMS[arm].kind != "pooled" or arm in others]

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


def published(results: Results) -> str:
    """One line for each measured cell, with everything that was measured."""
    rows = [
        {"digest": cell.digest, "settings": SETTINGS, "cell": asdict(cell), "result": result}
        for cell, result in (*results.tuned, *results.reported)
    ]
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


def restore(out: Path, file: Path) -> int:
    """Take over published cells that are not kept below ``out`` and would be measured in the same way; their number.

    Raises:
        UserError: a line is not a published cell.
    """
    if not file.exists():
        return 0
    taken = 0
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            cell, result = Cell(**row["cell"]), dict(row["result"])
            same = row["settings"] == SETTINGS and cell.arm in ARMS and row["digest"] == cell.digest
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}, line {number}: expected a published cell, found something else", hint="restore the file"
            ) from error
        if same and load_result(out, cell) is None:
            save_result(out, cell, result)
            taken += 1
    return taken
