"""Rosters and policies: what a roster must be, and that the strictest of plan and policy wins."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from privacy.errors import Refusal, UserError
from privacy.plan import Plan, parse_plan
from privacy.roster import Policy, Rules, load_roster, parse_roster, rules_for
from tests.test_plan import PLAN

ROSTER = f"""\
federation = "newsrooms"
coordinator = "{"4" * 64}"

[policy]
max_colluders = 1
min_cohort = 4
min_survivors = 3

[[members]]
name = "north"
key = "{"1" * 64}"

[[members]]
name = "south"
key = "{"2" * 64}"

[[members]]
name = "west"
key = "{"3" * 64}"
"""


def test_members_are_numbered_in_the_order_of_the_file() -> None:
    roster = parse_roster(ROSTER.encode()).roster
    assert [roster.index(name) for name in ("north", "south", "west")] == [0, 1, 2]
    assert roster.keys() == (b"\x11" * 32, b"\x22" * 32, b"\x33" * 32)
    assert (roster.name(2), roster.name(3), roster.name(-1)) == ("west", "member 3", "member -1")


def test_a_stranger_is_refused_by_name() -> None:
    with pytest.raises(Refusal, match="'east' is not a member of the federation 'newsrooms'"):
        parse_roster(ROSTER.encode()).roster.index("east")


def test_a_policy_has_safe_defaults() -> None:
    policy = parse_roster(ROSTER.encode()).roster.policy
    assert (policy.max_cohort, policy.bits, policy.allow_two_members) == (128, (16, 20, 24, 32), False)


def test_the_hash_is_over_the_label_and_the_very_bytes() -> None:
    file = parse_roster(ROSTER.encode())
    assert file.hash == hashlib.sha256(b"veilsum/1/roster\0" + ROSTER.encode()).digest()
    assert parse_roster(ROSTER.encode() + b"# a remark\n").hash != file.hash


#: Sentence -> (part of the roster, what it is replaced by, what the error says).
BAD: dict[str, tuple[str, str, str]] = {
    "an unknown key": ("max_colluders = 1", "max_colluders = 1\nmax_coluders = 0", "unknown key 'policy.max_coluders'"),
    "an unknown key of a member": ('name = "west"', 'name = "west"\nrole = "x"', "unknown key 'members.2.role'"),
    "a missing policy": (
        "[policy]\nmax_colluders = 1\nmin_cohort = 4\nmin_survivors = 3\n",
        "",
        "missing key 'policy'",
    ),
    "a missing minimum": ("min_survivors = 3\n", "", "missing key 'policy.min_survivors'"),
    "a name twice": ('"south"', '"north"', "names must be distinct"),
    "a key twice": ("2" * 64, "1" * 64, "keys must be distinct"),
    "a member with the coordinator's key": ("2" * 64, "4" * 64, "keys must be distinct, also from the coordinator's"),
    "a key that is too short": ("2" * 64, "2" * 62, "key 'members.1.key'"),
    "two survivors beside a colluder": ("min_survivors = 3", "min_survivors = 2", "expected at least 3"),
    "three survivors beside two colluders": ("max_colluders = 1", "max_colluders = 2", "expected at least 4"),
    "fewer joiners than survivors": ("min_cohort = 4", "min_cohort = 2", "min_survivors <= min_cohort"),
    "a cohort smaller than its minimum": (
        "min_cohort = 4",
        "min_cohort = 4\nmax_cohort = 3",
        "min_survivors <= min_cohort <= max_cohort",
    ),
    "a cohort beyond the complete graph": ("min_cohort = 4", "min_cohort = 4\nmax_cohort = 129", "policy.max_cohort"),
    "colluders below none": ("max_colluders = 1", "max_colluders = -1", "key 'policy.max_colluders'"),
    "no word size": ("min_cohort = 4", "min_cohort = 4\nbits = []", "key 'policy.bits'"),
    "a word of 8 bits": ("min_cohort = 4", "min_cohort = 4\nbits = [8]", "key 'policy.bits.0'"),
    "a clipping range of nothing": ("min_cohort = 4", "min_cohort = 4\nmax_clip = 0.0", "key 'policy.max_clip'"),
    "no weight": ("min_cohort = 4", "min_cohort = 4\nmax_weight = 0", "key 'policy.max_weight'"),
}


@pytest.mark.parametrize(("part", "instead", "fragment"), BAD.values(), ids=BAD.keys())
def test_a_bad_roster_is_refused_with_key_and_file(part: str, instead: str, fragment: str) -> None:
    assert part in ROSTER
    with pytest.raises(UserError) as refused:
        parse_roster(ROSTER.replace(part, instead, 1).encode(), "roster.toml")
    assert str(refused.value).startswith("roster.toml: ")
    assert fragment in str(refused.value)


def test_a_roster_has_at_least_two_members() -> None:
    with pytest.raises(UserError, match="key 'members'"):
        parse_roster(ROSTER[: ROSTER.index('[[members]]\nname = "south"')].encode())


LOW_ORDER = {
    "the neutral element": "01" + "00" * 31,
    "a point of order two": "ec" + "ff" * 30 + "7f",
    "a point of order four": "00" * 32,
    "a point of order four with the sign bit": "00" * 31 + "80",
    "the neutral element with the sign bit": "01" + "00" * 30 + "80",
    "a point of order eight": "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
}


@pytest.mark.parametrize("key", LOW_ORDER.values(), ids=LOW_ORDER.keys())
def test_an_identity_key_for_which_anybody_can_sign_is_refused(key: str) -> None:
    with pytest.raises(UserError, match="key"):
        parse_roster(ROSTER.replace("2" * 64, key).encode())


def test_two_members_need_the_opt_in_of_the_policy() -> None:
    pair = ROSTER.replace("max_colluders = 1", "max_colluders = 0").replace("min_survivors = 3", "min_survivors = 2")
    with pytest.raises(UserError, match="expected at least 3"):
        parse_roster(pair.encode())
    opted = pair.replace("min_survivors = 2", "min_survivors = 2\nallow_two_members = true")
    assert parse_roster(opted.encode()).roster.policy.min_survivors == 2
    with pytest.raises(UserError, match="expected at least 3"):
        parse_roster(opted.replace("max_colluders = 0", "max_colluders = 1").encode())


def test_only_the_pinned_roster_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "roster.toml"
    path.write_text(ROSTER)
    pin = parse_roster(ROSTER.encode()).hash
    assert load_roster(path, pin).hash == load_roster(path).hash == pin
    path.write_text(ROSTER + "\n")
    with pytest.raises(UserError, match="expected the pinned roster") as refused:
        load_roster(path, pin)
    assert "telephone" in refused.value.hint


def test_a_bad_roster_is_named(tmp_path: Path) -> None:
    bad = ROSTER.replace("max_colluders = 1", "max_colluders = -1")
    (tmp_path / "roster.toml").write_text(bad)
    with pytest.raises(UserError, match=r"roster\.toml: key 'policy\.max_colluders'"):
        load_roster(tmp_path / "roster.toml")
    with pytest.raises(UserError, match=r"^roster: key"):
        parse_roster(bad.encode())


def test_a_missing_roster_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"roster\.toml: expected a roster file"):
        load_roster(tmp_path / "roster.toml")


def plan_with(**changes: object) -> Plan:
    plan = parse_plan(PLAN.encode()).plan
    return plan.model_copy(update={"round": plan.round.model_copy(update=changes)})


def policy_with(**changes: object) -> Policy:
    return Policy.model_validate({"max_colluders": 1, "min_cohort": 4, "min_survivors": 3} | changes)


#: Sentence -> (plan, policy, the rules of the round).
STRICTEST: dict[str, tuple[dict[str, float], dict[str, float], Rules]] = {
    "plan and policy agree": ({}, {}, Rules(5, 1, 4, 3, 24)),
    "the plan asks for all that is allowed": (
        {"max_cohort": 5, "clip": 0.25, "max_weight": 10},
        {"max_cohort": 5, "max_clip": 0.25, "max_weight": 10},
        Rules(5, 1, 4, 3, 24),
    ),
    "the policy wants more survivors": ({}, {"min_survivors": 4}, Rules(5, 1, 4, 4, 24)),
    "the plan wants more survivors": ({"min_survivors": 4}, {}, Rules(5, 1, 4, 4, 24)),
    "the policy wants a larger cohort": ({}, {"min_cohort": 5}, Rules(5, 1, 5, 3, 24)),
    "the plan wants a larger cohort": ({"min_cohort": 5}, {}, Rules(5, 1, 5, 3, 24)),
    "the policy fears more colluders": ({}, {"max_colluders": 2, "min_survivors": 4}, Rules(5, 2, 4, 4, 24)),
    "the plan fears more colluders, which raises the minima": ({"max_colluders": 2}, {}, Rules(5, 2, 4, 4, 24)),
    "three colluders need five members": ({"max_colluders": 3}, {}, Rules(5, 3, 5, 5, 24)),
    "the plan hopes for none, the policy does not": ({"max_colluders": 0}, {}, Rules(5, 1, 4, 3, 24)),
    "a plan for pairs without the opt-in": (
        {"max_colluders": 0, "min_survivors": 2, "min_cohort": 2},
        {"max_colluders": 0, "min_cohort": 3},
        Rules(5, 0, 3, 3, 24),
    ),
    "a plan for pairs with the opt-in": (
        {"max_colluders": 0, "min_survivors": 2, "min_cohort": 2},
        {"max_colluders": 0, "min_cohort": 2, "min_survivors": 2, "allow_two_members": True},
        Rules(5, 0, 2, 2, 24),
    ),
    "the opt-in changes nothing beside a colluder": (
        {"min_survivors": 2},
        {"max_colluders": 0, "min_cohort": 2, "min_survivors": 2, "allow_two_members": True},
        Rules(5, 1, 4, 3, 24),
    ),
}


@pytest.mark.parametrize(("plan", "policy", "wanted"), STRICTEST.values(), ids=STRICTEST.keys())
def test_the_strictest_of_plan_and_policy_wins(plan: dict[str, float], policy: dict[str, float], wanted: Rules) -> None:
    assert rules_for(plan_with(**plan), policy_with(**policy)) == wanted


REFUSED: dict[str, tuple[dict[str, object], dict[str, object], str]] = {
    "a word size outside the policy": ({"bits": 16}, {"bits": (24, 32)}, "asks for bits 16, allowed 24, 32 by"),
    "a larger cohort": ({"max_cohort": 6}, {"max_cohort": 5}, "asks for max_cohort 6, allowed 5"),
    "a larger clipping range": ({"clip": 0.5}, {"max_clip": 0.25}, "asks for clip 0.5, allowed 0.25"),
    "a larger weight": ({"max_weight": 11}, {"max_weight": 10}, "asks for max_weight 11, allowed 10"),
    "a base model outside the policy": (
        {},
        {"bases": ("b" * 64, "c" * 64)},
        f"asks for base model {'a' * 16}…, allowed {'b' * 16}…, {'c' * 16}… by the pinned policy$",
    ),
    "colluders that no cohort outnumbers": ({"max_colluders": 4}, {}, "cohorts of 5, but policy and 4 colluders need"),
    "a policy for larger cohorts than the plan's": ({}, {"min_cohort": 6}, "need at least 6"),
}


@pytest.mark.parametrize(("plan", "policy", "fragment"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_policy_does_not_allow_is_refused(
    plan: dict[str, object], policy: dict[str, object], fragment: str
) -> None:
    with pytest.raises(Refusal, match=fragment):
        rules_for(plan_with(**plan), policy_with(**policy))
