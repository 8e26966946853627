"""Does this site agree to a plan? Pure: plan, pinned roster, the site's own file and what is charged to the data set
in, a refusal or nothing out.

Of roster policy, plan and the site's own file the strictest wins; a plan that is weaker than any of them is refused in
one line that says what was asked and what is allowed.
"""

from __future__ import annotations

from participant.config import Settings
from privacy.budget import terms
from privacy.budget.events import Mechanism
from privacy.budget.filter import Standing, objection
from privacy.errors import Refusal, UserError
from privacy.job import Job
from privacy.plan import Plan

AUDITS = ("none", "spot", "divided")


def admit(job: Job, settings: Settings, standing: Standing | None = None, stage: int = 1) -> None:
    """Refuse a plan this site does not agree to.

    Args:
        standing: what the ledger of the plan's data set says; ``None``: nothing is charged to it yet.
        stage: that is to come now; what it and all later ones cost must be left.

    Raises:
        Refusal: consent, base model, data set, cohort sizes, colluders, audit or the data set's budget; the
            roster's own rules were applied when the job was made.
    """
    plan, own, rules = job.plan, settings.policy, job.rules
    name = f"plan '{plan.name}'"
    if "*" not in own.plans and plan.name not in own.plans:
        raise Refusal(f"{name} has no consent here: expected it under [policy] plans in participant.toml")
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
    if found := objection(standing or Standing(data.policy()), _mechanism(plan), plan.trainings_from(stage)):
        raise Refusal(f"{name} {found}")


def _mechanism(plan: Plan) -> Mechanism:
    try:
        return terms.mechanism(plan)
    except UserError as error:  # no noise keeps its epsilon: nothing the administrator of this site could mend
        raise Refusal(f"plan '{plan.name}': {error}") from error
