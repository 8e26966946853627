"""May one more job run? The RDP filter of one data set, at the one order that was fixed before its first job.

Renyi divergences of one fixed order add up also where each job is chosen in sight of the results of those before
(Feldman and Zrnic 2021, arXiv:2008.11193; Lecuyer 2021, arXiv:2103.01379). Tighter ways to compose are for reports:
stopping when a PLD reaches the budget is no valid filter (arXiv:2602.06756). One filter serves a data set, whoever
asks for a job.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from privacy.budget.accounting import epsilon_of_rdp, rdp
from privacy.budget.book import Book, Job
from privacy.budget.entries import Policy
from privacy.budget.events import DpSgd, Mechanism, Unprotected, mechanism_from_json


@dataclass(frozen=True)
class Standing:
    """What is charged to a data set before the job in question.

    Attributes:
        charged: mechanisms of all jobs that count, open reservations in full.
        admitted: the job in question is among them already.
    """

    policy: Policy
    charged: tuple[Mechanism, ...] = ()
    admitted: bool = False

    @classmethod
    def of(cls, book: Book, plan_digest: str, stage: int) -> Standing:
        """The standing of a data set towards one plan file and stage.

        Raises:
            ProtocolError: a mechanism in the ledger that this version does not know.
        """
        return cls(book.policy, mechanisms_of(book.charged()), book.find(plan_digest, stage) is not None)

    def epsilon(self, *more: Mechanism) -> float:
        """Enforced epsilon of what is charged and of ``more``, at the policy's order and delta; may be infinite."""
        return enforced_epsilon(self.policy, (*self.charged, *more))


def mechanisms_of(jobs: Sequence[Job]) -> tuple[Mechanism, ...]:
    """What these jobs do, from their reservations; raises ProtocolError for what this version does not know."""
    return tuple(mechanism_from_json(job.reserve.mechanism) for job in jobs)


def enforced_epsilon(policy: Policy, mechanisms: Sequence[Mechanism]) -> float:
    """Epsilon that the filter holds against the budget; infinite with one job that has no privacy."""
    if any(isinstance(m, Unprotected) for m in mechanisms):
        return math.inf
    if not mechanisms:
        return 0.0
    total = math.fsum(rdp(m, policy.order) for m in mechanisms)
    return max(0.0, epsilon_of_rdp(total, policy.order, float(policy.delta)))


def mismatch(policy: Policy, mechanism: DpSgd) -> str | None:
    """In what a plan's terms promise less than the budget is about; a plan may be stricter."""
    if mechanism.adjacency != policy.adjacency:
        return f"adjacency '{mechanism.adjacency}', the budget is for '{policy.adjacency}'"
    if Decimal(mechanism.delta) > Decimal(policy.delta):
        return f"delta {mechanism.delta}, the budget allows {policy.delta}"
    if policy.unit == "user" and mechanism.unit != "user":
        return "unit 'record', the budget is for users"
    if policy.unit == "user" and mechanism.max_records_per_unit < policy.max_records_per_unit:
        found, wanted = mechanism.max_records_per_unit, policy.max_records_per_unit
        return f"max_records_per_unit {found}, users of this data set have up to {wanted}"
    return None


def objection(standing: Standing, mechanism: Mechanism, times: int = 1) -> str | None:
    """Why a job may not run on this data set; ``None`` if it may. Says what it would cost and what is left.

    Args:
        times: jobs with this mechanism that are to run one after another, one in each stage of a plan.
    """
    policy = standing.policy
    if standing.admitted or policy.epsilon is None:
        return None
    terms = f"order {policy.order}, delta {policy.delta}"
    if isinstance(mechanism, Unprotected):
        return f"has no [privacy], and the data set has a budget of epsilon {policy.epsilon} ({terms})"
    if not isinstance(mechanism, DpSgd):
        return f"has a mechanism that no budget can be charged with: {type(mechanism).__name__}"
    if found := mismatch(policy, mechanism):
        return f"has {found}"
    jobs, for_what = (mechanism,) * times, "alone" if times == 1 else f"in {times} stages"
    spent, alone = standing.epsilon(), enforced_epsilon(policy, jobs)
    after, budget = standing.epsilon(*jobs), float(policy.epsilon)
    if after <= budget:
        return None
    if math.isinf(spent):
        return f"meets a spent budget of epsilon {policy.epsilon}: a job without privacy ran on this data set before"
    return (
        f"would cost epsilon {alone:.3f} {for_what} and bring the data set to {after:.3f} of {policy.epsilon}; "
        f"{spent:.3f} is spent or reserved, {budget - spent:.3f} is left ({terms})"
    )
