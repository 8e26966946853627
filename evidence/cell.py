"""Measures one cell in a process of its own: ``python -m evidence.cell OUT '{"arm": ...}'``."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from evidence.cells import Cell, save_result
from privacy import console
from privacy.errors import VeilsumError

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The commit measured, with "+" where files differ from it; for the record only."""
    try:
        asked = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(arguments: Sequence[str]) -> None:
    """Measure the cell and keep its result."""
    out, cell = Path(arguments[0]), Cell(**json.loads(arguments[1]))
    from evidence.measure import measure  # imports torch

    result = measure(cell, out)
    about = {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "machine": platform.machine(),
    }
    save_result(out, cell, result | {"about": about})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except VeilsumError as error:
        console.fail(error)
