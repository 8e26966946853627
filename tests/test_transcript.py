"""The transcript of a finished round: it verifies from plan and roster alone, and any change is refused.

The round has five members and one colluder; member 2 falls silent before M5, so that the transcript holds opened seeds
of both kinds and pair leaves in both directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from coordinator import phases
from privacy.errors import ProtocolError
from privacy.secagg import keys, transcript
from privacy.secagg.messages import (
    Header,
    MaskedInput,
    OpenedMaskSecret,
    OpenedSelfMask,
    Outcome,
    ShareRoot,
    SurvivorVote,
    Transcript,
)
from privacy.secagg.signed import Signed, sign
from privacy.secagg.transcript import Cohort, Streams, verify_transcript
from tests.simulation import Simulation, context_for, identity

CONTEXT = context_for(5, 1)
HASH = CONTEXT.header_hash
X = bytes(32)


@cache
def finished() -> Simulation:
    simulation = Simulation(5, 1, silent={2: "M5"}).run()
    assert isinstance(simulation.phase, phases.Released)
    return simulation


def outcome() -> Outcome:
    phase = finished().phase
    assert isinstance(phase, phases.Released)
    return phase.outcome


def good() -> Transcript:
    return outcome().transcript


def t2() -> bytes:
    record = good()
    return transcript.t2_hash(Cohort(CONTEXT, record.keys).t1, record.roots)


def at(items: tuple[Any, ...], place: int, **changes: Any) -> tuple[Any, ...]:
    """The tuple with one item changed."""
    return (*items[:place], replace(items[place], **changes), *items[place + 1 :])


def without(items: tuple[Any, ...], *places: int) -> tuple[Any, ...]:
    return tuple(item for place, item in enumerate(items) if place not in places)


def resigned(items: tuple[Any, ...], place: int, **changes: Any) -> tuple[Any, ...]:
    """The tuple with the body of one item changed and signed anew by its sender: what a colluder can do."""
    item: Signed[Any] = items[place]
    body = replace(item.body, **changes)
    return (*items[:place], sign(identity(item.sender), item.sender, body, HASH), *items[place + 1 :])


def test_the_transcript_of_a_finished_round_verifies() -> None:
    verified = verify_transcript(CONTEXT, good())
    assert (verified.cohort.members, verified.sharers, verified.survivors) == (
        (0, 1, 2, 3, 4),
        (0, 1, 2, 3, 4),
        (0, 1, 3, 4),
    )
    assert verified.t2 == t2()
    assert len(verified.streams.plus) == 4 + 2  # a self mask of every survivor; 0 and 1 add towards 2
    assert len(verified.streams.minus) == 2  # 3 and 4 subtract


@pytest.mark.parametrize("sender", [5, 6])
def test_a_signature_of_nobody_in_the_roster_is_refused(sender: int) -> None:
    signed = sign(identity(sender), sender, SurvivorVote(X, X), HASH)
    with pytest.raises(ProtocolError, match=f"M7: member {sender} is not in the roster"):
        transcript.check_signed(CONTEXT, signed, "M7")


def test_a_verified_transcript_opens_the_sum() -> None:
    assert finished().is_exact()


def foreign_votes(record: Transcript, other_t2: bytes, other_l: bytes) -> tuple[Signed[SurvivorVote], ...]:
    return tuple(sign(identity(v.sender), v.sender, SurvivorVote(other_t2, other_l), HASH) for v in record.votes)


def stranger(record: Transcript) -> tuple[Any, ...]:
    return (*record.keys, sign(identity(7), 7, record.keys[0].body, HASH))


Change = Callable[[Transcript], dict[str, Any]]
CHANGES: dict[str, tuple[Change, str]] = {
    "another round": (lambda r: {"header": replace(r.header, round=2)}, "M10: the transcript is of another round"),
    "a key list below the smallest cohort": (lambda r: {"keys": r.keys[:2]}, "M2: expected 3 to 5 members, found 2"),
    "a member outside the roster": (lambda r: {"keys": without(stranger(r), 0)}, "member 7 is not in the roster"),
    "a key list signed for nobody": (
        lambda r: {"keys": at(r.keys, 1, signature=bytes(64))},
        "M1: the signature of member 1 does not verify",
    ),
    "two members with one share key": (
        lambda r: {"keys": resigned(r.keys, 1, share_key=r.keys[0].body.share_key)},
        "M2: expected distinct keys",
    ),
    "a member with one key for both uses": (
        lambda r: {"keys": resigned(r.keys, 1, mask_key=r.keys[1].body.share_key)},
        "M2: expected distinct keys",
    ),
    "a key of low order": (
        lambda r: {"keys": resigned(r.keys, 1, share_key=r.keys[1].body.share_key[: keys.MLKEM_BYTES] + X)},
        "M1: key c of member 1: .*low-order",
    ),
    "another key list than the roots": (
        lambda r: {"keys": resigned(r.keys, 4, rounds_joined=9)},
        "signed another key list than this one",
    ),
    "too few sharers": (lambda r: {"roots": r.roots[:3]}, "M4: expected at least 4 members with shares, found 3"),
    "a root signed for nobody": (
        lambda r: {"roots": at(r.roots, 0, signature=bytes(64))},
        "M3: the signature of member 0 does not verify",
    ),
    "a root over another key list": (
        lambda r: {"roots": resigned(r.roots, 0, t1=X)},
        "M3: member 0 signed another key list",
    ),
    "another root of a colluder": (
        lambda r: {"roots": resigned(r.roots, 4, root=X)},
        "M5: member 0 masked for another set of members",
    ),
    "a sharer left out": (
        lambda r: {"roots": without(r.roots, 2)},
        "M5: member 0 masked for another set of members",
    ),
    "too few survivors": (lambda r: {"inputs": r.inputs[:3]}, "M6: expected at least 4 survivors, found 3"),
    "an upload signed for nobody": (
        lambda r: {"inputs": at(r.inputs, 0, signature=bytes(64))},
        "M5: the signature of member 0 does not verify",
    ),
    "an upload of another length": (
        lambda r: {"inputs": resigned(r.inputs, 0, length=1)},
        "M5 of member 0: expected 72 bytes, found 1",
    ),
    "an upload under another T2": (
        lambda r: {"inputs": resigned(r.inputs, 0, t2=X)},
        "M5: member 0 masked for another set of members",
    ),
    "another upload of a colluder": (
        lambda r: {"inputs": resigned(r.inputs, 3, root=X)},
        "M7: member 0 signed another survivor list",
    ),
    "too few signatures": (lambda r: {"votes": r.votes[:3]}, "M8: expected at least 4 signatures, found 3"),
    "a forged signature": (
        lambda r: {"votes": at(r.votes, 0, signature=bytes(64))},
        "M7: the signature of member 0 does not verify",
    ),
    "the signature of a dropout": (
        lambda r: {"votes": without((*r.votes[:2], sign(identity(2), 2, r.votes[0].body, HASH), *r.votes[2:]), 0)},
        "M7: member 2 is not a survivor",
    ),
    "signatures under another T2": (
        lambda r: {"votes": foreign_votes(r, X, r.votes[0].body.survivors)},
        "M7: member 0 signed another survivor list",
    ),
    "signatures on another list": (
        lambda r: {"votes": foreign_votes(r, r.votes[0].body.t2, X)},
        "M7: member 0 signed another survivor list",
    ),
    "a seed too few": (lambda r: {"opened": r.opened[:-1]}, "M10: expected one opened seed for each member of U2"),
    "a self mask opened for the dropout": (
        lambda r: {"opened": (*r.opened[:2], OpenedSelfMask(2, X), *r.opened[3:])},
        "M10: the wrong kind of seed was opened for member 2",
    ),
    "a mask secret opened for a survivor": (
        lambda r: {"opened": (OpenedMaskSecret(0, X), *r.opened[1:])},
        "M10: the wrong kind of seed was opened for member 0",
    ),
    "the seeds of two survivors swapped": (
        lambda r: {"opened": (replace(r.opened[1], owner=0), replace(r.opened[0], owner=1), *r.opened[2:])},
        "the opened seed of member 0 does not match its M1",
    ),
    "another mask secret": (
        lambda r: {"opened": at(r.opened, 2, secret=X)},
        "the opened seed of member 2 does not match its M1",
    ),
    "a pair leaf too few": (lambda r: {"pair_leaves": r.pair_leaves[1:]}, "leaves of 4 survivor-dropout pairs"),
    "a pair leaf twice": (
        lambda r: {"pair_leaves": (*r.pair_leaves, r.pair_leaves[0])},
        "leaves of 4 survivor-dropout pairs",
    ),
    "a pair leaf under the name of another owner": (
        lambda r: {
            "pair_leaves": (replace(r.pair_leaves[1], owner=0), replace(r.pair_leaves[0], owner=1), *r.pair_leaves[2:])
        },
        "M10: a leaf of member 0 is not under its signed root",
    ),
    "a pair leaf that was changed": (
        lambda r: {"pair_leaves": at(r.pair_leaves, 0, leaf=replace(r.pair_leaves[0].leaf, self_share_hash=X))},
        "M10: a leaf of member 0 is not under its signed root",
    ),
    "a pair leaf with a changed path": (
        lambda r: {"pair_leaves": at(r.pair_leaves, 0, path=r.pair_leaves[0].path[1:])},
        "M10: a leaf of member 0 is not under its signed root",
    ),
}


@pytest.mark.parametrize(("change", "fragment"), CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_transcript_is_refused(change: Change, fragment: str) -> None:
    with pytest.raises(ProtocolError, match=fragment):
        verify_transcript(CONTEXT, replace(good(), **change(good())))


def test_a_transcript_is_of_one_roster() -> None:
    other = replace(CONTEXT, identities=(*CONTEXT.identities[1:], CONTEXT.identities[0]))
    with pytest.raises(ProtocolError, match="M1: the signature of member 0 does not verify"):
        verify_transcript(other, good())


def test_t1_binds_header_members_and_bodies() -> None:
    members = good().keys
    changed = [
        transcript.t1_hash(X, members),
        transcript.t1_hash(HASH, members[1:]),
        transcript.t1_hash(HASH, resigned(members, 0, rounds_joined=9)),
        transcript.t1_hash(HASH, at(members, 0, sender=9)),
    ]
    assert len({transcript.t1_hash(HASH, members), *changed}) == 5


def test_t2_binds_t1_members_and_roots() -> None:
    roots = good().roots
    changed = [
        transcript.t2_hash(HASH, roots),
        transcript.t2_hash(X, roots[1:]),
        transcript.t2_hash(X, resigned(roots, 0, root=X)),
        transcript.t2_hash(X, at(roots, 0, sender=9)),
    ]
    assert len({transcript.t2_hash(X, roots), *changed}) == 5


def test_a_list_binds_t2_members_and_uploads() -> None:
    inputs = good().inputs
    changed = [
        transcript.survivors_hash(HASH, inputs),
        transcript.survivors_hash(X, inputs[1:]),
        transcript.survivors_hash(X, resigned(inputs, 0, root=X)),
        transcript.survivors_hash(X, at(inputs, 0, sender=9)),
    ]
    assert len({transcript.survivors_hash(X, inputs), *changed}) == 5


def test_signatures_do_not_enter_the_transcript_hashes() -> None:
    record = good()
    other = tuple(replace(m, signature=bytes(64)) for m in record.keys)
    assert transcript.t1_hash(HASH, other) == transcript.t1_hash(HASH, record.keys)


def test_the_hash_of_a_total_binds_its_round_and_root() -> None:
    assert outcome().total == transcript.total_hash(t2(), outcome().root)
    assert len({transcript.total_hash(HASH, X), transcript.total_hash(X, X), transcript.total_hash(X, HASH)}) == 3


def test_the_lower_id_adds_and_the_higher_subtracts() -> None:
    seeds = {0: b"a" * 32, 5: b"b" * 32}
    streams = transcript.input_streams(3, b"s" * 32, seeds, X)
    assert streams.plus == (keys.self_mask_key(b"s" * 32, X, 3), keys.pair_mask_key(b"b" * 32, X, 3, 5))
    assert streams.minus == (keys.pair_mask_key(b"a" * 32, X, 0, 3),)
    assert streams.inverse() == Streams(streams.minus, streams.plus)


def test_both_members_of_a_pair_use_one_key_with_opposite_signs() -> None:
    seed = b"r" * 32
    low = transcript.input_streams(1, b"s" * 32, {2: seed}, X)
    high = transcript.input_streams(2, b"s" * 32, {1: seed}, X)
    assert low.plus[1] == high.minus[0]


def test_pairs_to_open_join_every_survivor_with_every_dropout() -> None:
    assert transcript.pairs_to_open((0, 1, 4), (0, 1, 2, 3, 4)) == [(0, 2), (0, 3), (1, 2), (1, 3), (2, 4), (3, 4)]
    assert transcript.pairs_to_open((0, 1), (0, 1)) == []


def test_a_wrong_opening_names_the_owner() -> None:
    record = replace(good(), opened=at(good().opened, 2, secret=X))
    with pytest.raises(ProtocolError) as refused:
        verify_transcript(CONTEXT, record)
    assert refused.value.culprit == 2


def test_the_context_and_not_the_message_fixes_threshold_and_quorum() -> None:
    cohort = Cohort(CONTEXT, good().keys)
    assert (cohort.threshold, cohort.quorum) == (4, 4)
    strict = Cohort(context_for(5, 1, minimum=5), good().keys)
    assert (strict.threshold, strict.quorum) == (4, 5)
    assert isinstance(CONTEXT.header, Header)


def test_a_root_and_an_upload_of_this_round_are_accepted_one_by_one() -> None:
    record = good()
    cohort = Cohort(CONTEXT, record.keys)
    for root in record.roots:
        transcript.check_root(cohort, root)
    for upload in record.inputs:
        transcript.check_input(cohort, (0, 1, 2, 3, 4), t2(), upload)
    with pytest.raises(ProtocolError, match="M5: member 2 has dealt no shares"):
        transcript.check_input(cohort, (0, 1), t2(), sign(identity(2), 2, MaskedInput(t2(), X, 72), HASH))
    with pytest.raises(ProtocolError, match="M3: member 4 is not in the key list"):
        transcript.check_root(Cohort(CONTEXT, record.keys[:4]), sign(identity(4), 4, ShareRoot(X, X), HASH))
