"""Exactness over **all** dropout patterns: ``make proofs`` (a seeded sample of this runs in the test suite).

Every member falls silent from some message on, or never; all combinations for n = 3, 4, 5 with c = 0 and 1, and n = 6
with c = 1. For each the total must equal the plain sum bit for bit, or the round abort, and abort exactly when fewer
than max(t, min_survivors) remain where they are needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.progress import Progress

from coordinator import phases
from privacy.secagg.threshold import threshold
from tests.simulation import Simulation

#: Messages that a total needs; None is a member that never falls silent.
SILENT_FROM: tuple[str | None, ...] = ("M1", "M3", "M5", "M7", "M9", None)
CONFIGURATIONS = ((3, 0), (3, 1), (4, 0), (4, 1), (5, 0), (5, 1), (6, 1))

Pattern = tuple[str | None, ...]


def patterns(n: int) -> Iterator[Pattern]:
    """All dropout patterns of n members."""
    return itertools.product(SILENT_FROM, repeat=n)


def completes(pattern: Pattern, colluders: int) -> bool:
    """Does the rule of protocol section 5 let this round complete?"""
    least = max(colluders, 1) + 2
    order = SILENT_FROM.index
    left = {step: sum(order(silent) > order(step) for silent in pattern) for step in SILENT_FROM[:-1]}
    if left["M1"] < max(least, colluders + 2):
        return False
    t = threshold(left["M1"], colluders)
    return left["M3"] >= max(t, least) and left["M5"] >= max(t, least) and left["M7"] >= t and left["M9"] >= t


def failure(pattern: Pattern, colluders: int) -> str | None:
    """Run one pattern; what is wrong with it, ``None`` for nothing."""
    silent = {i: step for i, step in enumerate(pattern) if step is not None}
    simulation = Simulation(len(pattern), colluders, silent=silent, size=9).run()
    released = isinstance(simulation.phase, phases.Released)
    if released != completes(pattern, colluders):
        return f"{pattern}, c = {colluders}: {'released' if released else simulation.phase}"
    if released and not simulation.is_exact():
        return f"{pattern}, c = {colluders}: the total is not the plain sum"
    return None


def _failures(job: tuple[int, list[Pattern]]) -> list[str]:
    colluders, batch = job
    return [found for pattern in batch if (found := failure(pattern, colluders)) is not None]


def main() -> None:
    """Run all patterns on all cores and write ``build/proofs.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=6, help="largest n (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/proofs.json"))
    arguments = parser.parse_args()
    began, failures, table = time.monotonic(), [], []
    with ProcessPoolExecutor() as pool, Progress() as bar:
        for n, colluders in CONFIGURATIONS:
            if n > arguments.most:
                continue
            todo = list(patterns(n))
            task = bar.add_task(f"n = {n}, c = {colluders}", total=len(todo))
            jobs = [(colluders, todo[low : low + 64]) for low in range(0, len(todo), 64)]
            for (_, batch), found in zip(jobs, pool.map(_failures, jobs), strict=True):
                failures += found
                bar.advance(task, len(batch))
            complete = sum(completes(p, colluders) for p in todo)
            table.append({"n": n, "c": colluders, "patterns": len(todo), "complete": complete})
    report = {"runs": table, "failures": failures, "seconds": round(time.monotonic() - began)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    for row in table:
        print(f"n = {row['n']}, c = {row['c']}: {row['patterns']} patterns, {row['complete']} complete and are exact")
    if failures:
        sys.exit(f"{len(failures)} patterns fail, the first: {failures[0]}")


if __name__ == "__main__":
    main()
