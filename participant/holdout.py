"""Records that a site keeps out of training, to judge releases by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, Self, TypeVar

from privacy.errors import UserError
from privacy.plan import Plan

LABEL = b"veilsum/1/holdout\0"


class Splittable(Protocol):
    """Records of whatever task."""

    @property
    def texts(self) -> tuple[str, ...]:
        """What each is known by."""
        ...

    def some(self, positions: Sequence[int]) -> Self:
        """Those at these positions."""
        ...


R = TypeVar("R", bound=Splittable)


def split(examples: R, plan: Plan) -> tuple[R, R]:
    """(for training, held out) of a site's records.

    A record's own text decides, with the data set's name: equal texts stay together, every plan and stage on the data
    set holds out the same, and a record more or less moves no other. Without ``[evaluation]`` nothing is held out.

    Raises:
        UserError: nothing is left on one of the two sides.
    """
    if plan.evaluation is None:
        return examples, examples.some([])
    sides: tuple[list[int], list[int]] = ([], [])
    for number, text in enumerate(examples.texts):
        sides[_draw(plan.data.dataset, text) < plan.evaluation.holdout].append(number)
    if not all(sides):
        raise UserError(
            f"data set '{plan.data.dataset}': expected records for training and some held out, "
            f"found {len(sides[0])} and {len(sides[1])}",
            hint="the data set is too small for a plan with [evaluation]",
        )
    return examples.some(sides[0]), examples.some(sides[1])


def _draw(dataset: str, text: str) -> float:
    """A number in [0, 1) that hangs on data set and text alone."""
    digest = hashlib.sha256(LABEL + dataset.encode() + b"\0" + text.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)
