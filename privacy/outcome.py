"""From verified rounds to a release: the same computation at coordinator, sites and auditors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy import merkle
from privacy.adapter import Tensors, start_digest
from privacy.errors import ProtocolError
from privacy.job import Job
from privacy.methods import Rounding, merged
from privacy.secagg import projection, transcript
from privacy.secagg.masking import BLOCK, MaskStreams, block_sizes, packed_bytes, unpack
from privacy.secagg.messages import Evidence, Outcome, OutcomeVote
from privacy.secagg.quantize import Quantizer, mean_loss
from privacy.secagg.signed import Signed
from privacy.secagg.transcript import VerifiedTranscript
from privacy.vectors import block_start, read_blocks

Facts = dict[str, Any]


@dataclass(frozen=True)
class Total:
    """A verified total on this disk, packed; read again tile by tile, so that memory does not grow with it."""

    path: Path
    quantizer: Quantizer

    def tiles(self) -> Iterator[NDArray[np.int64]]:
        """Its signed integers, (d + extras,) in all, block by block."""
        size, bits = self.quantizer.total_size, self.quantizer.bits
        for block, count in zip(read_blocks(self.path, size, bits), block_sizes(size), strict=True):
            yield self.quantizer.lift(unpack(block, count, bits))

    def block(self, index: int) -> NDArray[np.int64]:
        """The signed integers of one block."""
        bits, count = self.quantizer.bits, block_sizes(self.quantizer.total_size)[index]
        with self.path.open("rb") as file:
            file.seek(block_start(index, bits))
            return self.quantizer.lift(unpack(file.read(packed_bytes(count, bits)), count, bits))

    def extras(self) -> NDArray[np.int64]:
        """The coordinates behind the delta."""
        size = self.quantizer.size
        first = size // BLOCK
        blocks = [self.block(index) for index in range(first, len(block_sizes(self.quantizer.total_size)))]
        return np.concatenate(blocks)[size - first * BLOCK :]


@dataclass(frozen=True)
class VerifiedCohort:
    """One cohort whose transcript, total and membership hold."""

    number: int
    survivors: tuple[int, ...]
    t2: bytes
    total: bytes  # H(total)
    sums: Total
    #: Every block of the total was recomputed by c + 1 signers: an outcome certificate.
    certified: bool = False
    #: The random projection was made by all survivors, and holds.
    projected: bool = False


def verify_total(job: Job, outcome: Outcome, survivors: int, path: Path) -> Total:
    """The integer sum in a downloaded total, checked against the root that M10 names.

    Raises:
        ProtocolError: another root, or a garbled total.
    """
    quantizer, hashes, low = job.quantizer, [], 0
    size, bits = quantizer.total_size, job.rules.bits
    garbled: ProtocolError | None = None
    for block, count in zip(read_blocks(path, size, bits), block_sizes(size), strict=True):
        hashes.append(merkle.leaf_hash(block))
        try:
            quantizer.check_part(quantizer.lift(unpack(block, count, bits)), low, survivors)
        except ProtocolError as error:  # a changed file is garbled too: the root says whose fault it is
            garbled = garbled or error
        low += count
    if merkle.root(hashes) != outcome.root:
        raise ProtocolError("M10: the total fetched does not have the root that the outcome names")
    if garbled:
        raise garbled
    return Total(path, quantizer)


def is_certified(job: Job, votes: Iterable[Signed[OutcomeVote]]) -> bool:
    """Did c + 1 signers of one outcome recompute every block? (The signatures are checked elsewhere.)"""
    checked = {vote.sender: vote.body.blocks for vote in votes}
    blocks = len(block_sizes(job.quantizer.total_size))
    return projection.uncertified(blocks, checked, job.rules.colluders) == 0


def verify_cohort(job: Job, stage: int, start: bytes, evidence: Evidence, path: Path) -> VerifiedCohort:
    """Verify a released round from plan and roster alone.

    Raises:
        ProtocolError: transcript, total, header, an outcome signature or the projection do not hold.
    """
    job = job.at(stage)
    outcome = evidence.outcome
    header = outcome.transcript.header
    if header != job.header(stage, header.round, start):
        raise ProtocolError("a release is of another plan, stage, roster or start adapter")
    context = job.context(header)
    verified = transcript.verify_transcript(context, outcome.transcript)
    if outcome.total != transcript.total_hash(verified.t2, outcome.root):
        raise ProtocolError("M10: the hash of the total does not belong to its Merkle root")
    sums = verify_total(job, outcome, len(verified.survivors), path)
    for vote in evidence.votes:
        transcript.check_outcome_vote(context, verified.survivors, verified.t2, outcome.total, vote)
        transcript.check_nonce(verified.cohort, vote)
    certified, projected = is_certified(job, evidence.votes), _verify_projection(verified, evidence, sums)
    return VerifiedCohort(header.round, verified.survivors, verified.t2, outcome.total, sums, certified, projected)


def _verify_projection(verified: VerifiedTranscript, evidence: Evidence, sums: Total) -> bool:
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
    if sum(share.body.value for share in evidence.projection) % projection.WORD != projection.project(
        key, sums.tiles()
    ):
        raise ProtocolError("the random projection of the total is not that of the inputs: the total is wrong")
    return True


@dataclass(frozen=True)
class Combined:
    """The release of a stage: the whole adapter, and what the totals say beside it."""

    tensors: Tensors
    weight: int
    loss: float
    #: What the manifest says of the method: an error that was measured, a ridge that was used.
    facts: Facts = field(default_factory=dict)


def combine(
    job: Job, cohorts: Sequence[VerifiedCohort], start: Tensors | None = None, server_lr: float | None = None
) -> Combined:
    """The mean over disjoint cohorts and the adapter it gives by the plan's method. O(d) memory: the adapter.

    Args:
        job: at the stage of the cohorts, which is one of training.
        start: the whole adapter that the cohorts' stage starts from; without it that of stage 1.
        server_lr: instead of the plan's.

    Raises:
        ProtocolError: no cohorts, or one member in two of them.
    """
    assert not job.judging, "counts have no mean"
    plan = job.plan if server_lr is None else job.plan.with_server_lr(server_lr)
    extras, members = sums(job, cohorts), sum(len(cohort.survivors) for cohort in cohorts)
    weight = extras["weight"]
    mean = _mean(job, cohorts, weight)
    rounding = Rounding(job.quantizer.max_weight / (job.quantizer.qmax * weight), members)
    found = merged(job.start_tensors() if start is None else start, mean, plan, rounding, job.factors())
    return Combined(found.tensors, weight, mean_loss(extras), found.facts)


def sums(job: Job, cohorts: Sequence[VerifiedCohort]) -> dict[str, int]:
    """The extras of all cohorts together; raises ProtocolError for members in two of them, or garbled totals."""
    members = [m for cohort in cohorts for m in cohort.survivors]
    if not members or len(set(members)) != len(members):
        raise ProtocolError("expected disjoint cohorts in a release, found a member twice or none at all")
    return job.quantizer.decode_extras(np.add.reduce([c.sums.extras() for c in cohorts]), len(members))


def _mean(job: Job, cohorts: Sequence[VerifiedCohort], weight: int) -> NDArray[np.float32]:
    """Weighted mean delta (d,) float32 over all cohorts, tile by tile."""
    mean, low = np.empty(job.quantizer.size, np.float32), 0
    for tiles in zip(*(c.sums.tiles() for c in cohorts), strict=True):
        lifted = np.add.reduce(tiles)[: job.quantizer.size - low]
        mean[low : low + len(lifted)] = job.quantizer.decode_part(lifted, weight)
        low += len(lifted)
    return mean


def manifest(
    job: Job,
    stage: int,
    cohorts: Sequence[VerifiedCohort],
    combined: Combined,
    start: bytes | None = None,
    before: Sequence[tuple[int, bytes]] = (),
) -> Facts:
    """What a release says about itself, the same at coordinator and sites.

    Args:
        start: digest of the adapter that the stage started from; without it that of stage 1.
        before: (round, H(total)) of the cohorts of the stage before that it was computed from.
    """
    job = job.at(stage)
    return {
        "plan": job.plan.name,
        "plan_digest": job.plan_file.digest.hex(),
        "stage": stage,
        "stages": job.plan.stages,
        "base": {"name": job.plan.base.name, "digest": job.plan.base.digest},
        "start": {
            "digest": job.plan.adapter.digest if start is None else start.hex(),
            "cohorts": [{"round": number, "total": total.hex()} for number, total in before],
        },
        "adapter_digest": start_digest(combined.tensors).hex(),
        "coordinates": job.quantizer.size,
        "total_weight": combined.weight,
        **combined.facts,
        **({} if job.judging else _training(job, combined.loss)),
        "cohorts": [_cohort(job, cohort) for cohort in cohorts],
    }


def _training(job: Job, loss: float) -> Facts:
    """An analytic head is not trained: it has no training loss."""
    return {"training_loss": round(loss, 6)} if job.plan.aggregation.analytic is None else {}


def _cohort(job: Job, cohort: VerifiedCohort) -> Facts:
    extras = sums(job, [cohort])
    return {
        "round": cohort.number,
        "survivors": [job.roster.name(m) for m in cohort.survivors],
        "total": cohort.total.hex(),
        "total_weight": extras["weight"],
        **({} if job.judging else _training(job, mean_loss(extras))),
        "certified": cohort.certified,
        "projection": "holds" if cohort.projected else "inconclusive",
    }


def check_block(
    job: Job,
    verified: VerifiedTranscript,
    roots: Mapping[int, bytes],
    block: int,
    uploads: Mapping[int, tuple[bytes, Sequence[bytes]]],
    expected: NDArray[np.int64],
) -> None:
    """Recompute one block of a total from the uploads that were committed before U3 was signed.

    Args:
        roots: survivor -> Merkle root of its M5.
        uploads: survivor -> (packed block, Merkle path).
        expected: the signed integers of this block, of a total already checked against the root of M10.

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
    if not np.array_equal(job.quantizer.lift(tile), expected):
        raise ProtocolError(f"audit: block {block} of the total is not the sum of the uploads")
