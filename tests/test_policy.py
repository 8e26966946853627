"""A site's consent: of roster policy, plan and the site's own file the strictest wins, and the refusal says why."""

from __future__ import annotations

import pytest

from participant.config import Settings
from participant.policy import Waits, admit, allow, begin
from privacy.budget import terms
from privacy.budget.entries import Policy
from privacy.budget.filter import Standing, enforced_epsilon
from privacy.errors import Refusal
from privacy.job import Job
from privacy.plan import parse_plan
from privacy.roster import parse_roster
from privacy.settings import parse_toml
from tests.test_end_to_end import toy_plan

ROSTER = """federation = "f"
coordinator = "{coordinator}"
[policy]
max_colluders = 0
min_cohort = 2
min_survivors = 2
allow_two_members = true
[[members]]
name = "a"
key = "{a}"
[[members]]
name = "b"
key = "{b}"
""".format(coordinator="9" * 64, a="1" * 64, b="2" * 64)

SITE = """coordinator = "localhost:1"
member = "a"
[models]
tiny = "base"
[datasets.toy]
path = "x"
format = "csv"
[policy]
plans = ["toy"]
"""


def job(*changes: tuple[str, str]) -> Job:
    plan = toy_plan().decode()
    for old, new in changes:
        assert old in plan
        plan = plan.replace(old, new)
    return Job.of(parse_plan(plan.encode()), parse_roster(ROSTER.encode()))


def site(old: str = "", new: str = "") -> Settings:
    assert old in SITE
    return parse_toml(Settings, SITE.replace(old, new).encode() if old else SITE.encode(), "participant.toml")


def test_a_plan_within_everything_is_admitted() -> None:
    admit(job(), site())
    admit(job(), site('plans = ["toy"]', 'plans = ["*"]'))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('plans = ["toy"]', "plans = []", "plan 'toy' has no consent here"),
        ('plans = ["toy"]', 'plans = ["other"]', "plan 'toy' has no consent here"),
        ("tiny =", "huge =", "trains base model 'tiny'; this site has: huge$"),
        ("tiny =", 'huge = "h"\nbig =', "trains base model 'tiny'; this site has: big, huge$"),
        ('tiny = "base"', "", "trains base model 'tiny'; this site has: none$"),
        ("[datasets.toy]", "[datasets.other]", "trains on data set 'toy'; this site has: other$"),
        (
            "[datasets.toy]",
            '[datasets.some]\npath = "y"\nformat = "csv"\n[datasets.other]',
            "trains on data set 'toy'; this site has: other, some$",
        ),
        ('[datasets.toy]\npath = "x"\nformat = "csv"', "", "trains on data set 'toy'; this site has: none$"),
        ("[policy]", "[policy]\nmin_cohort = 5", "has min_cohort 4; this site demands at least 5"),
        ("[policy]", "[policy]\nmin_survivors = 4", "has min_survivors 3; this site demands at least 4"),
        ("[policy]", "[policy]\nmax_colluders = 2", "has max_colluders 1; this site demands at least 2"),
    ],
)
def test_what_this_site_does_not_allow_is_refused(old: str, new: str, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        admit(job(), site(old, new))


def test_a_weaker_audit_than_this_site_demands_is_refused() -> None:
    weak = job(("[deadlines]", 'audit = "spot"\n[deadlines]'))
    admit(weak, site("[policy]", '[policy]\naudit = "spot"'))
    with pytest.raises(Refusal, match="has audit 'spot'; this site demands 'divided'"):
        admit(weak, site("[policy]", '[policy]\naudit = "divided"'))


def test_a_sum_of_two_needs_the_opt_in_of_this_site() -> None:
    pair = job(
        ("max_cohort = 5", "max_cohort = 2"),
        ("min_cohort = 4", "min_cohort = 2"),
        ("min_survivors = 3", "min_survivors = 2"),
        ("max_colluders = 1", "max_colluders = 0"),
    )
    assert pair.rules.min_survivors == 2
    with pytest.raises(Refusal, match="allows sums of two members; this site has not opted in"):
        admit(pair, site())
    admit(pair, site("[policy]", "[policy]\nallow_two_members = true"))


def test_a_base_model_outside_the_pinned_policy_is_refused() -> None:
    for bases, allowed in (((), True), (("0" * 64,), True), (("a" * 64, "0" * 64), True), (("a" * 64,), False)):
        listed = ", ".join(f'"{digest}"' for digest in bases)
        roster = parse_roster(ROSTER.replace("[policy]", f"[policy]\nbases = [{listed}]").encode())
        plan = parse_plan(toy_plan())
        if allowed:
            assert Job.of(plan, roster).plan == plan.plan
        else:
            with pytest.raises(Refusal, match="asks for base model 0000000000000000…, allowed aaaaaaaaaaaaaaaa…"):
                Job.of(plan, roster)


def test_sums_of_statistics_need_a_minimum_of_this_site() -> None:
    section = "[aggregation.analytic]\nridge = 0.1\nfeature_clip = 1.0\nmin_class_count = 9\n[training]"
    plan = job(
        ("[training]", f'[aggregation]\nhead = "analytic"\n{section}'),
        ('head = { "classifier', 'train = "head"\nhead = { "classifier'),
    )
    with pytest.raises(
        Refusal, match=r"plan 'toy' sums statistics of the records; .* not opted in \(min_class_count\)"
    ):
        admit(plan, site())
    admit(plan, site("[policy]", "[policy]\nmin_class_count = 1"))


# --- several stages ---------------------------------------------------------------------------------------------------

PRIVATE = """
[privacy]
unit = "record"
sigma = "1.5"
delta = "1e-5"
clip = "0.5"
rate = "0.04"
steps = 50
nominal_batch = 4
nominal_size = 100
"""


def test_all_stages_that_are_left_must_fit_the_budget() -> None:
    """What was spent on the stages before is charged already, so a late one asks for less."""
    private = job(
        ("epochs = 1\n", ""),
        ("batch_size = 4\n", ""),
        ('task = "classification"', 'task = "classification"\nstages = 3'),
        ("outcome_s = 2\n", "outcome_s = 2\n" + PRIVATE),
    )
    policy = Policy(delta="0.00001", epsilon="1", order=4)
    one = terms.mechanism(private.plan)
    costs = [enforced_epsilon(policy, (one,) * count) for count in (1, 2, 3)]
    budget = policy.model_copy(update={"epsilon": f"{(costs[1] + costs[2]) / 2:.4f}".rstrip("0")})
    for stage, spent in ((2, ()), (3, ()), (3, (one,))):
        admit(private, site(), Standing(budget, spent), stage)
    for stage, spent in ((1, ()), (2, (one,))):
        with pytest.raises(Refusal, match=f"would cost epsilon .* in {4 - stage} stages and bring the data set to"):
            admit(private, site(), Standing(budget, spent), stage)


REGMEAN = "[aggregation.regmean]\nridge = 0.1\nfeature_clip = 1.0\nmin_texts = 9\n[training]"
FISHER = "[aggregation.fisher]\nridge = 0.1\nreach = 9.0\nmin_texts = 9\n[training]"


@pytest.mark.parametrize(("method", "section"), [("regmean", REGMEAN), ("fisher", FISHER)])
def test_other_statistics_need_a_minimum_of_texts_of_this_site(method: str, section: str) -> None:
    plan = job(("[training]", f'[aggregation]\nmethod = "{method}"\n{section}'))
    with pytest.raises(Refusal, match=r"plan 'toy' sums statistics of the records; .* not opted in \(min_texts\)"):
        admit(plan, site("[policy]", "[policy]\nmin_class_count = 1"))
    admit(plan, site("[policy]", "[policy]\nmin_texts = 1"))


def test_counts_need_a_minimum_of_this_site() -> None:
    section = "[aggregation.counted]\nmin_class_count = 9\n[training]"
    plan = job(("[training]", f'[aggregation]\nhead = "counted"\n{section}'))
    with pytest.raises(Refusal, match=r"not opted in \(min_class_count\)"):
        admit(plan, site("[policy]", "[policy]\nmin_texts = 1"))
    admit(plan, site("[policy]", "[policy]\nmin_class_count = 1"))


def test_a_larger_rank_than_this_site_trains_needs_the_method_that_sums_any() -> None:
    narrow, just = (site("[models]", f"max_rank = {rank}\n[models]") for rank in (1, 2))
    with pytest.raises(Refusal, match=r"plan 'toy' has rank 2; this site trains at most 1 \(max_rank\), which only"):
        admit(job(), narrow)
    admit(job(), just)
    admit(job(('head = { "classifier', 'train = "head"\nhead = { "classifier')), narrow)
    both = ("[training]", '[aggregation]\nmethod = "both"\n[training]')
    trained = ('head = { "classifier', 'train = "both"\nhead = { "classifier')
    with pytest.raises(Refusal, match="has rank 2"):
        admit(job(both, trained), narrow)
    admit(job(("[training]", '[aggregation]\nmethod = "dense"\n[training]'), trained), narrow)


# --- consent: by name, by approval, or by what the file admits -------------------------------------------------------

OPEN = '[policy.admits]\nbases = ["tiny"]\ndatasets = ["toy"]\n'


def outside(admits: str, plan: Job) -> str:
    """Why a plan waits at a site that admits this; empty if it does not."""
    settings = site('[policy]\nplans = ["toy"]\n', admits)
    allow(plan, settings)  # nothing else stands against it
    admit(plan, settings, approved=True)
    try:
        admit(plan, settings)
    except Waits as error:
        return str(error)
    return ""


def private(*changes: tuple[str, str]) -> Job:
    without = (("epochs = 1\n", ""), ("batch_size = 4\n", ""))
    return job(*without, ("outcome_s = 2\n", "outcome_s = 2\n" + PRIVATE), *changes)


def test_a_plan_that_nobody_agreed_to_waits_and_is_not_refused() -> None:
    found = outside("", job())
    assert "expected it under [policy] plans in participant.toml" in found
    assert found.endswith("to approve it: veilsum-participant approve toy")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("bases", "bases", ""),
        ('["tiny"]', '["other"]', "base model 'tiny' is not in [policy.admits] bases"),
        ('["toy"]', "[]", "data set 'toy' is not in [policy.admits] datasets"),
        ("bases", "min_cohort = 4\nbases", ""),
        ("bases", "min_cohort = 5\nbases", "min_cohort is 4, [policy.admits] has 5"),
        ("bases", 'max_epsilon = { other = "1" }\nbases', ""),
        ("bases", 'max_epsilon = { toy = "100" }\nbases', "it has no [privacy], [policy.admits] has max_epsilon 100"),
    ],
)
def test_a_plan_outside_of_what_is_admitted_waits_and_says_why(old: str, new: str, reason: str) -> None:
    found = outside(OPEN.replace(old, new), job())
    assert reason in found
    assert bool(found) == bool(reason)


def test_a_plan_that_would_cost_more_than_is_admitted_waits() -> None:
    plan = private()
    policy = Policy(delta="0.00001", epsilon=None, order=6, protected=True)
    cost = enforced_epsilon(policy, (terms.mechanism(plan.plan),))
    for most, waits in ((cost + 0.01, False), (cost - 0.01, True)):
        found = outside(f'{OPEN}max_epsilon = {{ toy = "{most:.3f}" }}\n', plan)
        assert bool(found) == waits
        assert not waits or f"it would cost epsilon {cost:.3f}, [policy.admits] has max_epsilon {most:.3f}" in found


def test_all_stages_of_a_plan_count() -> None:
    plan = private(('task = "classification"', 'task = "classification"\nstages = 3'))
    policy = Policy(delta="0.00001", epsilon=None, order=6, protected=True)
    once, thrice = (enforced_epsilon(policy, (terms.mechanism(plan.plan),) * times) for times in (1, 3))
    found = outside(f'{OPEN}max_epsilon = {{ toy = "{once + 0.1:.3f}" }}\n', plan)
    assert f"it would cost epsilon {thrice:.3f}" in found


def test_a_plan_with_weaker_terms_than_the_data_set_has_waits() -> None:
    plan = private(('delta = "1e-5"', 'delta = "1e-3"'))
    assert "it has delta 0.001, the budget allows 0.00001" in outside(OPEN + 'max_epsilon = { toy = "100" }\n', plan)


def test_an_approval_is_consent_and_nothing_more() -> None:
    settings = site('plans = ["toy"]', "min_cohort = 5")
    with pytest.raises(Refusal, match="demands at least 5"):
        admit(job(), settings, approved=True)


@pytest.mark.parametrize(
    ("hours", "minute", "inside"),
    [
        (None, 0, True),
        ("08:05-17:30", 484, False),
        ("08:05-17:30", 485, True),
        ("08:05-17:30", 1049, True),
        ("08:05-17:30", 1050, False),
        ("20:00-06:10", 1199, False),
        ("20:00-06:10", 1200, True),
        ("20:00-06:10", 0, True),
        ("20:00-06:10", 369, True),
        ("20:00-06:10", 370, False),
        ("00:00-00:00", 700, True),
    ],
)
def test_hours(hours: str | None, minute: int, inside: bool) -> None:
    if inside:
        begin(hours, minute)
        return
    with pytest.raises(Waits, match=f"training begins here at {hours and hours[:5]}"):
        begin(hours, minute)
