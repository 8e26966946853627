"""The release of a stage: the weighted mean over its cohorts, as a PEFT directory, with the evidence beside it.

releases/PLAN/stage-K/
    adapter/            what peft.PeftModel.from_pretrained loads
    manifest.json       cohorts, totals, weights, digests
    plan.toml, roster.toml
    rounds/NUMBER/      transcript.bin, total.bin (packed)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from privacy.adapter import save_peft
from privacy.evidence import TOTAL_FILE, Evidence, write_evidence
from privacy.files import write_durably
from privacy.job import Job
from privacy.outcome import Facts, VerifiedCohort, combine, manifest
from privacy.secagg.messages import Outcome, OutcomeVote, Signed
from privacy.vectors import read_total


@dataclass(frozen=True)
class CohortTotal:
    """One released round of a stage: its evidence and the file with its packed total."""

    number: int
    round_id: bytes
    outcome: Outcome
    votes: tuple[Signed[OutcomeVote], ...]
    total: Path

    @property
    def survivors(self) -> tuple[int, ...]:
        return tuple(i.sender for i in self.outcome.transcript.inputs)


def checked(job: Job, cohort: CohortTotal) -> VerifiedCohort:
    """What the coordinator's own machine verified message by message, with the integers of the total.

    Raises:
        ProtocolError: a garbled total.
    """
    total = read_total(cohort.total, job.quantizer.total_size, job.rules.bits)
    lifted = job.quantizer.checked(total, len(cohort.survivors))
    t2 = cohort.outcome.transcript.inputs[0].body.t2  # all inputs were checked to be under one
    return VerifiedCohort(cohort.number, cohort.survivors, t2, cohort.outcome.total, lifted)


def publish(job: Job, stage: int, cohorts: Sequence[CohortTotal], releases: Path) -> Facts:
    """Write (or write again, with one more cohort) the release of a stage; returns its manifest.

    Raises:
        ProtocolError: a garbled total; nothing is published.
        UserError: the disk is full; the release before stands.
    """
    verified = [checked(job, cohort) for cohort in cohorts]
    decoded, tensors = combine(job, verified)
    directory = releases / job.plan.name / f"stage-{stage}"
    for cohort in cohorts:
        evidence = directory / "rounds" / str(cohort.number)
        evidence.mkdir(parents=True, exist_ok=True)
        write_evidence(evidence, Evidence(cohort.outcome, cohort.votes))
        shutil.copyfile(cohort.total, evidence / TOTAL_FILE)
    write_durably(directory / "plan.toml", job.plan_file.raw, private=False)
    write_durably(directory / "roster.toml", job.roster_file.raw, private=False)
    save_peft(directory / "adapter", tensors, adapter=job.plan.adapter, base_name=job.plan.base.name)
    facts = manifest(job, stage, verified, decoded, tensors) | {"adapter": str(directory / "adapter")}
    for entry, cohort in zip(facts["cohorts"], cohorts, strict=True):
        entry["id"] = cohort.round_id.hex()
        entry["joined"] = [job.roster.name(k.sender) for k in cohort.outcome.transcript.keys]
        entry["confirmed_by"] = [job.roster.name(v.sender) for v in cohort.votes]
    write_durably(directory / "manifest.json", json.dumps(facts, indent=2).encode() + b"\n", private=False)
    return facts
