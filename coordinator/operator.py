"""The operator's side of the socket: what the commands call on a running coordinator."""

from __future__ import annotations

import json
from typing import Any

import grpc

from coordinator.config import Home
from privacy.console import Unreachable
from privacy.errors import Refusal, UserError
from privacy.wire import federation_pb2 as pb
from privacy.wire.federation_pb2_grpc import OperatorStub

TIMEOUT_S = 30.0
#: Where the hint of an error stands in the metadata of its call; UTF-8, hence the ending.
HINT = "hint-bin"


class Operator:
    """A connection to the coordinator that runs in a directory."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._channel = grpc.insecure_channel(f"unix:{home.socket}")
        self._stub = OperatorStub(self._channel)

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            code, text = error.code(), error.details() or ""
            if code == grpc.StatusCode.UNAVAILABLE:
                raise Unreachable(
                    f"expected a coordinator running in {self._home.directory}, found none",
                    hint=f"start it: veilsum-coordinator serve --dir {self._home.directory}",
                ) from error
            if code == grpc.StatusCode.FAILED_PRECONDITION:
                raise Refusal(text) from error
            metadata: Any = error.trailing_metadata() or ()
            raise UserError(text, hint=dict(metadata).get(HINT, b"").decode()) from error

    def submit_plan(self, raw: bytes) -> bytes:
        """Offer a plan; its digest."""
        reply: pb.SubmitPlanReply = self._call(self._stub.SubmitPlan, pb.SubmitPlanRequest(toml=raw))
        return reply.plan

    def cancel_plan(self, name: str, reason: str) -> None:
        """Withdraw a plan."""
        self._call(self._stub.CancelPlan, pb.CancelPlanRequest(name=name, reason=reason))

    def reload(self) -> None:
        """Have it start anew with the roster that is on disk now."""
        self._call(self._stub.Reload, pb.ReloadRequest())

    def report(self, plan: str = "") -> dict[str, Any]:
        """All plans in short, or one plan with its rounds."""
        reply: pb.ReportReply = self._call(self._stub.Report, pb.ReportRequest(plan=plan))
        found: dict[str, Any] = json.loads(reply.json)
        return found
