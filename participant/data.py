"""A site's records for classification: texts and label numbers, from any format of ``participant/rows.py``.

Records never leave the site. A mistake in the data is reported with the file and the line, and never with the text of
a record. Which file, format and columns a data set has is the site's own setting; which labels exist is the plan's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from participant.rows import TREE_LABEL, TREE_TEXT, Columns, read_rows, text_fault
from participant.rows import Format as Format  # the name others look for here
from privacy.errors import UserError

T = TypeVar("T")

#: An unknown label is shown no longer than this: where the wrong column is named, it is a text.
MAX_SHOWN_CHARS = 40


@dataclass(frozen=True)
class Examples:
    """A data set in memory: ``labels[i]`` is the index, in the plan's list of labels, of the label of ``texts[i]``."""

    texts: tuple[str, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.texts)

    def some(self, positions: Sequence[int]) -> Examples:
        """Those at these positions."""
        return Examples(tuple(self.texts[i] for i in positions), tuple(self.labels[i] for i in positions))


@dataclass(frozen=True)
class Record:
    """One record as read; ``where`` names it in errors, and its text is in no error."""

    where: str
    text: object = field(repr=False)
    #: Or the number, where a plan asks for one.
    label: object
    #: Whose record it is; asked for only where a plan protects users.
    unit: object = field(default=None, repr=False)


def load_examples(
    path: Path,
    fmt: Format,
    text_column: str,
    label_column: str,
    labels: Sequence[str],
    *,
    unit_column: str | None = None,
    max_records_per_unit: int | None = None,
) -> Examples:
    """Read a data set.

    Args:
        path: where the data set lies, see :func:`participant.rows.read_rows`; a tree of text files has directories
            that are named after the labels.
        fmt: its format.
        text_column: column or key of the text; not used for ``folder``.
        label_column: column or key of the label; not used for ``folder``.
        labels: the plan's labels, in its order.
        unit_column: as of :func:`read_labelled`.
        max_records_per_unit: as of :func:`read_labelled`.

    Raises:
        UserError: as ``read_labelled``, and for a label that the plan does not have.
    """
    index = {label: number for number, label in enumerate(labels)}
    texts, numbers = read_labelled(
        path,
        fmt,
        (text_column, label_column),
        lambda record: _number_of(record, index),
        unit_column=unit_column,
        max_records_per_unit=max_records_per_unit,
    )
    return Examples(texts, numbers)


def read_labelled(
    path: Path,
    fmt: Format,
    names: tuple[str, str],
    value_of: Callable[[Record], T],
    *,
    unit_column: str | None,
    max_records_per_unit: int | None,
) -> tuple[tuple[str, ...], tuple[T, ...]]:
    """The texts of a data set, and of each what ``value_of`` says of its record, or raises.

    With ``max_records_per_unit`` = k only the first k records of each unit are kept, in the order of the file: what a
    user-level guarantee is computed for must hold whatever the file has. Which records a unit keeps depends on that
    unit's records alone, so adding or removing another unit changes nothing else.

    Args:
        path: where it lies.
        fmt: its format.
        names: columns of text and label; not used for ``folder``.
        value_of: reads the label.
        unit_column: column or key of whom a record belongs to; needed with ``max_records_per_unit``.
        max_records_per_unit: most records of one unit.

    Raises:
        UserError: no such file, not the format, a missing column, undecodable bytes, an empty text, a record of
            nobody where units count, or no record at all.
    """
    if max_records_per_unit is not None and (unit_column is None or fmt == "folder"):
        raise UserError(
            f"{path}: expected to know whose record each is, since the plan protects users; found no column for it",
            hint='name the column as unit = "..." beside the data set\'s path; a tree of text files has none',
        )
    columns = (*names, *([unit_column] if unit_column and max_records_per_unit else []))
    kept: Counter[str] = Counter()
    texts: list[str] = []
    values: list[T] = []
    for record in _records(path, fmt, columns):
        text, value = _text_of(record), value_of(record)
        if max_records_per_unit is not None:
            unit = _unit_of(record)
            kept[unit] += 1
            if kept[unit] > max_records_per_unit:
                continue
        texts.append(text)
        values.append(value)
    if not texts:
        raise UserError(f"{path}: expected at least one record, found none", hint="check path and format of the data")
    return tuple(texts), tuple(values)


def _records(path: Path, fmt: Format, columns: tuple[str, ...]) -> Iterator[Record]:
    """``columns``: of text and label, and of the unit where it is asked for."""
    columns = (TREE_TEXT, TREE_LABEL) if fmt == "folder" else columns
    for row in read_rows(path, fmt, Columns(columns)):
        yield Record(row.where, *(row.values[column] for column in columns))


def _text_of(record: Record) -> str:
    if fault := text_fault(record.text):
        raise UserError(f"{record.where}: expected a text, found {fault}", hint="correct or remove the record")
    return str(record.text)


def _unit_of(record: Record) -> str:
    """Whose record it is, as text; whole numbers are compared as text, as labels are."""
    is_number = isinstance(record.unit, int) and not isinstance(record.unit, bool)
    unit = str(record.unit) if is_number else record.unit
    if not isinstance(unit, str) or not unit.strip():
        found = "an empty text" if isinstance(unit, str) else type(unit).__name__
        raise UserError(f"{record.where}: expected whose record it is, found {found}", hint="correct the unit's column")
    return unit.strip()


def _number_of(record: Record, index: dict[str, int]) -> int:
    """The label's number; whole numbers are compared as text, so that label 3 of a file is label "3" of a plan."""
    is_number = isinstance(record.label, int) and not isinstance(record.label, bool)
    label = str(record.label) if is_number else record.label
    if not isinstance(label, str) or label not in index:
        raise UserError(
            f"{record.where}: expected a label of the plan ({', '.join(index)}), found {repr(label)[:MAX_SHOWN_CHARS]}",
            hint="correct the record, or take part in a plan whose data.labels name this label",
        )
    return index[label]
