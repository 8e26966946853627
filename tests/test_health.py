"""The health and reflection services: what they say over mutual TLS, to whom, and behind which limits."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from coordinator import health, pulse
from coordinator.gate import BURST, IN_FLIGHT
from coordinator.pulse import Pulse, Wellbeing
from privacy.files import DiskError
from privacy.wire.transport import SERVICE
from tests.hostile import ANSWER_S, Caller, Hostile
from tests.test_floods import until

Status = health_pb2.HealthCheckResponse


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Hostile]:
    found = Hostile(tmp_path / "h", large=False)
    structlog.configure(processors=[found.log])
    yield found
    found.close()


def check(caller: Caller, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(caller.channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=ANSWER_S).status)


def listed(caller: Caller, *requests: reflection_pb2.ServerReflectionRequest) -> list[set[str]]:
    """The services that reflection lists, for each request."""
    asked = requests or (reflection_pb2.ServerReflectionRequest(list_services=""),)
    stub = reflection_pb2_grpc.ServerReflectionStub(caller.channel)
    replies = stub.ServerReflectionInfo(iter(asked), timeout=ANSWER_S)
    return [{service.name for service in reply.list_services_response.service} for reply in replies]


def test_a_member_sees_the_coordinator_serving_and_one_without_a_certificate_sees_nothing(hostile: Hostile) -> None:
    assert check(hostile.caller(1)) == check(hostile.caller(1), SERVICE) == Status.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        check(hostile.caller(1), "another.Service")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError) as caught:
        check(hostile.caller_from(hostile.world.federation.site("site-2"), certificate=False))
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_stopped_loop_and_a_full_disk_are_not_serving(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    caller, wellbeing = hostile.caller(1), hostile.wellbeing
    with pytest.raises(RuntimeError, match="a bug"), wellbeing.work.turning():
        raise RuntimeError("a bug of ours")
    assert check(caller) == Status.NOT_SERVING
    wellbeing.work.ended = False
    assert check(caller) == Status.SERVING
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, pulse.LEAST_FREE - 1))
    assert check(caller) == Status.NOT_SERVING


def test_a_watcher_hears_each_change_once(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOOK_S", 0.05)
    stub = health_pb2_grpc.HealthStub(hostile.caller(1).channel)
    watching = stub.Watch(health_pb2.HealthCheckRequest(), timeout=ANSWER_S)
    assert next(watching).status == Status.SERVING
    hostile.wellbeing.stopping = True
    assert next(watching).status == Status.NOT_SERVING
    hostile.wellbeing.stopping = False
    assert next(watching).status == Status.SERVING
    watching.cancel()


def test_reflection_lists_the_services_and_describes_the_federations(hostile: Hostile) -> None:
    assert listed(hostile.caller(1)) == [{SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}]
    stub = reflection_pb2_grpc.ServerReflectionStub(hostile.caller(1).channel)
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)
    (reply,) = stub.ServerReflectionInfo(iter([request]), timeout=ANSWER_S)
    assert any(b"FinishUpload" in raw for raw in reply.file_descriptor_response.file_descriptor_proto)


def test_watchers_of_one_member_take_places_of_that_member_only(hostile: Hostile) -> None:
    flooder, other = hostile.caller(1), hostile.caller(2)
    stub = health_pb2_grpc.HealthStub(flooder.channel)
    watching = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(IN_FLIGHT)]
    for call in watching:
        assert next(call).status == Status.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        check(flooder)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert check(other) == Status.SERVING
    for call in watching:
        call.cancel()
    until(lambda: _answers(flooder))


def _answers(caller: Caller) -> bool:
    try:
        return check(caller) == int(Status.SERVING)
    except grpc.RpcError:
        return False


def test_every_request_of_a_reflection_call_counts_as_a_call(hostile: Hostile) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with pytest.raises(grpc.RpcError) as caught:
        listed(hostile.caller(1), *[request] * round(3 * BURST))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "calls of a member a second" in (caught.value.details() or "")
    assert check(hostile.caller(2)) == Status.SERVING


def test_a_watch_without_its_request_is_ended_in_time(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.gate.RECEIVE_S", 0.5)
    call: grpc.StreamStreamMultiCallable[bytes, bytes] = hostile.caller(1).channel.stream_stream(
        "/grpc.health.v1.Health/Watch"
    )

    def silence() -> Iterator[bytes]:
        until(lambda: bool(done))
        yield from ()

    done: list[int] = []
    replies = call(silence(), timeout=ANSWER_S)
    with pytest.raises(grpc.RpcError) as caught:
        next(replies)
    done.append(1)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "expected the whole request within" in (caught.value.details() or "")


def test_what_a_pulse_says_of_its_loop() -> None:
    now = [0.0]
    found = Pulse("deadlines", short=True, clock=lambda: now[0])
    with found.turning():
        with found.step():
            now[0] = pulse.STUCK_S
            assert found.fault() == ""
            now[0] += 1
            assert found.fault() == "the loop 'deadlines' has been at one step for 61 s"
        assert found.fault() == ""
        with pytest.raises(DiskError), found.step():
            raise DiskError("full", hint="")
        assert found.fault() == "the loop 'deadlines' waits for the disk"
        with found.step():
            pass
        assert found.fault() == ""
    assert found.fault() == "the loop 'deadlines' has ended"
    long = Pulse("work", short=False, clock=lambda: now[0])
    with long.step():
        now[0] += 100 * pulse.STUCK_S
        assert long.fault() == ""


def test_a_round_that_waits_for_the_disk_is_a_fault(hostile: Hostile) -> None:
    engine = hostile.world.engine
    wellbeing = Wellbeing(engine)
    assert wellbeing.fault() == ""
    next(iter(engine.rounds.values())).try_again = engine.clock() + 10
    assert wellbeing.fault() == "a round waits for the disk"
