"""A site's records: read from CSV, JSONL, Parquet or a tree of text files into texts and label numbers.

Records never leave the site. A mistake in the data is reported with the file and the line, and never with the text of
a record. Which file, format and columns a data set has is the site's own setting; which labels exist is the plan's.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from privacy.errors import UserError, shown

Format = Literal["csv", "jsonl", "parquet", "folder"]

#: A field of a CSV file longer than this is an error of the file, such as a quote that is never closed.
MAX_FIELD_CHARS = 1 << 24
#: An unknown label is shown no longer than this: where the wrong column is named, it is a text.
MAX_SHOWN_CHARS = 40


@dataclass(frozen=True)
class Examples:
    """A data set in memory: ``labels[i]`` is the index, in the plan's list of labels, of the label of ``texts[i]``."""

    texts: tuple[str, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class _Record:
    """One record as read; ``where`` names it in errors, and its text is in no error."""

    where: str
    text: object = field(repr=False)
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

    With ``max_records_per_unit`` = k only the first k records of each unit are kept, in the order of the file: what a
    user-level guarantee is computed for must hold whatever the file has. Which records a unit keeps depends on that
    unit's records alone, so adding or removing another unit changes nothing else.

    Args:
        path: a CSV file with a header line, a JSONL file of objects, a Parquet file; or, for ``folder``, a directory
            whose subdirectories are named after the labels and hold one text per file.
        fmt: "csv", "jsonl", "parquet" or "folder".
        text_column: column or key of the text; not used for ``folder``.
        label_column: column or key of the label; not used for ``folder``.
        labels: the plan's labels, in its order.
        unit_column: column or key of whom a record belongs to; needed with ``max_records_per_unit``.
        max_records_per_unit: most records of one unit.

    Raises:
        UserError: no such file, not the format, a missing column, undecodable bytes, an empty text, a label that the
            plan does not have, a record of nobody where units count, or no record at all.
    """
    if max_records_per_unit is not None and (unit_column is None or fmt == "folder"):
        raise UserError(
            f"{path}: expected to know whose record each is, since the plan protects users; found no column for it",
            hint='name the column as unit = "..." beside the data set\'s path; a tree of text files has none',
        )
    if fmt not in get_args(Format):
        raise UserError(f"data format: expected one of {', '.join(get_args(Format))}, found {fmt!r}")
    index = {label: number for number, label in enumerate(labels)}
    columns = (text_column, label_column, *([unit_column] if unit_column and max_records_per_unit else []))
    kept: Counter[str] = Counter()
    texts: list[str] = []
    numbers: list[int] = []
    with _readable(path, fmt):
        for record in _records(path, fmt, columns):
            text, number = _text_of(record), _number_of(record, index)
            if max_records_per_unit is not None:
                unit = _unit_of(record)
                kept[unit] += 1
                if kept[unit] > max_records_per_unit:
                    continue
            texts.append(text)
            numbers.append(number)
    if not texts:
        raise UserError(f"{path}: expected at least one record, found none", hint="check path and format of the data")
    return Examples(tuple(texts), tuple(numbers))


def load_texts(path: Path, fmt: Format, text_column: str, label_column: str) -> tuple[str, ...]:
    """The texts of a data set alone, whatever their labels: what registering it looks at.

    Raises:
        UserError: as :func:`load_examples`, but for labels and units.
    """
    with _readable(path, fmt):
        return tuple(_text_of(record) for record in _records(path, fmt, (text_column, label_column)))


@contextmanager
def _readable(path: Path, fmt: Format) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: expected a readable {_kind(fmt)}, found: {error.strerror or error}",
            hint="check the path of the data set in this site's configuration",
        ) from error


def _kind(fmt: Format) -> str:
    return "directory" if fmt == "folder" else f"{fmt} file"


def _records(path: Path, fmt: Format, columns: tuple[str, ...]) -> Iterator[_Record]:
    """``columns``: of text and label, and of the unit where it is asked for."""
    if fmt == "csv":
        return _from_csv(path, columns)
    if fmt == "jsonl":
        return _from_jsonl(path, columns)
    if fmt == "parquet":
        return _from_parquet(path, columns)
    return _from_folder(path)


def _text_of(record: _Record) -> str:
    if not isinstance(record.text, str) or not record.text.strip():
        found = "an empty text" if isinstance(record.text, str) else type(record.text).__name__
        raise UserError(f"{record.where}: expected a text, found {found}", hint="correct or remove the record")
    return record.text


def _unit_of(record: _Record) -> str:
    """Whose record it is, as text; whole numbers are compared as text, as labels are."""
    is_number = isinstance(record.unit, int) and not isinstance(record.unit, bool)
    unit = str(record.unit) if is_number else record.unit
    if not isinstance(unit, str) or not unit.strip():
        found = "an empty text" if isinstance(unit, str) else type(unit).__name__
        raise UserError(f"{record.where}: expected whose record it is, found {found}", hint="correct the unit's column")
    return unit.strip()


def _number_of(record: _Record, index: dict[str, int]) -> int:
    """The label's number; whole numbers are compared as text, so that label 3 of a file is label "3" of a plan."""
    is_number = isinstance(record.label, int) and not isinstance(record.label, bool)
    label = str(record.label) if is_number else record.label
    if not isinstance(label, str) or label not in index:
        raise UserError(
            f"{record.where}: expected a label of the plan ({', '.join(index)}), found {repr(label)[:MAX_SHOWN_CHARS]}",
            hint="correct the record, or take part in a plan whose data.labels name this label",
        )
    return index[label]


def _names(columns: Iterable[str]) -> str:
    return shown(", ".join(map(repr, columns)), 400) or "(none)"


def _require_columns(path: Path, found: Sequence[str], columns: tuple[str, ...]) -> None:
    for column in columns:
        if column not in found:
            raise UserError(
                f"{path}: expected a column {column!r}, found the columns {_names(found)}",
                hint="name the columns in participant.toml: text, label, and unit where users count",
            )


def _lines(path: Path) -> Iterator[str]:
    """Lines as UTF-8, a byte-order mark skipped; bytes that are not UTF-8 are an error that names the line."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: expected UTF-8, found byte 0x{raw[error.start]:02x}",
                    hint="convert the file to UTF-8",
                ) from error


def _from_csv(path: Path, columns: tuple[str, ...]) -> Iterator[_Record]:
    csv.field_size_limit(MAX_FIELD_CHARS)
    rows = csv.reader(_lines(path), strict=True)
    try:
        header = next(rows, [])
        _require_columns(path, header, columns)
        positions = [header.index(column) for column in columns]
        for row in rows:
            if not row:  # a blank line
                continue
            where = f"{path}, line {rows.line_num}"
            if len(row) != len(header):
                raise UserError(f"{where}: expected {len(header)} columns, found {len(row)}", hint="check the quoting")
            yield _Record(where, *(row[at] for at in positions))
    except csv.Error as error:
        raise UserError(
            f"{path}, line {rows.line_num}: expected a CSV row, found: {error}", hint="check the quoting"
        ) from error


def _from_jsonl(path: Path, columns: tuple[str, ...]) -> Iterator[_Record]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            # The error's own text is left out: it may quote the record.
            raise UserError(f"{where}: expected a JSON object, found invalid JSON", hint="one per line") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}", hint="one per line")
        for column in columns:
            if column not in row:
                raise UserError(
                    f"{where}: expected a column {column!r}, found the columns {_names(row)}",
                    hint="name the columns in participant.toml: text, label, and unit where users count",
                )
        yield _Record(where, *(row[column] for column in columns))


def _from_parquet(path: Path, columns: tuple[str, ...]) -> Iterator[_Record]:
    # Imported here: it costs a tenth of a second and most sites have CSV or JSONL.
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as file:
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
            _require_columns(path, parquet.schema_arrow.names, columns)
            number = 0
            for batch in parquet.iter_batches(columns=list(columns)):
                for values in zip(*(batch.column(column).to_pylist() for column in columns), strict=True):
                    number += 1
                    yield _Record(f"{path}, row {number}", *values)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}: expected a Parquet file, found: {str(error).splitlines()[0]}", hint="check the data's format"
            ) from error


def _from_folder(path: Path) -> Iterator[_Record]:
    """Subdirectory -> label, file -> text; in sorted order, hidden files skipped, files beside them an error."""
    for directory in sorted(path.iterdir()):
        if directory.name.startswith("."):
            continue
        if not directory.is_dir():
            raise UserError(
                f"{directory}: expected only directories named after labels in {path}, found a file",
                hint="put each text into the directory of its label",
            )
        for file in sorted(directory.iterdir()):
            if not file.name.startswith("."):
                yield _Record(str(file), "".join(_lines(file)), directory.name)
