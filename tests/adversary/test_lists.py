"""Attacks with lists: key lists, sharers, survivors, certificates; what one half sees, the other does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from participant.phases import Advertising
from privacy.errors import ProtocolError
from privacy.secagg.messages import (
    Advertise,
    Certificate,
    Inbox,
    KeyList,
    MaskedInput,
    ShareRoot,
    Shares,
    SurvivorList,
    SurvivorVote,
)
from tests.adversary.world import World, changed, signed_by
from tests.simulation import context_for

X = bytes(32)


def colluder_again(world: World, member: int, **changes: Any) -> Any:
    """A colluder's second M1 of the round."""
    return world.sign(member, changed(world.last(member, Advertise).body, **changes))


# --- M2 ----------------------------------------------------------------------------------------------------------


def swap(world: World, place: int, message: Any) -> KeyList:
    members = world.key_list().members
    return KeyList((*members[:place], message, *members[place + 1 :]))


#: Sentence -> (the M2 that honest member 0 of five is shown; 4 colludes, what the refusal says, who is named).
KEY_LISTS: dict[str, tuple[Callable[[World], KeyList], str, int | None]] = {
    "a key list below the smallest cohort": (lambda w: w.key_list(0, 4), "M2: expected 3 to 5 members, found 2", None),
    "a key list without me": (lambda w: w.key_list(1, 2, 3, 4), "M2: expected my own M1", None),
    "an honest member's key replaced by the coordinator": (
        lambda w: swap(w, 1, changed(w.last(1, Advertise), body=w.last(4, Advertise).body)),
        "M1: the signature of member 1 does not verify",
        None,
    ),
    "an honest member's M1 under the name of another": (
        lambda w: swap(w, 2, changed(w.last(1, Advertise), sender=2)),
        "M1: the signature of member 2 does not verify",
        None,
    ),
    "a member signed for by a colluder": (
        lambda w: swap(w, 1, changed(w.sign(4, w.last(1, Advertise).body), sender=1)),
        "M1: the signature of member 1 does not verify",
        None,
    ),
    "an invented member outside the roster": (
        lambda w: KeyList((*w.key_list(0, 1, 2).members, signed_by(7, w.last(4, Advertise).body, w.context))),
        "M1: member 7 is not in the roster",
        None,
    ),
    "an M1 of an earlier round": (
        lambda w: swap(w, 4, signed_by(4, w.last(4, Advertise).body, context_for(5, 1, round_number=9))),
        "M1: the signature of member 4 does not verify in this round",
        None,
    ),
    "a colluder with the share key of an honest member": (
        lambda w: swap(w, 4, colluder_again(w, 4, share_key=w.last(1, Advertise).body.share_key)),
        "M2: expected distinct keys, found one twice",
        None,
    ),
    "a colluder whose mask key is an honest member's share key": (
        lambda w: swap(w, 4, colluder_again(w, 4, mask_key=w.last(1, Advertise).body.share_key)),
        "M2: expected distinct keys, found one twice",
        None,
    ),
    "a share key of low order": (
        lambda w: swap(w, 4, colluder_again(w, 4, share_key=w.last(4, Advertise).body.share_key[:1184] + X)),
        "M1: key c of member 4: .*low-order",
        4,
    ),
    "a mask key of low order": (
        lambda w: swap(w, 4, colluder_again(w, 4, mask_key=w.last(4, Advertise).body.mask_key[:1184] + X)),
        "M1: key s of member 4: .*low-order",
        4,
    ),
    "a key that is no ML-KEM key": (
        lambda w: swap(w, 4, colluder_again(w, 4, mask_key=b"\xff" * 1184 + w.last(4, Advertise).body.mask_key[1184:])),
        "M1: key s of member 4: .*modulus",
        4,
    ),
}


@pytest.mark.parametrize(("attack", "fragment", "culprit"), KEY_LISTS.values(), ids=KEY_LISTS.keys())
def test_a_bad_key_list_is_refused(attack: Callable[[World], KeyList], fragment: str, culprit: int | None) -> None:
    world = World(5, corrupt=[4])
    world.refused(0, attack(world), fragment, culprit=culprit)
    assert isinstance(world.tell(0, world.key_list()), Shares)  # the good list is still welcome


def test_my_own_m1_with_another_body_is_refused() -> None:
    """The attacker has no key of member 0, so this takes a second M1 of its own, say of a restored disk."""
    world = World(3)
    mine = world.last(0, Advertise)
    other = signed_by(0, changed(mine.body, rounds_joined=2), world.context)
    world.refused(0, swap(world, 0, other), "M2: expected my own M1 byte for byte")


def test_a_key_list_larger_than_the_largest_cohort_is_refused() -> None:
    world = World(5)
    machine = world.members[0].machine
    machine.context = changed(machine.context, rules=changed(machine.context.rules, cohort=4))
    world.refused(0, world.key_list(), "M2: expected 3 to 4 members, found 5")


@pytest.mark.parametrize("seen", [1, 2])
def test_a_member_whose_count_of_rounds_does_not_rise_is_refused(seen: int) -> None:
    world = World(3, counts={2: seen})
    with pytest.raises(ProtocolError, match=f"member 2 counts 1 rounds, {seen} were seen before"):
        world.members[0].machine.handle(world.key_list())
    assert isinstance(world.members[0].machine.phase, Advertising)


def test_the_coordinator_cannot_frame_a_member_by_holding_its_m1_back() -> None:
    """Member 2 joins round A (count 1), is told that A failed, and joins round B of another plan (count 2).

    The coordinator shows B to member 0 first, and then A with the M1 that it kept. Refusing is right, naming is not.
    """
    world = World(3, counts={2: 2})
    world.refused(0, world.key_list(), "member 2 counts 1 rounds, 2 were seen before", culprit=None)


def test_a_count_that_rises_is_accepted() -> None:
    world = World(3, counts={1: 0, 2: 0, 0: 99})  # nobody judges its own count
    assert isinstance(world.tell(0, world.key_list()), Shares)


def test_a_second_key_list_is_refused_and_a_repeat_gets_the_same_bytes() -> None:
    world = World(5, corrupt=[4])
    first = world.tell(0, world.key_list())
    world.refused(0, world.key_list(0, 1, 2, 3), "a second, different KeyList in one round")
    assert world.tell(0, world.key_list()) == first


def test_split_key_lists_die_at_the_share_roots() -> None:
    """Half of the members see the colluder's first keys, half its second ones: T1 differs."""
    world = World(5, corrupt=[4])
    other = swap(world, 4, colluder_again(world, 4, rounds_joined=5))
    for i in (0, 1, 4):
        world.tell(i, world.key_list())
    for i in (2, 3):
        world.tell(i, other)
    world.refused(0, world.inbox(0), "M3: member 2 signed another key list than this one")
    world.refused(2, world.inbox(2), "M3: member 0 signed another key list than this one")


def test_a_key_list_that_leaves_some_members_out_for_others_dies_there_too() -> None:
    world = World(5)
    for i in (0, 1, 2):
        world.tell(i, world.key_list())
    for i in (3, 4):
        world.tell(i, world.key_list(2, 3, 4))
    inbox = world.inbox(0, 0, 1, 2)
    attack = Inbox((*inbox.roots, world.last(3, Shares).root), inbox.leaves)
    world.refused(0, attack, "M3: member 3 signed another key list")
    inbox = world.inbox(3, 3, 4)
    attack = Inbox((world.last(2, Shares).root, *inbox.roots), inbox.leaves)
    world.refused(3, attack, "M3: member 2 signed another key list")


# --- M4 ----------------------------------------------------------------------------------------------------------


def test_fewer_sharers_than_the_threshold_are_refused() -> None:
    world = World(7, corrupt=[6]).dealt()  # t = 5
    world.refused(0, world.inbox(0, 0, 1, 2, 3), "M4: expected at least 5 members with shares, found 4")


def test_fewer_sharers_than_the_smallest_sum_are_refused() -> None:
    world = World(5, minimum=5).dealt()  # t = 3
    world.refused(0, world.inbox(0, 0, 1, 2, 3), "M4: expected at least 5 members with shares, found 4")


def test_an_inbox_without_me_is_refused() -> None:
    world = World(5).dealt()
    world.refused(0, world.inbox(0, 1, 2, 3, 4), "M4: expected my own share root")


def test_an_inbox_with_another_root_of_mine_is_refused() -> None:
    world = World(3).dealt()
    other = signed_by(0, changed(world.last(0, Shares).root.body, root=X), world.context)
    inbox = world.inbox(0)
    world.refused(0, Inbox((other, *inbox.roots[1:]), inbox.leaves), "M4: expected my own share root")


def test_a_sharer_that_was_not_in_the_key_list_is_refused() -> None:
    world = World(5, corrupt=[4])
    for i in range(4):
        world.tell(i, world.key_list(0, 1, 2, 3))
    t1 = world.last(0, Shares).root.body.t1
    inbox = world.inbox(0, 0, 1, 2, 3)
    foreign = world.sign(4, ShareRoot(t1, X))
    world.refused(0, Inbox((*inbox.roots, foreign), inbox.leaves), "M3: member 4 is not in the key list")


def test_a_share_root_that_the_coordinator_made_is_refused() -> None:
    world = World(5, corrupt=[4]).dealt()
    inbox = world.inbox(0)
    forged = changed(inbox.roots[1], body=changed(inbox.roots[1].body, root=X))
    attack = Inbox((inbox.roots[0], forged, *inbox.roots[2:]), inbox.leaves)
    world.refused(0, attack, "M3: the signature of member 1 does not verify")


def test_a_second_inbox_is_refused() -> None:
    world = World(5, corrupt=[4]).dealt()
    world.tell(0, world.inbox(0))
    world.refused(0, world.inbox(0, 0, 1, 2, 3), "a second, different Inbox in one round")


def test_two_sets_of_sharers_to_two_halves_die_at_the_survivor_list() -> None:
    world = World(5, corrupt=[4]).dealt()
    for i in (0, 1):
        world.tell(i, world.inbox(i))
    for i in (2, 3):
        world.tell(i, world.inbox(i, 0, 1, 2, 3))
    world.tell(4, world.inbox(4))
    world.refused(0, world.survivor_list(0, 1, 2, 4), "M5: member 2 masked for another set of members")
    world.refused(2, world.survivor_list(0, 1, 2, 3), "M5: member 0 masked for another set of members")


def test_a_colluder_that_signs_two_share_roots_splits_the_cohort_and_nothing_is_opened() -> None:
    world = World(5, corrupt=[4]).dealt()
    second = {4: world.redealt(4, 4, lambda leaf: changed(leaf, self_share_hash=X))}
    for i in (0, 1):
        world.tell(i, world.inbox(i))
    for i in (2, 3):
        world.tell(i, world.inbox(i, other=second))
    t2 = world.last(2, MaskedInput).body.t2
    assert t2 != world.last(0, MaskedInput).body.t2
    mine = world.sign(4, changed(world.last(2, MaskedInput).body, root=X))
    for listed in ((2, 3), (0, 2, 3)):
        attack = SurvivorList((*world.survivor_list(*listed).inputs, mine))
        fragment = "at least 4 survivors, found 3" if len(listed) == 2 else "member 0 masked for another set"
        world.refused(2, attack, fragment)


# --- M6 ----------------------------------------------------------------------------------------------------------


def test_fewer_survivors_than_the_threshold_are_refused() -> None:
    world = World(7, corrupt=[6]).dealt().uploaded()
    world.refused(0, world.survivor_list(0, 1, 2, 6), "M6: expected at least 5 survivors, found 4")


def test_a_list_below_the_smallest_sum_is_refused() -> None:
    world = World(5, minimum=5).dealt().uploaded()
    world.refused(0, world.survivor_list(0, 1, 2, 3), "M6: expected at least 5 survivors, found 4")


def test_a_list_without_me_is_refused() -> None:
    world = World(5).dealt().uploaded()
    world.refused(0, world.survivor_list(1, 2, 3, 4), "M6: expected my own upload among the survivors")


def upload_as(world: World, sender: int, signer: int, **changes: Any) -> Any:
    body = changed(world.last(0, MaskedInput).body, **changes)
    return changed(signed_by(signer, body, world.context), sender=sender)


#: Sentence -> (the upload of "member 4", which colludes, what the refusal says).
UPLOADS: dict[str, tuple[Callable[[World], Any], str]] = {
    "another length": (lambda w: upload_as(w, 4, 4, length=73), "M5 of member 4: expected 72 bytes, found 73"),
    "another T2": (lambda w: upload_as(w, 4, 4, t2=X), "M5: member 4 masked for another set"),
    "no signature of its own": (lambda w: upload_as(w, 4, 3), "M5: the signature of member 4 does not verify"),
    "a signature of another round": (
        lambda w: signed_by(4, w.last(4, MaskedInput).body, context_for(5, 1, round_number=2)),
        "M5: the signature of member 4 does not verify in this round",
    ),
}


@pytest.mark.parametrize(("attack", "fragment"), UPLOADS.values(), ids=UPLOADS.keys())
def test_a_list_with_a_bad_upload_is_refused(attack: Callable[[World], Any], fragment: str) -> None:
    world = World(5, corrupt=[4]).dealt().uploaded()
    world.refused(0, SurvivorList((*world.survivor_list(0, 1, 2, 3).inputs, attack(world))), fragment)


def test_a_survivor_that_dealt_no_shares_is_refused() -> None:
    world = World(5, corrupt=[4]).dealt().uploaded(0, 1, 2, 3)
    late = upload_as(world, 4, 4)
    attack = SurvivorList((*world.survivor_list(0, 1, 2, 3).inputs, late))
    world.refused(0, attack, "M5: member 4 has dealt no shares")


def test_another_upload_root_of_mine_is_refused() -> None:
    world = World(3).dealt().uploaded()
    other = upload_as(world, 0, 0, root=X)
    attack = SurvivorList((other, *world.survivor_list(1, 2).inputs))
    world.refused(0, attack, "M6: expected my own upload")


def test_a_second_survivor_list_is_refused_so_lists_cannot_overlap_dropouts() -> None:
    """Member 4 as a survivor first, as a dropout second: the classic attack on both kinds of share."""
    world = World(5).dealt().uploaded()
    first = world.tell(0, world.survivor_list())
    world.refused(0, world.survivor_list(0, 1, 2, 3), "a second, different SurvivorList in one round")
    assert world.tell(0, world.survivor_list()) == first


def test_two_survivor_lists_to_two_halves_are_never_both_certified() -> None:
    """Five members, one colluder: t = 4, and no two lists find four signers each."""
    world = World(5, corrupt=[4]).dealt().uploaded()
    all_five, without_3 = world.survivor_list(), world.survivor_list(0, 1, 2, 4)
    for i in (0, 1):
        world.tell(i, without_3)
    for i in (2, 3):
        world.tell(i, all_five)
    votes = [*world.certificate(0, 1).votes, world.vote(4, without_3)]
    world.refused(0, Certificate(tuple(votes)), "M8: expected at least 4 signatures, found 3")
    attack = Certificate((votes[0], votes[1], world.last(2, SurvivorVote), votes[2]))
    world.refused(0, attack, "M7: member 2 signed another survivor list")
