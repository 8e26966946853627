"""Does this site agree to a plan? Pure: plan, pinned roster, the site's own file and what is charged to the data set
in, a refusal or nothing out.

Of roster policy, plan and the site's own file the strictest wins; a plan that is weaker than any of them is refused in
one line that says what was asked and what is allowed.
"""

from __future__ import annotations

from participant.config import Settings
from participant.pace import UploadTime
from privacy.budget import terms
from privacy.budget.events import DpSgd, Mechanism
from privacy.budget.filter import Standing, enforced_epsilon, mismatch, objection
from privacy.errors import Refusal, UserError
from privacy.job import Job
from privacy.plan import Plan

AUDITS = ("none", "spot", "divided")


class Waits(Refusal):
    """Nothing is wrong with the plan: it waits for somebody to approve it, or for an hour of the day."""


def admit(
    job: Job, settings: Settings, standing: Standing | None = None, stage: int = 1, *, approved: bool = False
) -> None:
    """Refuse a plan this site does not agree to.

    Args:
        standing: what the ledger of the plan's data set says; ``None``: nothing is charged to it yet.
        stage: that is to come now; what it and all later ones cost must be left.
        approved: somebody at this site approved this very plan.

    Raises:
        Refusal: base model, data set, cohort sizes, colluders, audit or the data set's budget; the roster's own rules
            were applied when the job was made.
        Waits: all of that is right, and nobody has agreed to it.
    """
    allow(job, settings, standing, stage)
    if not approved:
        consent(job, settings)


def allow(job: Job, settings: Settings, standing: Standing | None = None, stage: int = 1) -> None:
    """As :func:`admit`, without consent: could this plan run here at all?"""
    plan, own, rules = job.plan, settings.policy, job.rules
    name = f"plan '{plan.name}'"
    if plan.base.name not in settings.models:
        known = ", ".join(sorted(settings.models)) or "none"
        raise Refusal(f"{name} trains base model '{plan.base.name}'; this site has: {known}")
    if plan.data.dataset not in settings.datasets:
        known = ", ".join(sorted(settings.datasets)) or "none"
        raise Refusal(f"{name} trains on data set '{plan.data.dataset}'; this site has: {known}")
    for what, asked, least in (
        ("min_cohort", rules.min_cohort, own.min_cohort),
        ("min_survivors", rules.min_survivors, own.min_survivors),
        ("max_colluders", rules.colluders, own.max_colluders),
    ):
        if asked < least:
            raise Refusal(f"{name} has {what} {asked}; this site demands at least {least}")
    if rules.min_survivors < 3 and not own.allow_two_members:
        raise Refusal(f"{name} allows sums of two members; this site has not opted in (allow_two_members)")
    if AUDITS.index(plan.round.audit) < AUDITS.index(own.audit):
        raise Refusal(f"{name} has audit '{plan.round.audit}'; this site demands '{own.audit}'")
    by_class = plan.aggregation.head != "trained" and plan.task == "classification"
    if by_class and own.min_class_count is None:
        raise Refusal(f"{name} sums statistics of the records; this site has not opted in (min_class_count)")
    if plan.aggregation.min_texts is not None and own.min_texts is None:
        raise Refusal(f"{name} sums statistics of the records; this site has not opted in (min_texts)")
    narrow = settings.max_rank is not None and settings.max_rank < plan.adapter.rank
    if narrow and plan.adapter.train != "head" and plan.aggregation.method != "dense":
        raise Refusal(
            f"{name} has rank {plan.adapter.rank}; this site trains at most {settings.max_rank} (max_rank), "
            'which only the method "dense" can sum'
        )
    data = settings.datasets[plan.data.dataset]
    if plan.privacy is not None and plan.privacy.unit == "user" and data.unit is None:
        raise Refusal(
            f"{name} protects users; data set '{plan.data.dataset}' does not say whose a record is: "
            "name the column under 'unit' in participant.toml"
        )
    rate = settings.max_upload_rate
    if rate is not None and (upload := UploadTime.of(job, rate, stage)).state == "late":
        raise Refusal(f"{name} {upload}: it would be late; {upload.todo}")
    if found := objection(standing or Standing(data.policy()), _mechanism(plan), plan.trainings_from(stage)):
        raise Refusal(f"{name} {found}")


def consent(job: Job, settings: Settings) -> None:
    """Has this site agreed to a plan by its file?

    Raises:
        Waits: no; says what keeps the plan from being one of those that need no approval.
    """
    plan, own = job.plan, settings.policy
    if "*" in own.plans or plan.name in own.plans:
        return
    why = "expected it under [policy] plans in participant.toml" if own.admits is None else _outside(job, settings)
    if why:
        raise Waits(
            f"plan '{plan.name}' has no consent here: {why}; to approve it: veilsum-participant approve {plan.name}"
        )


def _outside(job: Job, settings: Settings) -> str | None:
    """Why a plan is not one of those that need no approval; ``None`` if it is."""
    plan, rules, admits = job.plan, job.rules, settings.policy.admits
    assert admits is not None
    if plan.base.name not in admits.bases:
        return f"base model '{plan.base.name}' is not in [policy.admits] bases"
    if plan.data.dataset not in admits.datasets:
        return f"data set '{plan.data.dataset}' is not in [policy.admits] datasets"
    if rules.min_cohort < admits.min_cohort:
        return f"min_cohort is {rules.min_cohort}, [policy.admits] has {admits.min_cohort}"
    if plan.data.dataset not in settings.datasets:
        return f"data set '{plan.data.dataset}' is not in [datasets]"
    most = admits.max_epsilon.get(plan.data.dataset)
    if most is None:
        return None
    policy, found = settings.datasets[plan.data.dataset].policy(), _mechanism(plan)
    if not isinstance(found, DpSgd):
        return f"it has no [privacy], [policy.admits] has max_epsilon {most}"
    if odd := mismatch(policy, found):
        return f"it has {odd}"
    cost = enforced_epsilon(policy, (found,) * plan.trainings_from(1))
    return f"it would cost epsilon {cost:.3f}, [policy.admits] has max_epsilon {most}" if cost > float(most) else None


def begin(hours: str | None, minute: int) -> None:
    """May a training begin now?

    Args:
        hours: as in the site's file, or ``None`` for any.
        minute: of the day, local time.

    Raises:
        Waits: not before the hour that it names.
    """
    if hours is None:
        return
    start, end = (int(part[:2]) * 60 + int(part[3:]) for part in hours.split("-"))
    inside = start <= minute < end if start < end else minute >= start or minute < end
    if not inside:
        raise Waits(f"training begins here at {hours[:5]}: [policy] hours is {hours}")


def _mechanism(plan: Plan) -> Mechanism:
    try:
        return terms.mechanism(plan)
    except UserError as error:  # no noise keeps its epsilon: nothing the administrator of this site could mend
        raise Refusal(f"plan '{plan.name}': {error}") from error
