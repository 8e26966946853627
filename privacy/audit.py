"""Verifying a finished round from what was published, trusting neither the coordinator nor the files.

Only the pinned roster is taken as given. Without the uploads the sum itself is not recomputed, and the report says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from privacy.adapter import load_peft, start_digest
from privacy.encoding import decode
from privacy.errors import ProtocolError, UserError, shown
from privacy.evidence import EVIDENCE_FILE, TOTAL_FILE, read_evidence
from privacy.factors import FACTORS
from privacy.files import read_file
from privacy.job import Job
from privacy.outcome import VerifiedCohort, check_block, combine, manifest, verify_cohort
from privacy.plan import load_plan
from privacy.roster import load_roster
from privacy.secagg import transcript
from privacy.secagg.masking import block_sizes
from privacy.secagg.messages import Outcome
from privacy.secagg.naming import Accusation, accused
from privacy.vectors import read_block, round_name, upload_name


@dataclass(frozen=True)
class ReleaseReport:
    """What an audit of a release found to hold."""

    facts: dict[str, Any]
    #: Round number -> members that signed the outcome.
    confirmed: dict[int, list[str]]
    #: Members whom evidence in the manifest proves to have cheated, with round and kind.
    named: list[dict[str, Any]]


def audit_release(directory: Path, roster_hash: bytes | None = None, uploads: Path | None = None) -> ReleaseReport:
    """Verify a published release: transcripts, totals, disjoint cohorts, and the adapter they give.

    Args:
        directory: ``releases/PLAN/stage-K`` of a coordinator, or a copy of it.
        roster_hash: the pinned H_R; without it the roster in the directory is believed.
        uploads: the coordinator's ``rounds`` directory; with it every block of every sum is recomputed.

    Raises:
        ProtocolError: something does not hold; the first such thing.
        UserError: a file is missing.
    """
    plan = load_plan(directory / "plan.toml")
    job = Job.of(plan, load_roster(directory / "roster.toml", roster_hash), directory / FACTORS)
    stage = _stage(directory)
    start = start_digest(job.start_tensors())
    if start.hex() != job.plan.adapter.digest:
        raise ProtocolError("the start adapter computed from the public seed is not the one the plan pins")
    cohorts: list[VerifiedCohort] = []
    confirmed: dict[int, list[str]] = {}
    for path in sorted(directory.glob(f"rounds/*/{EVIDENCE_FILE}")):
        evidence = read_evidence(path.parent)
        cohort = verify_cohort(job, stage, start, evidence, path.parent / TOTAL_FILE)
        if uploads is not None:
            _recompute(job, evidence.outcome, cohort, uploads)
        confirmed[cohort.number] = [job.roster.name(v.sender) for v in evidence.votes]
        cohorts.append(cohort)
    combined = combine(job, cohorts)
    tensors = combined.tensors
    found = load_peft(directory / "adapter")
    if found.keys() != tensors.keys() or not all(np.array_equal(found[k], tensors[k]) for k in tensors):
        raise ProtocolError("the adapter is not the one that the totals give")
    return ReleaseReport(manifest(job, stage, cohorts, combined), confirmed, _named(job, directory))


def _recompute(job: Job, outcome: Outcome, cohort: VerifiedCohort, uploads: Path) -> None:
    """The sum of a round from its uploads, block by block, as the committed roots have them."""
    header = outcome.transcript.header
    size, bits = job.quantizer.total_size, job.rules.bits
    verified = transcript.verify_transcript(job.context(header), outcome.transcript)
    roots = {i.sender: i.body.root for i in outcome.transcript.inputs}
    files = {m: uploads / round_name(header.hash()) / upload_name(m) for m in cohort.survivors}
    for path in files.values():
        if not path.exists():
            raise UserError(
                f"{path}: expected an upload, found none",
                hint="after a release the coordinator keeps them only with keep_uploads = true in coordinator.toml",
            )
    for block in range(len(block_sizes(size))):
        shown = {member: read_block(path, size, bits, block) for member, path in files.items()}
        check_block(job, verified, roots, block, shown, cohort.sums.block(block))


def _named(job: Job, directory: Path) -> list[dict[str, Any]]:
    """Check every accusation in the manifest; raises ProtocolError for one that proves nothing or another member."""
    found = []
    for member, kind, evidence in _accusations(directory / "manifest.json"):
        accusation = decode(Accusation, evidence)
        culprit = job.roster.name(accused(job.context(accusation.header), accusation))
        if culprit != member:
            raise ProtocolError(f"the manifest names '{shown(member)}', its evidence names '{culprit}'")
        found.append({"round": accusation.header.round, "member": culprit, "kind": kind})
    return found


def _accusations(path: Path) -> list[tuple[str, str, bytes]]:
    """(member, kind, evidence) of each entry under ``named`` of a manifest, nothing of it believed yet."""
    try:
        listed = json.loads(read_file(path, "the manifest of a release")).get("named", [])
        return [(str(e["member"]), shown(str(e["kind"])), bytes.fromhex(e["evidence"])) for e in listed]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ProtocolError(f"{path}: expected the manifest of a release, found something else") from error


def _stage(directory: Path) -> int:
    number = directory.resolve().name.removeprefix("stage-")
    if not number.isdigit():
        raise UserError(f"{directory}: expected a directory named stage-K", hint="name releases/PLAN/stage-K")
    return int(number)
