"""Naming a cheat, with evidence that anybody can check (protocol section 4); pure.

* a share that does not match its leaf names its sender: :class:`BadShare`
* t matching shares that do not give B_i or s_pk_i name the owner: :class:`BadDealer`
* a pair seed that an opened z shows to be wrong names its dealer: :class:`BadSeed`

A garbled total has no author that could be shown: every upload carries the masks of pairs that stay closed, so nobody
can tell whose vector was out of range. It is refused, and the manifest says that nobody is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from privacy.errors import ProtocolError
from privacy.secagg import dealing, keys, shamir, transcript
from privacy.secagg.messages import (
    Advertise,
    Header,
    OpenedMaskSecret,
    OwnedLeaf,
    SelfMaskShare,
    Share,
    ShareRoot,
    UnmaskShares,
)
from privacy.secagg.signed import Signed
from privacy.secagg.transcript import Cohort, RoundContext


@dataclass(frozen=True)
class BadShare:
    """The sender's signed M9, and the owner's signed leaf that one of its shares does not match."""

    release: Signed[UnmaskShares]
    root: Signed[ShareRoot]
    leaf: OwnedLeaf


@dataclass(frozen=True)
class BadDealer:
    """t shares of one owner that match its signed leaves, and do not give what its M1 committed to."""

    root: Signed[ShareRoot]
    leaves: tuple[OwnedLeaf, ...]
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class BadSeed:
    """A leaf whose pair seed is not the one that the opened z of one of its two ends demands."""

    root: Signed[ShareRoot]
    leaf: OwnedLeaf
    opened: OpenedMaskSecret


Naming = BadShare | BadDealer | BadSeed


def matches_leaf(share: Share, owned: OwnedLeaf) -> bool:
    """Is this released share the one whose hash its owner signed?"""
    leaf, is_self = owned.leaf, isinstance(share, SelfMaskShare)
    kind = dealing.KIND_SELF if is_self else dealing.KIND_SECRET
    expected = leaf.self_share_hash if is_self else leaf.secret_share_hash
    return (
        share.owner == owned.owner
        and shamir.is_share(share.share)
        and keys.secret_hash(kind, share.owner, leaf.holder, share.share) == expected
    )


@dataclass(frozen=True)
class Accusation:
    """Evidence with what it is to be read against: key list and share roots that T2 is made of."""

    header: Header
    keys: tuple[Signed[Advertise], ...]
    roots: tuple[Signed[ShareRoot], ...]
    evidence: Naming


def accused(context: RoundContext, accusation: Accusation) -> int:
    """The member that an accusation names, checked from plan and roster alone.

    Raises:
        ProtocolError: it is of another round, or proves nothing.
    """
    if accusation.header != context.header:
        raise ProtocolError("evidence: it is of another round")
    transcript.check_key_list(context, accusation.keys)
    cohort = Cohort(context, accusation.keys)
    transcript.check_roots(cohort, accusation.roots)
    return named(cohort, accusation.roots, accusation.evidence)


def named(cohort: Cohort, roots: Sequence[Signed[ShareRoot]], evidence: Naming) -> int:
    """The member that the evidence proves to have cheated.

    Args:
        roots: of U2. A dealer can sign a second root afterwards; only the ones that T2 binds count.

    Raises:
        ProtocolError: the evidence proves nothing.
    """
    if evidence.root not in roots:
        raise ProtocolError("evidence: the share root is not one of this round")
    _check_leaves(cohort, evidence.root, evidence.leaves if isinstance(evidence, BadDealer) else (evidence.leaf,))
    if isinstance(evidence, BadShare):
        if evidence.release.body.t2 != transcript.t2_hash(cohort.t1, roots):
            raise ProtocolError("evidence: the share was released under other share roots")
        return _bad_share(cohort, evidence)
    if isinstance(evidence, BadDealer):
        return _bad_dealer(cohort, evidence)
    return _bad_seed(cohort, evidence)


def proves(cohort: Cohort, roots: Sequence[Signed[ShareRoot]], evidence: Naming) -> bool:
    """Does the evidence name anybody?"""
    try:
        named(cohort, roots, evidence)
    except ProtocolError:
        return False
    return True


def _check_leaves(cohort: Cohort, root: Signed[ShareRoot], leaves: Sequence[OwnedLeaf]) -> None:
    transcript.check_root(cohort, root)
    for leaf in leaves:
        if leaf.owner != root.sender or not dealing.has_path(leaf, cohort.members, root.body.root):
            raise ProtocolError("evidence: a leaf is not under its owner's signed root")


def _bad_share(cohort: Cohort, evidence: BadShare) -> int:
    sender = evidence.release.sender
    transcript.check_signed(cohort.context, evidence.release, "evidence")
    if evidence.leaf.leaf.holder != sender:
        raise ProtocolError("evidence: the leaf was dealt to another member than the sender")
    shares = [s for s in evidence.release.body.shares if s.owner == evidence.leaf.owner]
    if not shares or matches_leaf(shares[0], evidence.leaf):
        raise ProtocolError("evidence: the share matches its leaf")
    return sender


def _bad_dealer(cohort: Cohort, evidence: BadDealer) -> int:
    owner, shares = evidence.root.sender, evidence.shares
    if len(shares) != cohort.threshold or len({type(s) for s in shares}) != 1:
        raise ProtocolError(f"evidence: expected {cohort.threshold} shares of one kind")
    holders = [leaf.leaf.holder for leaf in evidence.leaves]
    if len(holders) != len(shares) or len(set(holders)) != len(holders):
        raise ProtocolError("evidence: expected one leaf of a holder of its own for each share")
    points = {}
    for share, leaf in zip(shares, evidence.leaves, strict=True):
        if not matches_leaf(share, leaf):
            raise ProtocolError("evidence: a share does not match its leaf")
        points[dealing.point(leaf.leaf.holder)] = share.share
    secret = shamir.combine(points)
    if secret is not None and transcript.matches_commitment(
        cohort, owner, secret, is_self=isinstance(shares[0], SelfMaskShare)
    ):
        raise ProtocolError("evidence: the shares give what the owner committed to")
    return owner


def _bad_seed(cohort: Cohort, evidence: BadSeed) -> int:
    dealer, holder, leaf = evidence.leaf.owner, evidence.leaf.leaf.holder, evidence.leaf.leaf
    opened = evidence.opened
    if dealer >= holder:
        raise ProtocolError("evidence: only the lower id deals a pair seed")
    if not transcript.matches_commitment(cohort, opened.owner, opened.secret, is_self=False):
        raise ProtocolError("evidence: the opened z does not match the M1 of its owner")
    if opened.owner == dealer:
        seed = keys.pair_seed(opened.secret, holder)
        honest = keys.secret_hash(dealing.KIND_SEED, dealer, holder, seed) == leaf.seed_hash
    elif opened.owner == holder:
        honest = _opens(cohort, evidence)
    else:
        raise ProtocolError("evidence: the opened z belongs to neither end of the pair")
    if honest:
        raise ProtocolError("evidence: the pair seed is the right one")
    return dealer


def _opens(cohort: Cohort, evidence: BadSeed) -> bool:
    key = keys.mask_key(evidence.opened.secret)
    try:
        dealing.open_seed(key, evidence.leaf.owner, evidence.leaf.leaf, cohort.context.header_hash, cohort.t1)
    except ProtocolError:
        return False
    return True
