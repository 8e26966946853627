"""The coordinator's memory: SQLite for what was accepted, files for what is large.

Every accepted message is an event, stored before it is acknowledged; a round is the replay of its events. One
connection writes and checkpoints (SQLite before 3.51.3 can corrupt a WAL that two connections reset), and no upload
ever goes into the database.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privacy.errors import UserError
from privacy.files import disk_errors, make_private_directory
from privacy.vectors import round_name, upload_name

SCHEMA_VERSION = 1
SCHEMA = """
create table plans (digest blob primary key, name text unique not null, toml blob not null, state text not null,
                    reason text not null, submitted real not null);
create table ready (plan blob not null, stage integer not null, member integer not null, since real not null,
                    primary key (plan, stage, member));
create table rounds (id blob primary key, plan blob not null, stage integer not null, number integer not null,
                     header blob not null, invited text not null, opened real not null, state text not null,
                     reason text not null, culprit integer, unique (plan, stage, number));
create table events (round blob not null, seq integer not null, kind text not null, payload blob not null,
                     at real not null, primary key (round, seq));
create table receipts (round blob not null, member integer not null, root blob not null, length integer not null,
                       signature blob not null, primary key (round, member));
create table traffic (round blob not null, member integer not null, sent integer not null, received integer not null,
                      chunks integer not null, primary key (round, member));
"""


@dataclass(frozen=True)
class PlanRow:
    digest: bytes
    name: str
    toml: bytes
    state: str  # open, released, aborted, cancelled
    reason: str
    submitted: float


@dataclass(frozen=True)
class RoundRow:
    id: bytes
    plan: bytes
    stage: int
    number: int
    header: bytes
    invited: tuple[int, ...]
    opened: float
    state: str  # running, released, aborted
    reason: str
    culprit: int | None


@dataclass(frozen=True)
class Event:
    kind: str  # message, close, sum, publish, abort
    payload: bytes


class Store:
    """All reads and writes of the coordinator's state."""

    def __init__(self, database: Path, rounds: Path) -> None:
        make_private_directory(rounds)
        self._rounds = rounds
        self._lock = threading.Lock()
        with disk_errors(database):
            try:
                database.touch(mode=0o600)
                self._db = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
                self._db.execute("pragma journal_mode=wal")
                self._db.execute("pragma synchronous=full")
                self._migrate()
            except sqlite3.DatabaseError as error:
                raise UserError(f"{database}: expected the coordinator's database, found: {error}") from error

    def _migrate(self) -> None:
        version = self._db.execute("pragma user_version").fetchone()[0]
        if version == 0:
            self._db.executescript(f"begin; {SCHEMA} pragma user_version={SCHEMA_VERSION}; commit;")
        elif version != SCHEMA_VERSION:
            raise UserError(
                f"expected a database of version {SCHEMA_VERSION}, found {version}",
                hint="run the version of veilsum that wrote it",
            )

    def close(self) -> None:
        self._db.close()

    def _write(self, statement: str, *values: object) -> None:
        with self._lock:
            try:
                self._db.execute(statement, values)
            except sqlite3.OperationalError as error:
                raise UserError(f"state.db: expected to write, found: {error}", hint="is the disk full?") from error

    def _read(self, statement: str, *values: object) -> list[Any]:
        with self._lock:
            return self._db.execute(statement, values).fetchall()

    # --- plans ---------------------------------------------------------------------------------------------------

    def add_plan(self, digest: bytes, name: str, toml: bytes, at: float) -> None:
        try:
            self._write("insert into plans values (?, ?, ?, 'open', '', ?)", digest, name, toml, at)
        except sqlite3.IntegrityError as error:
            raise UserError(
                f"expected a new plan name, found '{name}' again", hint="a changed plan needs a name of its own"
            ) from error

    def plans(self) -> list[PlanRow]:
        return [PlanRow(*row) for row in self._read("select * from plans order by submitted")]

    def set_plan_state(self, digest: bytes, state: str, reason: str = "") -> None:
        self._write("update plans set state = ?, reason = ? where digest = ?", state, reason, digest)

    # --- who is ready ----------------------------------------------------------------------------------------------

    def set_ready(self, plan: bytes, stage: int, member: int, since: float) -> None:
        self._write("insert or ignore into ready values (?, ?, ?, ?)", plan, stage, member, since)

    def drop_ready(self, plan: bytes, stage: int, members: tuple[int, ...]) -> None:
        for member in members:
            self._write("delete from ready where plan = ? and stage = ? and member = ?", plan, stage, member)

    def ready(self, plan: bytes, stage: int) -> dict[int, float]:
        rows = self._read("select member, since from ready where plan = ? and stage = ?", plan, stage)
        return {int(member): float(since) for member, since in rows}

    # --- rounds and their events -------------------------------------------------------------------------------------

    def add_round(self, row: RoundRow) -> None:
        self._write(
            "insert into rounds values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(row.id, row.plan, row.stage, row.number, row.header, json.dumps(row.invited)),
            *(row.opened, row.state, row.reason, row.culprit),
        )

    def rounds(self, plan: bytes | None = None) -> list[RoundRow]:
        where = "" if plan is None else "where plan = ?"
        values = () if plan is None else (plan,)
        rows = self._read(f"select * from rounds {where} order by plan, stage, number", *values)
        return [RoundRow(r[0], r[1], r[2], r[3], r[4], tuple(json.loads(r[5])), r[6], r[7], r[8], r[9]) for r in rows]

    def set_round_state(self, round_id: bytes, state: str, reason: str = "", culprit: int | None = None) -> None:
        self._write(
            "update rounds set state = ?, reason = ?, culprit = ? where id = ?", state, reason, culprit, round_id
        )

    def add_event(self, round_id: bytes, event: Event, at: float) -> None:
        self._write(
            "insert into events select ?, coalesce(max(seq) + 1, 0), ?, ?, ? from events where round = ?",
            *(round_id, event.kind, event.payload, at, round_id),
        )

    def events(self, round_id: bytes) -> Iterator[Event]:
        rows = self._read("select kind, payload from events where round = ? order by seq", round_id)
        return (Event(str(kind), bytes(payload)) for kind, payload in rows)

    # --- receipts and traffic ----------------------------------------------------------------------------------------

    def add_receipt(self, round_id: bytes, member: int, root: bytes, length: int, signature: bytes) -> None:
        self._write("insert or ignore into receipts values (?, ?, ?, ?, ?)", round_id, member, root, length, signature)

    def receipts(self, round_id: bytes) -> dict[int, tuple[bytes, int, bytes]]:
        """member -> (root, length, signature) of its one upload."""
        rows = self._read("select member, root, length, signature from receipts where round = ?", round_id)
        return {r[0]: (r[1], r[2], r[3]) for r in rows}

    def count_traffic(self, round_id: bytes, member: int, *, sent: int = 0, received: int = 0, chunks: int = 0) -> None:
        """Add to what a member sent and received in a round: bytes of messages and chunks, and upload chunk bytes."""
        self._write(
            "insert into traffic values (?, ?, ?, ?, ?) on conflict (round, member) do update set "
            "sent = sent + excluded.sent, received = received + excluded.received, chunks = chunks + excluded.chunks",
            *(round_id, member, sent, received, chunks),
        )

    def traffic(self, round_id: bytes) -> dict[int, tuple[int, int, int]]:
        """member -> (bytes sent, bytes received, bytes of upload chunks with their headers)."""
        rows = self._read("select member, sent, received, chunks from traffic where round = ?", round_id)
        return {r[0]: (r[1], r[2], r[3]) for r in rows}

    # --- files -------------------------------------------------------------------------------------------------------

    def round_directory(self, round_id: bytes) -> Path:
        """Where uploads, running sum and total of a round lie."""
        return make_private_directory(self._rounds / round_name(round_id))

    def upload(self, round_id: bytes, member: int) -> Path:
        return self.round_directory(round_id) / upload_name(member)

    def running_sum(self, round_id: bytes) -> Path:
        return self.round_directory(round_id) / "sum.u32"

    def total(self, round_id: bytes) -> Path:
        return self.round_directory(round_id) / "total.bin"
