"""A site's memory: once-only records, deltas, quantised vectors, spools and releases.

Records are one JSON object a line, appended and fsynced before the message they allow leaves (protocol section 6).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from participant.config import Home
from participant.records import Aborted, Joined, PeersSeen, Record, Released, SignedSurvivors, Spent
from privacy import merkle
from privacy.encoding import decode, encode
from privacy.errors import ProtocolError, UserError
from privacy.files import append_durably, disk_errors, fsync_directory, make_private_directory, write_durably
from privacy.secagg.masking import masked_blocks
from privacy.secagg.messages import Header
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


class Store:
    """All files of one site."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._records: list[Record] = list(self._load())

    # --- records -----------------------------------------------------------------------------------------------------

    def _load(self) -> Iterator[Record]:
        if not self.home.records.exists():
            return
        content = self.home.records.read_bytes()
        whole, _, partial = content.rpartition(b"\n")
        if partial:  # a crash in mid-append: the record was not durable, so its message never left
            with self.home.records.open("rb+") as file:
                file.truncate(len(content) - len(partial))
        for number, line in enumerate(whole.split(b"\n") if whole else []):
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

    def peer_counts(self) -> dict[int, int]:
        """Highest count of rounds seen of each peer."""
        counts: dict[int, int] = {}
        for record in self._records:
            if isinstance(record, PeersSeen):
                for member, count in zip(record.members, record.counts, strict=True):
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

    # --- what training leaves ----------------------------------------------------------------------------------------

    def directory(self, plan: str, stage: int) -> Path:
        return make_private_directory(self.home.work / plan / f"stage-{stage}")

    def trained(self, plan: str, stage: int) -> Trained | None:
        """The result of an earlier training of this plan and stage, if it is whole."""
        path = self.directory(plan, stage) / "trained.json"
        return Trained(**json.loads(path.read_bytes())) if path.exists() else None

    def keep_trained(self, plan: str, stage: int, vector: NDArray[np.int32], result: Trained) -> None:
        """Keep the quantised vector, then the note that it is whole."""
        directory = self.directory(plan, stage)
        write_durably(directory / "quantised.i32", vector.astype("<i4").tobytes())
        write_durably(directory / "trained.json", json.dumps(asdict(result)).encode())

    def quantised(self, plan: str, stage: int) -> NDArray[np.int32]:
        """The one quantised vector of a stage, (d + extras,) int32; masked again it is the very same."""
        return np.fromfile(self.directory(plan, stage) / "quantised.i32", "<i4").astype(np.int32)

    # --- the spool ---------------------------------------------------------------------------------------------------

    def spool(self, plan: str, header: Header) -> Path:
        """The masked, packed vector of one round, the only bytes ever sent."""
        return self.directory(plan, header.stage) / f"spool-{header.round}.bin"

    def write_spool(self, path: Path, vector: NDArray[np.int32], streams: Streams, bits: int) -> bytes:
        """Mask, pack and write block by block; durable when this returns. The Merkle root over its blocks."""
        hashes = []
        with disk_errors(path):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                for block in masked_blocks(vector, streams.plus, streams.minus, bits):
                    hashes.append(merkle.leaf_hash(block))
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            fsync_directory(path.parent)
        return merkle.root(hashes)
