"""A toy corpus on a tiny base model, so that the harness of the evidence runs in seconds.

python -m tests.evidence_toy OUT CELL        measures a cell, as ``python -m evidence.cell`` does
python -m tests.evidence_toy --fake OUT CELL  makes one up, slowly, without torch
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

from evidence.cells import Cell, save_result
from evidence.grid import Grid

#: Cells that the fake takes for so long that a test can kill it in between.
FAKE_S = 0.3
WORDS = {0: ("apple", "pear", "plum"), 1: ("iron", "zinc", "copper"), 2: ("rhine", "elbe", "danube")}


def toy_cell(arm: str = "one-freeze_a", **changes: object) -> Cell:
    """A cell of five sites and few epochs."""
    cell = Cell(arm, "toy", "pretrained", "natural", 0, 0.003, "test", sites=5, epochs=3)
    return replace(cell, **changes)  # type: ignore[arg-type]


def fake_grid(_out: Path) -> Grid:
    """Six cells, nothing to tune."""
    return Grid([toy_cell(seed=seed) for seed in range(6)])


def fake(out: Path, cell: Cell) -> None:
    """A made-up result; each attempt leaves a line in ``attempts``."""
    with (out / "attempts").open("a") as file:
        file.write(f"{cell.seed}\n")
    time.sleep(FAKE_S)
    rng = random.Random(cell.seed)
    right = [int(rng.random() < 0.8) for _ in range(20)]
    tau = {"adapted": 0.1, "network": 0.01}
    rounds = [{"difference": 0.0, "tolerance": 1.0, "clipped": 0.0, "sent": 1.0, "received": 2.0, "tau_sites": tau}]
    made_up = {"accuracy": sum(right) / 20, "loss": 0.5, "right": right, "rounds": rounds, "tau": tau}
    save_result(out, cell, made_up | {"cpu_s": FAKE_S})


def register() -> None:
    """Make the toy corpus and its base model known to the harness of this process."""
    from evidence import corpora, measure
    from evidence.corpora import Corpus
    from participant.data import Examples
    from tests.helpers_learning import tiny_base

    def examples(count: int, seed: int) -> Examples:
        rng = random.Random(seed)
        labels = [i % 3 for i in range(count)]
        return Examples(
            tuple(f"the {rng.choice(WORDS[label])} {i % 7}" for i, label in enumerate(labels)), tuple(labels)
        )

    def toy() -> Corpus:
        return Corpus("toy", ("fruit", "metal", "river"), 8, examples(150, 0), examples(30, 1), examples(30, 2))

    def base_of(weights: str, out: Path) -> Path:  # noqa: ARG001
        directory = out / "tiny"
        return directory if directory.exists() else tiny_base(directory)

    corpora.CORPORA["toy"] = toy
    measure.base_of = base_of  # type: ignore[attr-defined]


def main(arguments: list[str]) -> None:
    """Measure or make up one cell."""
    if arguments[0] == "--fake":
        fake(Path(arguments[1]), Cell(**json.loads(arguments[2])))
        return
    from evidence import cell

    register()
    cell.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
