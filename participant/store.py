"""A site's memory: once-only records, deltas, quantised vectors, spools and releases.

Records are one JSON object a line, appended and fsynced before the message they allow leaves (protocol section 6).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from participant.config import Home
from participant.records import Aborted, Joined, PeersSeen, Record, Released, SignedSurvivors, Spent
from privacy import faults, merkle
from privacy.encoding import decode, encode
from privacy.errors import ProtocolError, UserError
from privacy.files import (
    append_durably,
    disk_errors,
    fsync_directory,
    fsync_file,
    make_private_directory,
    replace_durably,
    whole_lines,
    write_durably,
)
from privacy.secagg.masking import TILE, engine_for, masked_blocks, tiles_of
from privacy.secagg.messages import Advertise, Header
from privacy.secagg.signed import Signed
from privacy.secagg.transcript import Streams

KINDS: dict[str, type[Record]] = {
    kind.__name__: kind for kind in (Joined, PeersSeen, Spent, SignedSurvivors, Released, Aborted)
}


@dataclass(frozen=True)
class Trained:
    """What training left: the weight and loss that go with the quantised vector, and the plan file it followed."""

    plan: str  # digest of the plan file, hex
    weight: int
    loss: float
    seconds: float
    examples: int
    start: str = ""  # digest of the adapter it was trained from, hex; without it that of stage 1


@dataclass(frozen=True)
class StartNote:
    """Where a stage after the first starts at this site; the adapter lies beside it, in ``start``."""

    plan: str  # digest of the plan file, hex
    digest: str  # of the adapter, hex
    #: (round, H(total) in hex) of the cohorts of the stage before.
    cohorts: list[tuple[int, str]]


@dataclass(frozen=True)
class Quantised:
    """The one quantised vector of a stage, (d + extras,) int32 in a file: masked again it is the very same.

    Iterating gives its tiles; the next overwrites the last, so memory is one tile.
    """

    path: Path

    def __len__(self) -> int:
        """Coordinates in the file, d + extras if it is whole."""
        return self.path.stat().st_size // 4

    def __iter__(self) -> Iterator[NDArray[np.int32]]:
        buffer = np.empty(TILE, "<i4")
        with self.path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer.data):
                yield buffer[: size // 4]

    def digest(self) -> bytes:
        """SHA-256 of the file, by which the records know the vector."""
        found = hashlib.sha256()
        for tile in self:
            found.update(tile.data)
        return found.digest()


def _write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Replace a private file by what comes piece by piece, whole or not at all, and on disk when this returns."""
    staging = path.with_name(f".{path.name}.tmp")  # one process at a time works here; what a crash left is overwritten
    with disk_errors(path):
        try:
            descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                faults.point("before-write", path)
                for piece in pieces:
                    file.write(piece)
                file.flush()
                fsync_file(descriptor, path)
            replace_durably(staging, path)
        finally:
            staging.unlink(missing_ok=True)


class Store:
    """All files of one site."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._records: list[Record] = list(self._load())
        whole_lines(home.witnesses)  # or the next line would continue half of one

    # --- records -----------------------------------------------------------------------------------------------------

    def _load(self) -> Iterator[Record]:
        for number, line in enumerate(whole_lines(self.home.records)):
            try:
                entry = json.loads(line)
                yield decode(KINDS[entry["kind"]], bytes.fromhex(entry["record"]))
            except (ValueError, KeyError, TypeError, RecursionError, ProtocolError) as error:
                raise UserError(
                    f"{self.home.records}:{number + 1}: expected a record of this site, found something else",
                    hint="a damaged or foreign file: sit out the running stages and ask the operator",
                ) from error

    def keep(self, record: Record) -> None:
        """Make a record durable; its message may leave when this returns."""
        line = json.dumps({"kind": type(record).__name__, "record": encode(record).hex()})
        append_durably(self.home.records, line.encode() + b"\n")
        self._records.append(record)

    def records(self, plan: bytes, stage: int) -> list[Record]:
        """Records of one plan and stage, oldest first."""
        return [r for r in self._records if (r.header.plan, r.header.stage) == (plan, stage)]

    def rounds_joined(self) -> int:
        """Rounds this identity ever joined; every M1 carries one more."""
        return max((r.rounds_joined for r in self._records if isinstance(r, Joined)), default=0)

    def highest_round(self, plan: bytes, stage: int) -> int:
        """Highest round of a plan and stage that was joined here."""
        return max((r.header.round for r in self.records(plan, stage) if isinstance(r, Joined)), default=0)

    def peer_counts(self, now: Callable[[bytes, int], int | None] = lambda _, member: member) -> dict[int, int]:
        """Highest count of rounds seen of each peer.

        Args:
            now: the index that a member of some roster (by its hash) has in the pinned one; ``None``: it is not in it.
        """
        counts: dict[int, int] = {}
        for record in self._records:
            if isinstance(record, PeersSeen):
                for then, count in zip(record.members, record.counts, strict=True):
                    member = now(record.header.roster, then)
                    if member is not None:
                        counts[member] = max(count, counts.get(member, 0))
        return counts

    def spent(self, plan: str, dataset: str, stage: int) -> list[Spent]:
        """Records that spent the delta of (data set, plan name, stage), whatever digest, round or start they had."""
        return [
            r
            for r in self._records
            if isinstance(r, Spent) and (r.plan, r.dataset, r.header.stage) == (plan, dataset, stage)
        ]

    def all_records(self) -> list[Record]:
        """Every record of this site, oldest first."""
        return list(self._records)

    def keep_witnesses(self, header: Header, members: Iterable[Signed[Advertise]]) -> None:
        """Keep what M2 shows of the others' ledgers, each in its member's signed M1; durable when this returns."""
        about = {"plan": header.plan.hex(), "round": header.round, "header": encode(header).hex()}
        lines = [
            about
            | {
                "member": one.sender,
                "size": one.body.ledger_size,
                "root": one.body.ledger_root.hex(),
                "advertise": encode(one, Signed[Advertise]).hex(),
            }
            for one in members
        ]
        text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
        append_durably(self.home.witnesses, text.encode())

    def witnesses(self) -> list[dict[str, Any]]:
        """What other members' ledgers were seen to be, oldest first; half a line at the end never counted."""
        path = self.home.witnesses
        content = path.read_bytes() if path.exists() else b""
        return [json.loads(line) for line in content.rpartition(b"\n")[0].splitlines()]

    # --- what training leaves ----------------------------------------------------------------------------------------

    def directory(self, plan: str, stage: int) -> Path:
        return make_private_directory(self.home.work / plan / f"stage-{stage}")

    def trained(self, plan: str, stage: int) -> Trained | None:
        """The result of an earlier training of this plan and stage, if it is whole."""
        path = self.directory(plan, stage) / "trained.json"
        return Trained(**json.loads(path.read_bytes())) if path.exists() else None

    def keep_trained(
        self, plan: str, stage: int, vector: NDArray[np.int32] | Iterable[NDArray[np.int32]], result: Trained
    ) -> None:
        """Keep the quantised vector, tile by tile as it comes, then the note that it is whole."""
        directory = self.directory(plan, stage)
        note = directory / "trained.json"
        if note.exists():  # of another file of this plan: it must never stand beside this vector
            note.unlink()
            fsync_directory(directory)
        pieces = (tile.astype("<i4", copy=False).data for tile in tiles_of(vector))
        _write_pieces(directory / "quantised.i32", pieces)
        write_durably(note, json.dumps(asdict(result)).encode())

    def forget_trained(self, plan: str, stage: int, digest: str) -> None:
        """Delete what training under this plan file left, its vector and every spool, the note first; durable."""
        directory, kept = self.directory(plan, stage), self.trained(plan, stage)
        if kept is None or kept.plan != digest:
            return
        for pattern in ("trained.json", "quantised.i32", "plain-vector.npy", "spool-*.bin"):
            for path in directory.glob(pattern):
                path.unlink()
            fsync_directory(directory)

    def quantised(self, plan: str, stage: int) -> Quantised:
        """The quantised vector of a stage that was trained."""
        return Quantised(self.directory(plan, stage) / "quantised.i32")

    # --- where a stage starts ----------------------------------------------------------------------------------------

    def keep_start(self, plan: str, stage: int, start: StartNote) -> None:
        """From here on a stage starts here at this adapter, whatever the coordinator shows later; durable."""
        write_durably(self.directory(plan, stage) / "start.json", json.dumps(asdict(start)).encode())

    def start(self, plan: str, stage: int) -> StartNote | None:
        """Where a stage starts here, if that is settled."""
        path = self.home.work / plan / f"stage-{stage}" / "start.json"  # asked about stages that never begin
        found = json.loads(path.read_bytes()) if path.exists() else None
        return None if found is None else StartNote(**found | {"cohorts": [(n, h) for n, h in found["cohorts"]]})

    # --- the spool ---------------------------------------------------------------------------------------------------

    def spool(self, plan: str, header: Header) -> Path:
        """The masked, packed vector of one round, the only bytes ever sent."""
        return self.directory(plan, header.stage) / f"spool-{header.round}.bin"

    def write_spool(
        self, path: Path, vector: NDArray[np.int32] | Iterable[NDArray[np.int32]], streams: Streams, bits: int
    ) -> bytes:
        """Mask, pack and write block by block; durable when this returns. The Merkle root over its blocks."""
        hashes: list[bytes] = []
        size = len(vector) if isinstance(vector, Sized) else 0
        engine = engine_for(size)

        def blocks() -> Iterator[bytes]:
            for block in masked_blocks(vector, streams.plus, streams.minus, bits, engine):
                hashes.append(merkle.leaf_hash(block))
                yield block

        _write_pieces(path, blocks())
        return merkle.root(hashes)
