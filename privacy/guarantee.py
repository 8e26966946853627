"""The section ``[privacy]`` of a plan: which guarantee a site's training gives, in public constants only.

Nothing here may depend on a site's records: the sampling rate, the divisor of a step and the size that weighs a site
are the plan's, since a noise scale or a weight computed from the real number of records would tell it (opacus#819).
What the numbers amount to is computed in ``privacy/budget``, by site and auditor alike.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Literal

from pydantic import Field, model_validator

from privacy.settings import Section

#: Numbers that decide about privacy are decimal strings: no rule for printing floats can change them.
Number = Annotated[str, Field(pattern=r"^[0-9]{1,7}(\.[0-9]{1,12})?(e-[0-9]{1,2})?$")]
Unit = Literal["record", "user"]
Count = Annotated[int, Field(ge=1, le=1 << 30)]

#: What a mechanism's parameters may be; ``privacy/budget/events.py`` refuses the rest again, from any ledger.
MIN_SIGMA, MAX_SIGMA = Decimal("0.2"), Decimal(100)
MAX_DELTA = Decimal("0.01")
MAX_EPSILON = Decimal(50)
TINY = Decimal("1e-20")
#: Decimals that a number may have once it is written without an exponent, as a ledger has it.
MAX_DECIMALS = 30
MAX_CLIP = Decimal(1000000)
MAX_STEPS = 10**6
#: Room for rounding in a prior that is written in decimals.
PRIOR_SLACK = 1e-3


class Privacy(Section):
    """DP-SGD at every site with full noise: (epsilon, delta) for one unit of one site's data set."""

    #: Whose presence is hidden: one record's, or a user's with at most ``max_records_per_unit`` records.
    unit: Unit
    #: Most records of one user; 1 for records.
    max_records_per_unit: Annotated[int, Field(ge=1, le=64)] = 1
    #: Neighbouring data sets: a unit is added or removed, or its records are replaced by nothing of the same number.
    adjacency: Literal["add-remove", "zero-out"] = "add-remove"
    #: The guarantee of one training, from which the noise follows; this or sigma.
    epsilon: Number | None = None
    #: The noise multiplier: the noise of a step has standard deviation sigma C.
    sigma: Number | None = None
    #: The delta of the guarantee.
    delta: Number
    #: C, the largest L2 norm of one record's gradient.
    clip: Number
    #: q, the probability with which a record is in a step's batch (Poisson sampling).
    rate: Number
    #: Of one training.
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    #: What the noised sum of a step is divided by, whatever the size of the batch.
    nominal_batch: Count
    #: What a site counts for where sites count by size, whatever its real number of records.
    nominal_size: Count
    #: Class prior of the logit-adjusted loss, one number per label; uniform where empty.
    prior: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()

    @model_validator(mode="after")
    def _one_of_guarantee_and_noise(self) -> Privacy:
        if (self.epsilon is None) == (self.sigma is None):
            found = "neither" if self.epsilon is None else "both"
            raise ValueError(f"privacy: expected exactly one of epsilon and sigma, found {found}")
        return self

    @model_validator(mode="after")
    def _numbers_are_in_range(self) -> Privacy:
        for name, least, most in (
            ("epsilon", TINY, MAX_EPSILON),
            ("sigma", MIN_SIGMA, MAX_SIGMA),
            ("delta", TINY, MAX_DELTA),
            ("clip", TINY, MAX_CLIP),
            ("rate", TINY, Decimal(1)),
        ):
            text = getattr(self, name)
            if text is None:
                continue
            value = Decimal(text)
            if not least <= value <= most or (name == "delta" and value == most):
                raise ValueError(f"privacy.{name}: expected a number from {least} to {most}, found {text}")
            if value.normalize().as_tuple().exponent < -MAX_DECIMALS:  # type: ignore[operator]  # finite, so an int
                raise ValueError(f"privacy.{name}: expected at most {MAX_DECIMALS} decimals, found {text}")
        return self

    @model_validator(mode="after")
    def _unit_fits_its_bound(self) -> Privacy:
        if self.unit == "record" and self.max_records_per_unit != 1:
            raise ValueError(
                f"privacy.max_records_per_unit: expected 1 for records, found {self.max_records_per_unit}; "
                'a person with several records needs unit = "user"'
            )
        return self

    @model_validator(mode="after")
    def _nominal_values_agree(self) -> Privacy:
        expected = float(self.rate) * self.nominal_size
        if not expected / 2 <= self.nominal_batch <= max(1.0, 2 * expected):
            raise ValueError(
                f"privacy.nominal_batch: expected about rate * nominal_size = {expected:.4g}, "
                f"found {self.nominal_batch}"
            )
        return self

    @model_validator(mode="after")
    def _prior_is_one(self) -> Privacy:
        if self.prior and abs(sum(self.prior) - 1) > PRIOR_SLACK:
            raise ValueError(f"privacy.prior: expected numbers that sum to 1, found {sum(self.prior):.4g}")
        return self


def unsuitable(tensor: str) -> str:
    """Why the module or tensor of this name has no per-example gradient that can be bounded; empty if it may have.

    The model itself is asked again before training (``participant/self_test.py``); this tells it from the plan.
    """
    parts = tensor.lower().replace(".", "_").split("_")
    if {"expert", "experts"} & set(parts):
        return "an expert sees tokens, not examples, so each token's gradient would be clipped by itself"
    if any(part.startswith(("embed", "wte", "wpe")) for part in parts):
        return "a trained embedding has no per-example gradient here"
    return ""
