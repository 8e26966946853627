"""What lies on the disks, read while the processes run, never written: records of sites, events of the coordinator."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from participant.records import Joined, Record
from participant.store import KINDS
from privacy.encoding import decode
from privacy.secagg.dialogue import FromMember


def whole_lines(path: Path) -> list[bytes]:
    """The lines of an append-only file; a partial one at the end does not count."""
    return path.read_bytes().rpartition(b"\n")[0].split(b"\n") if path.exists() else []


def records(site: Path) -> list[Record]:
    """Every record of a site, oldest first."""
    entries = [json.loads(line) for line in whole_lines(site / "records.jsonl") if line]
    return [decode(KINDS[e["kind"]], bytes.fromhex(e["record"])) for e in entries]


def last_joined(site: Path) -> tuple[bytes, int] | None:
    """(plan digest, round number) that a site joined last."""
    joined = [r for r in records(site) if isinstance(r, Joined)]
    return (joined[-1].header.plan, joined[-1].header.round) if joined else None


def ledger(site: Path, dataset: str = "toy") -> list[dict[str, Any]]:
    """The entries of a site's ledger, oldest first."""
    return [json.loads(line) for line in whole_lines(site / "ledger" / f"{dataset}.jsonl") if line]


def messages(database: Path) -> list[tuple[bytes, FromMember]]:
    """(round id, message) of every message the coordinator accepted, oldest first; empty while it cannot be read."""
    try:
        connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=1)
        try:
            rows = connection.execute("select round, payload from events where kind = 'message' order by at").fetchall()
        finally:
            connection.close()
    except sqlite3.Error:
        return []
    return [(bytes(round_id), decode(FromMember, payload)) for round_id, payload in rows]  # type: ignore[arg-type]
