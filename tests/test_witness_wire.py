"""Checkpoints on the wire: which messages need one, and what the coordinator answers to a wrong one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import structlog

from coordinator import gate
from privacy.budget.checkpoint import sign_checkpoint
from privacy.secagg.dialogue import FromMember
from privacy.secagg.messages import AbortStatement
from privacy.secagg.signed import sign
from privacy.wire import federation_pb2 as pb
from privacy.wire.convert import to_wire
from tests.charging import PRIVACY, plan
from tests.hostile import ANSWER_S, Hostile

BAD, REFUSED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
DATASET = "77" * 32


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hostile]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "SAY_S", 0.0)  # every refusal has its line
        found = Hostile(tmp_path_factory.mktemp("hostile"), large=False)
        yield found
        found.close()


@pytest.fixture(autouse=True)
def _logged(hostile: Hostile) -> None:
    structlog.configure(processors=[hostile.log])


def note(hostile: Hostile, size: int, fill: int = 0, member: int = 1, dataset: str = DATASET) -> bytes:
    return sign_checkpoint(hostile.world.site(member).identity, dataset, size, bytes([fill]) * 32)


def lines(hostile: Hostile) -> list[dict[str, Any]]:
    path = hostile.home.witnesses
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ready(hostile: Hostile, digest: bytes, checkpoint: bytes) -> object:
    request = pb.ReadyRequest(plan=digest, stage=1, checkpoint=checkpoint)
    return hostile.caller(1).stub.Ready(request, timeout=ANSWER_S)


def send(hostile: Hostile, checkpoint: bytes) -> object:
    header = hostile.world.rounds[-1].machine.context.header
    message = to_wire(sign(hostile.world.site(1).identity, 1, AbortStatement("x"), header.hash()), FromMember)
    request = pb.SendRequest(round=header.hash(), message=message, checkpoint=checkpoint)
    return hostile.caller(1).stub.Send(request, timeout=ANSWER_S)


def upload(hostile: Hostile, method: str, checkpoint: bytes) -> object:
    request = hostile.uploads[1].request
    request.checkpoint = checkpoint
    return getattr(hostile.caller(1).stub, method)(request, timeout=ANSWER_S)


CALLS: dict[str, Callable[[Hostile, bytes], object]] = {
    "Ready": lambda hostile, checkpoint: ready(hostile, hostile.world.digest, checkpoint),
    "Send": send,
    "BeginUpload": lambda hostile, checkpoint: upload(hostile, "BeginUpload", checkpoint),
    "FinishUpload": lambda hostile, checkpoint: upload(hostile, "FinishUpload", checkpoint),
}


def refused(call: Callable[[], object], code: grpc.StatusCode, text: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert (caught.value.code(), text in (caught.value.details() or "")) == (code, True), caught.value.details()


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_checkpoint_is_refused_whatever_it_comes_with(hostile: Hostile, call: str) -> None:
    before = lines(hostile)
    refused(lambda: CALLS[call](hostile, b"hello"), BAD, "checkpoint: expected origin")
    refused(
        lambda: CALLS[call](hostile, note(hostile, 3, member=2)), BAD, "expected a signature by the site's identity"
    )
    assert lines(hostile) == before


@pytest.mark.parametrize("call", CALLS)
def test_a_ledger_that_goes_back_or_forks_is_refused_and_kept(hostile: Hostile, call: str) -> None:
    dataset = call.encode().hex().ljust(64, "0")[:64]
    ready(hostile, hostile.world.digest, note(hostile, 5, 1, dataset=dataset))
    back, fork = note(hostile, 4, 0, dataset=dataset), note(hostile, 5, 2, dataset=dataset)
    refused(lambda: CALLS[call](hostile, back), REFUSED, "has 4 lines, 5 were witnessed")
    refused(lambda: CALLS[call](hostile, fork), REFUSED, "a fork")
    found = [line for line in lines(hostile) if line["dataset"] == dataset]
    assert [(line["checkpoint"].encode(), "rollback" in line, "fork" in line) for line in found] == [
        (note(hostile, 5, 1, dataset=dataset), False, False),
        (back, True, False),
        (fork, False, True),
    ]
    assert hostile.log.find("ledger fork")
    assert hostile.log.find("ledger rollback")


def test_without_a_checkpoint_a_private_plan_is_refused_and_another_said_aloud(hostile: Hostile) -> None:
    private = hostile.world.engine.submit_plan(plan("quiet", PRIVACY))
    refused(lambda: ready(hostile, private, b""), REFUSED, "plan 'quiet' is private: expected a signed checkpoint")
    assert ready(hostile, private, note(hostile, 6, 3))
    since = len(hostile.log.lines)
    assert ready(hostile, hostile.world.digest, b"")
    assert hostile.log.find("no checkpoint of the ledger", since)
