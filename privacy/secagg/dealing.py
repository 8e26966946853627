"""M3 and M4: an owner deals shares and pair seeds, a holder opens what was dealt to it (protocol sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import urandom

from privacy import merkle
from privacy.encoding import encode
from privacy.errors import ProtocolError
from privacy.secagg import keys, shamir
from privacy.secagg.keys import HybridKey, RoundSecrets
from privacy.secagg.messages import Advertise, OwnedLeaf, ShareLeaf

KIND_SELF, KIND_SECRET, KIND_SEED = "self-share", "secret-share", "pair-seed"


@dataclass(frozen=True)
class HeldShares:
    """What a holder keeps of one owner until M9; in memory only."""

    self_share: bytes = field(repr=False)
    secret_share: bytes = field(repr=False)
    pair_seed: bytes | None = field(repr=False)  # r_ij where the owner has the lower id


def point(member: int) -> int:
    """Shamir's x of a member: roster index + 1, never 0."""
    return member + 1


def deal(
    secrets: RoundSecrets,
    owner: int,
    cohort: Mapping[int, Advertise],
    threshold: int,
    header_hash: bytes,
    t1: bytes,
    rand: Callable[[int], bytes] = urandom,
) -> tuple[tuple[ShareLeaf, ...], HeldShares]:
    """Share b and z among all of U1 and choose the pair seeds for higher ids (Bonawitz 2017, Fig. 4, round 1).

    An owner is one of its own holders: its share never travels, its leaf carries the hashes alone.

    Returns:
        One leaf for every member of U1 in ascending order, and the owner's own shares.
    """
    points = [point(member) for member in sorted(cohort)]
    self_shares = shamir.share(secrets.self_seed, threshold, points, rand)
    secret_shares = shamir.share(secrets.mask_secret, threshold, points, rand)
    leaves = []
    for holder in sorted(cohort):
        pair = (self_shares[point(holder)], secret_shares[point(holder)])
        sealed_shares, seed, sealed_seed = b"", b"", b""
        if holder != owner:
            info = keys.box_info(keys.LABEL_SHARE, header_hash, t1, owner, holder)
            sealed_shares = keys.seal(cohort[holder].share_key, b"".join(pair), info)
        if holder > owner:
            seed = keys.pair_seed(secrets.mask_secret, holder)
            info = keys.box_info(keys.LABEL_PAIR, header_hash, t1, owner, holder)
            sealed_seed = keys.seal(cohort[holder].mask_key, seed, info)
        leaves.append(
            ShareLeaf(
                holder,
                sealed_shares,
                keys.secret_hash(KIND_SELF, owner, holder, pair[0]),
                keys.secret_hash(KIND_SECRET, owner, holder, pair[1]),
                sealed_seed,
                keys.secret_hash(KIND_SEED, owner, holder, seed) if seed else b"",
            )
        )
    own = HeldShares(self_shares[point(owner)], secret_shares[point(owner)], None)
    return tuple(leaves), own


def leaf_hashes(leaves: Sequence[ShareLeaf]) -> list[bytes]:
    """Merkle leaf hashes of an M3, in the order of its holders."""
    return [merkle.leaf_hash(encode(leaf)) for leaf in leaves]


def has_path(owned: OwnedLeaf, cohort: Sequence[int], root: bytes) -> bool:
    """Does this leaf stand under its owner's signed root, at its holder's place among U1 (ascending)?"""
    if owned.leaf.holder not in cohort:
        return False
    leaf, index = merkle.leaf_hash(encode(owned.leaf)), cohort.index(owned.leaf.holder)
    return merkle.verify(leaf, index, len(cohort), owned.path, root)


def open_seed(mask_key: HybridKey, owner: int, leaf: ShareLeaf, header_hash: bytes, t1: bytes) -> bytes:
    """r_ij out of a lower owner's leaf, checked against its hash.

    Raises:
        ProtocolError: with the owner as culprit.
    """
    info = keys.box_info(keys.LABEL_PAIR, header_hash, t1, owner, leaf.holder)
    try:
        seed = keys.unseal(mask_key, leaf.sealed_seed, info)
    except ProtocolError as error:
        raise ProtocolError(f"pair seed sealed by member {owner}: {error}", culprit=owner) from error
    if keys.secret_hash(KIND_SEED, owner, leaf.holder, seed) != leaf.seed_hash:
        raise ProtocolError(f"pair seed of member {owner} does not match its hash in M3", culprit=owner)
    return seed


def open_leaf(
    share_key: HybridKey, mask_key: HybridKey, owner: int, leaf: ShareLeaf, header_hash: bytes, t1: bytes
) -> HeldShares:
    """Open one leaf dealt to me and check every hash in it.

    Raises:
        ProtocolError: with the owner as culprit: a box that does not open, a share that is none or does not match.
    """
    info = keys.box_info(keys.LABEL_SHARE, header_hash, t1, owner, leaf.holder)
    try:
        opened = keys.unseal(share_key, leaf.sealed_shares, info)
    except ProtocolError as error:
        raise ProtocolError(f"shares sealed by member {owner}: {error}", culprit=owner) from error
    self_share, secret_share = opened[: shamir.SHARE_BYTES], opened[shamir.SHARE_BYTES :]
    for kind, value, expected in (
        (KIND_SELF, self_share, leaf.self_share_hash),
        (KIND_SECRET, secret_share, leaf.secret_share_hash),
    ):
        if not shamir.is_share(value) or keys.secret_hash(kind, owner, leaf.holder, value) != expected:
            raise ProtocolError(f"{kind} of member {owner} does not match its hash in M3", culprit=owner)
    if (owner < leaf.holder) != bool(leaf.sealed_seed):
        raise ProtocolError(f"member {owner}: expected a pair seed from the lower id, and only there", culprit=owner)
    seed = open_seed(mask_key, owner, leaf, header_hash, t1) if leaf.sealed_seed else None
    return HeldShares(self_share, secret_share, seed)
