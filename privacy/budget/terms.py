"""From a plan to the mechanism that a site's ledger reserves: site and auditor derive the same from the plan alone."""

from __future__ import annotations

from decimal import Decimal
from functools import lru_cache

from privacy.budget.accounting import calibrate
from privacy.budget.events import DpSgd, Mechanism, Unprotected
from privacy.errors import UserError
from privacy.guarantee import Privacy, Unit
from privacy.plan import Plan

#: sigma / nominal_batch, the noise of one step beside a signal of at most C: above this a model learns little.
NOISE_WARNING = 0.01


def canonical(number: str) -> str:
    """A decimal number as a ledger has it: no exponent, no zeros that say nothing.

    >>> canonical("1e-4"), canonical("1.50"), canonical("100")
    ('0.0001', '1.5', '100')
    """
    return f"{Decimal(number).normalize():f}"


@lru_cache(maxsize=64)
def _noise_for(epsilon: str, delta: str, rate: str, steps: int, unit: Unit, records: int) -> str:
    return calibrate(epsilon, delta, rate, steps, unit, records)


def sigma_of(privacy: Privacy) -> str:
    """The noise multiplier: the plan's own, or the smallest of three decimals that keeps its epsilon (seconds)."""
    if privacy.sigma is not None:
        return canonical(privacy.sigma)
    assert privacy.epsilon is not None  # the section has exactly one of the two
    delta, rate = canonical(privacy.delta), canonical(privacy.rate)
    terms = (canonical(privacy.epsilon), delta, rate, privacy.steps, privacy.unit, privacy.max_records_per_unit)
    try:
        return _noise_for(*terms)
    except ValueError as error:
        raise UserError(
            f"plan: expected an epsilon that noise in range can keep, found {privacy.epsilon} at delta {privacy.delta}",
            hint="a larger epsilon, fewer steps or a lower rate",
        ) from error


def mechanism(plan: Plan) -> Mechanism:
    """What training under this plan does with a data set, before any of it runs.

    Raises:
        UserError: no noise in the accepted range keeps the plan's epsilon.
    """
    privacy = plan.privacy
    if privacy is None:
        return Unprotected()
    return DpSgd(
        rate=canonical(privacy.rate),
        sigma=sigma_of(privacy),
        clip=canonical(privacy.clip),
        delta=canonical(privacy.delta),
        steps=privacy.steps,
        nominal_batch=privacy.nominal_batch,
        nominal_size=privacy.nominal_size,
        unit=privacy.unit,
        max_records_per_unit=privacy.max_records_per_unit,
        adjacency=privacy.adjacency,
        sampling="poisson",
    )


def noise_warning(plan: Plan) -> str:
    """Why this plan's noise may drown what there is to learn, for whoever drafts or runs it; empty if it need not."""
    if plan.privacy is None:
        return ""
    ratio = float(sigma_of(plan.privacy)) / plan.privacy.nominal_batch
    if ratio <= NOISE_WARNING:
        return ""
    or_head = ", or training the head alone" if plan.adapter.train == "all" and plan.adapter.head else ""
    return (
        f"sigma / nominal_batch is {ratio:.3g}, above {NOISE_WARNING}: expect little from many trained coordinates; "
        f"a larger nominal_batch (with rate) helps{or_head}"
    )
