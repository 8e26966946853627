"""M0 to M11 as types: what cannot be said, what is signed, and that every message has one encoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.encoding import decode, encode
from privacy.errors import ProtocolError
from privacy.secagg import messages
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.keys import identity_public
from privacy.secagg.messages import (
    AbortProof,
    AbortStatement,
    Advertise,
    Certificate,
    Complaint,
    Evidence,
    Header,
    Inbox,
    KeyList,
    ListedInput,
    ListProof,
    MaskedInput,
    MaskSecretShare,
    NonceList,
    Offer,
    OpenedMaskSecret,
    OpenedSelfMask,
    Outcome,
    OutcomeVote,
    OwnedLeaf,
    ProjectionShare,
    RoundAborted,
    SelfMaskShare,
    ShareLeaf,
    ShareRoot,
    Shares,
    SurvivorList,
    SurvivorVote,
    Transcript,
    UnmaskShares,
)
from privacy.secagg.signed import Signed, has_valid_signature, sign, signing_input
from privacy.secagg.transcript import RoundContext
from tests.simulation import Simulation, context_for, identity

X = bytes(32)
SIG = bytes(64)
PROOFS = (
    AbortProof(context_for(5, 1, round_number=2).header, (Signed(3, AbortStatement("no"), SIG),)),
    ListProof(context_for(5, 1, round_number=3).header, (ListedInput(3, X),), (Signed(4, SurvivorVote(X, X), SIG),)),
)
CONTEXT: RoundContext = context_for(5, 1)
HEADER: Header = CONTEXT.header
HASH = CONTEXT.header_hash


@dataclass(frozen=True)
class Said:
    """Every message of one round of four in which member 1 drops out after M3, by direction."""

    to_member: dict[str, Any]
    from_member: dict[str, Any]


@cache
def said() -> Said:
    found = Said({}, {})

    def to(_member: int, message: ToMember) -> ToMember:
        found.to_member[type(message).__name__] = message
        return message

    def back(_member: int, message: FromMember) -> FromMember:
        name = "Shares" if isinstance(message, Shares) else type(message.body).__name__
        found.from_member[name] = message
        return message

    Simulation(4, 0, silent={1: "M5"}, to_member=to, from_member=back).run()
    found.to_member["RoundAborted"] = RoundAborted(HEADER, "too few, alas: é")
    found.from_member["AbortStatement"] = sign(identity(2), 2, AbortStatement("as asked"), HASH)
    found.to_member["Offer"] = Offer(HEADER, PROOFS)
    found.from_member["Complaint"] = sign(identity(2), 2, Complaint(X, 1, "a bad leaf"), HASH)
    return found


TO_MEMBER = ("Offer", "KeyList", "Inbox", "SurvivorList", "Certificate", "Outcome", "NonceList", "RoundAborted")
FROM_MEMBER = (
    "Advertise",
    "Shares",
    "Complaint",
    "MaskedInput",
    "SurvivorVote",
    "UnmaskShares",
    "OutcomeVote",
    "ProjectionShare",
    "AbortStatement",
)
ALL = [(name, ToMember) for name in TO_MEMBER] + [(name, FromMember) for name in FROM_MEMBER]


def example(name: str) -> Any:
    return said().to_member[name] if name in TO_MEMBER else said().from_member[name]


@pytest.mark.parametrize(("name", "union"), ALL, ids=[name for name, _ in ALL])
def test_every_message_survives_the_round_trip(name: str, union: Any) -> None:
    message = example(name)
    encoded = encode(message, union)
    assert decode(union, encoded) == message
    assert encode(decode(union, encoded), union) == encoded


@pytest.mark.parametrize(("name", "union"), ALL, ids=[name for name, _ in ALL])
def test_truncated_and_extended_messages_are_refused(name: str, union: Any) -> None:
    encoded = encode(example(name), union)
    cuts = range(len(encoded)) if len(encoded) < 400 else range(0, len(encoded), len(encoded) // 50)
    for wrong in [encoded[:cut] for cut in cuts] + [encoded[:-1], encoded + b"\0"]:
        with pytest.raises(ProtocolError):
            decode(union, wrong)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ALL), st.data())
def test_changed_bytes_that_still_decode_encode_to_themselves(kind: tuple[str, Any], data: st.DataObject) -> None:
    name, union = kind
    changed = bytearray(encode(example(name), union))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, min(len(changed), 300) - 1) | st.integers(0, len(changed) - 1))
        changed[place] = data.draw(st.integers(0, 255))
    try:
        found = decode(union, bytes(changed))
    except ProtocolError:
        return
    assert encode(found, union) == bytes(changed)


def test_each_direction_numbers_its_kinds_in_this_order() -> None:
    assert [encode(example(name), ToMember)[0] for name in TO_MEMBER] == list(range(8))
    assert [encode(example(name), FromMember)[0] for name in FROM_MEMBER] == list(range(9))


def leaf(**changes: Any) -> ShareLeaf:
    return replace(ShareLeaf(1, b"", X, X, b"", b""), **changes)


def signed(sender: int, body: Any) -> Any:
    return Signed(sender, body, SIG)


def advertise(**changes: Any) -> Advertise:
    return replace(Advertise(bytes(1216), bytes(1216), X, X, 1, 0, X), **changes)


def transcript(**changes: Any) -> Transcript:
    return replace(Transcript(HEADER, (), (), (), (), (), ()), **changes)


OWNED = OwnedLeaf(1, leaf(), ())
ROOT = ShareRoot(X, X)
VOTE = SurvivorVote(X, X)
INPUT = MaskedInput(X, X, 1)

UNSAYABLE: dict[str, tuple[Callable[[], object], str]] = {
    "a header with a short plan digest": (lambda: replace(HEADER, plan=b"x"), "plan: expected 32 bytes, found 1"),
    "a header with a long coordinator key": (lambda: replace(HEADER, coordinator=bytes(33)), "coordinator"),
    "a signature of 63 bytes": (lambda: Signed(1, ROOT, bytes(63)), "signature: expected 64 bytes, found 63"),
    "a share key of another length": (lambda: advertise(share_key=bytes(32)), "share_key: expected 1216"),
    "a mask key of another length": (lambda: advertise(mask_key=bytes(1217)), "mask_key: expected 1216"),
    "a short commitment": (lambda: advertise(self_commitment=b""), "self_commitment: expected 32"),
    "a short nonce commitment": (lambda: advertise(nonce_commitment=b""), "nonce_commitment: expected 32"),
    "a short ledger root": (lambda: advertise(ledger_root=bytes(31)), "ledger_root: expected 32"),
    "a member twice in the key list": (lambda: KeyList((signed(1, advertise()),) * 2), "key list: .*each once"),
    "a key list out of order": (
        lambda: KeyList((signed(2, advertise()), signed(1, advertise()))),
        "key list: .*ascending",
    ),
    "sealed shares of another length": (lambda: leaf(sealed_shares=bytes(100)), "sealed_shares: expected 0 or 1202"),
    "a sealed seed of another length": (lambda: leaf(sealed_seed=bytes(5)), "sealed_seed: expected 0 or 1168"),
    "a sealed seed without its hash": (lambda: leaf(sealed_seed=bytes(1168)), "seed_hash: expected 32"),
    "the hash of a seed that is not there": (lambda: leaf(seed_hash=X), "seed_hash: expected 0"),
    "a short share hash": (lambda: leaf(self_share_hash=b""), "self_share_hash: expected 32"),
    "a share root over a short T1": (lambda: ShareRoot(b"", X), "t1: expected 32"),
    "a holder twice among the leaves": (lambda: Shares((leaf(), leaf()), signed(1, ROOT)), "share leaves"),
    "a path of 33 hashes": (lambda: OwnedLeaf(1, leaf(), (X,) * 33), "at most 32 hashes, found 33"),
    "a path of short hashes": (lambda: OwnedLeaf(1, leaf(), (b"",)), "Merkle path: expected 32"),
    "a sharer twice": (lambda: Inbox((signed(1, ROOT),) * 2, ()), "inbox roots"),
    "a leaf twice": (lambda: Inbox((), (OWNED, OWNED)), "inbox leaves"),
    "a complaint of 501 characters": (lambda: Complaint(X, 1, "x" * 501), "at most 500 characters, found 501"),
    "a complaint about a short T1": (lambda: Complaint(b"", 1, ""), "t1: expected 32"),
    "a survivor twice": (lambda: SurvivorList((signed(1, INPUT),) * 2), "survivor list"),
    "an upload with a short root": (lambda: MaskedInput(X, b"", 1), "root: expected 32"),
    "a vote over a short list hash": (lambda: SurvivorVote(X, b""), "survivors: expected 32"),
    "a signer twice in a certificate": (lambda: Certificate((signed(1, VOTE),) * 2), "certificate"),
    "a self share of 32 bytes": (lambda: SelfMaskShare(1, X), "share: expected 33"),
    "a secret share of 34 bytes": (lambda: MaskSecretShare(1, bytes(34)), "share: expected 33"),
    "both kinds of share of one owner": (
        lambda: UnmaskShares(X, X, (SelfMaskShare(1, bytes(33)), MaskSecretShare(1, bytes(33)))),
        "unmask shares",
    ),
    "shares for a short T2": (lambda: UnmaskShares(b"", X, ()), "t2: expected 32"),
    "an opened self mask of 33 bytes": (lambda: OpenedSelfMask(1, bytes(33)), "seed: expected 32"),
    "an opened secret of 31 bytes": (lambda: OpenedMaskSecret(1, bytes(31)), "secret: expected 32"),
    "a transcript with a member twice": (lambda: transcript(keys=(signed(1, advertise()),) * 2), "keys: "),
    "a transcript with a sharer twice": (lambda: transcript(roots=(signed(1, ROOT),) * 2), "roots: "),
    "a transcript with a survivor twice": (lambda: transcript(inputs=(signed(1, INPUT),) * 2), "inputs: "),
    "a transcript with a vote twice": (lambda: transcript(votes=(signed(1, VOTE),) * 2), "votes: "),
    "both seeds of one owner": (
        lambda: transcript(opened=(OpenedSelfMask(1, X), OpenedMaskSecret(1, X))),
        "opened seeds",
    ),
    "an outcome with a short root": (lambda: Outcome(X, b"", transcript()), "root: expected 32"),
    "a vote for a short total hash": (lambda: OutcomeVote(X, b"", (), X), "total: expected 32"),
    "a vote with a short nonce": (lambda: OutcomeVote(X, X, (), b""), "nonce: expected 32"),
    "a block checked twice": (lambda: OutcomeVote(X, X, (1, 1), X), "checked blocks: .*each once"),
    "a vote twice among the nonces": (lambda: NonceList((signed(1, OutcomeVote(X, X, (), X)),) * 2), "nonce list"),
    "a projection for a short total hash": (lambda: ProjectionShare(X, b"", 1), "total: expected 32"),
    "an abort statement of 501 characters": (lambda: AbortStatement("x" * 501), "abort statement: .*found 501"),
    "an abort statement twice": (lambda: AbortProof(HEADER, (signed(1, AbortStatement("")),) * 2), "abort certificate"),
    "a member twice on a certified list": (lambda: ListProof(HEADER, (ListedInput(1, X),) * 2, ()), "certified list"),
    "a certified list with a vote twice": (
        lambda: ListProof(HEADER, (), (signed(1, VOTE),) * 2),
        "certificate of a list",
    ),
    "a listed upload with a short root": (lambda: ListedInput(1, b""), "root: expected 32"),
    "evidence with an outcome vote twice": (
        lambda: Evidence(Outcome(X, X, transcript()), (signed(1, OutcomeVote(X, X, (), X)),) * 2, ()),
        "outcome signatures",
    ),
    "evidence with a projection twice": (
        lambda: Evidence(Outcome(X, X, transcript()), (), (signed(1, ProjectionShare(X, X, 1)),) * 2),
        "projection",
    ),
    "an abort with a reason of 501 characters": (lambda: RoundAborted(HEADER, "x" * 501), "found 501"),
    "a list of 1001 members": (lambda: Certificate(tuple(signed(i, VOTE) for i in range(1001))), "at most 1000"),
}


@pytest.mark.parametrize(("make", "fragment"), UNSAYABLE.values(), ids=UNSAYABLE.keys())
def test_what_cannot_be_said(make: Callable[[], object], fragment: str) -> None:
    with pytest.raises(ProtocolError, match=fragment):
        make()


def test_the_longest_text_and_the_longest_list_can_be_said() -> None:
    assert AbortStatement("x" * 500).reason == "x" * 500
    assert len(Certificate(tuple(signed(i, VOTE) for i in range(1000))).votes) == 1000
    assert len(OwnedLeaf(1, leaf(), (X,) * 32).path) == 32
    assert len(OutcomeVote(X, X, tuple(range(2000)), X).blocks) == 2000  # more blocks than members


def test_a_message_that_cannot_be_said_cannot_be_decoded() -> None:
    vote = encode(signed(1, VOTE))
    with pytest.raises(ProtocolError, match="certificate"):
        decode(Certificate, b"\0\0\0\2" + vote + vote)


BODY = SurvivorVote(bytes(range(32)), X)
VOTED = sign(identity(1), 1, BODY, HASH)
PUBLIC = identity_public(identity(1))

ALTERED: dict[str, tuple[Any, bytes, bytes]] = {
    "another sender": (replace(VOTED, sender=2), PUBLIC, HASH),
    "another body": (replace(VOTED, body=VOTE), PUBLIC, HASH),
    "another key": (VOTED, identity_public(identity(2)), HASH),
    "another round": (VOTED, PUBLIC, replace(HEADER, round=2).hash()),
    "another type with the same fields": (Signed(1, ShareRoot(BODY.t2, BODY.survivors), VOTED.signature), PUBLIC, HASH),
    "another signature": (replace(VOTED, signature=VOTED.signature[:-1] + b"\0"), PUBLIC, HASH),
}


def test_a_signature_verifies() -> None:
    assert has_valid_signature(VOTED, PUBLIC, HASH)


@pytest.mark.parametrize(("message", "public", "header"), ALTERED.values(), ids=ALTERED.keys())
def test_a_signature_covers_everything(message: Any, public: bytes, header: bytes) -> None:
    assert not has_valid_signature(message, public, header)


def test_two_types_with_equal_fields_are_signed_differently() -> None:
    assert encode(ROOT) == encode(VOTE)
    assert signing_input(1, ROOT, HASH) != signing_input(1, VOTE, HASH)


def test_the_hash_of_a_body_covers_type_sender_and_body_but_not_the_signature() -> None:
    assert replace(VOTED, signature=SIG).body_hash() == VOTED.body_hash()
    others: list[Signed[Any]] = [
        replace(VOTED, sender=2),
        replace(VOTED, body=VOTE),
        Signed(1, ShareRoot(BODY.t2, X), SIG),
    ]
    assert len({m.body_hash() for m in [VOTED, *others]}) == 4


def test_every_field_of_the_header_changes_its_hash() -> None:
    numbers: list[Any] = [{name: 7} for name in ("version", "stage", "round")]
    digests: list[Any] = [{name: b"\7" * 32} for name in ("plan", "roster", "start", "coordinator")]
    changed = [replace(HEADER, **change) for change in numbers + digests]
    assert len(changed) == len(fields(Header))
    assert len({header.hash() for header in [HEADER, *changed]}) == len(changed) + 1


def test_shares_and_opened_seeds_never_print() -> None:
    secret = b"\x5a" * 33
    shown = repr((SelfMaskShare(1, secret), MaskSecretShare(1, secret)))
    shown += repr((OpenedSelfMask(1, secret[:32]), OpenedMaskSecret(1, secret[:32])))
    assert "Z" not in shown


def test_an_offer_is_the_header_and_a_list_of_proofs() -> None:
    assert encode(Offer(HEADER)) == encode(HEADER) + bytes(4)
    assert encode(Offer(HEADER, (AbortProof(HEADER, ()),))) == encode(HEADER) + b"\0\0\0\1\0" + encode(HEADER) + bytes(
        4
    )
    assert decode(Offer, encode(Offer(HEADER, PROOFS))) == Offer(HEADER, PROOFS)


def test_every_message_type_has_an_example() -> None:
    names = {*TO_MEMBER, *FROM_MEMBER}
    assert names == {*said().to_member, *said().from_member}
    assert all(hasattr(messages, name) for name in names)
