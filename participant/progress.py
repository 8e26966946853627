"""Training progress: a bar with loss and time left on a terminal, a log line every ten seconds elsewhere.

A loss that is not a number is not shown: private training tells none.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from privacy.job import Job

log = structlog.get_logger()

EVERY_S = 10.0
Report = Callable[[int, int, float], None]


@contextmanager
def training_progress(*, show: bool) -> Iterator[Callable[[Job, int], Report]]:
    """Yields a function that makes the progress callback (step, steps, loss) of one job and stage."""
    if not (show and sys.stderr.isatty()):
        yield _log_lines
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:

        def start(job: Job, stage: int) -> Report:
            of = f", stage {stage} of {job.plan.stages}" if job.plan.stages > 1 else ""
            task = bar.add_task(f"training {job.plan.name}{of}", total=None, loss="")
            return lambda step, steps, loss: bar.update(
                task, completed=step, total=steps, loss="" if math.isnan(loss) else f"loss {loss:.4f}"
            )

        yield start


def _log_lines(job: Job, stage: int) -> Report:
    last = time.monotonic()

    def report(step: int, steps: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY_S:
            last = time.monotonic()
            told = {} if math.isnan(loss) else {"loss": round(loss, 4)}
            log.info("training", plan=job.plan.name, stage=stage, step=step, steps=steps, **told)

    return report
