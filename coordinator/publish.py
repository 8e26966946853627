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

import numpy as np

from coordinator.unmask import read_total
from privacy.adapter import Tensors, release, save_peft, start_adapter, start_digest
from privacy.encoding import encode
from privacy.files import write_durably
from privacy.job import Job
from privacy.secagg.messages import Outcome, OutcomeVote, Signed
from privacy.secagg.quantize import Decoded


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


def combine(job: Job, cohorts: Sequence[CohortTotal]) -> tuple[Decoded, list[Decoded]]:
    """The mean over all cohort totals, and what each total says alone.

    Raises:
        ProtocolError: a garbled total.
    """
    quantizer = job.quantizer
    whole = np.zeros(quantizer.total_size, np.int64)
    each = []
    for cohort in cohorts:
        total = read_total(cohort.total, quantizer.total_size, job.rules.bits)
        lifted = quantizer.checked(total, len(cohort.survivors))
        each.append(quantizer.decode_sum(lifted, len(cohort.survivors)))
        whole += lifted
    return quantizer.decode_sum(whole, sum(len(c.survivors) for c in cohorts)), each


def released_adapter(job: Job, decoded: Decoded) -> Tensors:
    """start + server_lr * mean, as every site computes it too."""
    return release(start_adapter(job.plan.adapter), decoded.mean, job.plan.aggregation.server_lr, job.layout)


def publish(job: Job, stage: int, cohorts: Sequence[CohortTotal], releases: Path) -> dict[str, object]:
    """Write (or write again, with one more cohort) the release of a stage; returns its manifest.

    Raises:
        ProtocolError: a garbled total; nothing is published.
        UserError: the disk is full; the release before stands.
    """
    decoded, each = combine(job, cohorts)
    tensors = released_adapter(job, decoded)
    directory = releases / job.plan.name / f"stage-{stage}"
    for cohort in cohorts:
        evidence = directory / "rounds" / str(cohort.number)
        evidence.mkdir(parents=True, exist_ok=True)
        write_durably(evidence / "transcript.bin", encode(cohort.outcome.transcript), private=False)
        shutil.copyfile(cohort.total, evidence / "total.bin")
    write_durably(directory / "plan.toml", job.plan_file.raw, private=False)
    write_durably(directory / "roster.toml", job.roster_file.raw, private=False)
    save_peft(directory / "adapter", tensors, adapter=job.plan.adapter, base_name=job.plan.base.name)
    manifest: dict[str, object] = {
        "plan": job.plan.name,
        "plan_digest": job.plan_file.digest.hex(),
        "stage": stage,
        "base": {"name": job.plan.base.name, "digest": job.plan.base.digest},
        "adapter": str(directory / "adapter"),
        "adapter_digest": start_digest(tensors).hex(),
        "coordinates": job.quantizer.size,
        "total_weight": decoded.weight,
        "training_loss": round(decoded.loss, 6),
        "cohorts": [_cohort(job, c, d) for c, d in zip(cohorts, each, strict=True)],
    }
    write_durably(directory / "manifest.json", json.dumps(manifest, indent=2).encode() + b"\n", private=False)
    return manifest


def _cohort(job: Job, cohort: CohortTotal, decoded: Decoded) -> dict[str, object]:
    names = job.roster.name
    transcript = cohort.outcome.transcript
    return {
        "round": cohort.number,
        "id": cohort.round_id.hex(),
        "joined": [names(k.sender) for k in transcript.keys],
        "survivors": [names(i) for i in cohort.survivors],
        "confirmed_by": [names(v.sender) for v in cohort.votes],
        "total": cohort.outcome.total.hex(),
        "total_weight": decoded.weight,
        "training_loss": round(decoded.loss, 6),
    }
