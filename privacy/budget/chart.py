"""Epsilon over the jobs of a ledger as one inline SVG: the enforced staircase, PLD, the budget, open reservations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from privacy.budget.audit import LedgerReport

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 34, 40


@dataclass(frozen=True)
class Bar:
    """The share of one open reservation."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Coordinates for the template, in SVG units; text is escaped there."""

    width: int
    height: int
    left: int
    right: int
    bottom: int
    enforced: str
    pld: str
    budget: float | None  # y
    open_bars: tuple[Bar, ...]
    xs: tuple[Tick, ...]
    ys: tuple[Tick, ...]
    beyond: bool  # an infinite epsilon is drawn at the upper edge


def chart(report: LedgerReport) -> Chart | None:
    """The chart of a ledger; ``None`` where no job is charged."""
    jobs = report.charged
    if not jobs or report.policy is None:
        return None
    budget = float(report.policy.epsilon) if report.policy.epsilon else None
    enforced = [job.enforced_after for job in jobs]
    pld = [job.pld_after for job in jobs]
    finite = [value for value in (*enforced, *pld, budget or 0.0) if math.isfinite(value)]
    step = _nice(max(finite, default=1.0) or 1.0)
    top = step * (math.floor(max(finite, default=1.0) / step) + 1)

    def x(position: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * position / len(jobs), 2)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * min(value, top) / top, 2)

    bars = []
    for i, job in enumerate(jobs):
        if job.is_open:
            below = enforced[i - 1] if i else 0.0
            bars.append(Bar(x(i), y(enforced[i]), round(x(i + 1) - x(i), 2), round(y(below) - y(enforced[i]), 2)))
    every = max(1, math.ceil(len(jobs) / 12))
    return Chart(
        WIDTH,
        HEIGHT,
        LEFT,
        WIDTH - RIGHT,
        HEIGHT - BOTTOM,
        _stairs([x(i) for i in range(len(jobs) + 1)], [y(v) for v in enforced], y(0)),
        _stairs([x(i) for i in range(len(jobs) + 1)], [y(v) for v in pld], y(0)),
        y(budget) if budget is not None else None,
        tuple(bars),
        tuple(Tick(x(i + 0.5), str(i + 1)) for i in range(0, len(jobs), every)),
        tuple(Tick(y(step * i), f"{step * i:g}") for i in range(round(top / step) + 1)),
        any(math.isinf(value) for value in (*enforced, *pld)),
    )


def _stairs(xs: Sequence[float], ys: Sequence[float], zero: float) -> str:
    """The path of a staircase that begins at zero and rises at the left edge of each job."""
    points = [f"M{xs[0]} {zero}"]
    for i, value in enumerate(ys):
        points.append(f"V{value}H{xs[i + 1]}")
    return "".join(points)


def _nice(largest: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that gives about five ticks."""
    rough = largest / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next((m * power for m in (1, 2, 5) if m * power >= rough), 10 * power)
