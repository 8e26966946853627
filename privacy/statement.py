"""The privacy statement of a model card: what plan and rules promise, in plain words, and what nobody promises."""

from __future__ import annotations

from decimal import Decimal

from privacy.guarantee import Privacy
from privacy.plan import Plan
from privacy.roster import Rules


def privacy_statement(plan: Plan, rules: Rules, stage: int) -> list[str]:
    """The section of a card; docs/privacy.md and docs/threat-model.md are the long form.

    Args:
        plan: that of the file.
        stage: whose release it is of.
    """
    private = _none() if plan.privacy is None else _guarantee(plan.privacy, stage)
    return ["## Privacy", "", *_masking(rules), "", *_sums(plan, rules), "", *private, "", *_not_promised()]


def _masking(rules: Rules) -> list[str]:
    honest = rules.min_survivors - rules.colluders
    return [
        "**Masking.** Records stayed at their sites. In each round a site sent one update, masked, and only the sum",
        f"of a cohort's updates was opened: over at least {rules.min_survivors} members, of whom at most",
        f"{rules.colluders} were assumed to work with the coordinator. These together learn the sum of at least",
        f"{honest} others, no single update. The coordinator learns besides who took part and when, and how long each",
        "site's ledger is.",
    ]


def _sums(plan: Plan, rules: Rules) -> list[str]:
    """Who learns the sums, and what is in them beside updates."""
    more = []
    if rules.min_survivors == 2:
        more.append("A member of a cohort of two knows the other's update: the sum less its own.")
    aggregation = plan.aggregation
    if any((aggregation.analytic, aggregation.counted, aggregation.regmean, aggregation.fisher)):
        more.append("They contain statistics of records, such as sums of features or numbers of records by class.")
    if plan.evaluation is not None:
        more.append("They contain how many of the held-out answers were right, over all sites of a cohort.")
    return [
        "**The sums.** Every member of the federation learns them, and so does whoever gets their files; this adapter",
        "was computed from them. A sum can reveal something: a number to which one member alone contributed is in",
        "the clear, for instance that of a class which only one site has.",
        *more,
    ]


def _none() -> list[str]:
    return [
        "**No differential privacy:** the plan has no section `[privacy]`. No record's gradient was clipped and no",
        "noise added, so what the adapter and the sums say about a single record is not bounded.",
    ]


def _guarantee(privacy: Privacy, stage: int) -> list[str]:
    """What the plan promises for a site, with the plan's own numbers; nothing is computed but multiples of them."""
    whose = "one record"
    if privacy.unit == "user":
        whose = f"all records of one user, at most {privacy.max_records_per_unit},"
    change = f"adding or removing {whose}" if privacy.adjacency == "add-remove" else f"replacing {whose} by nothing"
    how = (
        f"Poisson-sampled DP-SGD with sampling rate {privacy.rate}, {privacy.steps} steps\n"
        f"and gradients of each record clipped to {privacy.clip}"
    )
    lines = [f"**Differential privacy per site.** By the plan a site's training in one stage was {how}."]
    if privacy.epsilon is None:
        lines += [
            f"The plan states its noise, a multiplier of {privacy.sigma} at delta {privacy.delta}, and no epsilon;",
            f"`veilsum-audit ledger` computes the one for {change} of a site's data set.",
        ]
    else:
        lines += [
            f"Its noise is calibrated for epsilon {privacy.epsilon} and delta {privacy.delta}. The guarantee is for",
            f"{change} of that site's data set, and covers all that left the site for",
            "that training.",
        ]
    return [*lines, *_composed(privacy, stage), *_limits()]


def _composed(privacy: Privacy, stage: int) -> list[str]:
    """Basic composition over the stages: exact in decimals, and true whatever the trainings saw of one another."""
    if stage == 1:
        return []
    if privacy.epsilon is None:
        return [f"This release follows {stage} such trainings of a site, which compose."]
    epsilon, delta = stage * Decimal(privacy.epsilon), stage * Decimal(privacy.delta)
    return [
        f"This release follows {stage} such trainings of a site: together at most epsilon {epsilon:f},",
        f"delta {delta:f}.",
    ]


def _limits() -> list[str]:
    return [
        "It does not depend on the coordinator, the masking or other sites. It assumes that each site ran the code",
        "that its ledger says, and counts this plan alone: other jobs on the same data, and records of a person at",
        "other sites, add up.",
    ]


def _not_promised() -> list[str]:
    return [
        "**Not promised:** that nobody learns that a site took part; that sites sent honest updates (one member can",
        "shift the mean within the clipping range); anything for a site whose machine or identity key somebody else",
        "has; and nothing hides what holds for the population that the records are from. The code has had no",
        "independent review.",
    ]
