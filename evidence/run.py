"""Runs the grid: ``python -m evidence.run``. Whatever is measured is kept; run it again and it goes on.

Each cell is measured by a process of its own with one thread, two at a time. At the end, and whenever it is stopped,
the report of what is there is written: ``report.md`` and its plots, the bars that fail or are not measured at the top.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

from evidence import report
from evidence.cells import Cell, load_result
from evidence.grid import Grid, estimate, grid
from evidence.results import restore
from privacy import console
from privacy.errors import UserError, VeilsumError

OUT = Path("build/evidence")
PUBLISHED = Path("docs/evidence") / report.RESULTS
#: One thread a process: two processes of one thread are faster than one of two.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
POLL_S = 0.2
#: Measures one cell; called with the output directory and the cell as JSON.
COMMAND: Sequence[str] = (sys.executable, "-m", "evidence.cell")

Plan = Callable[[Path], Grid]


@dataclass
class Runner:
    """Measures what is ready, as many at a time as there are workers.

    Attributes:
        plan: gives the grid as it stands; asked again after each cell, since tuning decides what comes next.
        chosen: whether a cell is to be measured.
        stop_at: no cell is started after this moment of the monotonic clock.
    """

    out: Path
    plan: Plan
    chosen: Callable[[Cell], bool]
    workers: int
    stop_at: float
    running: dict[str, tuple[Cell, subprocess.Popen[bytes], float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    #: Seconds estimated and taken by the cells of this run.
    expected: float = 0.0
    taken: float = 0.0

    def run(self) -> None:
        """Until nothing is left, or the time is up."""
        try:
            self._start()
            while self.running:
                time.sleep(POLL_S)
                ended = [digest for digest, (_, process, _) in self.running.items() if process.poll() is not None]
                for digest in ended:
                    self._finish(digest)
                if ended:
                    self._start()
        finally:
            for _, process, _ in self.running.values():
                process.terminate()
            for _, process, _ in self.running.values():
                process.wait()

    def todo(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those to be measured and not yet kept, given up or under way."""
        skipped = self.failed.keys() | self.running.keys()
        return [c for c in cells if self.chosen(c) and c.digest not in skipped and load_result(self.out, c) is None]

    def remaining_s(self) -> float:
        """Estimated seconds until all is measured, by what the cells so far took."""
        found = self.plan(self.out)
        under_way = [cell for cell, _, _ in self.running.values()]
        seconds = sum(map(estimate, [*self.todo(found.ready), *filter(self.chosen, found.waiting), *under_way]))
        return seconds * (self.taken / self.expected if self.expected else 1.0) / self.workers

    def _start(self) -> None:
        todo = self.todo(self.plan(self.out).ready)
        while todo and len(self.running) < self.workers and time.monotonic() < self.stop_at:
            cell = todo.pop(0)
            with self._log(cell).open("wb") as log:
                process = subprocess.Popen(
                    [*COMMAND, str(self.out), json.dumps(asdict(cell))],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **ENVIRONMENT},
                    start_new_session=True,  # a Ctrl-C comes to this process, which ends the others
                )
            self.running[cell.digest] = (cell, process, time.monotonic())

    def _log(self, cell: Cell) -> Path:
        path = self.out / "logs" / f"{cell.digest}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _finish(self, digest: str) -> None:
        cell, process, began = self.running.pop(digest)
        result = load_result(self.out, cell)
        if process.returncode or result is None:
            tail = self._log(cell).read_text(errors="replace").strip().splitlines()[-1:]
            self.failed[digest] = f"{cell.name}: {tail[0] if tail else f'exit status {process.returncode}'}"
            print(f"FAILED {self.failed[digest]} ({self._log(cell)})", flush=True)
            return
        seconds = time.monotonic() - began
        self.expected, self.taken = self.expected + estimate(cell), self.taken + seconds
        left = f"{console_time(self.remaining_s())} left"
        print(f"{time.strftime('%H:%M:%S')} {cell.name}: {headline(result)} ({seconds:.0f} s, {left})", flush=True)


def headline(result: dict[str, object]) -> str:
    """The one number of a result that says most."""
    key = "accuracy" if "accuracy" in result else "loss"
    return f"{key} {result[key]:.4f}"


def console_time(seconds: float) -> str:
    """Hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min"


@contextmanager
def alone_in(out: Path) -> Iterator[IO[str]]:
    """Hold the lock of the output directory.

    Raises:
        UserError: another run holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{out}: expected no other run, found one at work", hint="wait, or name another --out"
            ) from error
        yield lock


def listed(found: Grid, out: Path, chosen: Callable[[Cell], bool]) -> list[str]:
    """One line for each cell, and the sum."""
    lines, seconds = [], {"measured": 0.0, "to do": 0.0, "waits": 0.0}
    for cells, waits in ((found.ready, False), (found.waiting, True)):
        for cell in filter(chosen, cells):
            state = "waits" if waits else "measured" if load_result(out, cell) is not None else "to do"
            seconds[state] += estimate(cell)
            lines.append(f"{state:9}{estimate(cell):6.0f} s  {cell.name}")
    hours = {state: f"{value / 3600:.1f} h" for state, value in seconds.items()}
    spent = ", ".join(f"{hours[state]} {state}" for state in hours)
    return [*lines, f"{len(lines)} cells; estimated on one core with AVX-512: {spent}; with two workers half of it"]


def main(arguments: Sequence[str] | None = None, plan: Plan = grid) -> int:
    """Command line; the exit status."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m evidence.run", description=about)
    parser.add_argument("--out", type=Path, default=OUT, help="where results are kept (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="cells whose names match, such as 'bbc/*/natural/*'"
    )
    parser.add_argument("--list", action="store_true", help="show the cells and an estimate, and measure nothing")
    parser.add_argument("--report", action="store_true", help="write the report of what is there, and measure nothing")
    parser.add_argument("--publish", type=Path, metavar="DIR", help="the same, as a page with its plots in a directory")
    parser.add_argument("--afresh", action="store_true", help=f"take over no cells that are in {PUBLISHED}")
    parser.add_argument("--hours", type=float, default=float("inf"), help="start no cell after so many hours")
    parser.add_argument(
        "--workers", type=int, default=2, help="cells at a time, of one core each (default: %(default)s)"
    )
    options = parser.parse_args(arguments)

    def chosen(cell: Cell) -> bool:
        return options.only is None or any(fnmatchcase(cell.name, f"*{pattern}*") for pattern in options.only)

    out: Path = options.out
    if not options.afresh and (taken := restore(out, PUBLISHED)):
        print(f"taken over: {taken} cells from {PUBLISHED}", flush=True)
    if options.list:
        print("\n".join(listed(plan(out), out, chosen)))
        return 0
    if options.publish:
        print(f"written: {report.publish(out, plan(out), options.publish)}")
        return 0
    if options.report:
        print(f"written: {report.write(out, plan(out))}")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped in the same way as by Ctrl-C
    stop_at = time.monotonic() + 3600 * options.hours
    with alone_in(out):
        return measure_all(Runner(out, plan, chosen, max(1, options.workers), stop_at))


def measure_all(runner: Runner) -> int:
    """Measure, write the report, say what failed; the exit status."""
    status = 0
    try:
        print(f"estimated: {console_time(runner.remaining_s())}", flush=True)
        runner.run()
    except KeyboardInterrupt:
        print("stopped; run the same command again and it goes on")
        status = console.EXIT_INTERRUPTED
    print(f"written: {report.write(runner.out, runner.plan(runner.out))}")
    for reason in runner.failed.values():
        print(f"FAILED {reason}")
    return status or (1 if runner.failed else 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except VeilsumError as failure:
        console.fail(failure)
