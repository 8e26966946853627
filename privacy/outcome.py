"""From verified rounds to a release: the same computation at coordinator, sites and auditors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy.adapter import Tensors, release, start_adapter, start_digest
from privacy.errors import ProtocolError
from privacy.job import Job
from privacy.secagg import transcript
from privacy.secagg.messages import Outcome
from privacy.secagg.quantize import Decoded
from privacy.vectors import file_root, read_total

Facts = dict[str, Any]


@dataclass(frozen=True)
class VerifiedCohort:
    """One cohort whose transcript, total and membership hold."""

    number: int
    survivors: tuple[int, ...]
    t2: bytes
    total: bytes  # H(total)
    lifted: NDArray[np.int64]  # (d + extras,)


def verify_total(job: Job, outcome: Outcome, survivors: int, path: Path) -> NDArray[np.int64]:
    """The integer sum in a downloaded total, (d + extras,), checked against the root that M10 names.

    Raises:
        ProtocolError: another root, or a garbled total.
    """
    size, bits = job.quantizer.total_size, job.rules.bits
    if file_root(path, size, bits) != outcome.root:
        raise ProtocolError("M10: the total fetched does not have the root that the outcome names")
    return job.quantizer.checked(read_total(path, size, bits), survivors)


def verify_cohort(job: Job, stage: int, start: bytes, outcome: Outcome, path: Path) -> VerifiedCohort:
    """Verify a released round from plan and roster alone.

    Raises:
        ProtocolError: transcript, total or header do not hold.
    """
    header = outcome.transcript.header
    if header != job.header(stage, header.round, start):
        raise ProtocolError("a release is of another plan, stage, roster or start adapter")
    verified = transcript.verify_transcript(job.context(header), outcome.transcript)
    if outcome.total != transcript.total_hash(verified.t2, outcome.root):
        raise ProtocolError("M10: the hash of the total does not belong to its Merkle root")
    lifted = verify_total(job, outcome, len(verified.survivors), path)
    return VerifiedCohort(header.round, verified.survivors, verified.t2, outcome.total, lifted)


def combine(job: Job, cohorts: Sequence[VerifiedCohort]) -> tuple[Decoded, Tensors]:
    """The mean over disjoint cohorts and the adapter it gives: start + server_lr * mean.

    Raises:
        ProtocolError: no cohorts, or one member in two of them.
    """
    members = [m for cohort in cohorts for m in cohort.survivors]
    if not members or len(set(members)) != len(members):
        raise ProtocolError("expected disjoint cohorts in a release, found a member twice or none at all")
    decoded = job.quantizer.decode_sum(np.sum([c.lifted for c in cohorts], axis=0, dtype=np.int64), len(members))
    tensors = release(start_adapter(job.plan.adapter), decoded.mean, job.plan.aggregation.server_lr, job.layout)
    return decoded, tensors


def manifest(job: Job, stage: int, cohorts: Sequence[VerifiedCohort], decoded: Decoded, tensors: Tensors) -> Facts:
    """What a release says about itself, the same at coordinator and sites."""
    return {
        "plan": job.plan.name,
        "plan_digest": job.plan_file.digest.hex(),
        "stage": stage,
        "base": {"name": job.plan.base.name, "digest": job.plan.base.digest},
        "adapter_digest": start_digest(tensors).hex(),
        "coordinates": job.quantizer.size,
        "total_weight": decoded.weight,
        "training_loss": round(decoded.loss, 6),
        "cohorts": [_cohort(job, cohort) for cohort in cohorts],
    }


def _cohort(job: Job, cohort: VerifiedCohort) -> Facts:
    alone = job.quantizer.decode_sum(cohort.lifted, len(cohort.survivors))
    return {
        "round": cohort.number,
        "survivors": [job.roster.name(m) for m in cohort.survivors],
        "total": cohort.total.hex(),
        "total_weight": alone.weight,
        "training_loss": round(alone.loss, 6),
    }
