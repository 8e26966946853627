"""An analytic head first, and then the adapter with that head fixed for all sites ("aligned").

Stage 1 of such a plan is that of any analytic head: statistics in, the ridge solution of all records out, nothing
trained. Every later stage trains LoRA's B alone, from the release of the stage before, behind the head of stage 1. All
sites then move their features towards the same targets, whatever classes they have, so what they learn can be averaged
(docs/decisions/0013-aligned.md).

There is one plan file, and its digest is in every header. A stage sees another plan, made here, and an ordinary one:
whoever computes the size of a vector, trains, or merges a mean need not know that there are such plans.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from privacy.aggregation import Aggregation, Method

if TYPE_CHECKING:
    from privacy.plan import Plan

#: Methods that sum B alone, or B with statistics that training leaves beside it.
METHODS: tuple[Method, ...] = ("freeze_a", "regmean", "fisher")


def misfit(plan: Plan) -> str | None:
    """What is wrong in a plan about a head that is fixed while the adapter is trained; None if nothing is."""
    method, train = plan.aggregation.method, plan.adapter.train
    if (plan.training.sharpness is not None) != plan.aligned:
        return (
            'training.sharpness: expected this key with head = "analytic" and stages of 2 or more, and only with both'
        )
    if not plan.aligned:
        if train == "lora":
            return (
                'adapter.train: expected "lora" with head = "analytic" and stages of 2 or more, and only with both: '
                "a fixed head is computed in a stage before, or stays at zero"
            )
        return None
    if train != "lora":
        return f'adapter.train: expected "lora" beside an analytic head and {plan.stages} stages, found "{train}"'
    if method not in METHODS:
        return (
            f'aggregation.method: expected {", ".join(METHODS[:-1])} or {METHODS[-1]} with adapter.train = "lora", '
            f'found "{method}": A and the factors stay as they start, only B is trained'
        )
    return None


def plan_at(plan: Plan, stage: int) -> Plan:
    """The plan as one of its stages sees it; the plan itself if its head is not fixed, and in the evaluation.

    Stage 1 sees a plan with an analytic head alone; later stages one without it, in which B is trained.
    """
    if not plan.aligned or plan.judges(stage):
        return plan
    if stage > 1:
        trained = plan.aggregation.model_copy(update={"head": "trained", "analytic": None})
        return plan.model_copy(update={"aggregation": trained})
    alone = Aggregation(head="analytic", analytic=plan.aggregation.analytic)
    adapter = plan.adapter.model_copy(update={"train": "head"})
    return plan.model_copy(update={"adapter": adapter, "aggregation": alone})
