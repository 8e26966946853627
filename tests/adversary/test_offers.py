"""Attacks with offers: another plan, roster, start adapter, version or coordinator; numbers that do not rise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from participant.round import accept_offer
from privacy.errors import Refusal
from privacy.secagg.messages import Header, Offer
from tests.adversary.world import World
from tests.simulation import context_for, make_member

EXPECTED = context_for(5, 1, round_number=4)
OTHER = b"\x07" * 32

#: Sentence -> (what the coordinator changes in the header, what the refusal says).
HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "another version of the protocol": ({"version": 2}, "M0: expected version 1, found 2$"),
    "another plan": (
        {"plan": OTHER},
        f"M0: expected plan {EXPECTED.header.plan.hex()[:16]}…, found 0707070707070707…$",
    ),
    "another stage": ({"stage": 2}, "M0: expected stage 1, found 2"),
    "another roster": (
        {"roster": OTHER},
        f"M0: expected roster {EXPECTED.header.roster.hex()[:16]}…, found 0707070707070707…$",
    ),
    "another start adapter": (
        {"start": OTHER},
        f"M0: expected start {EXPECTED.header.start.hex()[:16]}…, found 0707070707070707…$",
    ),
    "another coordinator": (
        {"coordinator": OTHER},
        f"M0: expected coordinator {EXPECTED.header.coordinator.hex()[:16]}…, found 0707070707070707…$",
    ),
    "the round joined last": ({"round": 3}, "M0: expected a round above 3, the highest joined here, found 3"),
    "a round before that": ({"round": 1}, "M0: expected a round above 3, the highest joined here, found 1"),
    "round nothing": ({"round": 0}, "M0: expected a round above 3"),
}


@pytest.mark.parametrize(("changes", "fragment"), HEADERS.values(), ids=HEADERS.keys())
def test_a_bad_offer_is_refused(changes: dict[str, Any], fragment: str) -> None:
    with pytest.raises(Refusal, match=fragment):
        accept_offer(Offer(replace(EXPECTED.header, **changes)), EXPECTED, 3)


def test_every_field_of_the_header_is_either_expected_or_must_rise() -> None:
    for field in Header.__dataclass_fields__:
        value: Any = {"round": 0, "version": 9, "stage": 9}.get(field, OTHER)
        with pytest.raises(Refusal, match=f"M0: expected (a )?{field}"):
            accept_offer(Offer(replace(EXPECTED.header, **{field: value})), EXPECTED, 3)


def test_a_round_above_the_highest_is_joined_with_rules_of_plan_and_roster_only() -> None:
    joined = accept_offer(Offer(replace(EXPECTED.header, round=9)), EXPECTED, 3)
    assert joined.header.round == 9
    assert (joined.rules, joined.identities, joined.upload_length) == (
        EXPECTED.rules,
        EXPECTED.identities,
        EXPECTED.upload_length,
    )


def test_members_that_were_offered_different_rounds_cannot_be_put_together() -> None:
    world = World(5)
    other = context_for(5, round_number=2)
    world.members[4] = make_member(4, Offer(other.header), other, 24)
    reply = world.members[4].keep(world.members[4].machine.join())
    assert reply is not None
    world.sent[4] = [reply]
    world.refused(0, world.key_list(), "M1: the signature of member 4 does not verify in this round")


def test_one_offer_cannot_use_up_the_round_numbers_of_a_stage() -> None:
    context = context_for(5, 1)
    for number in (10_008, 2**64 - 1):
        with pytest.raises(Refusal, match="expected a round up to 10007"):
            accept_offer(Offer(replace(context.header, round=number)), context, 7)
    assert accept_offer(Offer(replace(context.header, round=10_007)), context, 7).header.round == 10_007
