"""What the coordinator remembers of its members' ledgers: the signed checkpoint that comes with each message.

One append-only file, one JSON object a line, on disk before the message it came with is answered. A ledger only grows:
a checkpoint of fewer lines, or of as many lines under another root, is kept as evidence and its message is refused.
Whether a longer ledger begins with the lines of a shorter one is seen by whoever has the ledger: the auditor.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from privacy.budget.checkpoint import Checkpoint, verify_checkpoint
from privacy.encoding import digest
from privacy.errors import ProtocolError, Refusal, UserError
from privacy.files import append_durably, whole_lines
from privacy.roster import Roster

log = structlog.get_logger()

#: What one member may make the coordinator keep: lines in all, and lines of evidence against it.
MOST_LINES, MOST_EVIDENCE = 100_000, 16


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a witness file.

    Raises:
        UserError: a line that is none.
    """
    found = []
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.rpartition(b"\n")[0].splitlines()):
        try:
            entry = json.loads(line)
            if not {"member", "dataset", "checkpoint", "time"} <= entry.keys():
                raise ValueError("a key is missing")
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}:{number + 1}: expected a witnessed checkpoint, found something else",
                hint="restore the file from your backup: it is what shows that members' ledgers are complete",
            ) from error
        found.append(entry)
    return found


class Witnesses:
    """The checkpoints of all members' ledgers, as far as they were shown here."""

    def __init__(self, path: Path, roster: Roster, clock: Callable[[], float]) -> None:
        """Read what was kept; half a line at the end was never acknowledged and is cut off.

        Raises:
            UserError: a line that is none.
        """
        self._path, self._roster, self._clock = path, roster, clock
        self._keys, self._lock = roster.keys(), threading.Lock()
        self._last: dict[tuple[str, str], Checkpoint] = {}
        self._shown: set[bytes] = set()
        self._lines: Counter[str] = Counter()
        self._evidence: Counter[str] = Counter()
        self._load()

    def _load(self) -> None:
        whole_lines(self._path)
        keys = {member.name: bytes.fromhex(member.key) for member in self._roster.members}
        entries = read_lines(self._path)
        for entry in entries:
            name = entry["member"]
            self._lines[name] += 1
            if _is_evidence(entry):
                self._evidence[name] += 1
            else:
                self._shown.add(_mark(name, str(entry["checkpoint"]).encode()))
        for entry in _latest(entries):
            name = entry["member"]
            if name in keys:  # of somebody who left the roster nothing is expected any more
                with suppress(ProtocolError):  # of a member's key before this one: nothing to compare with
                    found = verify_checkpoint(str(entry["checkpoint"]).encode(), keys[name])
                    self._last[name, found.dataset] = found

    def take(self, member: int, note: bytes, advertised: tuple[int, bytes] | None = None) -> None:
        """Keep the checkpoint that came with a message; durable when this returns.

        Args:
            advertised: (size, root) that the message itself states (M1).

        Raises:
            ProtocolError: not a checkpoint, not signed by this member, or not what the message states.
            Refusal: the ledger is shorter than it was, or forked: both notes are kept.
        """
        name = self._roster.name(member)
        with self._lock:
            known = next((c for (who, _), c in self._last.items() if who == name and c.note == note), None)
            found = known or verify_checkpoint(note, self._keys[member])
            if advertised is not None:
                _check_stated(found, *advertised)
            if known is None:
                self._compare(name, found)

    def _compare(self, name: str, found: Checkpoint) -> None:
        last = self._last.get((name, found.dataset))
        if last is None or last.size < found.size:
            self._keep(name, found)
            self._last[name, found.dataset] = found
            self._shown.add(_mark(name, found.note))
        elif last.size > found.size:
            if _mark(name, found.note) not in self._shown:  # else a late message looks the same
                self._accuse(name, found, last, "rollback")
            raise Refusal(
                f"the ledger of '{name}' has {found.size} lines, {last.size} were witnessed: a part of it is missing; "
                "restore it before you go on"
            )
        elif last.root != found.root:
            self._accuse(name, found, last, "fork")
            raise Refusal(f"the ledger of '{name}' is not the one that was witnessed with {last.size} lines: a fork")

    def _keep(self, name: str, found: Checkpoint, **evidence: str) -> None:
        if self._lines[name] >= MOST_LINES:
            raise Refusal(f"expected at most {MOST_LINES} checkpoints of '{name}'")
        time = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        entry = {"member": name, "dataset": found.dataset, "checkpoint": found.note.decode(), "time": time, **evidence}
        append_durably(self._path, json.dumps(entry, sort_keys=True).encode() + b"\n")
        self._lines[name] += 1

    def _accuse(self, name: str, found: Checkpoint, last: Checkpoint, kind: str) -> None:
        log.error("ledger " + kind, member=name, dataset=found.dataset[:16], size=found.size, witnessed=last.size)
        if self._evidence[name] < MOST_EVIDENCE:  # the first ones convict as well as all of them
            self._keep(name, found, **{kind: last.note.decode()})
            self._evidence[name] += 1


def _mark(name: str, note: bytes) -> bytes:
    """A few bytes to know a kept note by."""
    return digest("witnessed", name.encode(), note)[:16]


def _check_stated(found: Checkpoint, size: int, root: bytes) -> None:
    """A checkpoint may be newer than the M1 that is repeated with it, never older, and never another of one size."""
    if found.size < size or (found.size == size and found.root != root):
        raise ProtocolError(f"M1 states a ledger of {size} lines, the checkpoint with it {found.size} or other ones")


def anchors(path: Path, member: str = "") -> list[dict[str, Any]]:
    """The last witnessed checkpoint of each ledger, of one member or of all, in order of their names."""
    return [entry for entry in _latest(read_lines(path)) if member in ("", entry["member"])]


def _latest(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last line about each ledger that is no evidence, in order of their names."""
    last = {(e["member"], e["dataset"]): e for e in entries if not _is_evidence(e)}
    return [last[key] for key in sorted(last)]


def _is_evidence(entry: dict[str, Any]) -> bool:
    return "fork" in entry or "rollback" in entry


def anchor_file(found: Sequence[dict[str, Any]]) -> str:
    """The notes alone, an empty line between two of them: what ``veilsum-audit ledger --anchor`` reads."""
    return "\n".join(str(entry["checkpoint"]) for entry in found)
