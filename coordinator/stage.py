"""Cohorts of one stage: who may aggregate together, when a cohort opens, and when the stage is over; pure.

Cohorts of one stage are disjoint. A member that has been in a released round of the stage is done with it; whoever
becomes ready later waits for the next cohort.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from privacy.errors import UserError
from privacy.roster import Rules


def check_enough(plan: str, rules: Rules, members: int) -> None:
    """Could a cohort of this roster ever open? More members take another roster, with which a plan ends.

    Raises:
        UserError: the plan wants more members than there are.
    """
    if rules.min_cohort > members:
        raise UserError(
            f"plan '{plan}': its min_cohort is {rules.min_cohort}, and the roster has {members} members",
            hint="no round of it could ever open: correct min_cohort, or publish a roster with more members first",
        )


def next_cohort(
    ready: Mapping[int, float], done: Collection[int], members: int, rules: Rules, now: float, waiting_s: float
) -> tuple[int, ...] | None:
    """The members of the cohort to open now, ``None`` to go on waiting.

    A cohort opens when everybody of the roster who is not done is ready, or when ``min_cohort`` are ready and the first
    of them has waited ``waiting_s`` seconds. Those ready first go first; what is over the largest cohort waits, unless
    it would be left alone with too few for a cohort of its own.

    Args:
        ready: member -> time (same clock as ``now``) since when its delta is ready.
        done: members that a released round of this stage already contains.
        members: size of the roster.
    """
    waiting = {m: since for m, since in ready.items() if m not in done}
    if len(waiting) < rules.min_cohort:
        return None
    everybody = len(waiting) == members - len(done)
    if not everybody and now - min(waiting.values()) < waiting_s:
        return None
    in_order = sorted(waiting, key=lambda m: (waiting[m], m))
    count = min(len(in_order), rules.cohort)
    rest = len(in_order) - count
    if 0 < rest < rules.min_cohort <= len(in_order) - rules.min_cohort:  # leave the rest enough for a cohort of its own
        count = len(in_order) - rules.min_cohort
    return tuple(sorted(in_order[:count]))


def last_round(invited: Sequence[Collection[int]], cohort: Collection[int]) -> int:
    """The number, from 1, of the last round that any of these members was invited to; 0 for none."""
    return max((number for number, members in enumerate(invited, 1) if not set(cohort).isdisjoint(members)), default=0)


def is_over(done: int, members: int, first_release: float | None, now: float, stage_s: float) -> bool:
    """May a stage without a running round close? When everybody is in its release, or has been waited for.

    Args:
        done: members that a released round of the stage contains.
        members: size of the roster.
        first_release: when the first total of the stage was published; ``None`` if there is none.
        stage_s: how long late members are waited for after that, seconds.
    """
    return first_release is not None and (done == members or now >= first_release + stage_s)
