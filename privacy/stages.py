"""Where a stage starts: at the public start adapter, or at the release of the stage before.

Nobody is told where a stage starts. Coordinator, sites and auditors each compute it, by :func:`next_start`, from the
totals of the stage before that they verified themselves; its digest stands in the header of every round of the stage,
so who was shown other totals takes part in no round of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from privacy.adapter import Tensors, start_digest
from privacy.errors import ProtocolError
from privacy.job import Job
from privacy.outcome import VerifiedCohort, combine


@dataclass(frozen=True)
class Start:
    """The whole adapter that a stage starts from."""

    tensors: Tensors
    #: SHA-256 of the tensors, as the headers of the stage have it.
    digest: bytes
    #: (round, H(total)) of the cohorts of the stage before that it was computed from; none in stage 1.
    cohorts: tuple[tuple[int, bytes], ...] = ()


def first_start(job: Job) -> Start:
    """The start of stage 1, from the plan's seed; whether it is the one that the plan pins, the caller checks."""
    tensors = job.start_tensors()
    return Start(tensors, start_digest(tensors))


def next_start(job: Job, before: Start, cohorts: Sequence[VerifiedCohort]) -> Start:
    """The start of a stage: the release of the stage before.

    Args:
        before: where that stage started.
        cohorts: all cohorts of it that the release is over, verified.

    Raises:
        ProtocolError: no cohorts, one member in two of them, or a total that fewer than c + 1 signers recomputed in
            any of its blocks: who invents a total supplies a model made to measure.
    """
    for cohort in cohorts:
        if not cohort.certified:
            raise ProtocolError(f"round {cohort.number} has no outcome certificate: no stage starts from its total")
    tensors = combine(job, cohorts, before.tensors).tensors
    return Start(tensors, start_digest(tensors), tuple((c.number, c.total) for c in cohorts))


def start_of(job: Job, stage: int, cohorts: Callable[[int, Start], Sequence[VerifiedCohort]]) -> Start:
    """The start of any stage, computed from stage 1 on.

    Args:
        cohorts: the verified cohorts of an earlier stage, given its number and where it started.

    Raises:
        ProtocolError: as :func:`next_start`.
    """
    start = first_start(job)
    for number in range(1, stage):
        start = next_start(job, start, cohorts(number, start))
    return start
