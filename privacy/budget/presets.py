"""Sections ``[privacy]`` to begin with, by the size of a site's data set; whoever drafts a plan may change them.

Batch and steps follow what is known to serve at each size: large batches, few steps, and delta well below one in the
number of records. The noise is calibrated when the plan is drafted and stands in it, so that no site computes another.
"""

from __future__ import annotations

from dataclasses import dataclass

from privacy.budget.accounting import calibrate
from privacy.budget.terms import canonical
from privacy.errors import UserError
from privacy.guarantee import Unit

#: C where the plan's author has no reason for another; never tuned on norms of private gradients.
CLIP = "1"


@dataclass(frozen=True)
class Preset:
    """For data sets of about ``size`` records."""

    size: int
    batch: int
    steps: int
    delta: str


PRESETS = (
    Preset(500, 128, 40, "0.0001"),
    Preset(2_000, 256, 60, "0.00001"),
    Preset(10_000, 512, 150, "0.000001"),
    Preset(50_000, 1_024, 300, "0.000001"),
)


def preset_for(size: int) -> Preset:
    """The preset of the largest size that does not exceed ``size``; the smallest for a smaller one."""
    return max((p for p in PRESETS if p.size <= size), key=lambda p: p.size, default=PRESETS[0])


def draft_privacy(size: int, epsilon: str, *, unit: Unit = "record", max_records_per_unit: int = 1) -> str:
    """The text of a section ``[privacy]`` for sites of ``size`` records each, give or take; takes seconds.

    Raises:
        UserError: a size too small to hide anybody in, an epsilon that is no number, or one no noise in range keeps.
    """
    if size < 2:
        raise UserError(f"draft: expected a size of at least 2 records, found {size}")
    preset = preset_for(size)
    # At most half of a small data set: sampling is what makes a step cheap.
    batch = min(preset.batch, max(1, size // 2))
    rate = canonical(f"{batch / size:.4f}")
    try:
        sigma = calibrate(canonical(epsilon), preset.delta, rate, preset.steps, unit, max_records_per_unit)
    except (ValueError, ArithmeticError) as error:
        raise UserError(
            f"draft: expected an epsilon that noise can keep, found {epsilon!r}",
            hint="name a number such as 8; for users with many records a larger one, or fewer records each",
        ) from error
    return f"""\
[privacy]  # every number is public and the same at every site, whatever its records
unit = "{unit}"
max_records_per_unit = {max_records_per_unit}
adjacency = "add-remove"
# Noise multiplier that keeps epsilon {canonical(epsilon)} at this delta, by the PLD accountant, rounded up.
sigma = "{sigma}"
delta = "{preset.delta}"
clip = "{CLIP}"  # largest L2 norm of one record's gradient
rate = "{rate}"  # chance of a record to be in a step's batch
steps = {preset.steps}
nominal_batch = {batch}  # what a noised sum is divided by, whatever the batch
nominal_size = {size}  # what a site counts for, whatever its records
prior = []  # class prior of the loss, one number a label; empty is uniform. Never counted from the data
"""
