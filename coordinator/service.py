"""gRPC around the engine: who is calling (by TLS certificate), parse or refuse, count bytes, answer.

Errors a caller can cause become a clear status; every RPC is bounded. Blocking work runs in threads, the event loop
only waits.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import structlog
from structlog.contextvars import bind_contextvars

from coordinator import phases
from coordinator.counts import Counts
from coordinator.engine import Engine
from coordinator.gate import Quotas
from coordinator.members import Members
from coordinator.operator import HINT
from coordinator.peers import AuthContext, common_name, expired_on, issued_before
from coordinator.pki import LEEWAY
from coordinator.round import sender_of
from coordinator.uploads import Uploads
from coordinator.witnesses import Witnesses
from privacy import PROTOCOL_VERSION, __version__
from privacy.encoding import encode
from privacy.errors import ProtocolError, Refusal, UserError, VeilsumError, shown
from privacy.job import Job
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.messages import Advertise, Evidence, MaskedInput
from privacy.secagg.signed import Signed
from privacy.wire import federation_pb2 as pb
from privacy.wire import federation_pb2_grpc, secagg_pb2
from privacy.wire.convert import from_wire, to_wire
from privacy.wire.transport import MOST_CHUNK_BYTES, PUT_CHUNK, SERVICE, chunk_reply, read_chunk

log = structlog.get_logger()

#: Seconds a long poll waits before it answers "nothing new".
POLL_S = 20.0
#: The shortest, for a member that a round of another plan waits for.
TURN_S = 1.0
#: What a member may say of why it takes no part.
MAX_REASON = 500
#: Messages kept encoded; the largest, M10, is one for the whole cohort.
MOST_ENCODED = 32

STATUS = {
    ProtocolError: grpc.StatusCode.INVALID_ARGUMENT,
    Refusal: grpc.StatusCode.FAILED_PRECONDITION,
    UserError: grpc.StatusCode.RESOURCE_EXHAUSTED,
}

R = TypeVar("R")
Call = grpc.aio.ServicerContext[Any, Any]


async def guarded(
    context: Call, work: Awaitable[R], note: Callable[[VeilsumError], bool] = lambda _: True, *, hints: bool = False
) -> R:
    """Await ``work``; what a caller did wrong becomes a status and a log line, never a traceback.

    Args:
        note: hears of each refusal; is a line about it due?
        hints: the caller is told what to do as well, in the call's metadata. Hints name files of this machine.
    """
    try:
        return await work
    except VeilsumError as error:
        if note(error):
            log.warning("refused", reason=str(error))
        hint = getattr(error, "hint", "") if hints else ""
        code = next(code for kind, code in STATUS.items() if isinstance(error, kind))
        await context.abort(code, str(error), ((HINT, hint.encode()),) if hint else ())
        raise AssertionError("abort raises") from error


@dataclass(frozen=True)
class Encoded:
    """A message to a member, and what both ends know it by."""

    message: ToMember
    digest: bytes  # SHA-256 of the canonical encoding
    wire: secagg_pb2.ToMember


def shut_out(members: Members, auth: AuthContext, name: str) -> str | None:
    """Why a member with a certificate is not served: it was removed, or the certificate is from before that."""
    member = members.known(name)
    if member is None:  # of a federation that was set up by hand
        return None
    if member.removed:
        return f"'{name}' was removed from this federation"
    if issued_before(auth, member.barred, LEEWAY):
        return f"this certificate of '{name}' is from before that member was removed: join again"
    return None


class LastEncoded:
    """The last messages, encoded: M10 of a large cohort takes a tenth of a second, and everybody asks for the same."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: OrderedDict[int, Encoded] = OrderedDict()  # by identity: the message is kept, so it stays unique

    def of(self, message: ToMember) -> Encoded:
        """The message, encoded now or before."""
        with self._lock:
            if found := self._last.get(id(message)):
                self._last.move_to_end(id(message))
                return found
        made = Encoded(message, hashlib.sha256(encode(message, ToMember)).digest(), to_wire(message, ToMember))
        with self._lock:
            self._last[id(message)] = made
            while len(self._last) > MOST_ENCODED:
                self._last.popitem(last=False)
        return made


class FederationService(federation_pb2_grpc.FederationServicer):
    """What participants call; each is the member its certificate names."""

    def __init__(
        self, engine: Engine, uploads: Uploads, witnesses: Witnesses, members: Members, counts: Counts
    ) -> None:
        self._engine, self._uploads, self._encoded = engine, uploads, LastEncoded()
        self._witnesses, self._members, self._counts = witnesses, members, counts
        self._lines = Quotas()
        self._changed = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(self._wake)

        engine.changed = wake

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _member(self, context: Call, *, round_id: bytes = b"", plan: bytes = b"", stage: int = 0) -> int:
        """Who calls, if it may; lines of the log about the call say what it is about."""
        auth = context.auth_context()
        name, expired = common_name(auth), expired_on(auth, datetime.datetime.now(datetime.UTC))
        try:
            if (text := shut_out(self._members, auth, name)) is not None:
                raise Refusal(text)
            member = self._engine.roster.roster.index(name)
        except Refusal as error:
            self._counts.refused(name, "stranger")
            if self._lines.shall_say(name.encode(), "unknown"):
                log.warning("refused", reason=str(error), peer=context.peer())
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
            raise AssertionError("abort raises") from error
        if expired is not None:
            self._counts.refused(name, "expired")
            text = f"the certificate of '{name}' expired on {expired:%Y-%m-%d %H:%M} UTC: ask for another"
            if self._lines.shall_say(name.encode(), "expired"):
                log.warning("refused", reason=text, peer=context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, text)
        if running := self._engine.rounds.get(round_id):
            bind_contextvars(**running.about)
        elif job := self._engine.jobs.get(plan):
            bind_contextvars(plan=job.plan.name, stage=stage)
        return member

    def _name(self, member: int) -> str:
        return self._engine.roster.roster.name(member)

    async def _guarded(self, context: Call, work: Awaitable[R], member: int, *, bulk: bool = False) -> R:
        """As :func:`guarded`, counted.

        Args:
            bulk: no rate bounds such calls: their refusals must not fill the disk with lines.
        """
        name = self._name(member)

        def note(error: VeilsumError) -> bool:
            self._counts.refused_for(name, error)
            return not bulk or self._lines.shall_say(name.encode(), type(error).__name__)

        return await guarded(context, work, note)

    async def Hello(self, request: pb.HelloRequest, context: Call) -> pb.HelloReply:
        await self._member(context)
        roster = self._engine.roster
        return pb.HelloReply(
            protocol_version=PROTOCOL_VERSION,
            software=__version__,
            roster=roster.hash,
            coordinator=bytes.fromhex(roster.roster.coordinator),
        )

    async def ListPlans(self, request: pb.ListPlansRequest, context: Call) -> pb.ListPlansReply:
        await self._member(context)
        engine = self._engine

        def listed() -> list[pb.PlanState]:
            plans = [*engine.store.plans(), *engine.store.ended_plans()]
            found = [(p, engine.stage(p.digest)) for p in plans]
            return [pb.PlanState(toml=p.toml, state=p.state, reason=p.reason, stage=stage) for p, stage in found]

        return pb.ListPlansReply(plans=await asyncio.to_thread(listed))

    async def Ready(self, request: pb.ReadyRequest, context: Call) -> pb.ReadyReply:
        member = await self._member(context, plan=request.plan, stage=request.stage)

        def take() -> tuple[int, int]:
            self._witness(self._engine.open_plan(request.plan)[1], member, request.checkpoint)
            return self._engine.ready(request.plan, request.stage, member)

        work = asyncio.to_thread(take)
        ready, expected = await self._guarded(context, work, member)
        self._wake()
        return pb.ReadyReply(ready=ready, expected=expected)

    async def Decline(self, request: pb.DeclineRequest, context: Call) -> pb.DeclineReply:
        member = await self._member(context, plan=request.plan)

        def keep() -> None:
            self._engine.decline(request.plan, member, shown(request.reason, MAX_REASON), waiting=request.waiting)

        await self._guarded(context, asyncio.to_thread(keep), member)
        return pb.DeclineReply()

    async def Next(self, request: pb.NextRequest, context: Call) -> pb.NextReply:
        member = await self._member(context, plan=request.plan, stage=request.stage)
        deadline = asyncio.get_running_loop().time() + POLL_S
        while True:
            changed = self._changed
            found, awaited = await asyncio.to_thread(self._news, request.plan, request.stage, member)
            if found is not None and found[1].digest != request.seen:
                reply = pb.NextReply(message=found[1].wire, round=found[0])
                self._count(found[0], member, received=reply.ByteSize())
                return reply
            rest = deadline - asyncio.get_running_loop().time()
            if awaited:
                await asyncio.sleep(max(0.0, rest - POLL_S + TURN_S))
                return pb.NextReply()  # for its turn at the other plan
            if rest <= 0:
                return pb.NextReply()
            try:
                await asyncio.wait_for(changed.wait(), rest)
            except TimeoutError:
                return pb.NextReply()

    def _news(self, plan: bytes, stage: int, member: int) -> tuple[tuple[bytes, Encoded] | None, bool]:
        """What there is for a member, and whether a round of another plan waits for it to join."""
        found = self._engine.message_for(plan, stage, member)
        with self._engine.lock:
            awaited = any(r.row.plan != plan and r.asks_to_join(member) for r in self._engine.rounds.values())
        return (found[0], self._encoded.of(found[1])) if found is not None else None, awaited

    def _count(self, round_id: bytes, member: int, **counts: int) -> None:
        if round_id in self._engine.rounds:  # what a caller invents leaves no trace on disk
            self._engine.store.count_traffic(round_id, member, **counts)

    def _witness(self, job: Job, member: int, note: bytes, advertised: tuple[int, bytes] | None = None) -> None:
        """Keep the checkpoint that came with a message, or refuse the message.

        Raises:
            Refusal: none came and the plan is private, or the ledger went back or forked. ProtocolError: it is wrong.
        """
        if note:
            self._witnesses.take(member, note, advertised)
        elif job.plan.privacy is not None:
            raise Refusal(f"plan '{job.plan.name}' is private: expected a signed checkpoint of the ledger, found none")
        elif self._lines.shall_say(self._name(member).encode(), "no checkpoint"):
            log.warning("no checkpoint of the ledger")

    async def Send(self, request: pb.SendRequest, context: Call) -> pb.SendReply:
        member = await self._member(context, round_id=request.round)

        def take() -> bool:
            message = from_wire(request.message, FromMember)
            if isinstance(getattr(message, "body", None), MaskedInput):
                raise ProtocolError("M5 comes with its upload: BeginUpload, PutChunk, FinishUpload")
            self._check_sender(sender_of(message), member)
            job, body = self._engine.running(request.round).job, getattr(message, "body", None)
            advertised = (body.ledger_size, body.ledger_root) if isinstance(body, Advertise) else None
            self._witness(job, member, request.checkpoint, advertised)
            self._count(request.round, member, sent=request.ByteSize())
            return not self._engine.receive(request.round, message)

        return pb.SendReply(repeated_message=await self._guarded(context, asyncio.to_thread(take), member))

    @staticmethod
    def _check_sender(claimed: int, member: int) -> None:
        if claimed != member:
            raise ProtocolError(f"expected a message of member {member}, whose certificate this is, found {claimed}")

    def _input(self, request: pb.UploadRequest, member: int) -> Signed[MaskedInput]:
        message: Signed[MaskedInput] = from_wire(request.input, Signed[MaskedInput])
        self._check_sender(message.sender, member)
        self._witness(self._engine.running(request.round).job, member, request.checkpoint)
        self._count(request.round, member, sent=request.ByteSize())
        return message

    async def BeginUpload(self, request: pb.UploadRequest, context: Call) -> pb.UploadState:
        member = await self._member(context, round_id=request.round)
        work = asyncio.to_thread(lambda: self._uploads.begin(request.round, self._input(request, member)))
        received = await self._guarded(context, work, member)
        finished = self._uploads.receipt(request.round, member) is not None
        return pb.UploadState(received=received, finished=finished, window=self._uploads.window())

    async def put_chunk(self, request: bytes, context: Call) -> bytes:
        """Raw bytes in, one byte out: no protobuf around the payload."""
        member = await self._member(context, round_id=request[:32])

        def put() -> bytes:
            round_id, offset, payload = read_chunk(request)
            window = self._uploads.put(round_id, member, offset, payload)
            self._count(round_id, member, sent=len(request), chunks=len(request))
            return chunk_reply(window)

        return await self._guarded(context, asyncio.to_thread(put), member, bulk=True)

    async def FinishUpload(self, request: pb.UploadRequest, context: Call) -> pb.Receipt:
        member = await self._member(context, round_id=request.round)
        work = asyncio.to_thread(lambda: self._uploads.finish(request.round, self._input(request, member)))
        receipt = await self._guarded(context, work, member)
        log.info("upload received", bytes=receipt.length)
        return pb.Receipt(
            round=request.round, member=member, root=receipt.root, length=receipt.length, signature=receipt.signature
        )

    async def ListReleases(self, request: pb.ListReleasesRequest, context: Call) -> pb.ListReleasesReply:
        await self._member(context, plan=request.plan, stage=request.stage)

        def listed() -> list[pb.Release]:
            with self._engine.lock:
                cohorts = self._engine.released(request.plan, request.stage)
            stage = request.stage
            return [pb.Release(round=c.round_id, stage=stage, evidence=to_wire(c.evidence, Evidence)) for c in cohorts]

        return pb.ListReleasesReply(releases=await asyncio.to_thread(listed))

    async def FetchTotal(self, request: pb.FetchTotalRequest, context: Call) -> pb.TotalChunk:
        member = await self._member(context, round_id=request.round)

        def read() -> pb.TotalChunk:
            # The phase says it, not the row: a full disk may have come between the total and its row.
            if not isinstance(self._engine.running(request.round).machine.phase, phases.HasTotal):
                raise Refusal(f"round {request.round.hex()[:16]}… has no total")
            path = self._engine.store.total(request.round)
            length = path.stat().st_size
            if request.offset > length:
                raise ProtocolError(f"expected an offset of at most {length}, found {request.offset}")
            with path.open("rb") as file:
                file.seek(request.offset)
                return pb.TotalChunk(data=file.read(MOST_CHUNK_BYTES), length=length)

        chunk = await self._guarded(context, asyncio.to_thread(read), member, bulk=True)
        self._count(request.round, member, received=chunk.ByteSize())
        return chunk

    async def FetchBlock(self, request: pb.FetchBlockRequest, context: Call) -> pb.UploadBlock:
        member = await self._member(context, round_id=request.round)
        work = asyncio.to_thread(self._engine.upload_block, request.round, request.member, request.block)
        data, path = await self._guarded(context, work, member, bulk=True)
        block = pb.UploadBlock(data=data, path=path)
        self._count(request.round, member, received=block.ByteSize())
        return block


def add_federation(server: grpc.aio.Server, service: FederationService) -> None:
    """Register the typed calls and, beside them, the raw chunk call."""
    federation_pb2_grpc.add_FederationServicer_to_server(service, server)
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(service.put_chunk)
    method = PUT_CHUNK.rpartition("/")[2]
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {method: handler}),))


def add_operator(server: grpc.aio.Server, service: OperatorService) -> None:
    """Register the operator's calls."""
    federation_pb2_grpc.add_OperatorServicer_to_server(service, server)


class OperatorService(federation_pb2_grpc.OperatorServicer):
    """What the operator's commands call, over a socket file only the operator's account can open."""

    def __init__(self, engine: Engine | None, report: Callable[[Engine, str], str], reload: Callable[[], None]) -> None:
        self._engine_or_none, self._report, self._reload = engine, report, reload

    def _engine(self) -> Engine:
        if self._engine_or_none is None:
            raise Refusal("there is no roster yet: veilsum-coordinator roster draft, then roster publish")
        return self._engine_or_none

    async def SubmitPlan(self, request: pb.SubmitPlanRequest, context: Call) -> pb.SubmitPlanReply:
        work = asyncio.to_thread(lambda: self._engine().submit_plan(request.toml))
        return pb.SubmitPlanReply(plan=await guarded(context, work, hints=True))

    async def CancelPlan(self, request: pb.CancelPlanRequest, context: Call) -> pb.CancelPlanReply:
        work = asyncio.to_thread(lambda: self._engine().cancel_plan(request.name, request.reason))
        await guarded(context, work, hints=True)
        return pb.CancelPlanReply()

    async def Report(self, request: pb.ReportRequest, context: Call) -> pb.ReportReply:
        if self._engine_or_none is None and not request.plan:
            return pb.ReportReply(json='{"plans": [], "waiting_for": "a roster"}')
        work = asyncio.to_thread(lambda: self._report(self._engine(), request.plan))
        return pb.ReportReply(json=await guarded(context, work, hints=True))

    async def Reload(self, request: pb.ReloadRequest, context: Call) -> pb.ReloadReply:
        self._reload()
        return pb.ReloadReply()
