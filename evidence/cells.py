"""A cell of the grid: what defines it, the digest of that, and the file that holds its result.

A result is kept under the digest of its definition, so it stays valid while code changes that does not change what is
measured; when it does, :data:`RECIPE` is raised. Files appear whole or not at all: whoever is killed leaves no half.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from evidence.arms import ALPHA, ARMS, BATCH, CLIP, RANK, TEXT
from privacy.errors import UserError

#: Raised whenever the same definition would give another measurement.
RECIPE = 1
#: Settings that every cell shares.
SETTINGS = {"recipe": RECIPE, "rank": RANK, "alpha": ALPHA, "batch": BATCH, "clip": CLIP}
SITES, EPOCHS = 10, 3

Part = Literal["validation", "test"]


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        arm: key of :data:`evidence.arms.ARMS`.
        corpus: key of :data:`evidence.corpora.CORPORA`.
        weights: "pretrained", or "random" for the same network without pretraining.
        split: who holds what, see :func:`evidence.splits.deal`; "none" where no site takes part.
        seed: of the deal, of the frozen A and of the order of the records.
        rate: learning rate; 0 where nothing is trained.
        part: validation records for tuning, test records for what is reported.
        sites: of a round.
        epochs: local epochs of an arm in all, shared out to its rounds.
    """

    arm: str
    corpus: str
    weights: str
    split: str
    seed: int
    rate: float
    part: Part
    sites: int = SITES
    epochs: int = EPOCHS

    @property
    def name(self) -> str:
        """For people, and for ``--only``; unique within a grid."""
        rate = f" lr={self.rate:g}" if self.rate else ""
        return f"{self.corpus}/{self.weights}/{self.split}/{self.arm}/{self.part} seed={self.seed}{rate}"

    @property
    def digest(self) -> str:
        """24 hexadecimal digits over the definition, that of the arm included."""
        return digest_of(
            {**asdict(self), **ARMS[self.arm].definition, **({"text": TEXT} if self.corpus == "desks" else {})}
        )


def digest_of(definition: dict[str, Any]) -> str:
    """24 hexadecimal digits over a JSON object and the shared settings."""
    content = json.dumps(SETTINGS | definition, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def cell_path(out: Path, cell: Cell) -> Path:
    """Where the result of a cell is kept below the output directory."""
    return out / "cells" / f"{cell.digest}.json"


def write_json(path: Path, content: object) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    staging.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(staging, path)


def save_result(out: Path, cell: Cell, result: dict[str, Any]) -> None:
    """Keep the result of a cell with its definition."""
    write_json(cell_path(out, cell), {"settings": SETTINGS, "cell": asdict(cell), "result": result})


def load_result(out: Path, cell: Cell) -> dict[str, Any] | None:
    """The result of a cell; None if it was not measured yet.

    Raises:
        UserError: the file is not the result of this cell.
    """
    path = cell_path(out, cell)
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: expected the result of a cell, found no JSON", hint="delete the file") from error
    if not isinstance(content, dict) or content.get("cell") != asdict(cell) or content.get("settings") != SETTINGS:
        raise UserError(f"{path}: expected the result of {cell.name}, found another", hint="delete the file")
    result: dict[str, Any] = content["result"]
    return result
