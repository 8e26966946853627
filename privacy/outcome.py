"""From verified rounds to a release: the same computation at coordinator, sites and auditors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy import merkle
from privacy.adapter import Tensors, release, start_adapter, start_digest
from privacy.errors import ProtocolError
from privacy.job import Job
from privacy.secagg import projection, transcript
from privacy.secagg.masking import BLOCK, MaskStreams, block_sizes, unpack
from privacy.secagg.messages import Evidence, Outcome
from privacy.secagg.quantize import Decoded
from privacy.secagg.transcript import VerifiedTranscript
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
    #: Every block of the total was recomputed by c + 1 signers: an outcome certificate.
    certified: bool = False
    #: The random projection was made by all survivors, and holds.
    projected: bool = False


def verify_total(job: Job, outcome: Outcome, survivors: int, path: Path) -> NDArray[np.int64]:
    """The integer sum in a downloaded total, (d + extras,), checked against the root that M10 names.

    Raises:
        ProtocolError: another root, or a garbled total.
    """
    size, bits = job.quantizer.total_size, job.rules.bits
    if file_root(path, size, bits) != outcome.root:
        raise ProtocolError("M10: the total fetched does not have the root that the outcome names")
    return job.quantizer.checked(read_total(path, size, bits), survivors)


def verify_cohort(job: Job, stage: int, start: bytes, evidence: Evidence, path: Path) -> VerifiedCohort:
    """Verify a released round from plan and roster alone.

    Raises:
        ProtocolError: transcript, total, header, an outcome signature or the projection do not hold.
    """
    outcome = evidence.outcome
    header = outcome.transcript.header
    if header != job.header(stage, header.round, start):
        raise ProtocolError("a release is of another plan, stage, roster or start adapter")
    context = job.context(header)
    verified = transcript.verify_transcript(context, outcome.transcript)
    if outcome.total != transcript.total_hash(verified.t2, outcome.root):
        raise ProtocolError("M10: the hash of the total does not belong to its Merkle root")
    lifted = verify_total(job, outcome, len(verified.survivors), path)
    for vote in evidence.votes:
        transcript.check_outcome_vote(context, verified.survivors, verified.t2, outcome.total, vote)
        transcript.check_nonce(verified.cohort, vote)
    blocks = len(block_sizes(job.quantizer.total_size))
    checked = {vote.sender: vote.body.blocks for vote in evidence.votes}
    certified = projection.uncertified(blocks, checked, job.rules.colluders) == 0
    projected = _verify_projection(verified, evidence, lifted)
    return VerifiedCohort(header.round, verified.survivors, verified.t2, outcome.total, lifted, certified, projected)


def _verify_projection(verified: VerifiedTranscript, evidence: Evidence, lifted: NDArray[np.int64]) -> bool:
    """``False`` where the projection was not made; raises where it was and does not hold."""
    if not evidence.projection:
        return False
    total = evidence.outcome.total
    transcript.check_nonces(verified.cohort, verified.survivors, verified.t2, total, evidence.votes)
    if tuple(share.sender for share in evidence.projection) != verified.survivors:
        raise ProtocolError("M13: expected a projection of every survivor")
    for share in evidence.projection:
        transcript.check_projection(verified.cohort.context, verified.survivors, verified.t2, total, share)
    key = projection.challenge({v.sender: v.body.nonce for v in evidence.votes}, total)
    if sum(share.body.value for share in evidence.projection) % projection.WORD != projection.project(key, lifted):
        raise ProtocolError("the random projection of the total is not that of the inputs: the total is wrong")
    return True


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
        "certified": cohort.certified,
        "projection": "holds" if cohort.projected else "inconclusive",
    }


def check_block(
    job: Job,
    verified: VerifiedTranscript,
    roots: Mapping[int, bytes],
    block: int,
    uploads: Mapping[int, tuple[bytes, Sequence[bytes]]],
    total: NDArray[np.int64],
) -> None:
    """Recompute one block of a total from the uploads that were committed before U3 was signed.

    Args:
        roots: survivor -> Merkle root of its M5.
        uploads: survivor -> (packed block, Merkle path).
        total: (d + extras,) signed integers, already checked against the root of M10.

    Raises:
        ProtocolError: a block is not the committed one, or the sum without its masks is not the total.
    """
    counts, bits = block_sizes(job.quantizer.total_size), job.rules.bits
    tile = np.zeros(counts[block], np.uint32)
    for member in verified.survivors:
        data, path = uploads[member]
        if not merkle.verify(merkle.leaf_hash(data), block, len(counts), path, roots[member]):
            raise ProtocolError(f"audit: block {block} is not the one that member {member} committed to")
        tile += unpack(data, counts[block], bits)
    off = verified.streams.inverse()
    MaskStreams(off.plus, off.minus, bits, block * BLOCK).apply(tile)
    if not np.array_equal(job.quantizer.lift(tile), total[block * BLOCK : block * BLOCK + counts[block]]):
        raise ProtocolError(f"audit: block {block} of the total is not the sum of the uploads")
