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

from privacy.adapter import save_peft, start_adapter, start_digest
from privacy.evidence import TOTAL_FILE, write_evidence
from privacy.files import write_durably
from privacy.job import Job
from privacy.outcome import Facts, combine, manifest, verify_cohort
from privacy.secagg.messages import Evidence, Outcome


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


def publish(job: Job, stage: int, cohorts: Sequence[CohortTotal], releases: Path, named: Sequence[Facts] = ()) -> Facts:
    """Write (or write again, with one more cohort) the release of a stage; returns its manifest.

    Raises:
        ProtocolError: a garbled total; nothing is published.
        UserError: the disk is full; the release before stands.
    """
    start = start_digest(start_adapter(job.plan.adapter))
    verified = [verify_cohort(job, stage, start, cohort.evidence, cohort.total) for cohort in cohorts]
    decoded, tensors = combine(job, verified)
    directory = releases / job.plan.name / f"stage-{stage}"
    for cohort in cohorts:
        evidence = directory / "rounds" / str(cohort.number)
        evidence.mkdir(parents=True, exist_ok=True)
        write_evidence(evidence, cohort.evidence)
        shutil.copyfile(cohort.total, evidence / TOTAL_FILE)
    write_durably(directory / "plan.toml", job.plan_file.raw, private=False)
    write_durably(directory / "roster.toml", job.roster_file.raw, private=False)
    save_peft(directory / "adapter", tensors, adapter=job.plan.adapter, base_name=job.plan.base.name)
    facts = manifest(job, stage, verified, decoded, tensors) | {"adapter": str(directory / "adapter")}
    for entry, cohort in zip(facts["cohorts"], cohorts, strict=True):
        entry["id"] = cohort.round_id.hex()
        entry["joined"] = [job.roster.name(k.sender) for k in cohort.outcome.transcript.keys]
        entry["confirmed_by"] = [job.roster.name(v.sender) for v in cohort.evidence.votes]
    facts["named"] = list(named)
    write_durably(directory / "manifest.json", json.dumps(facts, indent=2).encode() + b"\n", private=False)
    return facts
