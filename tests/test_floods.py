"""One member, or somebody without a certificate, takes what it can get: the others are served, and places come back."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog

from coordinator import daemon, gate, phases, uploads
from coordinator.gate import BURST, IN_FLIGHT, RATE, Quotas
from coordinator.service import MOST_ENCODED, LastEncoded
from privacy.encoding import encode
from privacy.errors import UserError
from privacy.secagg.dialogue import ToMember
from privacy.secagg.messages import RoundAborted
from privacy.wire import federation_pb2 as pb
from privacy.wire.convert import from_wire
from privacy.wire.transport import PUT_CHUNK, SERVER_OPTIONS, put_chunk
from tests.fuzz import seeds
from tests.hostile import ANSWER_S, Caller, Hostile, RawCaller
from tests.on_disk import full_disk

BUSY = grpc.StatusCode.RESOURCE_EXHAUSTED
HELLO = pb.HelloRequest()
#: A member that is not crowded out is answered within so many seconds, also on a busy machine.
SOON_S = 3.0
#: Where many calls or connections come at once: what is measured is this coordinator, not what else the machine does.
flood = pytest.mark.alone


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Hostile]]:
    """Starts a coordinator whose round is taking uploads."""
    found: list[Hostile] = []

    def starting(**options: Any) -> Hostile:
        found.append(Hostile(tmp_path / "h", **({"large": False} | options)))
        structlog.configure(processors=[found[0].log])
        return found[0]

    yield starting
    for hostile in found:
        hostile.close()


def serves(caller: Caller) -> None:
    """A call is answered, and soon."""
    started = time.monotonic()
    assert caller.stub.Hello(HELLO, timeout=ANSWER_S).protocol_version == 1
    assert time.monotonic() - started < SOON_S


def busy(call: Callable[[], object], text: str) -> None:
    """The call is told to come back."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() == BUSY, caught.value.details()
    assert text in (caught.value.details() or "")


def until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


# --- calls -------------------------------------------------------------------------------------------------------


@flood
def test_a_flood_of_calls_is_told_to_come_back_and_the_others_are_served(start: Callable[..., Hostile]) -> None:
    hostile = start()
    flooder, other = hostile.caller(1), hostile.caller(2)
    serves(flooder)
    calls = [flooder.stub.Hello.future(HELLO, timeout=60) for _ in range(2000)]
    for _ in range(10):
        serves(other)
    codes = [call.code() for call in calls]
    assert codes.count(BUSY) > 1000
    # Of so many calls begun at once on one connection gRPC itself cancels some, with quotas or without; how many is a
    # matter of how busy the machine is.
    assert set(codes) <= {BUSY, grpc.StatusCode.OK, grpc.StatusCode.CANCELLED}
    lines = hostile.log.find("site-1")
    assert lines
    assert "expected at most" in lines[0]["reason"]
    assert len(lines) < 10  # and not one a call
    until(lambda: flooder.stub.Hello.future(HELLO, timeout=ANSWER_S).code() == grpc.StatusCode.OK)


@flood
@pytest.mark.parametrize(("method", "limit"), [("Send", "RECEIVE_S"), ("PutChunk", "CHUNK_S")])
def test_calls_that_are_begun_and_never_sent_take_nothing_from_the_others(
    start: Callable[..., Hostile], monkeypatch: pytest.MonkeyPatch, method: str, limit: str
) -> None:
    monkeypatch.setattr(daemon, "MOST_CALLS", 3 * IN_FLIGHT)
    monkeypatch.setattr(gate, limit, 4.0)
    hostile = start()
    slow = RawCaller(hostile.address, hostile.world.federation.site("site-1"))
    for _ in range(10 * IN_FLIGHT):
        slow.begin(method, 1 << 20, b"the first bytes")
    until(lambda: bool(hostile.log.find("calls of a member in flight")))
    serves(hostile.caller(2))
    busy(lambda: hostile.caller(1).stub.Hello(HELLO, timeout=ANSWER_S), f"at most {IN_FLIGHT} calls of a member")
    until(lambda: bool(hostile.log.find("expected the whole request within 4 s")))
    until(lambda: hostile.caller(1).stub.Hello.future(HELLO, timeout=ANSWER_S).code() == grpc.StatusCode.OK)
    slow.close()


def test_a_call_that_is_cut_off_gives_its_place_back(start: Callable[..., Hostile]) -> None:
    hostile = start()
    for _ in range(3):
        slow = RawCaller(hostile.address, hostile.world.federation.site("site-1"))
        for _ in range(IN_FLIGHT):
            slow.begin("PutChunk", 1 << 20, b"x")
        until(lambda: hostile.caller(1).stub.Hello.future(HELLO, timeout=ANSWER_S).code() == BUSY)
        slow.close()
        until(lambda: hostile.caller(1).stub.Hello.future(HELLO, timeout=ANSWER_S).code() == grpc.StatusCode.OK)


def test_quotas_are_each_members_own_and_fill_up_again() -> None:
    now = 0.0
    quotas = Quotas(lambda: now)
    for _ in range(int(BURST)):
        with quotas.call(b"a", "/Hello"):
            pass
    for method, fits in (("/Hello", False), (PUT_CHUNK, True)):
        if fits:
            with quotas.call(b"a", method):
                pass
        else:
            with pytest.raises(UserError, match="calls of a member a second"), quotas.call(b"a", method):
                pass
    with quotas.call(b"b", "/Hello"):
        pass
    now = 1 / RATE
    with quotas.call(b"a", "/Hello"):
        pass
    with pytest.raises(UserError), quotas.call(b"a", "/Hello"):
        pass
    open_calls = [quotas.call(b"a", PUT_CHUNK) for _ in range(IN_FLIGHT + 1)]
    for call in open_calls[:-1]:
        call.__enter__()
    with pytest.raises(UserError, match="in flight"):
        open_calls[-1].__enter__()
    open_calls[0].__exit__(None, None, None)
    with quotas.call(b"a", PUT_CHUNK):
        pass


def test_a_large_reply_counts_as_many_calls() -> None:
    """Two copies of an M10 of 60 MiB use up what a member may save; then it waits, however few its calls are."""
    now = 0.0
    quotas = Quotas(lambda: now)
    for _ in range(2):
        with quotas.call(b"a", "/Next"):
            quotas.charge(b"a", 60 << 20)
    with pytest.raises(UserError), quotas.call(b"a", "/Next"):
        pass
    with quotas.call(b"b", "/Next"):
        pass
    now = 3.0
    with quotas.call(b"a", "/Next"):
        pass


def test_a_message_that_many_ask_for_is_encoded_once() -> None:
    kept = LastEncoded()
    asked = [RoundAborted(seeds.outcome().transcript.header, f"reason {i}") for i in range(MOST_ENCODED + 1)]
    first = kept.of(asked[0])
    assert first.digest == hashlib.sha256(encode(asked[0], ToMember)).digest()
    assert from_wire(first.wire, ToMember) == asked[0]
    for message in asked[1:-1]:
        assert kept.of(message) is not first
    assert kept.of(asked[0]) is first
    kept.of(asked[-1])  # in the place of the one that was not asked for longest
    assert kept.of(asked[0]) is first
    assert len(kept._last) == MOST_ENCODED


def test_a_flood_of_calls_is_no_flood_of_log_lines() -> None:
    now = 0.0
    quotas = Quotas(lambda: now)
    assert quotas.shall_say(b"a", "flood")
    assert not quotas.shall_say(b"a", "flood")
    assert quotas.shall_say(b"a", "another")
    assert quotas.shall_say(b"b", "flood")
    now = gate.SAY_S
    assert quotas.shall_say(b"a", "flood")


def test_a_flood_of_refused_chunks_is_no_flood_of_log_lines(start: Callable[..., Hostile]) -> None:
    hostile = start(large=False)
    chunk = put_chunk(bytes(32), 0, b"x")
    for _ in range(50):
        with pytest.raises(grpc.RpcError, match="expected BeginUpload first"):
            hostile.caller(3).chunk(chunk, timeout=20)
    assert len(hostile.log.find("expected BeginUpload first")) == 1


# --- connections -------------------------------------------------------------------------------------------------


@flood
def test_connections_that_say_nothing_take_nothing_from_the_others_and_are_ended(
    start: Callable[..., Hostile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three hundred without TLS, a hundred with TLS and no HTTP/2, a hundred with HTTP/2 and no call."""
    short = {"grpc.server_handshake_timeout_ms": 2000, "grpc.max_connection_idle_ms": 3000}
    assert short.keys() <= dict(SERVER_OPTIONS).keys()
    monkeypatch.setattr(daemon, "SERVER_OPTIONS", [*(dict(SERVER_OPTIONS) | short).items()])
    hostile = start()
    host, _, port = hostile.address.rpartition(":")
    silent = [socket.create_connection((host, int(port)), 5) for _ in range(300)]
    site = hostile.world.federation.site("site-1")
    speaking = [RawCaller(hostile.address, site, hello=i % 2 == 0) for i in range(200)]
    serves(hostile.caller(2))
    serves(hostile.caller(1))
    for connection in [*silent[::50], *(caller.socket for caller in speaking[::20])]:
        connection.settimeout(15)
        until(lambda connection=connection: ended(connection))  # type: ignore[misc]
    serves(hostile.caller(2))
    for connection in silent:
        connection.close()
    for caller in speaking:
        caller.close()


def test_the_coordinator_takes_as_many_files_as_the_system_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        assert daemon.take_all_files() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def ended(connection: socket.socket) -> bool:
    """Did the other end close it? Reads whatever comes first."""
    try:
        return connection.recv(1 << 16) == b""
    except ConnectionError:
        return True


# --- uploads -----------------------------------------------------------------------------------------------------


def begin(hostile: Hostile, member: int) -> pb.UploadState:
    return hostile.caller(member).stub.BeginUpload(hostile.uploads[member].request, timeout=ANSWER_S)


def test_more_uploads_at_once_than_places_wait_for_their_turn(start: Callable[..., Hostile]) -> None:
    hostile = start(settings="max_uploads = 1\n")
    begin(hostile, 1)
    busy(lambda: begin(hostile, 2), "expected at most 1 uploads at once, all places are taken")
    assert hostile.log.find("all places are taken")
    begin(hostile, 1)  # the same one again is not another one
    hostile.caller(1).upload(hostile.uploads[1])
    hostile.caller(2).upload(hostile.uploads[2])


def test_an_upload_that_stalls_gives_its_place_to_whoever_waits(
    start: Callable[..., Hostile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "IDLE_S", 0.5)
    hostile = start(settings="max_uploads = 1\n", large=True)
    begin(hostile, 1)
    first, second = hostile.uploads[1].chunks()
    hostile.caller(1).chunk(first, timeout=ANSWER_S)
    busy(lambda: begin(hostile, 2), "all places are taken")
    time.sleep(0.6)
    hostile.caller(2).upload(hostile.uploads[2])
    busy(lambda: hostile.caller(1).chunk(second, timeout=ANSWER_S), "expected BeginUpload first")
    hostile.caller(1).upload(hostile.uploads[1])  # it is not shut out, and begins again


def test_a_slow_sender_is_left_behind_when_the_phase_ends(start: Callable[..., Hostile]) -> None:
    hostile = start(large=True)
    begin(hostile, 1)
    hostile.caller(1).chunk(hostile.uploads[1].chunks()[0], timeout=ANSWER_S)
    for member in (0, 2, 3, 4):
        hostile.caller(member).upload(hostile.uploads[member])
    assert isinstance(hostile.world.phase, phases.Uploading)
    hostile.world.wait(3600.0)
    hostile.world.away = {1}
    hostile.world.run()
    assert isinstance(hostile.world.phase, phases.Released)
    assert hostile.world.phase.closed.survivors == (0, 2, 3, 4)
    hostile.world.assert_exact()
    for call in (
        lambda: begin(hostile, 1),
        lambda: hostile.caller(1).stub.FinishUpload(hostile.uploads[1].request, timeout=ANSWER_S),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "too late" in (caught.value.details() or "")


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("call", "when"), [("posix_fallocate", "begun"), ("pwrite", "sent"), ("fsync", "ended")])
def test_an_upload_to_a_full_disk_is_told_to_come_back(
    start: Callable[..., Hostile], monkeypatch: pytest.MonkeyPatch, call: str, when: str
) -> None:
    hostile = start(large=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        busy(lambda: hostile.caller(1).upload(hostile.uploads[1]), "No space left on device")
        serves(hostile.caller(2))
    assert hostile.log.find("No space left on device"), when
    for member in range(5):
        hostile.caller(member).upload(hostile.uploads[member])
    hostile.world.run()
    assert isinstance(hostile.world.phase, phases.Released)
    hostile.world.assert_exact()


def test_a_total_is_shown_although_the_disk_was_full_for_the_row_that_names_it(
    start: Callable[..., Hostile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that is refused the total which M10 promised signs no outcome."""
    hostile = start(large=False)
    for member in range(5):
        hostile.caller(member).upload(hostile.uploads[member])
    hostile.world.run(phases.Unmasking)
    for member in range(5):
        if isinstance(hostile.world.phase, phases.Unmasking):
            hostile.world.tell(member)
    full_disk(monkeypatch, "before-commit:rounds")
    hostile.world.work()
    assert isinstance(hostile.world.phase, phases.Confirming)
    assert hostile.world.rounds[-1].row.state == "running"
    request = pb.FetchTotalRequest(round=hostile.uploads[0].round_id)
    assert hostile.caller(0).stub.FetchTotal(request, timeout=ANSWER_S).data
