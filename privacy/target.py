"""The target of a regression: a number with a public range, which models see as one from -1 to 1.

The range is the plan's and the same for all sites, so it says nothing of any record, and errors of all sites are in one
unit. A release says the scaled number: who uses it takes the range from plan or manifest, as :func:`unscaled` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

if TYPE_CHECKING:
    from privacy.plan import Plan


def _is_range(found: tuple[float, float]) -> tuple[float, float]:
    """``found``, or ValueError unless it has a middle and a half width that float64 can say."""
    if not 0 < half_width(found) < math.inf:
        raise ValueError("expected [low, high] with low < high")
    return found


#: (low, high), in the target's own unit.
Target = Annotated[tuple[float, float], AfterValidator(_is_range)]


def half_width(target: Target) -> float:
    """How much of the target's own unit the number 1 of a model is."""
    return (target[1] - target[0]) / 2


def scaled(value: float, target: Target) -> float:
    """A value of the range as a number from -1 to 1; rounding takes none beyond."""
    return min(1.0, max(-1.0, (value - target[0]) / half_width(target) - 1.0))


def unscaled(number: float, target: Target) -> float:
    """What a model said, in the target's own unit; it may lie outside the range."""
    return target[0] + (number + 1.0) * half_width(target)


def misfit(plan: Plan) -> str:
    """Why a plan's keys do not fit its being for regression, or for something else; empty if they do."""
    is_one = plan.task == "regression"
    for key, found, wanted in _keys(plan, is_one):
        if found != wanted:
            said = ("one" if wanted else "none", "one" if found else "none")
            return f'{key}: expected {said[0]} for task = "{plan.task}", found {said[1]}'
    if (plan.training.loss == "squared") != is_one:
        return (
            'training.loss: expected "squared" for task = "regression", and only for it, '
            f'found "{plan.training.loss}" for task = "{plan.task}"'
        )
    return ""


def _keys(plan: Plan, is_one: bool) -> Iterator[tuple[str, bool, bool]]:
    """(key, is it there, must it be there)."""
    yield "data.target", plan.data.target is not None, is_one
    if is_one:
        yield "data.labels", bool(plan.data.labels), False
        yield "aggregation.counted", plan.aggregation.counted is not None, False
    if (analytic := plan.aggregation.analytic) is not None:
        yield "aggregation.analytic.min_texts", analytic.min_texts is not None, is_one
        yield "aggregation.analytic.min_class_count", analytic.min_class_count is not None, not is_one
    if (evaluation := plan.evaluation) is not None:
        yield "evaluation.tolerance", evaluation.tolerance is not None, is_one
