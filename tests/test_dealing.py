"""M3 and M4 between two members: what is dealt opens, and every way of dealing badly names the dealer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from privacy import merkle
from privacy.errors import ProtocolError
from privacy.secagg import keys, shamir
from privacy.secagg.dealing import (
    KIND_SECRET,
    KIND_SEED,
    KIND_SELF,
    HeldShares,
    deal,
    has_path,
    leaf_hashes,
    open_leaf,
    open_seed,
    point,
)
from privacy.secagg.keys import HybridKey, RoundSecrets
from privacy.secagg.messages import Advertise, OwnedLeaf, ShareLeaf
from tests.simulation import seeded

H, T1, ROOT = b"h" * 32, b"1" * 32, b"r" * 32
MEMBERS = (1, 4, 6, 9)
OWNER, THRESHOLD = 4, 3
SECRETS = {i: RoundSecrets.generate(seeded(f"dealing {i}")) for i in MEMBERS}
MASK_KEYS = {i: keys.mask_key(SECRETS[i].mask_secret) for i in MEMBERS}
COHORT = {i: Advertise(SECRETS[i].share_key.public, MASK_KEYS[i].public, ROOT, ROOT, 1, 0, ROOT) for i in MEMBERS}
LEAVES, OWN = deal(SECRETS[OWNER], OWNER, COHORT, THRESHOLD, H, T1, seeded("deal"))
BY_HOLDER = {leaf.holder: leaf for leaf in LEAVES}


def opened(holder: int, leaf: ShareLeaf | None = None, owner: int = OWNER) -> HeldShares:
    return open_leaf(SECRETS[holder].share_key, MASK_KEYS[holder], owner, leaf or BY_HOLDER[holder], H, T1)


def all_held() -> dict[int, HeldShares]:
    return {i: OWN if i == OWNER else opened(i) for i in MEMBERS}


def test_every_member_gets_a_leaf_in_ascending_order() -> None:
    assert tuple(leaf.holder for leaf in LEAVES) == MEMBERS


def test_the_owner_holds_a_share_that_never_travels() -> None:
    leaf = BY_HOLDER[OWNER]
    assert (leaf.sealed_shares, leaf.sealed_seed, leaf.seed_hash) == (b"", b"", b"")
    assert leaf.self_share_hash == keys.secret_hash(KIND_SELF, OWNER, OWNER, OWN.self_share)
    assert leaf.secret_share_hash == keys.secret_hash(KIND_SECRET, OWNER, OWNER, OWN.secret_share)


def test_any_t_holders_open_both_secrets() -> None:
    held = all_held()
    for chosen in combinations(MEMBERS, THRESHOLD):
        assert shamir.combine({point(i): held[i].self_share for i in chosen}) == SECRETS[OWNER].self_seed
        assert shamir.combine({point(i): held[i].secret_share for i in chosen}) == SECRETS[OWNER].mask_secret


def test_fewer_holders_open_neither() -> None:
    held = all_held()
    for chosen in combinations(MEMBERS, THRESHOLD - 1):
        assert shamir.combine({point(i): held[i].self_share for i in chosen}) != SECRETS[OWNER].self_seed


def test_the_two_secrets_have_polynomials_of_their_own() -> None:
    held = all_held()
    assert all(shares.self_share != shares.secret_share for shares in held.values())


def test_pair_seeds_go_to_higher_ids_only() -> None:
    assert {i for i in MEMBERS if BY_HOLDER[i].sealed_seed} == {6, 9}
    assert opened(1).pair_seed is None
    assert opened(9).pair_seed == keys.pair_seed(SECRETS[OWNER].mask_secret, 9)


def test_what_was_sealed_under_the_share_key_stays_shut_when_the_mask_secret_opens() -> None:
    """Protocol section 3: shares travel under c_i, so an opened z_i opens pair seeds and nothing else."""
    info = keys.box_info(keys.LABEL_SHARE, H, T1, OWNER, 9)
    with pytest.raises(ProtocolError, match="does not open"):
        keys.unseal(MASK_KEYS[9], BY_HOLDER[9].sealed_shares, info)


def leaf_for_9(**changes: Any) -> ShareLeaf:
    return replace(BY_HOLDER[9], **changes)


def shares_for_9(self_share: bytes, secret_share: bytes) -> ShareLeaf:
    """A leaf that seals these shares, with hashes that fit them."""
    info = keys.box_info(keys.LABEL_SHARE, H, T1, OWNER, 9)
    return leaf_for_9(
        sealed_shares=keys.seal(COHORT[9].share_key, self_share + secret_share, info),
        self_share_hash=keys.secret_hash(KIND_SELF, OWNER, 9, self_share),
        secret_share_hash=keys.secret_hash(KIND_SECRET, OWNER, 9, secret_share),
    )


def seed_box(seed: bytes, info: bytes | None = None, key: HybridKey | None = None) -> bytes:
    info = info or keys.box_info(keys.LABEL_PAIR, H, T1, OWNER, 9)
    return keys.seal((key or MASK_KEYS[9]).public, seed, info)


GOOD = (opened(9).self_share, opened(9).secret_share)
TOO_LARGE = shamir.PRIME.to_bytes(33, "big")
BAD: dict[str, tuple[Callable[[], ShareLeaf], str]] = {
    "the box of another holder": (
        lambda: leaf_for_9(sealed_shares=BY_HOLDER[6].sealed_shares),
        "shares sealed by member 4: a sealed box does not open",
    ),
    "shares sealed under the mask key": (
        lambda: leaf_for_9(
            sealed_shares=keys.seal(
                MASK_KEYS[9].public, GOOD[0] + GOOD[1], keys.box_info(keys.LABEL_SHARE, H, T1, OWNER, 9)
            )
        ),
        "shares sealed by member 4: a sealed box does not open",
    ),
    "no box at all": (lambda: leaf_for_9(sealed_shares=b""), "shares sealed by member 4"),
    "a self share that its hash does not promise": (
        lambda: leaf_for_9(self_share_hash=bytes(32)),
        "self-share of member 4 does not match its hash",
    ),
    "a secret share that its hash does not promise": (
        lambda: leaf_for_9(secret_share_hash=bytes(32)),
        "secret-share of member 4 does not match its hash",
    ),
    "the two shares swapped": (
        lambda: leaf_for_9(
            self_share_hash=BY_HOLDER[9].secret_share_hash, secret_share_hash=BY_HOLDER[9].self_share_hash
        ),
        "self-share of member 4",
    ),
    "a self share that is no field element": (
        lambda: shares_for_9(TOO_LARGE, GOOD[1]),
        "self-share of member 4 does not match",
    ),
    "a secret share that is no field element": (
        lambda: shares_for_9(GOOD[0], TOO_LARGE),
        "secret-share of member 4 does not match",
    ),
    "no pair seed for a higher id": (
        lambda: leaf_for_9(sealed_seed=b"", seed_hash=b""),
        "expected a pair seed from the lower id, and only there",
    ),
    "a pair seed that its hash does not promise": (
        lambda: leaf_for_9(seed_hash=bytes(32)),
        "pair seed of member 4 does not match its hash",
    ),
    "another pair seed than promised": (
        lambda: leaf_for_9(sealed_seed=seed_box(bytes(32))),
        "pair seed of member 4 does not match its hash",
    ),
    "a pair seed sealed for another round": (
        lambda: leaf_for_9(sealed_seed=seed_box(bytes(32), keys.box_info(keys.LABEL_PAIR, T1, T1, OWNER, 9))),
        "pair seed sealed by member 4: a sealed box does not open",
    ),
    "a pair seed sealed for another holder": (
        lambda: leaf_for_9(sealed_seed=BY_HOLDER[6].sealed_seed),
        "pair seed sealed by member 4: a sealed box does not open",
    ),
    "a pair seed under the share key": (
        lambda: leaf_for_9(sealed_seed=seed_box(bytes(32), key=SECRETS[9].share_key)),
        "pair seed sealed by member 4: a sealed box does not open",
    ),
}


@pytest.mark.parametrize(("leaf", "fragment"), BAD.values(), ids=BAD.keys())
def test_a_bad_leaf_names_its_dealer(leaf: Callable[[], ShareLeaf], fragment: str) -> None:
    with pytest.raises(ProtocolError, match=fragment) as refused:
        opened(9, leaf())
    assert refused.value.culprit == OWNER


def test_a_pair_seed_from_the_higher_id_names_its_dealer() -> None:
    info = keys.box_info(keys.LABEL_PAIR, H, T1, OWNER, 1)
    seed = bytes(range(32))
    leaf = replace(
        BY_HOLDER[1],
        sealed_seed=keys.seal(MASK_KEYS[1].public, seed, info),
        seed_hash=keys.secret_hash(KIND_SEED, OWNER, 1, seed),
    )
    with pytest.raises(ProtocolError, match="expected a pair seed from the lower id") as refused:
        opened(1, leaf)
    assert refused.value.culprit == OWNER


@pytest.mark.parametrize(("header", "t1", "owner"), [(T1, T1, OWNER), (H, H, OWNER), (H, T1, 6)])
def test_a_leaf_opens_for_its_own_round_key_list_and_owner_only(header: bytes, t1: bytes, owner: int) -> None:
    with pytest.raises(ProtocolError, match="does not open"):
        open_leaf(SECRETS[9].share_key, MASK_KEYS[9], owner, BY_HOLDER[9], header, t1)
    with pytest.raises(ProtocolError, match="does not open"):
        open_seed(MASK_KEYS[9], owner, BY_HOLDER[9], header, t1)


def test_a_leaf_has_a_path_at_its_holders_place_only() -> None:
    hashes = leaf_hashes(LEAVES)
    root = merkle.root(hashes)
    for place, leaf in enumerate(LEAVES):
        owned = OwnedLeaf(OWNER, leaf, merkle.path(hashes, place))
        assert has_path(owned, MEMBERS, root)
        assert not has_path(owned, MEMBERS, bytes(32))
        other = LEAVES[place - 1]
        assert not has_path(replace(owned, leaf=other), MEMBERS, root)
        assert not has_path(replace(owned, leaf=replace(leaf, self_share_hash=bytes(32))), MEMBERS, root)
        assert not has_path(replace(owned, leaf=replace(leaf, holder=2)), MEMBERS, root)


def test_shares_never_print() -> None:
    assert repr(OWN) == "HeldShares()"
