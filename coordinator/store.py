"""The coordinator's memory: SQLite for what was accepted, files for what is large.

Every accepted message is an event, stored before it is acknowledged; a round is the replay of its events. One
connection writes and checkpoints (SQLite before 3.51.3 can corrupt a WAL that two connections reset), and no upload
ever goes into the database. The running sum of a round is a file that is never changed: folding writes the next
generation beside it, and one transaction names the new file and the members it contains.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coordinator.schema import SCHEMA
from privacy import endings, faults
from privacy.endings import Reason
from privacy.errors import UserError
from privacy.files import DiskError, disk_errors, make_private_directory
from privacy.vectors import round_name, upload_name

#: As :class:`PlanRow` has it.
PLANS = "select digest, name, toml, state, reason, submitted from plans"


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
class StageRow:
    """A stage after the first: with this row the stage before is closed, and what is in its release is fixed."""

    stage: int
    opened: float
    #: (round id, H(total)) of the rounds of the stage before that this one starts from.
    cohorts: tuple[tuple[bytes, bytes], ...]
    #: Digest of the adapter that it starts from; ``None`` until that is computed, and nobody hears of the stage.
    start: bytes | None = None


@dataclass(frozen=True)
class Event:
    kind: str  # message, close, sum, publish, abort
    payload: bytes


@dataclass(frozen=True)
class SumRow:
    """The generation of a round's running sum that counts, and the members whose uploads are in it."""

    generation: int
    members: frozenset[int]


def _pairs(text: str) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((bytes.fromhex(round_id), bytes.fromhex(total)) for round_id, total in json.loads(text))


class Store:
    """All reads and writes of the coordinator's state."""

    def __init__(self, database: Path, rounds: Path) -> None:
        make_private_directory(rounds)
        self.directory = rounds
        self._lock = threading.Lock()
        self._roster = b""  # hash of the one in force
        self._traffic: dict[tuple[bytes, int], list[int]] = defaultdict(lambda: [0, 0, 0])
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
        if not 0 <= version <= len(SCHEMA):
            raise UserError(
                f"expected a database of version {len(SCHEMA)} or older, found {version}",
                hint="run the version of veilsum that wrote it",
            )
        for number, statements in enumerate(SCHEMA[version:], version + 1):
            self._db.executescript(f"begin; {statements} pragma user_version={number}; commit;")

    def close(self) -> None:
        self.flush_traffic()
        self._db.close()

    @contextmanager
    def _transaction(self, what: str) -> Iterator[sqlite3.Connection]:
        """All statements inside, or none of them; durable when it ends.

        Raises:
            DiskError: the disk is full or not writable.
        """
        with self._lock:
            try:
                self._db.execute("begin immediate")
                yield self._db
                faults.point("before-commit", what)
                self._db.execute("commit")
                faults.point("after-commit", what)
            except sqlite3.IntegrityError:
                raise  # a second plan of one name, a second round of one number: not the disk
            except (sqlite3.DatabaseError, OSError) as error:
                raise DiskError(
                    f"state.db: expected to write, found: {error}",
                    hint="free space on this file system; nothing that was confirmed is lost",
                ) from error
            finally:
                if self._db.in_transaction:
                    with suppress(sqlite3.DatabaseError):  # SQLite may have rolled back by itself
                        self._db.execute("rollback")

    def _write(self, what: str, statement: str, *values: object) -> None:
        with self._transaction(what) as db:
            db.execute(statement, values)

    def _read(self, statement: str, *values: object) -> list[Any]:
        with self._lock:
            return self._db.execute(statement, values).fetchall()

    # --- plans ---------------------------------------------------------------------------------------------------

    def add_plan(self, digest: bytes, name: str, toml: bytes, at: float) -> None:
        try:
            statement = "insert into plans values (?, ?, ?, 'open', '', ?, ?)"
            self._write("plans", statement, digest, name, toml, at, self._roster)
        except sqlite3.IntegrityError as error:
            raise UserError(
                f"expected a new plan name, found '{name}' again", hint="a changed plan needs a name of its own"
            ) from error

    def plans(self) -> list[PlanRow]:
        """The plans that were submitted under the roster in force."""
        return [PlanRow(*r) for r in self._read(f"{PLANS} where roster = ? order by submitted", self._roster)]

    def ended_plans(self) -> list[PlanRow]:
        """Plans of earlier rosters that were open when theirs was replaced."""
        where = "where roster != ? and state = 'cancelled' order by submitted"
        return [PlanRow(*r) for r in self._read(f"{PLANS} {where}", self._roster)]

    def use_roster(self, roster: bytes) -> None:
        """From now on this roster is in force: members are numbered by it, and no plan of another goes on."""
        self._roster = roster
        with self._transaction("plans") as db:
            db.execute("update plans set roster = ? where roster = x''", (roster,))  # of an older version
            db.execute(
                "update plans set state = 'cancelled', reason = ? where roster != ? and state = 'open'",
                (endings.roster_changed(), roster),
            )

    def set_plan_state(self, digest: bytes, state: str, reason: Reason) -> None:
        self._write("plans", "update plans set state = ?, reason = ? where digest = ?", state, reason, digest)

    # --- stages ------------------------------------------------------------------------------------------------------

    def open_stage(self, plan: bytes, row: StageRow) -> None:
        """Close the stage before for good; what the new one starts from is fixed by this one row."""
        cohorts = json.dumps([[found.hex() for found in pair] for pair in row.cohorts])
        statement = "insert into stages values (?, ?, ?, ?, ?)"
        self._write("stages", statement, plan, row.stage, row.opened, cohorts, row.start)

    def set_start(self, plan: bytes, stage: int, digest: bytes) -> None:
        """The start of a stage is computed: members may hear of it."""
        self._write("stages", "update stages set start = ? where plan = ? and stage = ?", digest, plan, stage)

    def stages(self, plan: bytes) -> dict[int, StageRow]:
        """The stages of a plan after the first, by number."""
        rows = self._read("select stage, opened, cohorts, start from stages where plan = ? order by stage", plan)
        return {r[0]: StageRow(r[0], r[1], _pairs(r[2]), r[3]) for r in rows}

    def first_release(self, plan: bytes, stage: int) -> float | None:
        """When the first total of a stage was published."""
        rows = self._read(
            "select min(events.at) from events join rounds on rounds.id = events.round "
            "where events.kind = 'publish' and rounds.plan = ? and rounds.stage = ?",
            *(plan, stage),
        )
        return None if rows[0][0] is None else float(rows[0][0])

    # --- who is ready ----------------------------------------------------------------------------------------------

    def set_ready(self, plan: bytes, stage: int, member: int, since: float) -> None:
        self._write("ready", "insert or ignore into ready values (?, ?, ?, ?)", plan, stage, member, since)

    def set_unready(self, plan: bytes, member: int) -> None:
        self._write("ready", "delete from ready where plan = ? and member = ?", plan, member)

    def ready(self, plan: bytes, stage: int) -> dict[int, float]:
        rows = self._read("select member, since from ready where plan = ? and stage = ?", plan, stage)
        return {int(member): float(since) for member, since in rows}

    # --- rounds and their events -------------------------------------------------------------------------------------

    def add_round(self, row: RoundRow, first: Event) -> None:
        """A round and its first event, both or neither."""
        with self._transaction("rounds") as db:
            values = (row.id, row.plan, row.stage, row.number, row.header, json.dumps(row.invited))
            db.execute(
                "insert into rounds values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*values, row.opened, row.state, row.reason, row.culprit),
            )
            db.execute("insert into events values (?, 0, ?, ?, ?)", (row.id, first.kind, first.payload, row.opened))

    def rounds(self, plan: bytes | None = None) -> list[RoundRow]:
        where = "" if plan is None else "where plan = ?"
        values = () if plan is None else (plan,)
        rows = self._read(f"select * from rounds {where} order by plan, stage, number", *values)
        return [RoundRow(r[0], r[1], r[2], r[3], r[4], tuple(json.loads(r[5])), r[6], r[7], r[8], r[9]) for r in rows]

    def end_round(
        self, row: RoundRow, state: str, reason: str, culprit: int | None, unready: tuple[int, ...]
    ) -> RoundRow:
        """A round is over: its state, who must say again that it is ready, and the plan's release, in one transaction.

        Returns:
            The row as it is now.
        """
        with self._transaction("rounds") as db:
            statement = "update rounds set state = ?, reason = ?, culprit = ? where id = ?"
            db.execute(statement, (state, reason, culprit, row.id))
            for member in unready:
                gone = (row.plan, row.stage, member)
                db.execute("delete from ready where plan = ? and stage = ? and member = ?", gone)
            if state == "released":
                db.execute("update plans set state = 'released' where digest = ? and state = 'open'", (row.plan,))
        return replace(row, state=state, reason=reason, culprit=culprit)

    def add_event(self, round_id: bytes, event: Event, at: float) -> None:
        self._write(
            "events",
            "insert into events select ?, coalesce(max(seq) + 1, 0), ?, ?, ? from events where round = ?",
            *(round_id, event.kind, event.payload, at, round_id),
        )

    def events(self, round_id: bytes) -> Iterator[Event]:
        rows = self._read("select kind, payload from events where round = ? order by seq", round_id)
        return (Event(str(kind), bytes(payload)) for kind, payload in rows)

    # --- uploads -----------------------------------------------------------------------------------------------------

    def set_upload(self, round_id: bytes, member: int, encoded: bytes, durable: int) -> None:
        """An upload is on its way: its signed M5, and how many bytes of it are on disk without a gap."""
        statement = (
            "insert into uploads values (?, ?, ?, ?) on conflict (round, member) do update set "
            "input = excluded.input, durable = excluded.durable"
        )
        self._write("uploads", statement, round_id, member, encoded, durable)

    def uploads(self, round_id: bytes) -> dict[int, tuple[bytes, int]]:
        """member -> (signed M5, durable bytes) of the uploads on their way."""
        rows = self._read("select member, input, durable from uploads where round = ?", round_id)
        return {r[0]: (r[1], r[2]) for r in rows}

    def drop_upload(self, round_id: bytes, member: int) -> None:
        self._write("uploads", "delete from uploads where round = ? and member = ?", round_id, member)

    def add_receipt(self, round_id: bytes, member: int, root: bytes, length: int, signature: bytes) -> None:
        with self._transaction("receipts") as db:
            values = (round_id, member, root, length, signature)
            db.execute("insert or ignore into receipts values (?, ?, ?, ?, ?)", values)
            db.execute("delete from uploads where round = ? and member = ?", (round_id, member))

    def receipts(self, round_id: bytes) -> dict[int, tuple[bytes, int, bytes]]:
        """member -> (root, length, signature) of its one upload."""
        rows = self._read("select member, root, length, signature from receipts where round = ?", round_id)
        return {r[0]: (r[1], r[2], r[3]) for r in rows}

    # --- the running sum, and its way to the total --------------------------------------------------------------------

    def sum_row(self, round_id: bytes) -> SumRow:
        """Which generation counts; generation 0 is the empty sum and has no file."""
        rows = self._read("select generation, members from sums where round = ?", round_id)
        return SumRow(rows[0][0], frozenset(json.loads(rows[0][1]))) if rows else SumRow(0, frozenset())

    def name_sum(self, round_id: bytes, generation: int, members: Iterable[int]) -> None:
        """From here on this generation, whose file is durable, is the running sum, over these members."""
        statement = "insert or replace into sums values (?, ?, ?)"
        self._write("sums", statement, round_id, generation, json.dumps(sorted(members)))

    def add_shard(self, round_id: bytes, first: int, hashes: bytes) -> None:
        """The blocks of the total from ``first`` on are durable and have these leaf hashes."""
        self._write("shards", "insert or replace into shards values (?, ?, ?)", round_id, first, hashes)

    def shards(self, round_id: bytes) -> dict[int, bytes]:
        """first block -> leaf hashes, of the shards of the total that are done."""
        return dict(self._read("select first, hashes from shards where round = ?", round_id))

    def sweep(self, round_id: bytes, *, uploads: bool) -> None:
        """Delete the files of a round that is over, but not its total; with ``uploads`` its uploads too."""
        patterns = ("*.part", "*.tmp", "sum-*.u32", *(["upload-*.bin"] if uploads else []))
        found = [path for pattern in patterns for path in self.round_directory(round_id).glob(pattern)]
        if found:
            with self._transaction("sums") as db:
                for table in ("uploads", "sums", "shards"):
                    db.execute(f"delete from {table} where round = ?", (round_id,))
        for path in found:
            path.unlink(missing_ok=True)

    def recover(self, round_id: bytes) -> None:
        """Delete the sum files of a running round that no transaction names: a crash came while they were written."""
        named = self.sum_file(round_id, self.sum_row(round_id).generation)
        for pattern in ("sum-*.tmp", "sum-*.u32"):
            for path in self.round_directory(round_id).glob(pattern):
                if path != named:
                    path.unlink(missing_ok=True)

    # --- traffic -----------------------------------------------------------------------------------------------------

    def count_traffic(self, round_id: bytes, member: int, *, sent: int = 0, received: int = 0, chunks: int = 0) -> None:
        """Add to what a member sent and received in a round: bytes of messages and chunks, and upload chunk bytes.

        In memory until :meth:`flush_traffic`: a commit for every chunk would cost more than the chunk, and nothing
        depends on these numbers.
        """
        with self._lock:
            counts = self._traffic[round_id, member]
            for place, count in enumerate((sent, received, chunks)):
                counts[place] += count

    def flush_traffic(self) -> None:
        """Write the counts down."""
        with self._lock:
            counts, self._traffic = self._traffic, defaultdict(lambda: [0, 0, 0])
        if counts:
            with self._transaction("traffic") as db:
                db.executemany(
                    "insert into traffic values (?, ?, ?, ?, ?) on conflict (round, member) do update set "
                    "sent = sent + excluded.sent, received = received + excluded.received, "
                    "chunks = chunks + excluded.chunks",
                    [(*key, *value) for key, value in counts.items()],
                )

    def traffic(self, round_id: bytes) -> dict[int, tuple[int, int, int]]:
        """member -> (bytes sent, bytes received, bytes of upload chunks with their headers)."""
        self.flush_traffic()
        rows = self._read("select member, sent, received, chunks from traffic where round = ?", round_id)
        return {r[0]: (r[1], r[2], r[3]) for r in rows}

    def traffic_of_plans(self) -> list[tuple[bytes, int, int, int, int]]:
        """(plan, member, bytes sent, bytes received, bytes of upload chunks) over all rounds, as last flushed."""
        return self._read(
            "select plan, member, sum(sent), sum(received), sum(chunks) from traffic "
            "join rounds on rounds.id = traffic.round group by plan, member"
        )

    # --- files -------------------------------------------------------------------------------------------------------

    def round_directory(self, round_id: bytes) -> Path:
        """Where uploads, running sum and total of a round lie."""
        return make_private_directory(self.directory / round_name(round_id))

    def upload(self, round_id: bytes, member: int) -> Path:
        return self.round_directory(round_id) / upload_name(member)

    def part(self, round_id: bytes, member: int) -> Path:
        """An upload on its way."""
        return self.upload(round_id, member).with_suffix(".part")

    def sum_file(self, round_id: bytes, generation: int) -> Path:
        return self.round_directory(round_id) / f"sum-{generation}.u32"

    def total(self, round_id: bytes) -> Path:
        return self.round_directory(round_id) / "total.bin"
