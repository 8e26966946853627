"""Federated evaluation: one more stage whose vector is counts, and the vote on how far the mean is applied.

Each site puts records that it kept out of training to every candidate: the base model, where the last stage started,
and its release at each ``server_lr`` that the plan names. It sends how many records it looked at, and for each
candidate the number of right answers and the sum of losses; the round adds them up like any vector, so that totals are
all anybody learns (protocol section 6). Right answers and not choices: a unanimous vote would tell each site's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from privacy.errors import ProtocolError
from privacy.plan import Plan
from privacy.secagg.quantize import LOSS_SCALE, MAX_LOSS, Extra, Quantizer

#: Held-out records that one site may count.
MAX_RECORDS = 1 << 30


@dataclass(frozen=True)
class Candidate:
    """What is evaluated.

    Attributes:
        name: as manifests have it.
        server_lr: of a release of the last stage; None where it is a start.
    """

    name: str
    server_lr: float | None = None


def candidates_of(plan: Plan) -> tuple[Candidate, ...]:
    """All candidates of a plan with ``[evaluation]``, in the order of the counts."""
    assert plan.evaluation is not None
    starts = [Candidate("base")] + ([Candidate("previous")] if plan.stages > 1 else [])
    rates = plan.evaluation.server_lr or (plan.aggregation.server_lr,)
    return (*starts, *(Candidate(f"server_lr {rate:g}", rate) for rate in rates))


def counts_quantizer(plan: Plan) -> Quantizer:
    """The layout of the counts: no delta, and as extras the records, then right answers and loss of each candidate."""
    each = [
        extra
        for number in range(len(candidates_of(plan)))
        for extra in (
            Extra(f"correct-{number}", MAX_RECORDS),
            Extra(f"loss-{number}", MAX_RECORDS * MAX_LOSS * LOSS_SCALE),
        )
    ]
    r = plan.round
    return Quantizer(0, r.bits, r.max_cohort, 1.0, MAX_RECORDS, (Extra("weight", MAX_RECORDS), *each))


@dataclass(frozen=True)
class Counts:
    """What one candidate did on held-out records."""

    #: Of a regression: off by no more than the tolerance.
    correct: int
    #: Sum of the cross-entropies in nats; of a regression of the squared errors on the scaled target.
    loss: float


def encode_counts(records: int, counts: Sequence[Counts]) -> dict[str, int]:
    """One site's counts as the extras of its vector.

    Raises:
        ValueError: no records, or more right answers than records.
    """
    if not 1 <= records <= MAX_RECORDS or any(not 0 <= c.correct <= records for c in counts):
        raise ValueError(f"expected right answers of 1 to {MAX_RECORDS} records, found {counts} of {records}")
    most = float(records * MAX_LOSS)
    found = {"weight": records}
    for number, one in enumerate(counts):
        found[f"correct-{number}"] = one.correct
        loss = most if math.isnan(one.loss) else min(most, max(0.0, one.loss))
        found[f"loss-{number}"] = round(loss * LOSS_SCALE)
    return found


@dataclass(frozen=True)
class Result:
    """What a candidate did on the held-out records of all sites together."""

    candidate: Candidate
    records: int
    correct: int
    #: Mean cross-entropy, nats, or mean squared error on the scaled target.
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.records


def results_of(plan: Plan, extras: Mapping[str, int]) -> tuple[Result, ...]:
    """The results in a total's extras, one for each candidate.

    Raises:
        ProtocolError: more right answers than records, or more loss than so many records can have.
    """
    records, found = extras["weight"], []
    for number, candidate in enumerate(candidates_of(plan)):
        correct, loss = extras[f"correct-{number}"], extras[f"loss-{number}"]
        if correct > records or loss > records * MAX_LOSS * LOSS_SCALE:
            raise ProtocolError(f"garbled counts: {correct} right answers of {records} records for {candidate.name}")
        found.append(Result(candidate, records, correct, loss / LOSS_SCALE / records))
    return tuple(found)


def elected(results: Sequence[Result]) -> Result:
    """The release with the most right answers; of equals the one with the smaller loss, then the first in the plan."""
    releases = [result for result in results if result.candidate.server_lr is not None]
    return min(releases, key=lambda result: (-result.correct, result.loss))
