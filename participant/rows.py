"""Rows of a site's data: CSV, JSONL, Parquet, a data set that ``datasets`` saved, or a tree of text files.

A row is a place, for errors, and the columns that were asked for. What a column means is not known here: see
``participant/data.py`` and ``participant/text_data.py``. No error shows what a record says.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from privacy.errors import UserError, shown

Format = Literal["csv", "jsonl", "parquet", "arrow", "folder"]

#: A field of a CSV file longer than this is an error of the file, such as a quote that is never closed.
MAX_FIELD_CHARS = 1 << 24
#: Columns of a row out of a tree of text files: its directory is the label.
TREE_TEXT, TREE_LABEL = "text", "label"
#: What ``Dataset.save_to_disk`` and ``DatasetDict.save_to_disk`` leave beside the data.
STATE_FILE, DICT_FILE = "state.json", "dataset_dict.json"

HINT = "name the columns in participant.toml: text, label or target, and unit where users count"


@dataclass(frozen=True)
class Row:
    """One record as read; ``where`` names it in errors, and its values are in none."""

    where: str
    #: Column -> value, of those that were asked for and are there.
    values: Mapping[str, object] = field(repr=False)


@dataclass(frozen=True)
class Columns:
    """Columns to read: those that must be there, and those that are read where they are."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def found_in(self, names: Sequence[str], where: str) -> tuple[str, ...]:
        """Those of the columns that are among ``names``; a UserError where a required one is not."""
        for column in self.required:
            if column not in names:
                raise UserError(f"{where}: expected a column {column!r}, found the columns {listed(names)}", hint=HINT)
        return tuple(column for column in dict.fromkeys(self.required + self.optional) if column in names)


def read_rows(path: Path, fmt: Format, columns: Columns) -> Iterator[Row]:
    """The rows of a data set, one after another, in the order of its files.

    Args:
        path: a CSV file with a header line, a JSONL file of objects, a Parquet file; for ``arrow`` a directory that
            ``datasets.Dataset.save_to_disk`` wrote; for ``folder`` a directory of directories with one text per file,
            whose rows have the columns :data:`TREE_TEXT` and :data:`TREE_LABEL`, whatever was asked for.
        fmt: which of these.
        columns: the columns to read.

    Raises:
        UserError: no such file, not the format, a missing column, or undecodable bytes; names file and line.
    """
    if fmt not in get_args(Format):
        raise UserError(f"data format: expected one of {', '.join(get_args(Format))}, found {fmt!r}")
    try:
        yield from _READERS[fmt](path, columns)
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: expected a readable {_kind(fmt)}, found: {error.strerror or error}",
            hint="check the path of the data set in this site's configuration",
        ) from error


def _kind(fmt: Format) -> str:
    return "directory" if fmt in ("folder", "arrow") else f"{fmt} file"


def text_fault(value: object) -> str:
    """What a value is instead of a text that says something; empty if it is one."""
    if not isinstance(value, str):
        return type(value).__name__
    if not value.strip():
        return "an empty text"
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write one half of a surrogate pair, which is no character
        return "half a character"
    return ""


def listed(columns: Iterable[str]) -> str:
    """Names of columns, which somebody else wrote, for an error."""
    return shown(", ".join(map(repr, columns)), 400) or "(none)"


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


def _from_csv(path: Path, columns: Columns) -> Iterator[Row]:
    csv.field_size_limit(MAX_FIELD_CHARS)
    rows = csv.reader(_lines(path), strict=True)
    try:
        header = next(rows, [])
        positions = {column: header.index(column) for column in columns.found_in(header, str(path))}
        for row in rows:
            if not row:  # a blank line
                continue
            where = f"{path}, line {rows.line_num}"
            if len(row) != len(header):
                raise UserError(f"{where}: expected {len(header)} columns, found {len(row)}", hint="check the quoting")
            yield Row(where, {column: row[at] for column, at in positions.items()})
    except csv.Error as error:
        raise UserError(
            f"{path}, line {rows.line_num}: expected a CSV row, found: {error}", hint="check the quoting"
        ) from error


def _from_jsonl(path: Path, columns: Columns) -> Iterator[Row]:
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
        yield Row(where, {column: row[column] for column in columns.found_in(tuple(row), where)})


def _from_parquet(path: Path, columns: Columns) -> Iterator[Row]:
    # Imported here: it costs a tenth of a second and most sites have CSV or JSONL.
    import pyarrow.parquet

    with path.open("rb") as file, _arrow_errors(path, "a Parquet file"):
        parquet = pyarrow.parquet.ParquetFile(file)
        found = columns.found_in(parquet.schema_arrow.names, str(path))
        yield from _numbered(path, parquet.iter_batches(columns=list(found)), found)


def _from_arrow(path: Path, columns: Columns) -> Iterator[Row]:
    """The layout of ``datasets.Dataset.save_to_disk``: Arrow streams, in the order that ``state.json`` gives."""
    import pyarrow.ipc

    for file in _arrow_files(path):
        with file.open("rb") as source, _arrow_errors(file, "an Arrow stream"):
            stream = pyarrow.ipc.open_stream(source)
            found = columns.found_in(stream.schema.names, str(file))
            yield from _numbered(file, stream, found)


def _arrow_files(path: Path) -> list[Path]:
    hint = "name the directory that Dataset.save_to_disk wrote"
    if (path / DICT_FILE).exists():
        splits = sorted(child.name for child in path.iterdir() if (child / STATE_FILE).exists())
        raise UserError(
            f"{path}: expected one split of a data set, found several: {listed(splits)}",
            hint="add the name of the split to the path",
        )
    try:
        state: Any = json.loads((path / STATE_FILE).read_bytes())
        names = [str(file["filename"]) for file in state["_data_files"]]
        indices = state.get("_indices_data_files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / STATE_FILE}: expected the names of the data files", hint=hint) from error
    if indices:  # old versions write which rows count, and in which order
        raise UserError(f"{path}: expected a data set without an index", hint="flatten_indices(), then save it again")
    if any(Path(name).name != name for name in names):
        raise UserError(f"{path / STATE_FILE}: expected files of this directory, found others", hint=hint)
    return [path / name for name in names]


@contextmanager
def _arrow_errors(path: Path, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: expected {kind}, found: {str(error).splitlines()[0]}", hint="check the data's format"
        ) from error


def _numbered(path: Path, batches: Iterable[Any], columns: Sequence[str]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for values in zip(*(batch.column(column).to_pylist() for column in columns), strict=True):
            number += 1
            yield Row(f"{path}, row {number}", dict(zip(columns, values, strict=True)))


def _from_folder(path: Path, _columns: Columns) -> Iterator[Row]:
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
                yield Row(str(file), {TREE_TEXT: "".join(_lines(file)), TREE_LABEL: directory.name})


_READERS: dict[Format, Callable[[Path, Columns], Iterator[Row]]] = {
    "csv": _from_csv,
    "jsonl": _from_jsonl,
    "parquet": _from_parquet,
    "arrow": _from_arrow,
    "folder": _from_folder,
}
