"""The gate before every call of a participant: no member may keep the others from being served.

Each has so many calls in flight, and so many calls a second that are not bulk transfer; above that the answer is
RESOURCE_EXHAUSTED, which its client takes as "come back". What is large is bounded elsewhere: messages by gRPC's
receive limit, uploads by their places (``coordinator/uploads.py``).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import structlog

from privacy.errors import UserError
from privacy.wire.transport import SERVICE, WINDOW

log = structlog.get_logger()

#: Calls of one member in flight: a full window of chunks twice, and some calls beside it.
IN_FLIGHT = 2 * WINDOW + 8
#: Calls of one member a second in the long run, and how many it may save up.
RATE, BURST = 50.0, 400.0
#: Seconds between two log lines about one member's flood.
SAY_S = 10.0
#: Bounded by what is in flight alone: a large vector takes thousands of these.
BULK = frozenset(f"/{SERVICE}/{name}" for name in ("PutChunk", "FetchTotal", "FetchBlock"))


@dataclass
class Use:
    """What one caller uses now."""

    tokens: float
    at: float
    flying: int = 0
    said: float = float("-inf")


class Quotas:
    """In-flight calls and a token bucket for each caller."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: dict[bytes, Use] = defaultdict(lambda: Use(BURST, clock()))

    @contextmanager
    def call(self, caller: bytes, method: str) -> Iterator[None]:
        """One call of ``caller`` is in flight.

        Raises:
            UserError: too many at once, or too many a second.
        """
        use, now = self._uses[caller], self._clock()
        use.tokens, use.at = min(BURST, use.tokens + RATE * (now - use.at)), now
        if use.flying >= IN_FLIGHT:
            raise UserError(f"expected at most {IN_FLIGHT} calls of a member in flight: come back shortly")
        if method not in BULK:
            if use.tokens < 1:
                raise UserError(f"expected at most {RATE:g} calls of a member a second: come back shortly")
            use.tokens -= 1
        use.flying += 1
        try:
            yield
        finally:
            use.flying -= 1

    def shall_say(self, caller: bytes) -> bool:
        """Is a log line about this caller due? A flood of calls must not become a flood of lines."""
        use, now = self._uses[caller], self._clock()
        if now - use.said < SAY_S:
            return False
        use.said = now
        return True


class Gate(grpc.aio.ServerInterceptor):
    """Puts every unary call of the federation service through the quotas."""

    def __init__(self, quotas: Quotas | None = None) -> None:
        self._quotas = quotas or Quotas()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        answer, method, quotas = handler.unary_unary, handler_call_details.method, self._quotas

        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            caller = b"/".join(context.auth_context().get("x509_common_name", []))
            try:
                with quotas.call(caller, method):
                    return await answer(request, context)  # type: ignore[arg-type]  # stubs know the other context
            except UserError as error:
                if quotas.shall_say(caller):
                    log.warning("flood", reason=str(error), caller=caller.decode(errors="replace"))
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))

        return grpc.unary_unary_rpc_method_handler(
            call,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
