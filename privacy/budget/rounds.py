"""What others remember of a federation's ledgers: the coordinator's witnesses, the peers', and M1 in transcripts.

Everything is verified by the roster's keys before it counts for or against anybody.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privacy.budget.anchors import Anchor
from privacy.budget.checkpoint import verify_checkpoint
from privacy.budget.findings import Code, Found
from privacy.encoding import decode
from privacy.errors import ProtocolError, UserError, VeilsumError, shown
from privacy.evidence import EVIDENCE_FILE, read_evidence
from privacy.files import read_file
from privacy.job import Job
from privacy.plan import load_plan
from privacy.roster import RosterFile
from privacy.secagg import transcript
from privacy.secagg.messages import Advertise, Header
from privacy.secagg.signed import Signed, has_valid_signature

#: Longest line of a witness file that is read.
MAX_LINE = 1 << 16


@dataclass(frozen=True)
class Seen:
    """One memory of one ledger: named by its data set, or by a plan that was reserved in it."""

    member: str
    anchor: Anchor
    dataset: str = ""
    plan: str = ""

    @property
    def ledger(self) -> str:
        """What the ledger is known by."""
        return (
            f"the ledger of data set {self.dataset[:16]}…" if self.dataset else f"a ledger with plan {self.plan[:16]}…"
        )

    def is_about(self, dataset: str, plans: frozenset[str]) -> bool:
        """Is it about the ledger of this data set, with these plans in it?"""
        return self.dataset == dataset if self.dataset else self.plan in plans


@dataclass(frozen=True)
class Round:
    """A released round whose transcript holds."""

    title: str
    number: int
    plan_and_stage: tuple[str, int]  # digest in hex, stage
    plan_text: str
    coordinator: bytes
    t2: bytes
    uploads: dict[str, bytes]  # member in the sum -> root of its upload
    seen: tuple[Seen, ...]  # what M1 of each member says about its ledger


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    raw = read_file(path, "a file of witnessed checkpoints")
    for number, line in enumerate(raw.rpartition(b"\n")[0].splitlines(), start=1):
        try:
            found = json.loads(line) if len(line) <= MAX_LINE else None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{path}:{number}: expected a witnessed checkpoint, found something else")
        yield number, found


def coordinators_witnesses(path: Path, roster: RosterFile, found: list[Found]) -> list[Seen]:
    """The checkpoints that a coordinator kept; a forged one, and two of one size, are findings."""
    keys = {member.name: bytes.fromhex(member.key) for member in roster.roster.members}
    seen = []
    for number, line in _lines(path):
        where = f"{path.name}:{number}"
        member, time = str(line.get("member")), str(line.get("time"))
        key = keys.get(member)
        if key is None:
            found.append(Found(Code.BROKEN, f"{where}: '{shown(member)}' is no member of the roster"))
            continue
        try:
            notes = {
                kind: verify_checkpoint(str(line[kind]).encode(errors="replace"), key)
                for kind in ("checkpoint", "fork", "rollback")
                if kind in line
            }
            now = notes["checkpoint"]
        except (ProtocolError, KeyError) as error:
            found.append(Found(Code.BROKEN, f"{where}: {member}: {error}"))
            continue
        other = notes.get("fork")
        if other is not None and (now.dataset, now.size) == (other.dataset, other.size) and now.root != other.root:
            text = f"two ledgers of {now.size} lines, both signed, of data set {now.dataset[:16]}…"
            found.append(Found(Code.FORK, f"{where}: {member} showed {text}"))
        # A rollback is no finding by itself: a message that was late, or an old note that the coordinator shows again,
        # looks the same. Both notes are anchors, and the ledger says whether it has the lines of both.
        for kind, note in notes.items():
            dated = time if kind == "checkpoint" else ""
            source = f"the coordinator ({where})"
            seen.append(Seen(member, Anchor(note.size, note.root, source, dated), dataset=note.dataset))
    return seen


def peers_witnesses(path: Path, keeper: str, roster: RosterFile, found: list[Found]) -> list[Seen]:
    """The signed M1 of others that a site kept; a forged one is a finding."""
    seen = []
    for number, line in _lines(path):
        where = f"{keeper}/{path.name}:{number}"
        try:
            header = decode(Header, bytes.fromhex(line["header"]))
            message = decode(Signed[Advertise], bytes.fromhex(line["advertise"]))
            seen += [_seen(message, header, roster, where)]
        except (VeilsumError, KeyError, ValueError, TypeError) as error:
            found.append(Found(Code.BROKEN, f"{where}: expected a signed M1, found: {error}"))
    return [one for one in seen if one.anchor.size]


def _seen(message: Signed[Advertise], header: Header, roster: RosterFile, source: str) -> Seen:
    keys = roster.roster.keys()
    known = message.sender < len(keys) and header.roster == roster.hash
    if not known or not has_valid_signature(message, keys[message.sender], header.hash()):
        raise ProtocolError("M1: expected a valid signature of a member of this roster")
    anchor = Anchor(message.body.ledger_size, message.body.ledger_root, f"M1 ({source})")
    return Seen(roster.roster.name(message.sender), anchor, plan=header.plan.hex())


def rounds_of(releases: Path, roster: RosterFile, found: list[Found]) -> Iterator[Round]:
    """Every released round whose transcript holds; one that does not is a finding."""
    for path in sorted(releases.glob(f"*/stage-*/rounds/*/{EVIDENCE_FILE}")):
        title = path.parent.relative_to(releases).as_posix()
        try:
            yield _round(path.parent, title, roster)
        except VeilsumError as error:
            found.append(Found(Code.BROKEN, f"{title}: {error}"))


def _round(directory: Path, title: str, roster: RosterFile) -> Round:
    job = Job.of(load_plan(directory.parent.parent / "plan.toml"), roster)
    signed = read_evidence(directory).outcome.transcript
    header = signed.header
    if header != job.header(header.stage, header.round, header.start):
        raise ProtocolError("the transcript is of another plan or roster")
    verified = transcript.verify_transcript(job.context(header), signed)
    return Round(
        title,
        header.round,
        (header.plan.hex(), header.stage),
        job.plan_file.raw.decode(),
        header.coordinator,
        verified.t2,
        {job.roster.name(i.sender): i.body.root for i in signed.inputs},
        tuple(one for m in signed.keys if (one := _seen(m, header, roster, title)).anchor.size),
    )
