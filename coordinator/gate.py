"""The gate before every call of a participant: no member may keep the others from being served.

Each has so many calls in flight, and so many calls a second that are not bulk transfer; above that the answer is
RESOURCE_EXHAUSTED, which its client takes as "come back". What is large is bounded elsewhere: messages by gRPC's
receive limit, uploads by their places (``coordinator/uploads.py``).
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog

from coordinator.counts import Counts
from privacy.errors import UserError
from privacy.wire.transport import CHUNK_S, MAX_REQUEST, PUT_CHUNK, SERVICE, WINDOW

Call = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger()

#: Calls of one member in flight: a full window of chunks twice, and some calls beside it.
IN_FLIGHT = 2 * WINDOW + 8
#: Calls of one member a second in the long run, and how many it may save up.
RATE, BURST = 50.0, 400.0
#: Bytes of a reply that count as one call more.
REPLY_BYTES = 1 << 18
#: Seconds between two log lines of one kind about one member.
SAY_S = 10.0
#: Seconds for the request of a call that is no chunk; a client of ours gives up at the same time.
RECEIVE_S = 60.0
#: Classes of what the gate refuses.
REASONS = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: "busy",
    grpc.StatusCode.DEADLINE_EXCEEDED: "slow",
    grpc.StatusCode.INVALID_ARGUMENT: "malformed",
}
#: Bounded by what is in flight alone: a large vector takes thousands of these.
BULK = frozenset(f"/{SERVICE}/{name}" for name in ("PutChunk", "FetchTotal", "FetchBlock"))


@dataclass
class Use:
    """What one caller uses now."""

    tokens: float
    at: float
    flying: int = 0
    said: dict[str, float] = field(default_factory=dict)  # kind of refusal -> when a line about it was written


class Quotas:
    """In-flight calls and a token bucket for each caller."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        in_flight: int = IN_FLIGHT,
        rate: float = RATE,
        burst: float = BURST,
    ) -> None:
        self._clock, self._in_flight, self._rate, self._burst = clock, in_flight, rate, burst
        self._uses: dict[bytes, Use] = defaultdict(lambda: Use(burst, clock()))

    @contextmanager
    def call(self, caller: bytes, method: str) -> Iterator[None]:
        """One call of ``caller`` is in flight.

        Raises:
            UserError: too many at once, or too many a second.
        """
        use = self._uses[caller]
        if use.flying >= self._in_flight:
            raise UserError(f"expected at most {self._in_flight} calls of a member in flight: come back shortly")
        if method not in BULK:
            self.spend(caller)
        use.flying += 1
        try:
            yield
        finally:
            use.flying -= 1

    def spend(self, caller: bytes) -> None:
        """One call more, or one request more of a call that has several; raises UserError."""
        use, now = self._uses[caller], self._clock()
        use.tokens, use.at = min(self._burst, use.tokens + self._rate * (now - use.at)), now
        if use.tokens < 1:
            raise UserError(f"expected at most {self._rate:g} calls of a member a second: come back shortly")
        use.tokens -= 1

    def charge(self, caller: bytes, size: int) -> None:
        """A large reply counts as many calls: it costs the coordinator as much."""
        self._uses[caller].tokens -= size / REPLY_BYTES

    def shall_say(self, caller: bytes, kind: str) -> bool:
        """Is a log line of this kind about this caller due? A flood of calls must not become a flood of lines."""
        use, now = self._uses[caller], self._clock()
        if now - use.said.get(kind, float("-inf")) < SAY_S:
            return False
        use.said[kind] = now
        return True


def _caller(context: Call) -> bytes:
    """The name in a caller's certificate; lines of the log about its call carry it.

    gRPC runs each call in a task with a context of its own, so what is bound here ends with the call.
    """
    caller = b"/".join(context.auth_context().get("x509_common_name", []))
    if caller:  # nobody has a name yet where sites join
        structlog.contextvars.bind_contextvars(member=caller.decode(errors="replace"))
    return caller


class Gate(grpc.aio.ServerInterceptor):
    """Puts every call of a participant through the quotas, a unary one **before** its request is received.

    gRPC calls the handler of a unary call once the whole request is there. Calls that are begun and never sent would
    pass the quotas unseen, and one member could take every place there is. So each handler is registered as one of a
    stream, which on the wire is the same: it runs when the call begins, and takes its one request itself, in time.
    """

    def __init__(self, quotas: Quotas | None = None, counts: Counts | None = None) -> None:
        self._quotas, self._counts = quotas or Quotas(), counts or Counts()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        if handler.unary_unary is None:
            return self._streaming(handler, handler_call_details.method)
        answer, parse, method = handler.unary_unary, handler.request_deserializer, handler_call_details.method

        async def call(requests: AsyncIterator[bytes], context: Call) -> Any:
            caller = _caller(context)
            try:
                with self._quotas.call(caller, method), self._counts.call(method):
                    request = await self._received(requests, context, caller, method)
                    parsed = await self._parsed(parse, request, context, caller, method) if parse else request
                    reply = await answer(parsed, context)  # type: ignore[arg-type]  # stubs know the other context
                    if method not in BULK:
                        self._quotas.charge(caller, reply.ByteSize())
                    return reply
            except UserError as error:
                await self._refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), caller, method)

        return grpc.stream_unary_rpc_method_handler(call, response_serializer=handler.response_serializer)

    def _streaming(self, handler: grpc.RpcMethodHandler[Any, Any], method: str) -> grpc.RpcMethodHandler[Any, Any]:
        """A call with several requests or replies, as health and reflection have them: each request is a call more."""
        one, many = handler.unary_stream, handler.stream_stream
        parse = handler.request_deserializer

        async def call(requests: AsyncIterator[Any], context: Call) -> AsyncIterator[Any]:
            caller = _caller(context)
            try:
                with self._quotas.call(caller, method):
                    if many is None:
                        request = await self._received(requests, context, caller, method)
                        parsed = await self._parsed(parse, request, context, caller, method) if parse else request
                        replies: Any = one(parsed, context)  # type: ignore[misc, arg-type]
                    else:
                        replies = many(self._spending(requests, caller), context)  # type: ignore[arg-type]
                    async for reply in replies:
                        self._quotas.charge(caller, reply.ByteSize())
                        yield reply
            except UserError as error:
                await self._refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), caller, method)

        return grpc.stream_stream_rpc_method_handler(
            call,
            request_deserializer=parse if many is not None else None,
            response_serializer=handler.response_serializer,
        )

    async def _spending(self, requests: AsyncIterator[Any], caller: bytes) -> AsyncIterator[Any]:
        async for request in requests:
            self._quotas.spend(caller)
            yield request

    async def _received(self, requests: AsyncIterator[bytes], context: Call, caller: bytes, method: str) -> bytes:
        """The one request of a call, in time."""
        seconds = CHUNK_S if method == PUT_CHUNK else RECEIVE_S
        try:
            async with asyncio.timeout(seconds):
                request = await anext(requests)
                # Asked to its end, or gRPC's half-read iterator keeps the request until the collector comes.
                if await anext(requests, None) is None:
                    return request
                text = "expected one request in a call, found more"
        except TimeoutError:
            text = f"expected the whole request within {seconds:g} s"
            await self._refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, text, caller, method)
        except StopAsyncIteration:  # also above the limit, which gRPC tells the client itself: RESOURCE_EXHAUSTED
            text = f"expected a request of at most {MAX_REQUEST} bytes, found none that is whole"
        await self._refuse(context, grpc.StatusCode.INVALID_ARGUMENT, text, caller, method)
        raise AssertionError("abort raises")

    async def _parsed(
        self, parse: Callable[[bytes], Any], request: bytes, context: Call, caller: bytes, method: str
    ) -> Any:
        try:
            return parse(request)
        except Exception as error:  # what a protobuf parser raises; protobuf itself is none of this file's business
            text = f"expected a request of {method}, found other bytes: {error}"
            await self._refuse(context, grpc.StatusCode.INVALID_ARGUMENT, text, caller, method)
            raise AssertionError("abort raises") from error

    async def _refuse(self, context: Call, code: grpc.StatusCode, reason: str, caller: bytes, method: str) -> None:
        name = caller.decode(errors="replace")
        self._counts.refused(name, REASONS[code])
        if self._quotas.shall_say(caller, code.name):
            log.warning("refused", reason=reason, member=name, method=method)
        await context.abort(code, reason)
