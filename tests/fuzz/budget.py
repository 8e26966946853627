"""The auditor's own parsers: a mechanism in a ledger, and the memory of coordinator and peers."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

from privacy.budget.checkpoint import sign_checkpoint
from privacy.budget.entries import canonical, strict_json
from privacy.budget.events import DpSgd, Unprotected, mechanism_from_json
from privacy.budget.findings import Found
from privacy.budget.rounds import coordinators_witnesses
from privacy.errors import ProtocolError
from privacy.roster import RosterFile, parse_roster
from tests.fuzz import seeds
from tests.simulation import identity

DATASET = "ab" * 32


def run_mechanism(data: bytes) -> None:
    """A mechanism is taken in the one form that it is written in, and every accountant can take it."""
    try:
        value = strict_json(data)
    except ValueError as error:
        raise ProtocolError("expected a JSON object") from error
    found = mechanism_from_json(value)
    assert canonical(found.to_json()) == canonical(value), "one mechanism is written in two ways"
    found.event()


def mechanism_seeds() -> list[bytes]:
    record = DpSgd("0.01", "1", "0.5", "0.00001", 1000, 100, 10000)
    user = DpSgd("0.01", "1", "0.5", "0.00001", 1000, 100, 10000, "user", 3)
    return [canonical(m.to_json()) for m in (record, user, Unprotected())]


@cache
def _scratch() -> Path:
    return Path(tempfile.mkdtemp()) / "witnesses.jsonl"


@cache
def _roster() -> RosterFile:
    """A roster whose first member's key the tests have."""
    raw = seeds.rosters()[0]
    old = parse_roster(raw).roster.members[0].key
    return parse_roster(raw.replace(old.encode(), identity(0).public_key().public_bytes_raw().hex().encode()))


def run_witnesses(data: bytes) -> None:
    """Whatever a witness file says, only what a member signed counts, for or against it."""
    path, found = _scratch(), list[Found]()
    path.write_bytes(data)
    seen = coordinators_witnesses(path, _roster(), found)
    assert all(one.anchor.size <= 9 and one.dataset == DATASET for one in seen), "nobody signed that"


def witness_seeds() -> list[bytes]:
    member, key = _roster().roster.members[0], identity(0)
    note, more = (sign_checkpoint(key, DATASET, size, bytes([size]) * 32).decode() for size in (3, 9))
    line = {"member": member.name, "dataset": DATASET, "checkpoint": more, "time": "2026-11-25T12:00:00Z"}
    return [json.dumps(one).encode() + b"\n" for one in (line, line | {"fork": note})]
