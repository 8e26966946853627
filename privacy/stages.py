"""Where a stage starts: at the public start adapter, or at the release of the stage before.

Nobody is told where a stage starts. Coordinator, sites and auditors each compute it, by :func:`next_start`, from the
totals of the stage before that they verified themselves; its digest stands in the header of every round of the stage,
so who was shown other totals takes part in no round of it.

The evaluation starts from several adapters at once, its candidates; the digest is over all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from privacy.adapter import Tensors, start_digest
from privacy.errors import ProtocolError
from privacy.evaluation import Result, candidates_of, elected, results_of
from privacy.job import Job
from privacy.outcome import Combined, Facts, VerifiedCohort, combine, sums

CANDIDATES_LABEL = b"veilsum/1/candidates\0"


@dataclass(frozen=True)
class Start:
    """The whole adapter that a stage starts from."""

    #: Of an evaluation that of the first candidate, the base model.
    tensors: Tensors
    #: SHA-256 of the tensors, or over all candidates, as the headers of the stage have it.
    digest: bytes
    #: (round, H(total)) of the cohorts of the stage before that it was computed from; none in stage 1.
    cohorts: tuple[tuple[int, bytes], ...] = ()
    #: Number -> the adapter of a candidate, made or read anew; only of an evaluation.
    candidate: Callable[[int], Tensors] | None = None


def first_start(job: Job) -> Start:
    """The start of stage 1, from the plan's public seed; the caller checks that the plan pins it."""
    tensors = job.start_tensors()
    return Start(tensors, start_digest(tensors))


def next_start(job: Job, stage: int, before: Start, cohorts: Sequence[VerifiedCohort]) -> Start:
    """The start of a stage: the release of the stage before, or the candidates of an evaluation.

    Args:
        stage: the one that starts.
        before: where the stage before it started.
        cohorts: all cohorts of that stage that the release is over, verified.

    Raises:
        ProtocolError: no cohorts, one member in two of them, or a total that fewer than c + 1 signers recomputed in
            any of its blocks: who invents a total supplies a model made to measure.
    """
    for cohort in cohorts:
        if not cohort.certified:
            raise ProtocolError(f"round {cohort.number} has no outcome certificate: no stage starts from its total")
    totals = tuple((c.number, c.total) for c in cohorts)
    trained, job = job.at(stage - 1), job.at(stage)
    if not job.judging:
        tensors = combine(trained, cohorts, before.tensors).tensors
        return Start(tensors, start_digest(tensors), totals)

    def candidate(number: int) -> Tensors:
        found = candidates_of(job.plan)[number]
        if found.server_lr is not None:
            return combine(trained, cohorts, before.tensors, found.server_lr).tensors
        return job.start_tensors() if found.name == "base" else before.tensors

    return Start(candidate(0), candidates_digest(job, candidate), totals, candidate)


def candidates_digest(job: Job, candidate: Callable[[int], Tensors]) -> bytes:
    """SHA-256 over the digests of all candidates, in the order of the counts."""
    count = len(candidates_of(job.plan))
    return hashlib.sha256(CANDIDATES_LABEL + b"".join(start_digest(candidate(k)) for k in range(count))).digest()


def start_of(job: Job, stage: int, cohorts: Callable[[int, Start], Sequence[VerifiedCohort]]) -> Start:
    """The start of any stage, computed from stage 1 on.

    Args:
        cohorts: the verified cohorts of an earlier stage, given its number and where it started.

    Raises:
        ProtocolError: as :func:`next_start`.
    """
    start = first_start(job)
    for number in range(1, stage):
        start = next_start(job, number + 1, start, cohorts(number, start))
    return start


def release_of(job: Job, stage: int, cohorts: Sequence[VerifiedCohort], start: Start) -> Combined:
    """What a stage releases: the mean of what was trained, or the candidate that the held-out records elect.

    Raises:
        ProtocolError: no cohorts, a member in two of them, or garbled totals.
    """
    job = job.at(stage)
    if not job.judging:
        return combine(job, cohorts, start.tensors)
    assert start.candidate is not None
    extras = sums(job, cohorts)
    results = results_of(job.plan, extras)
    best = elected(results)
    facts = {"evaluation": {"elected": best.candidate.name, "candidates": [_shown(result) for result in results]}}
    return Combined(start.candidate(results.index(best)), extras["weight"], best.loss, facts)


def _shown(result: Result) -> Facts:
    return {
        "candidate": result.candidate.name,
        "records": result.records,
        "correct": result.correct,
        "accuracy": round(result.accuracy, 6),
        "loss": round(result.loss, 6),
    }


def each_candidate(job: Job, start: Start) -> Iterator[tuple[str, Tensors]]:
    """(name, adapter) of the candidates of an evaluation, one at a time."""
    assert start.candidate is not None
    for number, candidate in enumerate(candidates_of(job.plan)):
        yield candidate.name, start.candidate(number)
