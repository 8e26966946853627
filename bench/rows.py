"""Rows of the benchmark table: a value, what it is compared with, and the bar it has to reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Bar:
    """Bounds of a row's ratio or of its value, both inclusive."""

    of: Literal["ratio", "value"]
    least: float = -math.inf
    most: float = math.inf

    def __str__(self) -> str:
        bounds = [f">= {self.least:.4g}"] if self.least > -math.inf else []
        bounds += [f"<= {self.most:.4g}"] if self.most < math.inf else []
        return f"{self.of} {' and '.join(bounds)}"


@dataclass(frozen=True)
class Row:
    """One line of ``build/bench.json``.

    Attributes:
        reference: what ``value`` is compared with, in the same unit, measured in the same run.
        ratio: value / reference, always this way round.
        bar: empty where nothing is demanded.
        holds: whether the bar is reached; ``None`` without a bar.
        note: what was compared, for people.
    """

    name: str
    value: float
    unit: str
    reference: float | None
    ratio: float | None
    n: int
    d: int
    bar: str
    holds: bool | None
    note: str


def row(
    name: str,
    value: float,
    unit: str,
    *,
    n: int,
    d: int,
    reference: float | None = None,
    bar: Bar | None = None,
    note: str = "",
) -> Row:
    """A row with its ratio and its judgement."""
    ratio = value / reference if reference else None
    judged = ratio if bar is not None and bar.of == "ratio" else value
    holds = None if bar is None else judged is not None and bar.least <= judged <= bar.most
    return Row(name, value, unit, reference, ratio, n, d, str(bar) if bar else "", holds, note)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def describe(r: Row) -> str:
    """A row in one line for the terminal."""
    parts = [f"{r.name}: {_number(r.value)} {r.unit}, n = {r.n}, d = {r.d:,}"]
    if r.reference is not None:
        parts.append(f"reference {_number(r.reference)}, ratio {_number(r.ratio)}")
    if r.bar:
        parts.append(f"bar {r.bar}: {'holds' if r.holds else 'DOES NOT HOLD'}")
    return "; ".join(parts)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, those with a bar first."""
    lines = [
        "| name | n | d | value | reference | ratio | bar | holds | what |",
        "|---|---:|---:|---:|---:|---:|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: not r.bar):
        holds = {True: "yes", False: "**no**", None: ""}[r.holds]
        reference = f"{_number(r.reference)} {r.unit}" if r.reference is not None else ""
        cells = [f"`{r.name}`", str(r.n), f"{r.d:,}", f"{_number(r.value)} {r.unit}", reference, _number(r.ratio)]
        lines.append(_line([*cells, r.bar.replace("<=", "≤").replace(">=", "≥"), holds, r.note]))
    return "\n".join(lines)
