"""The losses of the trainings of this process, for the site's own page: bounded, in memory, never sent anywhere."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from privacy.job import Job

Report = Callable[[int, int, float], None]

#: Trainings that are remembered, the newest, and points of each.
MOST_CURVES, MOST_POINTS = 8, 400


@dataclass
class Curve:
    """One training: how far it is, and its loss at some of its steps."""

    plan: str
    stage: int
    began: float
    step: int = 0
    steps: int = 0
    every: int = 1
    points: list[tuple[int, float]] = field(default_factory=list)

    def add(self, step: int, steps: int, loss: float) -> None:
        """One step more; of a long training every second point is dropped, again and again, but never the last."""
        self.step, self.steps = step, steps
        if not math.isfinite(loss):  # private training tells none
            return
        if self.points and self.points[-1][0] % self.every:
            self.points.pop()
        self.points.append((step, loss))
        if len(self.points) > MOST_POINTS:
            self.every *= 2
            self.points = [point for point in self.points if point[0] % self.every == 0 or point[0] == step]


class Curves:
    """What the daemon trained since it started; written by its thread, read by that of the page."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._lock, self._curves = clock, threading.Lock(), list[Curve]()

    def watching(self, progress: Callable[[Job, int], Report]) -> Callable[[Job, int], Report]:
        """The same progress, watched."""

        def start(job: Job, stage: int) -> Report:
            tell, curve = progress(job, stage), Curve(job.plan.name, stage, self._clock())

            def report(step: int, steps: int, loss: float) -> None:
                with self._lock:
                    if curve.steps == 0:  # the first step: what an earlier run trained is not trained again
                        self._curves = [*self._curves, curve][-MOST_CURVES:]
                    curve.add(step, steps, loss)
                tell(step, steps, loss)

            return report

        return start

    def seen(self) -> list[Curve]:
        """The curves as they are now, the newest first; copies."""
        with self._lock:
            return [
                Curve(c.plan, c.stage, c.began, c.step, c.steps, c.every, list(c.points)) for c in self._curves[::-1]
            ]
