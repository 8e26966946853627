"""The release of a stage: the weighted mean over its cohorts, as a PEFT directory, with the evidence beside it.

releases/PLAN/stage-K/
    adapter/            what peft.PeftModel.from_pretrained loads, with the model card
    manifest.json       cohorts, totals, weights, digests
    plan.toml, roster.toml
    factors/            those of the method "core", for who has no base model
    rounds/NUMBER/      transcript.bin, total.bin (packed)
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from privacy.adapter import CARD_FILE, save_peft
from privacy.card import model_card
from privacy.encoding import encode
from privacy.evidence import TOTAL_FILE, write_evidence
from privacy.factors import FACTORS, keep_factors
from privacy.files import disk_errors, fsync_file, replace_durably, write_durably
from privacy.job import Job
from privacy.outcome import Facts, VerifiedCohort, manifest, verify_cohort
from privacy.secagg.messages import Evidence, Outcome
from privacy.stages import Start, first_start, release_of, start_of

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class CohortTotal:
    """One released round of a stage: its evidence and the file with its packed total."""

    number: int
    round_id: bytes
    evidence: Evidence
    total: Path

    @property
    def outcome(self) -> Outcome:
        return self.evidence.outcome

    @property
    def survivors(self) -> tuple[int, ...]:
        return tuple(i.sender for i in self.outcome.transcript.inputs)


def verified(job: Job, stage: int, start: Start, cohorts: Sequence[CohortTotal]) -> list[VerifiedCohort]:
    """Each released round of a stage, verified as a member would; raises ProtocolError for one that does not hold."""
    return [verify_cohort(job, stage, start.digest, cohort.evidence, cohort.total) for cohort in cohorts]


def start_from(job: Job, stage: int, released: Callable[[int], Sequence[CohortTotal]]) -> Start:
    """Where a stage starts, from the totals of the stages before on this disk; ``released`` gives those of a stage."""
    return start_of(job, stage, lambda number, start: verified(job, number, start, released(number)))


def publish(
    job: Job,
    stage: int,
    cohorts: Sequence[CohortTotal],
    releases: Path,
    named: Sequence[Facts] = (),
    start: Start | None = None,
) -> Facts:
    """Write (or write again, with one more cohort) the release of a stage; returns its manifest.

    Args:
        start: where the stage started; without it at the plan's seed, as stage 1 does.

    Raises:
        ProtocolError: a garbled total; nothing is published.
        UserError: the disk is full; the release before stands.
    """
    directory = _directory(job, stage, releases)
    with disk_errors(directory):
        return _publish(job, stage, cohorts, directory, named, start or first_start(job))


def _directory(job: Job, stage: int, releases: Path) -> Path:
    return releases / job.plan.name / f"stage-{stage}"


def withdraw(job: Job, stage: int, releases: Path) -> None:
    """Delete a release that was written while its plan was cancelled."""
    shutil.rmtree(_directory(job, stage, releases), ignore_errors=True)


def _publish(
    job: Job, stage: int, cohorts: Sequence[CohortTotal], directory: Path, named: Sequence[Facts], start: Start
) -> Facts:
    held = verified(job, stage, start, cohorts)
    combined = release_of(job, stage, held, start)
    for cohort in cohorts:
        evidence = directory / "rounds" / str(cohort.number)
        evidence.mkdir(parents=True, exist_ok=True)
        _copy_total(cohort.total, evidence / TOTAL_FILE)
        write_evidence(evidence, cohort.evidence)
    if (factors := job.factors()) is not None:
        keep_factors(directory / FACTORS, factors, private=False)
    write_durably(directory / "plan.toml", job.plan_file.raw, private=False)
    write_durably(directory / "roster.toml", job.roster_file.raw, private=False)
    facts = manifest(job, stage, held, combined, start.digest, start.cohorts)
    adapter, card = directory / "adapter", model_card(job, facts)
    save_peft(adapter, combined.tensors, adapter=job.plan.adapter, base_name=job.plan.base.name, card=card)
    facts |= {"adapter": str(adapter), "card": str(adapter / CARD_FILE)}
    for entry, cohort in zip(facts["cohorts"], cohorts, strict=True):
        entry["id"] = cohort.round_id.hex()
        entry["joined"] = [job.roster.name(k.sender) for k in cohort.outcome.transcript.keys]
        entry["evidence_sha256"] = _evidence_hash(cohort)
        entry["confirmed_by"] = [job.roster.name(v.sender) for v in cohort.evidence.votes]
    facts["named"] = list(named)
    write_durably(directory / MANIFEST, json.dumps(facts, indent=2).encode() + b"\n", private=False)
    _drop_others(directory / "rounds", {str(cohort.number) for cohort in cohorts})
    return facts


def _drop_others(rounds: Path, kept: Set[str]) -> None:
    """A round that was cancelled while its release was written is in no manifest, and no auditor should meet it."""
    for path in rounds.iterdir():
        if path.name not in kept:
            shutil.rmtree(path)


def _copy_total(total: Path, target: Path) -> None:
    """Copy a total beside its evidence, unless an earlier run did; a crash leaves no half of it under its name."""
    if target.exists():
        return
    staging = target.with_name(f".{target.name}-{secrets.token_hex(6)}")
    try:
        shutil.copyfile(total, staging)
        with staging.open("rb+") as file:
            fsync_file(file.fileno(), target)
        replace_durably(staging, target)
    finally:
        staging.unlink(missing_ok=True)


def has_adapter(plan: str, releases: Path) -> bool:
    """Does an adapter of this plan lie in the directory of releases?"""
    return any((releases / plan).glob("stage-*/adapter/adapter_model.safetensors"))


def is_published(job: Job, stage: int, cohorts: Sequence[CohortTotal], releases: Path) -> bool:
    """Does the release hold these cohorts with this very evidence already? Its manifest, written last, says so.

    Files that somebody took away since are written anew.
    """
    path = _directory(job, stage, releases) / MANIFEST
    if not path.exists() or not (path.parent / "adapter" / "adapter_model.safetensors").exists():
        return False
    listed = [(c["round"], c.get("evidence_sha256")) for c in json.loads(path.read_bytes())["cohorts"]]
    return listed == [(c.number, _evidence_hash(c)) for c in cohorts]


def _evidence_hash(cohort: CohortTotal) -> str:
    return hashlib.sha256(encode(cohort.evidence)).hexdigest()
