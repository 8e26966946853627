"""A site's records for text generation: conversations, prompts with a response, and plain texts.

What a record is, its own columns say, one by one, so that a file may have all three. No error shows what a record says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from participant.config import DataSet
from participant.rows import TREE_TEXT, Columns, Row, read_rows, text_fault
from privacy.errors import UserError, shown

Kind = Literal["conversation", "pair", "text"]

ROLES = ("system", "user", "assistant")
CORRECT = "correct or remove the record"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str = field(repr=False)


@dataclass(frozen=True)
class Record:
    """One record. A pair is a turn of the user and one of the assistant; a text is a turn of nobody."""

    where: str
    kind: Kind
    messages: tuple[Message, ...] = field(repr=False)

    @property
    def text(self) -> str:
        """All that was said, by which the record is recognised under another name of its data set."""
        return "\n".join(message.content for message in self.messages)


@dataclass(frozen=True)
class Records:
    """A data set in memory."""

    records: tuple[Record, ...]

    def __len__(self) -> int:
        return len(self.records)

    def some(self, positions: Sequence[int]) -> Records:
        """Those at these positions."""
        return Records(tuple(self.records[i] for i in positions))

    @property
    def texts(self) -> tuple[str, ...]:
        """What the site's registry knows of each record."""
        return tuple(record.text for record in self.records)

    def kinds(self) -> dict[str, int]:
        """How many records of each kind there are."""
        return dict(Counter(record.kind for record in self.records))


def load_records(path: Path, data: DataSet) -> Records:
    """Read a data set; its format and the names of its columns are the site's setting.

    A record with a conversation is one, whatever else it has; one with prompt and response is a pair; else its text
    is taken. A column whose value is null is not there.

    Args:
        path: where it lies, see :func:`participant.rows.read_rows`; in a tree of text files each file is a text.
        data: the site's entry of the data set.

    Raises:
        UserError: as ``read_rows``; a record with none of these columns, an unknown role, a conversation in which the
            assistant says nothing, an empty text, or no record at all.
    """
    text = TREE_TEXT if data.format == "folder" else data.text
    columns = Columns((), (data.messages, data.prompt, data.response, text))
    found = tuple(_record(row, data, text) for row in read_rows(path, data.format, columns))
    if not found:
        raise UserError(f"{path}: expected at least one record, found none", hint="check path and format of the data")
    return Records(found)


def _record(row: Row, data: DataSet, text: str) -> Record:
    there = {column: value for column, value in row.values.items() if value is not None}
    if data.messages in there:
        return Record(row.where, "conversation", _conversation(row.where, there[data.messages]))
    if data.prompt in there and data.response in there:
        prompt, response = (_said(row.where, column, there[column]) for column in (data.prompt, data.response))
        return Record(row.where, "pair", (Message("user", prompt), Message("assistant", response)))
    if text in there:
        return Record(row.where, "text", (Message("", _said(row.where, text, there[text])),))
    raise UserError(
        f"{row.where}: expected a column {data.messages!r}, or {data.prompt!r} and {data.response!r}, or {text!r}, "
        f"found {' and '.join(map(repr, there)) or 'none of them'}",
        hint="name the columns in participant.toml: messages, or prompt and response, or text",
    )


def _said(where: str, what: str, value: object) -> str:
    if fault := text_fault(value):
        raise UserError(f"{where}: expected a text as {what!r}, found {fault}", hint=CORRECT)
    return str(value)


def _conversation(where: str, value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if isinstance(value, list) else type(value).__name__
        raise UserError(
            f"{where}: expected a list of messages, found {found}", hint='such as [{"role": "user", "content": "..."}]'
        )
    messages = tuple(_message(f"{where}, message {number}", turn) for number, turn in enumerate(value, start=1))
    if not any(message.role == "assistant" for message in messages):
        raise UserError(f"{where}: expected a message of the assistant to learn from, found none", hint=CORRECT)
    return messages


def _message(where: str, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: expected an object with role and content, found {type(turn).__name__}", hint=CORRECT)
    role = turn.get("role")
    if role not in ROLES:
        found = shown(repr(role), 40) if isinstance(role, str) else type(role).__name__
        raise UserError(f"{where}: expected a role of {', '.join(ROLES)}, found {found}", hint=CORRECT)
    return Message(role, _said(where, "content", turn.get("content")))
