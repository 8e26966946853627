"""A site's records for regression: texts with a number each, within the range that the plan names.

A number beyond the range is refused, not cut off at it: it is mostly a wrong unit or a mark for "unknown", and cut off
it would be an answer that no record has. As with labels, no error shows what a record says, only its number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from participant.data import Format, Record, read_labelled
from privacy.errors import UserError
from privacy.target import Target

#: Formats that have nothing but texts; in the others a number is a number.
TEXTUAL = ("csv", "folder")


@dataclass(frozen=True)
class Measured:
    """A data set in memory: ``targets[i]`` is the number of ``texts[i]``, in its own unit."""

    texts: tuple[str, ...] = field(repr=False)
    targets: tuple[float, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.texts)

    def some(self, positions: Sequence[int]) -> Measured:
        """Those at these positions."""
        return Measured(tuple(self.texts[i] for i in positions), tuple(self.targets[i] for i in positions))


def load_measured(
    path: Path,
    fmt: Format,
    text_column: str,
    target_column: str,
    target: Target,
    *,
    unit_column: str | None = None,
    max_records_per_unit: int | None = None,
) -> Measured:
    """Read a data set; arguments as of :func:`participant.data.load_examples`, but for ``target``, the plan's range.

    Raises:
        UserError: as ``load_examples``, and for a record without a number of the range.
    """
    texts, numbers = read_labelled(
        path,
        fmt,
        (text_column, target_column),
        lambda record: _number_of(record, target, fmt in TEXTUAL),
        unit_column=unit_column,
        max_records_per_unit=max_records_per_unit,
    )
    return Measured(texts, numbers)


def _number_of(record: Record, target: Target, may_be_text: bool) -> float:
    low, high = target
    number, found = _read(record.label, may_be_text)
    if number is not None and low <= number <= high:
        return number
    raise UserError(
        f"{record.where}: expected a number from {low!r} to {high!r} (data.target of the plan), found {found}",
        hint="correct or remove the record, or take part in a plan with another range",
    )


def _read(value: object, may_be_text: bool) -> tuple[float | None, str]:
    """The number that a value is, None if it is none or not finite, and how to name it in an error."""
    if value is None:
        return None, "none"
    if isinstance(value, str) and not value.strip():
        return None, "none"
    if isinstance(value, str) and may_be_text and "_" not in value:  # which Python reads past, and nobody else does
        try:
            value = float(value)
        except ValueError:
            return None, "a text"
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None, "a text" if isinstance(value, str) else type(value).__name__
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond all floats
        return None, "a number out of range"
    return (number if math.isfinite(number) else None), repr(number)
