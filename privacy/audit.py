"""Verifying a finished round from what was published, trusting neither the coordinator nor the files.

Only the pinned roster is taken as given. Without the uploads the sum itself is not recomputed, and the report says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from privacy.adapter import load_peft
from privacy.encoding import decode
from privacy.errors import ProtocolError, UserError, shown
from privacy.evidence import EVIDENCE_FILE, TOTAL_FILE, read_evidence
from privacy.factors import FACTORS
from privacy.files import read_file
from privacy.job import Job
from privacy.outcome import VerifiedCohort, check_block, manifest, verify_cohort
from privacy.plan import load_plan
from privacy.roster import load_roster
from privacy.secagg import transcript
from privacy.secagg.masking import block_sizes
from privacy.secagg.messages import Evidence, Outcome
from privacy.secagg.naming import Accusation, accused
from privacy.stages import Start, first_start, release_of, start_of
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
        directory: ``releases/PLAN/stage-K`` of a coordinator, or a copy of it; from stage 2 on with the directories of
            the stages before beside it, since the start of a stage is computed from their totals.
        roster_hash: the pinned H_R; without it the roster in the directory is believed.
        uploads: the coordinator's ``rounds`` directory; with it every block of every sum is recomputed.

    Raises:
        ProtocolError: something does not hold; the first such thing.
        UserError: a file is missing.
    """
    plan = load_plan(directory / "plan.toml")
    job = Job.of(plan, load_roster(directory / "roster.toml", roster_hash), directory / FACTORS)
    stage = _stage(directory, job)
    start = _start(directory, job, stage)
    cohorts: list[VerifiedCohort] = []
    confirmed: dict[int, list[str]] = {}
    for evidence, cohort in _cohorts(directory, job, stage, start):
        if uploads is not None:
            _recompute(job.at(stage), evidence.outcome, cohort, uploads)
        confirmed[cohort.number] = [job.roster.name(v.sender) for v in evidence.votes]
        cohorts.append(cohort)
    combined = release_of(job, stage, cohorts, start)
    tensors = combined.tensors
    found = load_peft(directory / "adapter")
    if found.keys() != tensors.keys() or not all(np.array_equal(found[k], tensors[k]) for k in tensors):
        raise ProtocolError("the adapter is not the one that the totals give")
    facts = manifest(job, stage, cohorts, combined, start.digest, start.cohorts)
    if _manifest(directory / "manifest.json").get("start", facts["start"]) != facts["start"]:
        raise ProtocolError("the manifest names another start of the stage than the totals before give")
    return ReleaseReport(facts, confirmed, _named(job, directory))


def _cohorts(directory: Path, job: Job, stage: int, start: Start) -> Iterator[tuple[Evidence, VerifiedCohort]]:
    """Every round of a release, verified, in the order of their numbers."""
    for path in sorted(directory.glob(f"rounds/*/{EVIDENCE_FILE}"), key=lambda p: (len(p.parent.name), p.parent.name)):
        evidence = read_evidence(path.parent)
        yield evidence, verify_cohort(job, stage, start.digest, evidence, path.parent / TOTAL_FILE)


def _start(directory: Path, job: Job, stage: int) -> Start:
    """Where a stage starts, from the published totals of the stages before."""

    def cohorts(number: int, start: Start) -> list[VerifiedCohort]:
        before = directory.resolve().with_name(f"stage-{number}")
        found = [cohort for _, cohort in _cohorts(before, job, number, start)]
        if not found:
            raise UserError(
                f"{before}: expected the release that stage {number + 1} starts from, found none",
                hint="copy the directories of all stages before beside this one",
            )
        return found

    if first_start(job).digest.hex() != job.plan.adapter.digest:
        raise ProtocolError("the start adapter computed from the public seed is not the one the plan pins")
    return start_of(job, stage, cohorts)


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
        context = job.at(accusation.header.stage).context(accusation.header)
        culprit = job.roster.name(accused(context, accusation))
        if culprit != member:
            raise ProtocolError(f"the manifest names '{shown(member)}', its evidence names '{culprit}'")
        found.append({"round": accusation.header.round, "member": culprit, "kind": kind})
    return found


def _accusations(path: Path) -> list[tuple[str, str, bytes]]:
    """(member, kind, evidence) of each entry under ``named`` of a manifest, nothing of it believed yet."""
    try:
        listed = _manifest(path).get("named", [])
        return [(str(e["member"]), shown(str(e["kind"])), bytes.fromhex(e["evidence"])) for e in listed]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ProtocolError(f"{path}: expected the manifest of a release, found something else") from error


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a release as JSON, nothing of it believed yet."""
    try:
        found = json.loads(read_file(path, "the manifest of a release"))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{path}: expected the manifest of a release, found something else") from error
    if not isinstance(found, dict):
        raise ProtocolError(f"{path}: expected the manifest of a release, found something else")
    return found


def _stage(directory: Path, job: Job) -> int:
    number = directory.resolve().name.removeprefix("stage-")
    if not (number.isdecimal() and len(number) < 4 and 1 <= int(number) <= job.plan.last):
        raise UserError(
            f"{directory}: expected a directory named stage-K, K from 1 to {job.plan.last}",
            hint="name releases/PLAN/stage-K",
        )
    return int(number)
