"""What was agreed, hash by hash, and the checks that everybody makes: member, coordinator and auditor alike.

T1 fixes the key list (and with it n, t and the holders), T2 the sharers, L the survivors. Each function below checks
one list completely before anything is done with it; none has side effects (protocol section 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from privacy.encoding import digest, number
from privacy.errors import ProtocolError
from privacy.roster import Rules
from privacy.secagg import dealing, keys
from privacy.secagg.messages import (
    Advertise,
    Header,
    MaskedInput,
    Opened,
    OpenedMaskSecret,
    OpenedSelfMask,
    OutcomeVote,
    OwnedLeaf,
    ProjectionShare,
    ShareRoot,
    SurvivorVote,
    Transcript,
)
from privacy.secagg.signed import Signed, has_valid_signature
from privacy.secagg.threshold import threshold

B = TypeVar("B")


@dataclass(frozen=True)
class RoundContext:
    """What plan and pinned roster say about a round: no message can change any of it."""

    header: Header
    identities: tuple[bytes, ...]  # Ed25519 keys by roster index
    rules: Rules
    upload_length: int  # bytes of a packed vector

    @cached_property
    def header_hash(self) -> bytes:
        return self.header.hash()


def t1_hash(header_hash: bytes, members: Sequence[Signed[Advertise]]) -> bytes:
    """T1 = H(header, sorted (id, H(M1)))."""
    parts = [part for m in members for part in (number(m.sender), m.body_hash())]
    return digest("T1", header_hash, *parts)


def t2_hash(t1: bytes, roots: Sequence[Signed[ShareRoot]]) -> bytes:
    """T2 = H(T1, sorted (id, R_i))."""
    return digest("T2", t1, *(part for r in roots for part in (number(r.sender), r.body.root)))


def total_hash(t2: bytes, root: bytes) -> bytes:
    """H(total): binds the Merkle root over the packed blocks of a total to its round."""
    return digest("total", t2, root)


def list_hash(t2: bytes, listed: Sequence[tuple[int, bytes]]) -> bytes:
    """L = H(T2, sorted (id, root of the upload))."""
    return digest("L", t2, *(part for member, root in listed for part in (number(member), root)))


def survivors_hash(t2: bytes, inputs: Sequence[Signed[MaskedInput]]) -> bytes:
    """L of the uploads of U3."""
    return list_hash(t2, [(i.sender, i.body.root) for i in inputs])


def check_signed(context: RoundContext, message: Signed[B], what: str) -> None:
    """The sender is in the roster and signed this body in the round of this header."""
    if not 0 <= message.sender < len(context.identities):
        raise ProtocolError(f"{what}: member {message.sender} is not in the roster")
    if not has_valid_signature(message, context.identities[message.sender], context.header_hash):
        raise ProtocolError(f"{what}: the signature of member {message.sender} does not verify in this round")


def check_advertise(context: RoundContext, message: Signed[Advertise]) -> None:
    """One M1: signature and usable keys; a trial seal to each finds low-order X25519 points."""
    check_signed(context, message, "M1")
    for name, key in (("c", message.body.share_key), ("s", message.body.mask_key)):
        try:
            keys.seal(key, b"", b"trial")
        except ProtocolError as error:
            raise ProtocolError(
                f"M1: key {name} of member {message.sender}: {error}", culprit=message.sender
            ) from error


def check_key_list(context: RoundContext, members: Sequence[Signed[Advertise]], least: int | None = None) -> None:
    """M2: every M1 is good, no key appears twice, and the cohort has an allowed size.

    Args:
        least: fewest members that the caller agrees to; ``None`` for whoever reads what others agreed to. A certified
            list that lost its total comes again as it is, and may be smaller than ``min_cohort`` (protocol section 6,
            c), though not than the t that signed it; only its members can tell, and t of them signed what others read.
    """
    rules = context.rules
    if least is None:
        least = max(rules.min_survivors, threshold(rules.min_cohort, rules.colluders))
    if not least <= len(members) <= rules.cohort:
        raise ProtocolError(f"M2: expected {least} to {rules.cohort} members, found {len(members)}")
    for member in members:
        check_advertise(context, member)
    all_keys = [key for m in members for key in (m.body.share_key, m.body.mask_key)]
    if len(set(all_keys)) != len(all_keys):
        raise ProtocolError("M2: expected distinct keys, found one twice")


@dataclass(frozen=True)
class Cohort:
    """U1 with what follows from it: n, t and the holders are fixed here and nowhere else."""

    context: RoundContext
    keys: tuple[Signed[Advertise], ...]

    @cached_property
    def members(self) -> tuple[int, ...]:
        return tuple(m.sender for m in self.keys)

    @cached_property
    def advertised(self) -> dict[int, Advertise]:
        return {m.sender: m.body for m in self.keys}

    @property
    def threshold(self) -> int:
        return threshold(len(self.keys), self.context.rules.colluders)

    @property
    def quorum(self) -> int:
        """Fewest members that U2 and U3 may have."""
        return max(self.threshold, self.context.rules.min_survivors)

    @cached_property
    def t1(self) -> bytes:
        return t1_hash(self.context.header_hash, self.keys)


def check_roots(cohort: Cohort, roots: Sequence[Signed[ShareRoot]]) -> None:
    """U2 of M4: within U1, large enough, and everybody signed **this** T1; a split key list dies here."""
    if len(roots) < cohort.quorum:
        raise ProtocolError(f"M4: expected at least {cohort.quorum} members with shares, found {len(roots)}")
    for root in roots:
        check_root(cohort, root)


def check_root(cohort: Cohort, root: Signed[ShareRoot]) -> None:
    """The signed part of one M3."""
    if root.sender not in cohort.members:
        raise ProtocolError(f"M3: member {root.sender} is not in the key list")
    check_signed(cohort.context, root, "M3")
    if root.body.t1 != cohort.t1:
        raise ProtocolError(f"M3: member {root.sender} signed another key list than this one")


def check_inputs(cohort: Cohort, sharers: Sequence[int], t2: bytes, inputs: Sequence[Signed[MaskedInput]]) -> None:
    """U3 of M6: within U2, large enough, each upload signed under **this** T2."""
    if len(inputs) < cohort.quorum:
        raise ProtocolError(f"M6: expected at least {cohort.quorum} survivors, found {len(inputs)}")
    for message in inputs:
        check_input(cohort, sharers, t2, message)


def check_input(cohort: Cohort, sharers: Sequence[int], t2: bytes, message: Signed[MaskedInput]) -> None:
    """The signed part of one M5."""
    if message.sender not in sharers:
        raise ProtocolError(f"M5: member {message.sender} has dealt no shares")
    check_signed(cohort.context, message, "M5")
    if message.body.t2 != t2:
        raise ProtocolError(f"M5: member {message.sender} masked for another set of members")
    if message.body.length != cohort.context.upload_length:
        raise ProtocolError(
            f"M5 of member {message.sender}: expected {cohort.context.upload_length} bytes, found {message.body.length}"
        )


def check_list_vote(
    context: RoundContext, survivors: Sequence[int], t2: bytes, survivors_l: bytes, vote: Signed[SurvivorVote]
) -> None:
    """One M7: a survivor, its signature, this T2 and this list."""
    if vote.sender not in survivors:
        raise ProtocolError(f"M7: member {vote.sender} is not a survivor")
    check_signed(context, vote, "M7")
    if (vote.body.t2, vote.body.survivors) != (t2, survivors_l):
        raise ProtocolError(f"M7: member {vote.sender} signed another survivor list")


def check_certificate(
    cohort: Cohort, survivors: Sequence[int], t2: bytes, survivors_l: bytes, votes: Sequence[Signed[SurvivorVote]]
) -> None:
    """M8: at least t distinct survivors signed one list."""
    if len(votes) < cohort.threshold:
        raise ProtocolError(f"M8: expected at least {cohort.threshold} signatures, found {len(votes)}")
    for vote in votes:
        check_list_vote(cohort.context, survivors, t2, survivors_l, vote)


def check_outcome_vote(
    context: RoundContext, survivors: Sequence[int], t2: bytes, total: bytes, vote: Signed[OutcomeVote]
) -> None:
    """One M11: a survivor, its signature, this T2 and this total."""
    if vote.sender not in survivors:
        raise ProtocolError(f"M11: member {vote.sender} is not a survivor")
    check_signed(context, vote, "M11")
    if (vote.body.t2, vote.body.total) != (t2, total):
        raise ProtocolError(f"M11: member {vote.sender} signed another total", culprit=vote.sender)


def check_nonces(
    cohort: Cohort, survivors: Sequence[int], t2: bytes, total: bytes, votes: Sequence[Signed[OutcomeVote]]
) -> None:
    """M12: all of U3 opened the nonce of its M1 for one H(total); else a coordinator could grind totals."""
    if tuple(v.sender for v in votes) != tuple(survivors):
        raise ProtocolError(f"M12: expected the nonce of every survivor, found {len(votes)} of {len(survivors)}")
    for vote in votes:
        check_outcome_vote(cohort.context, survivors, t2, total, vote)
        check_nonce(cohort, vote)


def check_nonce(cohort: Cohort, vote: Signed[OutcomeVote]) -> None:
    """One opened nonce matches the commitment in its owner's M1."""
    expected = cohort.advertised[vote.sender].nonce_commitment
    if keys.nonce_commitment(cohort.context.header_hash, vote.sender, vote.body.nonce) != expected:
        raise ProtocolError(f"M11: the nonce of member {vote.sender} does not match its M1", culprit=vote.sender)


def check_projection(
    context: RoundContext, survivors: Sequence[int], t2: bytes, total: bytes, share: Signed[ProjectionShare]
) -> None:
    """One M13: a survivor, its signature, this T2 and this total."""
    if share.sender not in survivors:
        raise ProtocolError(f"M13: member {share.sender} is not a survivor")
    check_signed(context, share, "M13")
    if (share.body.t2, share.body.total) != (t2, total):
        raise ProtocolError(f"M13: member {share.sender} projected another total", culprit=share.sender)


def check_opened(cohort: Cohort, sharers: Sequence[int], survivors: Sequence[int], opened: Sequence[Opened]) -> None:
    """b of every survivor and z of every dropout, and each matches what M1 committed to."""
    if [o.owner for o in opened] != list(sharers):
        raise ProtocolError("M10: expected one opened seed for each member of U2")
    for seed in opened:
        check_seed(cohort, survivors, seed)


def matches_commitment(cohort: Cohort, owner: int, secret: bytes, *, is_self: bool) -> bool:
    """Does a reconstructed b (or z) match B_i (or s_pk_i) of its owner's M1?"""
    advertised = cohort.advertised[owner]
    if is_self:
        return keys.self_commitment(cohort.context.header_hash, owner, secret) == advertised.self_commitment
    return keys.mask_key(secret).public == advertised.mask_key


def check_seed(cohort: Cohort, survivors: Sequence[int], seed: Opened) -> None:
    """One opened seed is of the right kind and matches B_i or s_pk_i."""
    owner, is_self = seed.owner, isinstance(seed, OpenedSelfMask)
    if is_self != (owner in survivors):
        raise ProtocolError(f"M10: the wrong kind of seed was opened for member {owner}")
    secret = seed.seed if isinstance(seed, OpenedSelfMask) else seed.secret
    if not matches_commitment(cohort, owner, secret, is_self=is_self):
        raise ProtocolError(f"the opened seed of member {owner} does not match its M1", culprit=owner)


def pairs_to_open(survivors: Sequence[int], sharers: Sequence[int]) -> list[tuple[int, int]]:
    """(owner, holder) of every pair seed between a survivor and a dropout; the owner has the lower id."""
    dropouts = [j for j in sharers if j not in survivors]
    return sorted((min(i, j), max(i, j)) for i in survivors for j in dropouts)


def open_pairs(
    cohort: Cohort,
    roots: Sequence[Signed[ShareRoot]],
    survivors: Sequence[int],
    opened: Sequence[Opened],
    pair_leaves: Sequence[OwnedLeaf],
) -> dict[tuple[int, int], bytes]:
    """r of every survivor-dropout pair, from the opened z of the dropout.

    Raises:
        ProtocolError: a leaf is missing or not under its signed root; naming the dealer where its seed is bad.
    """
    by_owner = {r.sender: r.body.root for r in roots}
    secrets = {o.owner: o.secret for o in opened if isinstance(o, OpenedMaskSecret)}
    mask_keys = {owner: keys.mask_key(secret) for owner, secret in secrets.items()}
    leaves = {(leaf.owner, leaf.leaf.holder): leaf for leaf in pair_leaves}
    wanted = pairs_to_open(survivors, tuple(by_owner))
    if sorted(leaves) != wanted or len(leaves) != len(pair_leaves):
        raise ProtocolError(f"M10: expected the leaves of {len(wanted)} survivor-dropout pairs, found {len(leaves)}")
    seeds = {}
    for owner, holder in wanted:
        leaf = leaves[owner, holder]
        if not dealing.has_path(leaf, cohort.members, by_owner[owner]):
            raise ProtocolError(f"M10: a leaf of member {owner} is not under its signed root")
        if owner in secrets:  # the dropout chose the seed: its z gives it, and its own leaf promised this very one
            seed = keys.pair_seed(secrets[owner], holder)
            if keys.secret_hash(dealing.KIND_SEED, owner, holder, seed) != leaf.leaf.seed_hash:
                raise ProtocolError(f"member {owner} dealt a pair seed that is not the one of its z", culprit=owner)
        else:
            seed = dealing.open_seed(mask_keys[holder], owner, leaf.leaf, cohort.context.header_hash, cohort.t1)
        seeds[owner, holder] = seed
    return seeds


@dataclass(frozen=True)
class Streams:
    """AES keys of the mask streams that one vector carries, by sign."""

    plus: tuple[bytes, ...]
    minus: tuple[bytes, ...]

    def inverse(self) -> Streams:
        """The streams that take these off again."""
        return Streams(self.minus, self.plus)


def input_streams(me: int, self_seed: bytes, seeds: Mapping[int, bytes], t2: bytes) -> Streams:
    """Masks of one member's input: its self mask, and per other member the pair mask; the lower id adds."""
    plus = [keys.self_mask_key(self_seed, t2, me)]
    plus += [keys.pair_mask_key(seed, t2, me, j) for j, seed in sorted(seeds.items()) if me < j]
    minus = [keys.pair_mask_key(seed, t2, me, j) for j, seed in sorted(seeds.items()) if me > j]
    return Streams(tuple(plus), tuple(minus))


def total_streams(
    t2: bytes, survivors: Sequence[int], opened: Sequence[Opened], pairs: Mapping[tuple[int, int], bytes]
) -> Streams:
    """Masks left in the sum over U3: every self mask, and the pair masks towards dropouts."""
    plus = [keys.self_mask_key(o.seed, t2, o.owner) for o in opened if isinstance(o, OpenedSelfMask)]
    minus: list[bytes] = []
    for (low, high), seed in sorted(pairs.items()):
        (plus if low in survivors else minus).append(keys.pair_mask_key(seed, t2, low, high))
    return Streams(tuple(plus), tuple(minus))


@dataclass(frozen=True)
class VerifiedTranscript:
    """A transcript all of whose signatures, lists and openings hold, and the masks that its total carried."""

    cohort: Cohort
    sharers: tuple[int, ...]
    survivors: tuple[int, ...]
    t2: bytes
    survivors_l: bytes
    streams: Streams


def verify_transcript(context: RoundContext, transcript: Transcript) -> VerifiedTranscript:
    """Check a whole transcript from plan and roster alone, trusting nobody.

    Raises:
        ProtocolError: the first thing that does not hold.
    """
    if transcript.header != context.header:
        raise ProtocolError("M10: the transcript is of another round")
    check_key_list(context, transcript.keys)
    cohort = Cohort(context, transcript.keys)
    check_roots(cohort, transcript.roots)
    t2 = t2_hash(cohort.t1, transcript.roots)
    sharers = tuple(r.sender for r in transcript.roots)
    check_inputs(cohort, sharers, t2, transcript.inputs)
    survivors = tuple(i.sender for i in transcript.inputs)
    survivors_l = survivors_hash(t2, transcript.inputs)
    check_certificate(cohort, survivors, t2, survivors_l, transcript.votes)
    check_opened(cohort, sharers, survivors, transcript.opened)
    pairs = open_pairs(cohort, transcript.roots, survivors, transcript.opened, transcript.pair_leaves)
    streams = total_streams(t2, survivors, transcript.opened, pairs)
    return VerifiedTranscript(cohort, sharers, survivors, t2, survivors_l, streams)
