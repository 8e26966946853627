"""Attacks on what members seal for one another: swapped, forged, re-signed, replayed, withheld."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from participant.phases import Dealing, Stopped
from participant.records import Aborted, Spent
from privacy.secagg import keys
from privacy.secagg.messages import Advertise, Complaint, Inbox, OwnedLeaf, ShareLeaf, Shares
from tests.adversary.world import World, changed

X = bytes(32)

#: Changes one inbox of member 1 (of five; 4 and 0 collude, so that they are a lower and a higher dealer).
Attack = Callable[[World, Inbox], Inbox]


def with_leaf(inbox: Inbox, place: int, **changes: Any) -> Inbox:
    leaves = list(inbox.leaves)
    leaves[place] = changed(leaves[place], **changes)
    return Inbox(inbox.roots, tuple(leaves))


def with_box(inbox: Inbox, place: int, **changes: Any) -> Inbox:
    return with_leaf(inbox, place, leaf=changed(inbox.leaves[place].leaf, **changes))


def flipped(box: bytes) -> bytes:
    return bytes([box[0] ^ 1]) + box[1:]


def world() -> World:
    return World(5, corrupt=[0, 4]).dealt()


NOT_MINE = "M4: the leaf of member {} is not mine under its signed root"

#: What the coordinator alone can do to a box, and to whose leaf the refusal points.
RELAYED: dict[str, tuple[Attack, str]] = {
    "a bit changed in sealed shares": (
        lambda _w, m: with_box(m, 1, sealed_shares=flipped(m.leaves[1].leaf.sealed_shares)),
        NOT_MINE.format(2),
    ),
    "a bit changed in a sealed pair seed": (
        lambda _w, m: with_box(m, 0, sealed_seed=flipped(m.leaves[0].leaf.sealed_seed)),
        NOT_MINE.format(0),
    ),
    "the pair seed withheld": (lambda _w, m: with_box(m, 0, sealed_seed=b"", seed_hash=b""), NOT_MINE.format(0)),
    "shares that the coordinator sealed itself": (
        lambda w, m: with_box(
            m, 1, sealed_shares=keys.seal(w.last(1, Advertise).body.share_key, bytes(66), b"whatever")
        ),
        NOT_MINE.format(2),
    ),
    "the hash of a share changed": (lambda _w, m: with_box(m, 1, self_share_hash=X), NOT_MINE.format(2)),
    "the leaf of another holder": (lambda w, m: with_leaf(m, 1, leaf=w.leaf(2, 3).leaf), NOT_MINE.format(2)),
    "the leaf of another holder with its path": (
        lambda w, m: Inbox(m.roots, (m.leaves[0], w.leaf(2, 3), *m.leaves[2:])),
        NOT_MINE.format(2),
    ),
    "the leaf of another holder under my name": (
        lambda w, m: with_leaf(m, 1, leaf=changed(w.leaf(2, 3).leaf, holder=1)),
        NOT_MINE.format(2),
    ),
    "the dealer's own leaf": (lambda w, m: with_leaf(m, 1, leaf=w.leaf(2, 2).leaf), NOT_MINE.format(2)),
    "the leaf of another owner": (lambda w, m: with_leaf(m, 1, leaf=w.leaf(3, 1).leaf), NOT_MINE.format(2)),
    "the leaf and path of another owner": (
        lambda w, m: Inbox(m.roots, (m.leaves[0], changed(w.leaf(3, 1), owner=2), *m.leaves[2:])),
        NOT_MINE.format(2),
    ),
    "a path cut short": (lambda _w, m: with_leaf(m, 1, path=m.leaves[1].path[1:]), NOT_MINE.format(2)),
    "a path with a hash more": (lambda _w, m: with_leaf(m, 1, path=(*m.leaves[1].path, X)), NOT_MINE.format(2)),
    "a leaf too few": (lambda _w, m: Inbox(m.roots, m.leaves[1:]), "M4: expected one leaf of every other member of U2"),
    "my own leaf among them": (
        lambda w, m: Inbox(m.roots, (m.leaves[0], w.leaf(1, 1), *m.leaves[1:])),
        "M4: expected one leaf of every other member of U2",
    ),
    "a leaf of somebody outside U2": (
        lambda w, m: Inbox(w.inbox(1, 0, 1, 2, 3).roots, m.leaves),
        "M4: expected one leaf of every other member of U2",
    ),
    "the leaf of one owner twice, of another not at all": (
        lambda w, m: Inbox(m.roots, (m.leaves[0], w.leaf(2, 1), changed(w.leaf(2, 1), owner=3), m.leaves[3])),
        NOT_MINE.format(3),
    ),
}


@pytest.mark.parametrize(("attack", "fragment"), RELAYED.values(), ids=RELAYED.keys())
def test_a_coordinator_that_touches_a_box_is_refused(attack: Attack, fragment: str) -> None:
    scene = world()
    scene.refused(1, attack(scene, scene.inbox(1)), fragment)
    assert isinstance(scene.members[1].machine.phase, Dealing)


def sealed_for(scene: World, holder: int, plaintext: bytes, kind: str, sender: int) -> bytes:
    """A box that a colluder makes for an honest holder, under any info it likes."""
    advertised = scene.last(holder, Advertise).body
    t1 = scene.last(0, Shares).root.body.t1
    info = keys.box_info(kind, scene.context.header_hash, t1, sender, holder)
    return keys.seal(advertised.share_key if kind == keys.LABEL_SHARE else advertised.mask_key, plaintext, info)


Deal = Callable[[World, ShareLeaf], ShareLeaf]

#: Sentence -> (dealer, how it changes and signs its leaf for member 1, the complaint).
DEALT: dict[str, tuple[int, Deal, str]] = {
    "a box that opens for nobody": (
        4,
        lambda _w, leaf: changed(leaf, sealed_shares=flipped(leaf.sealed_shares)),
        "shares sealed by member 4: a sealed box does not open",
    ),
    "no box": (4, lambda _w, leaf: changed(leaf, sealed_shares=b""), "shares sealed by member 4"),
    "an honest member's box, copied": (
        4,
        lambda w, leaf: changed(leaf, sealed_shares=w.leaf(2, 1).leaf.sealed_shares),
        "shares sealed by member 4: a sealed box does not open",
    ),
    "an honest member's whole leaf, signed as one's own": (
        4,
        lambda w, _leaf: w.leaf(2, 1).leaf,
        "shares sealed by member 4: a sealed box does not open",
    ),
    "a box under another member's name": (
        4,
        lambda w, leaf: changed(leaf, sealed_shares=sealed_for(w, 1, bytes(66), keys.LABEL_SHARE, 3)),
        "shares sealed by member 4: a sealed box does not open",
    ),
    "shares that its hashes do not promise": (
        4,
        lambda w, leaf: changed(leaf, sealed_shares=sealed_for(w, 1, bytes(66), keys.LABEL_SHARE, 4)),
        "self-share of member 4 does not match its hash in M3",
    ),
    "a hash that its shares do not give": (
        4,
        lambda _w, leaf: changed(leaf, secret_share_hash=X),
        "secret-share of member 4 does not match its hash in M3",
    ),
    "a pair seed that its hash does not promise": (
        0,
        lambda w, leaf: changed(leaf, sealed_seed=sealed_for(w, 1, X, keys.LABEL_PAIR, 0)),
        "pair seed of member 0 does not match its hash in M3",
    ),
    "a pair seed that opens for nobody": (
        0,
        lambda _w, leaf: changed(leaf, sealed_seed=flipped(leaf.sealed_seed)),
        "pair seed sealed by member 0: a sealed box does not open",
    ),
    "no pair seed": (
        0,
        lambda _w, leaf: changed(leaf, sealed_seed=b"", seed_hash=b""),
        "expected a pair seed from the lower id, and only there",
    ),
    "a pair seed from the higher id": (
        4,
        lambda w, leaf: changed(
            leaf,
            sealed_seed=sealed_for(w, 1, X, keys.LABEL_PAIR, 4),
            seed_hash=keys.secret_hash("pair-seed", 4, 1, X),
        ),
        "expected a pair seed from the lower id, and only there",
    ),
}


@pytest.mark.parametrize(("dealer", "deal", "reason"), DEALT.values(), ids=DEALT.keys())
def test_a_bad_dealer_meets_a_signed_complaint_and_no_upload(dealer: int, deal: Deal, reason: str) -> None:
    scene = world()
    again = scene.redealt(dealer, 1, lambda leaf: deal(scene, leaf))
    reply = scene.tell(1, scene.inbox(1, other={dealer: again}))
    assert isinstance(reply.body, Complaint)
    assert (reply.body.accused, reply.body.t1) == (dealer, again.root.body.t1)
    assert reason in reply.body.reason
    member = scene.members[1]
    assert member.machine.phase == Stopped(reply.body.reason)
    assert member.records[-1] == Aborted(scene.context.header, reply.body.reason)
    assert not any(isinstance(record, Spent) for record in member.records)
    scene.assert_nothing_revealed()
    scene.refused(1, scene.inbox(1), "a second, different Inbox")


def test_a_complaint_says_nothing_secret() -> None:
    scene = world()
    again = scene.redealt(4, 1, lambda leaf: changed(leaf, self_share_hash=X))
    reply = scene.tell(1, scene.inbox(1, other={4: again}))
    secrets = scene.members[1].machine._secrets
    for value in (secrets.self_seed, secrets.mask_secret):
        assert value.hex() not in reply.body.reason


def test_an_opened_mask_secret_does_not_open_shares_sealed_to_its_owner() -> None:
    """The coordinator learns z of a dropout, so all keys derived from it: shares to it stay shut."""
    scene = World(5).dealt()
    mask_key = keys.mask_key(scene.members[4].machine._secrets.mask_secret)
    leaf = scene.leaf(0, 4).leaf
    t1 = scene.last(0, Shares).root.body.t1
    for kind in (keys.LABEL_SHARE, keys.LABEL_PAIR):
        with pytest.raises(Exception, match="does not open"):
            keys.unseal(mask_key, leaf.sealed_shares, keys.box_info(kind, scene.context.header_hash, t1, 0, 4))


def test_boxes_of_one_round_are_worthless_in_the_next() -> None:
    """A replay of all M3 of a round with the same keys would need the same T1, which covers the header."""
    scene = world()
    stale = OwnedLeaf(2, world().leaf(2, 1).leaf, scene.leaf(2, 1).path)
    inbox = scene.inbox(1)
    scene.refused(1, Inbox(inbox.roots, (inbox.leaves[0], stale, *inbox.leaves[2:])), NOT_MINE.format(2))
