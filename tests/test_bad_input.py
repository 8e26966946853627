"""What a member with a real certificate may send that it should not: a status, a log line, and the service stays up.

One coordinator for the whole file, whose round is taking uploads; member 1 is hostile throughout. After every case
member 2 is served, and at the end of the file the round that bore all this ends with the exact sum.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import structlog

from coordinator import gate, phases
from privacy.secagg.dialogue import FromMember
from privacy.secagg.messages import AbortStatement, Advertise, MaskedInput, SurvivorVote
from privacy.secagg.signed import Signed, sign
from privacy.wire import federation_pb2 as pb
from privacy.wire import secagg_pb2
from privacy.wire.convert import to_wire
from privacy.wire.transport import MAX_REQUEST, MOST_CHUNK_BYTES, SERVICE, chunk_bytes, put_chunk
from tests.certificates import certify, make_authority, make_site
from tests.fuzz.seeds import messages
from tests.hostile import ANSWER_S, Hostile

BAD, BUSY, REFUSED = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
)
CHUNK = chunk_bytes(24)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hostile]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "SAY_S", 0.0)  # every refusal has its line
        found = Hostile(tmp_path_factory.mktemp("hostile"))
        yield found
        found.close()


@pytest.fixture(autouse=True)
def _logged(hostile: Hostile) -> None:
    structlog.configure(processors=[hostile.log])


def refused(
    hostile: Hostile, call: Callable[[], object], code: grpc.StatusCode, text: str, *, logged: str | None = None
) -> None:
    """The call meets this status and leaves a log line, and another member is served as if nothing had been."""
    since = len(hostile.log.lines)
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() == code, caught.value.details()
    told = caught.value.details() or ""
    assert re.search(text, told), told
    assert hostile.log.find(logged or told, since), hostile.log.lines[since:]
    serves(hostile, 2)


def serves(hostile: Hostile, member: int) -> None:
    """A correct call of a member is answered, and soon."""
    started = time.monotonic()
    reply = hostile.caller(member).stub.BeginUpload(hostile.uploads[member].request, timeout=ANSWER_S)
    assert not reply.finished
    assert time.monotonic() - started < 2.0


# --- messages ----------------------------------------------------------------------------------------------------


def from_member(kind: type) -> bytes:
    """A well-formed message of this kind of body, as ``Send`` takes it."""
    found = next(v for v, k in messages() if k == FromMember and type(getattr(v, "body", v)) is kind)
    encoded: bytes = to_wire(found, FromMember).SerializeToString()
    return encoded


def sending(message: bytes, round_id: bytes = bytes(32)) -> bytes:
    return pb.SendRequest(round=round_id, message=secagg_pb2.FromMember.FromString(message)).SerializeToString()


def with_unknown_field() -> bytes:
    return sending(from_member(SurvivorVote) + bytes([0xF8, 0x07, 1]))


def with_short_key() -> bytes:
    message = secagg_pb2.FromMember.FromString(from_member(Advertise))
    message.signed_advertise.body.share_key = b"short"
    return sending(message.SerializeToString())


def without_body() -> bytes:
    message = secagg_pb2.FromMember.FromString(from_member(SurvivorVote))
    message.signed_survivor_vote.ClearField("body")
    return sending(message.SerializeToString())


def out_of_order() -> bytes:
    found = next(v for v, k in messages() if k == FromMember and hasattr(v, "leaves"))
    wire = to_wire(found, FromMember)
    leaves = list(wire.shares.leaves)
    wire.shares.ClearField("leaves")
    wire.shares.leaves.extend(reversed(leaves))
    return sending(wire.SerializeToString())


def with_long_text() -> bytes:
    message = secagg_pb2.FromMember.FromString(from_member(AbortStatement))
    message.signed_abort_statement.body.reason = "x" * 501
    return sending(message.SerializeToString())


#: What -> the call, its request, the status, and what the reason says.
MESSAGES: dict[str, tuple[str, Callable[[], bytes], grpc.StatusCode, str]] = {
    "a truncated protobuf": ("Send", lambda: with_short_key()[:-3], BAD, "expected a request of .*/Send, found other"),
    "bytes that are no protobuf": ("Hello", lambda: b"\xff\xff", BAD, "expected a request of .*/Hello, found other"),
    "an unknown field deep inside": ("Send", with_unknown_field, BAD, "expected no unknown fields"),
    "no message at all": ("Send", lambda: b"", BAD, "expected one of signed_advertise"),
    "an absent part": ("Send", without_body, BAD, "expected a body, found none"),
    "a key of five bytes": ("Send", with_short_key, BAD, "share_key: expected 1216 bytes, found 5"),
    "a list out of order": ("Send", out_of_order, BAD, "share leaves: expected .* in ascending order"),
    "a reason of 501 letters": ("Send", with_long_text, BAD, "expected at most 500 characters, found 501"),
    "a message in the name of another member": (
        "Send",
        lambda: sending(from_member(AbortStatement)),
        BAD,
        "expected a message of member 1, whose certificate this is, found 2",
    ),
    "a stage of another plan": (
        "Ready",
        lambda: pb.ReadyRequest(plan=b"x" * 32, stage=1).SerializeToString(),
        REFUSED,
        "no plan with digest 7878",
    ),
    "a block of an unknown round": (
        "FetchBlock",
        lambda: pb.FetchBlockRequest(round=b"y", member=2**64 - 1, block=2**64 - 1).SerializeToString(),
        REFUSED,
        "no round 79",
    ),
    "a total that is not there": (
        "FetchTotal",
        lambda: pb.FetchTotalRequest(round=b"y", offset=2**64 - 1).SerializeToString(),
        REFUSED,
        "no round 79",
    ),
}


@pytest.mark.parametrize("what", MESSAGES)
def test_a_bad_message_is_refused(hostile: Hostile, what: str) -> None:
    method, request, code, text = MESSAGES[what]
    data = request()
    refused(hostile, lambda: hostile.caller(1).raw(method, data), code, text)


def test_a_message_above_the_limit_is_refused(hostile: Hostile) -> None:
    def call() -> object:
        return hostile.caller(1).raw("Send", bytes(MAX_REQUEST + 1))

    logged = f"expected a request of at most {MAX_REQUEST} bytes, found none that is whole"
    refused(hostile, call, BUSY, "larger than max", logged=logged)


def test_a_call_without_a_request_is_refused(hostile: Hostile) -> None:
    call: grpc.StreamUnaryMultiCallable[bytes, bytes] = hostile.caller(1).channel.stream_unary(f"/{SERVICE}/Hello")
    refused(hostile, lambda: call(iter(()), timeout=ANSWER_S), BAD, "found none that is whole")


def test_masked_input_beside_its_upload_is_refused(hostile: Hostile) -> None:
    message = to_wire(hostile.uploads[1].message, FromMember)
    request = pb.SendRequest(round=hostile.uploads[1].round_id, message=message)
    refused(hostile, lambda: hostile.caller(1).stub.Send(request, timeout=ANSWER_S), BAD, "M5 comes with its upload")


# --- uploads -----------------------------------------------------------------------------------------------------


def begun(hostile: Hostile) -> bytes:
    """Member 1 has begun its upload; the round."""
    hostile.caller(1).stub.BeginUpload(hostile.uploads[1].request, timeout=ANSWER_S)
    return hostile.uploads[1].round_id


#: What -> whether the upload was begun, the chunk for a round, the status, and what the reason says.
CHUNKS: dict[str, tuple[Callable[[bytes], bytes], grpc.StatusCode, str]] = {
    "shorter than its header": (lambda r: r, BAD, "expected a chunk of 1 to .* found 32"),
    "without a payload": (lambda r: put_chunk(r, 0, b""), BAD, "expected a chunk of 1 to .* found 40"),
    "above the limit": (lambda r: put_chunk(r, 0, bytes(MOST_CHUNK_BYTES + 1)), BAD, "expected a chunk of 1 to"),
    "too short for its place": (lambda r: put_chunk(r, 0, b"x"), BAD, f"at 0: expected {CHUNK} bytes"),
    "too long for the last": (lambda r: put_chunk(r, CHUNK, bytes(CHUNK)), BAD, f"at {CHUNK}: expected "),
    "between two places": (lambda r: put_chunk(r, 1, bytes(CHUNK)), BAD, r"at 1: expected .* bytes at k \* "),
    "beyond the end": (lambda r: put_chunk(r, 2 * CHUNK, b"x"), BAD, f"at {2 * CHUNK}: expected 0 bytes"),
    "beyond all ends": (lambda r: put_chunk(r, 2**64 - 1, b"x"), BAD, "expected 0 bytes"),
    "of an unknown round": (lambda _: put_chunk(b"z" * 32, 0, b"x"), BUSY, "expected BeginUpload first"),
}


@pytest.mark.parametrize("what", CHUNKS)
def test_a_bad_chunk_is_refused(hostile: Hostile, what: str) -> None:
    chunk, code, text = CHUNKS[what]
    data = chunk(begun(hostile))
    refused(hostile, lambda: hostile.caller(1).chunk(data, timeout=ANSWER_S), code, text)


def test_a_chunk_reaches_only_the_upload_of_its_own_certificate(hostile: Hostile) -> None:
    """A chunk names no member: member 3 has begun nothing, so it cannot write into what member 1 has begun."""
    begun(hostile)
    chunk = hostile.uploads[1].chunks()[0]
    refused(hostile, lambda: hostile.caller(3).chunk(chunk, timeout=ANSWER_S), BUSY, "expected BeginUpload first")


def test_other_bytes_in_a_place_that_is_filled_are_refused(hostile: Hostile) -> None:
    begun(hostile)
    good = hostile.uploads[1].chunks()[1]
    hostile.caller(1).chunk(good, timeout=ANSWER_S)
    bad = good[:-1] + bytes([good[-1] ^ 1])
    refused(hostile, lambda: hostile.caller(1).chunk(bad, timeout=ANSWER_S), BAD, "expected the same bytes as before")


def upload_calls(hostile: Hostile, method: str, request: pb.UploadRequest) -> Callable[[], object]:
    return lambda: getattr(hostile.caller(1).stub, method)(request, timeout=ANSWER_S)


def signed_again(hostile: Hostile, **changes: bytes | int) -> pb.UploadRequest:
    """Another M5 of member 1, with its own signature."""
    site, own = hostile.world.site(1), hostile.uploads[1]
    header = hostile.world.rounds[-1].machine.context.header.hash()
    message = sign(site.identity, 1, replace(own.message.body, **changes), header)  # type: ignore[arg-type]
    return pb.UploadRequest(round=own.round_id, input=to_wire(message, Signed[MaskedInput]))


def of_member_2(hostile: Hostile) -> pb.UploadRequest:
    return hostile.uploads[2].request


def of_unknown_round(hostile: Hostile) -> pb.UploadRequest:
    return pb.UploadRequest(round=b"z" * 32, input=hostile.uploads[1].request.input)


def with_bad_signature(hostile: Hostile) -> pb.UploadRequest:
    request = hostile.uploads[1].request
    request.input.signature = bytes(64)
    return request


#: What -> the call, its request, the status, and what the reason says.
UPLOADS: dict[str, tuple[str, Callable[[Hostile], pb.UploadRequest], grpc.StatusCode, str]] = {
    "begun in the name of another": ("BeginUpload", of_member_2, BAD, "whose certificate this is, found 2"),
    "ended in the name of another": ("FinishUpload", of_member_2, BAD, "whose certificate this is, found 2"),
    "of an unknown round": ("BeginUpload", of_unknown_round, REFUSED, "no round 7a7a"),
    "without an input": ("BeginUpload", lambda _: pb.UploadRequest(), BAD, "expected a body, found none"),
    "that nobody signed": ("BeginUpload", with_bad_signature, BAD, "M5: the signature of member 1|signature"),
    "of another length": ("BeginUpload", lambda h: signed_again(h, length=1), BAD, "expected 1200045 bytes, found 1"),
    "of more than there is": ("BeginUpload", lambda h: signed_again(h, length=2**64 - 1), BAD, "expected 1200045"),
    "a second, different one": ("BeginUpload", lambda h: signed_again(h, root=bytes(32)), BAD, "second, different"),
    "ended before it is whole": ("FinishUpload", lambda h: h.uploads[1].request, BUSY, "expected 1200045 bytes, found"),
}


@pytest.mark.parametrize("what", UPLOADS)
def test_a_bad_upload_is_refused(hostile: Hostile, what: str) -> None:
    method, request, code, text = UPLOADS[what]
    begun(hostile)
    refused(hostile, upload_calls(hostile, method, request(hostile)), code, text)


# --- certificates ------------------------------------------------------------------------------------------------


def test_a_certificate_of_somebody_outside_the_roster_is_refused(hostile: Hostile, tmp_path: Path) -> None:
    stranger = hostile.caller_from(make_site(tmp_path / "x", hostile.world.federation.coordinator, "stranger"))
    denied = grpc.StatusCode.PERMISSION_DENIED
    refused(hostile, lambda: stranger.stub.Hello(pb.HelloRequest()), denied, "'stranger' is not a member")
    refused(hostile, lambda: stranger.chunk(put_chunk(bytes(32), 0, b"x")), denied, "'stranger' is not a member")


def test_a_certificate_that_expires_during_its_connection_is_refused(hostile: Hostile, tmp_path: Path) -> None:
    authority = hostile.world.federation.coordinator
    caller = hostile.caller_from(make_site(tmp_path / "x", authority, "site-1", days=3 / 86400))
    assert caller.stub.Hello(pb.HelloRequest(), timeout=ANSWER_S).protocol_version == 1
    time.sleep(3.5)
    refused(
        hostile,
        lambda: caller.stub.Hello(pb.HelloRequest(), timeout=ANSWER_S),
        grpc.StatusCode.UNAUTHENTICATED,
        "certificate of 'site-1' expired on .* UTC: ask for another",
    )


def test_no_certificate_one_of_another_authority_and_an_expired_one_do_not_get_in(
    hostile: Hostile, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """TLS refuses them before there is a call: gRPC writes the log line, ``participant/diagnose.py`` tells the site."""
    ours = hostile.world.federation.coordinator
    theirs = make_site(tmp_path / "theirs", make_authority(tmp_path / "other"), "site-1")
    (theirs / "ca.crt").write_bytes((ours / "ca.crt").read_bytes())
    expired, nobody = (make_site(tmp_path / name, ours, "site-1") for name in ("expired", "nobody"))
    certify(expired, ours, "site-1", days=-1)
    for site in (theirs, expired, nobody):
        caller = hostile.caller_from(site, certificate=site is not nobody)
        with pytest.raises(grpc.RpcError) as caught:
            caller.stub.Hello(pb.HelloRequest(), timeout=3.0)
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        serves(hostile, 2)
    lines = capfd.readouterr().err
    for why in ("certificate has expired", "unable to get local issuer", "PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        assert why in lines


def test_what_the_coordinator_says_of_a_plan_stays_small_at_a_site(hostile: Hostile) -> None:
    site = hostile.world.site(3)
    site.note("toy", "failed", "no\n\x1b[2J" + "x" * 10**6)
    assert site.notes()["toy"]["reason"].startswith(r"no\n\x1b[2Jxxx")
    assert len(site.notes()["toy"]["reason"]) == 501


# --- at the end --------------------------------------------------------------------------------------------------


def test_after_all_that_the_round_ends_with_the_exact_sum(hostile: Hostile) -> None:
    bad = hostile.uploads[1].chunks()
    caller, request = hostile.caller(1), hostile.uploads[1].request
    hostile.caller(1).stub.BeginUpload(request, timeout=ANSWER_S)
    # Bytes that do not have the root which was signed: where a chunk is in its place already, it stands.
    caller.chunk(bad[0][:-1] + bytes([bad[0][-1] ^ 1]), timeout=ANSWER_S)
    caller.chunk(bad[1], timeout=ANSWER_S)
    finish = upload_calls(hostile, "FinishUpload", request)
    refused(hostile, finish, BAD, "upload of member 1 does not have its signed root")
    for member in range(5):
        receipt = hostile.caller(member).upload(hostile.uploads[member])
        assert receipt.length == len(hostile.uploads[member].spool.read_bytes())
        assert hostile.caller(member).upload(hostile.uploads[member]) == receipt
    hostile.world.run()
    assert isinstance(hostile.world.phase, phases.Released)
    hostile.world.assert_exact()
    late = signed_again(hostile, root=bytes(32))
    beyond = pb.FetchTotalRequest(round=hostile.uploads[1].round_id, offset=2**64 - 1)
    for call, text in (
        (upload_calls(hostile, "BeginUpload", late), "second, different upload"),
        (lambda: caller.stub.FetchTotal(beyond, timeout=ANSWER_S), "expected an offset"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() == BAD
        assert re.search(text, caught.value.details() or "")
        assert hostile.log.find(caught.value.details() or "")
