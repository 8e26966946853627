"""``make chaos``: several hundred rounds of real processes, with everything going wrong; writes ``build/chaos.json``.

    python -m tests.chaos.run --rounds 300 --seed 1

First a clean plan and a failing one show which fault points a round passes; then every pass of every point is asked for
once, among random kills, stalls, cuts, delays, repeats and full disks, until there were enough rounds and faults. The
schedules follow from the seed and the points; what the machine makes of them does not, so a failure is listed with its
schedule and the ends of the logs.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import queue
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.chaos.rounds import Result, run_batch
from tests.chaos.schedule import FIVE, Batch, Schedule, batches, once_more, passes, schedules

MOST_FAILURES = 50
ROLES = ("the coordinator", "a member")


@dataclass
class Tally:
    """The sum of all plans so far."""

    plans: int = 0
    rounds: int = 0
    completed: int = 0
    aborted: int = 0
    lost: int = 0
    wrong: int = 0
    unmet: int = 0
    slow: int = 0
    struck: dict[str, set[str]] = field(default_factory=lambda: {role: set() for role in ROLES})
    faults: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, result: Result) -> None:
        verdict = result.verdict
        self.plans += 1
        self.rounds += verdict.rounds
        self.completed += verdict.completed
        self.aborted += verdict.aborted
        self.lost += verdict.lost
        self.wrong += len(verdict.wrong)
        self.unmet += len(verdict.unmet) + len(result.failures)
        self.slow += verdict.slow
        for role, point in result.struck:
            self.struck[role].add(point)
        self.faults.update(result.faults)
        said = [*verdict.wrong, *verdict.unmet, *result.failures]
        if (said or verdict.lost) and len(self.failures) < MOST_FAILURES:
            entry = {"plan": result.plan, "schedule": result.schedule, "said": said, "logs": result.tails}
            self.failures.append(entry)

    @property
    def faults_total(self) -> int:
        """Faults that took effect; what was skipped is none."""
        return sum(count for kind, count in self.faults.items() if not kind.startswith("skipped"))

    def line(self) -> str:
        return (
            f"{self.rounds} rounds ({self.completed} completed, {self.aborted} aborted), {self.faults_total} faults, "
            f"{self.lost} lost, {self.wrong} wrong, {self.unmet} unmet"
        )


def work(batch: Batch, seed: int, results: Any) -> None:
    """One batch in a process of its own."""
    logging.disable()
    run_batch(batch, seed, results.put)


def points(console: Console, seed: int, tally: Tally) -> tuple[list[str], list[str]]:
    """Points that a clean plan, and one whose first round fails, pass at the coordinator and at a member."""
    console.print("looking for fault points: a clean plan, and one that fails first")
    fails = Schedule(victims=(("site-2", "before-M7@1"), ("site-3", "before-M7@1")), torn=True)
    found: list[Result] = []
    run_batch(Batch(0, FIVE, (Schedule(), fails)), seed, found.append)
    for result in found:
        tally.add(result)
    clean, failed = found
    ours, theirs = (with_unhappy(*pair) for pair in zip(clean.passed, failed.passed, strict=True))
    return ours, theirs


def with_unhappy(clean: dict[str, int], failed: dict[str, int]) -> list[str]:
    """Passes of a clean plan, and of those points that only a failed round has."""
    return passes(clean) + passes({name: count for name, count in failed.items() if name not in clean})


@dataclass(frozen=True)
class Goal:
    """When it is enough."""

    rounds: int
    faults: int
    schedules: int

    def reached(self, tally: Tally, submitted: int) -> bool:
        return tally.rounds >= self.rounds and tally.faults_total >= self.faults and submitted >= self.schedules


class Driver:
    """Batches side by side, until there were enough."""

    def __init__(self, console: Console, seed: int, workers: int, tally: Tally, save: Callable[[], None]) -> None:
        self.console, self.seed, self.workers, self.tally = console, seed, workers, tally
        self.save = save
        self.submitted = 0

    def run(self, todo: Iterator[Batch], enough: Callable[[], bool]) -> None:
        """Submit from ``todo`` until it ends or ``enough()``; returns when all of them are done."""
        context = multiprocessing.get_context("spawn")
        with context.Manager() as manager, ProcessPoolExecutor(self.workers, mp_context=context) as pool:
            results: Any = manager.Queue()
            running: set[Future[None]] = set()
            while True:
                while len(running) < self.workers and not enough() and (batch := next(todo, None)):
                    self.submitted += len(batch.plans)
                    running.add(pool.submit(work, batch, self.seed * 1000 + batch.number, results))
                if not running:
                    return
                ended, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                drain(self.console, results, self.tally)
                for future in ended:
                    if error := future.exception():
                        self.tally.unmet += 1
                        self.tally.failures.append({"plan": "", "schedule": "", "said": [f"driver: {error!r}"]})
                if ended:
                    self.save()


def drain(console: Console, results: Any, tally: Tally) -> None:
    """Take what the batches reported since."""
    while True:
        try:
            result: Result = results.get_nowait()
        except queue.Empty:
            return
        tally.add(result)
        verdict = result.verdict
        for said in [*verdict.wrong, *verdict.unmet, *result.failures]:
            console.print(f"[bold red]{result.plan}[/]: {said}", highlight=False)
        console.print(f"{result.plan} in {result.seconds} s; {tally.line()}", highlight=False)


def points_of(asked: list[str], struck: set[str]) -> dict[str, Any]:
    """How many points killed somebody, with K passes or another number of them, and which never did."""
    names = {point.partition("@")[0] for point in asked}
    reached = {point.partition("@")[0] for point in struck}
    return {"names": len(names), "struck": len(names & reached), "never": sorted(names - reached)}


def verdict_of(tally: Tally, asked: tuple[list[str], list[str]], seed: int, seconds: float) -> dict[str, Any]:
    """What ``build/chaos.json`` says."""
    return {
        "rounds": tally.rounds,
        "completed": tally.completed,
        "aborted": tally.aborted,
        "lost": tally.lost,
        "wrong": tally.wrong,
        "faults": dict(sorted(tally.faults.items())),
        "faults_total": tally.faults_total,
        "unmet": tally.unmet,
        "excused_slow": tally.slow,
        "points": {role: points_of(a, tally.struck[role]) for role, a in zip(ROLES, asked, strict=True)},
        "plans": tally.plans,
        "seed": seed,
        "seconds": round(seconds),
        "failures": tally.failures,
    }


def main() -> int:
    """Run; 1 if anything was lost or wrong, or a round that should have completed did not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="at least so many rounds")
    parser.add_argument("--faults", type=int, default=500, help="at least so many faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4, help="federations side by side")
    parser.add_argument("--some-points", action="store_true", help="end when there were enough, not after every point")
    parser.add_argument("--output", type=Path, default=Path("build/chaos.json"))
    arguments = parser.parse_args()
    console, started, tally = Console(stderr=True), time.monotonic(), Tally()
    found = points(console, arguments.seed, tally)
    console.print(f"{len(found[0])} passes of points at the coordinator, {len(found[1])} at a member")
    # A little more than half of the schedules ask for a point of the coordinator; see schedules().
    least = 0 if arguments.some_points else 2 * max(map(len, found))
    goal = Goal(arguments.rounds, arguments.faults, least)

    def save() -> None:
        facts = verdict_of(tally, found, arguments.seed, time.monotonic() - started)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(facts, indent=2) + "\n")

    driver = Driver(console, arguments.seed, arguments.workers, tally, save)
    driver.run(batches(schedules(arguments.seed, *found)), lambda: goal.reached(tally, driver.submitted))
    if not arguments.some_points:
        ours, theirs = (points_of(a, tally.struck[role])["never"] for role, a in zip(ROLES, found, strict=True))
        console.print(f"{len(ours) + len(theirs)} points have not struck: once more, each in a federation of its own")
        driver.run(once_more(ours, theirs, 9001), lambda: False)
    save()
    console.print(f"{tally.line()}; {arguments.output}")
    return 1 if tally.lost or tally.wrong or tally.unmet else 0


if __name__ == "__main__":
    sys.exit(main())
