"""The site's end of the wire: it dials out, says who it is by certificate, and takes nothing on trust.

What the other end says becomes messages (``privacy/wire/convert.py``) or an error; a coordinator that does not answer
is tried again, for ever, by the caller.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import grpc

from participant.counts import Counts
from participant.diagnose import explain
from participant.enrol import tls_files
from participant.pace import Pace
from privacy import PROTOCOL_VERSION, __version__
from privacy.console import Unreachable
from privacy.encoding import encode
from privacy.errors import ProtocolError, Refusal, UserError
from privacy.files import disk_errors
from privacy.receipt import is_receipt
from privacy.roster import RosterFile
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.messages import Evidence, MaskedInput
from privacy.secagg.signed import Signed
from privacy.wire import federation_pb2 as pb
from privacy.wire.convert import from_wire, to_wire
from privacy.wire.federation_pb2_grpc import FederationStub
from privacy.wire.transport import (
    CHUNK_HEADER,
    CHUNK_S,
    CLIENT_OPTIONS,
    PUT_CHUNK,
    WINDOW,
    chunk_bytes,
    put_chunk,
    read_chunk_reply,
)

#: A call that takes longer than this is tried again; long polls end before it.
TIMEOUT_S = 60.0
#: The fastest line that an upload fills, bytes a second; what is in flight beyond that waits at the coordinator.
LINE_BYTES_S = 125e6
#: Chunks that a near upload leaves out of its window: its connection costs the coordinator as much memory.
SPARE = 3
#: Pause between two looks at why there is no connection.
DIAGNOSE_S = 60.0


@dataclass(frozen=True)
class OfferedPlan:
    """A plan file as the coordinator offers it, and what became of it there."""

    toml: bytes
    state: str
    reason: str
    stage: int


@dataclass(frozen=True)
class ReleasedCohort:
    """One released round of a plan, not yet verified."""

    round_id: bytes
    stage: int
    evidence: Evidence


#: Packed bytes of a block, and its Merkle path.
Block = tuple[bytes, tuple[bytes, ...]]


def seen_hash(message: ToMember) -> bytes:
    """What a long poll says it has seen."""
    return hashlib.sha256(encode(message, ToMember)).digest()


@contextmanager
def answered(address: str, diagnosis: Callable[[], str | None]) -> Iterator[None]:
    """What gRPC says as one of our errors.

    Args:
        diagnosis: says why there is no connection, where it finds out.
    """
    try:
        yield
    except grpc.RpcError as error:
        code, text = error.code(), error.details() or ""
        if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE):
            raise ProtocolError(f"the coordinator refused: {text}") from error
        if code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.PERMISSION_DENIED):
            raise Refusal(f"the coordinator refused: {text}") from error
        if code == grpc.StatusCode.UNIMPLEMENTED:
            raise UserError(
                f"{address}: expected a coordinator of version {__version__}, found one without this call",
                hint="run the same version of veilsum at both ends",
            ) from error
        found = f"{code.name if code else 'none'}: {text}"
        if code == grpc.StatusCode.UNAVAILABLE:
            found = diagnosis() or found
        raise Unreachable(
            f"{address}: expected an answer, found {found}",
            hint="is the coordinator running, is the address right, are the certificates of this federation valid?",
        ) from error


class OtherRoster(Refusal):
    """The coordinator has another roster in force than the one that this site approved."""


class Client:
    """One connection to the coordinator."""

    def __init__(
        self,
        directory: Path,
        address: str,
        roster: RosterFile,
        me: int,
        counts: Counts | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._address, self._directory, self._roster, self._me = address, directory, roster, me
        self._counts, self._pace = counts or Counts(), pace or Pace(None)
        self._diagnosed = float("-inf")
        self._found: str | None = None
        #: Seconds of the quickest call so far: how far away the coordinator is.
        self._round_trip = TIMEOUT_S
        #: Counts what was acknowledged of uploads, so that somebody can see that it goes on.
        self.progress = 0
        #: The signed note of the ledger that goes with every message about a round; set by who knows the plan.
        self.checkpoint: Callable[[], bytes] = lambda: b""
        self._dial()

    def _dial(self) -> None:
        credentials = grpc.ssl_channel_credentials(*tls_files(self._directory))
        self._channel = grpc.secure_channel(self._address, credentials, CLIENT_OPTIONS)
        self._stub = FederationStub(self._channel)
        self._chunk: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(PUT_CHUNK)

    def close(self) -> None:
        self._channel.close()

    def redial(self) -> None:
        """Connect anew, with the certificate that is on disk now."""
        self.close()
        self._dial()

    def _errors(self) -> AbstractContextManager[None]:
        return answered(self._address, self._diagnosis)

    def _diagnosis(self) -> str | None:
        """Why there is no connection: gRPC does not say. Looked at once a minute."""
        if time.monotonic() - self._diagnosed >= DIAGNOSE_S:
            self._diagnosed, self._found = time.monotonic(), explain(self._address, self._directory)
        return self._found

    def _call(self, method: str, request: Any) -> Any:
        self._pace.take(request.ByteSize())
        began = time.monotonic()
        self._counts.moved(sent=request.ByteSize())
        with self._errors(), self._counts.call(method):
            reply = getattr(self._stub, method)(request, timeout=TIMEOUT_S)
        self._counts.moved(received=reply.ByteSize())
        self._round_trip = min(self._round_trip, time.monotonic() - began)
        return reply

    def hello(self) -> None:
        """Compare versions, roster and coordinator key.

        Raises:
            UserError: another protocol version. Refusal: another roster or coordinator than the pinned one.
        """
        request = pb.HelloRequest(protocol_version=PROTOCOL_VERSION, software=__version__, roster=self._roster.hash)
        reply: pb.HelloReply = self._call("Hello", request)
        if reply.protocol_version != PROTOCOL_VERSION:
            raise UserError(
                f"expected protocol version {PROTOCOL_VERSION} (veilsum {__version__}), found {reply.protocol_version} "
                f"(veilsum {reply.software}) at the coordinator",
                hint="run the same version of veilsum at both ends",
            )
        if reply.roster != self._roster.hash:
            raise OtherRoster(
                f"expected the pinned roster {self._roster.hash.hex()[:16]}…, "
                f"the coordinator uses {reply.roster.hex()[:16]}…: veilsum-participant roster show"
            )

    def plans(self) -> list[OfferedPlan]:
        """All plans the coordinator offers."""
        reply: pb.ListPlansReply = self._call("ListPlans", pb.ListPlansRequest())
        return [OfferedPlan(p.toml, p.state, p.reason, p.stage) for p in reply.plans]

    def ready(self, plan: bytes, stage: int) -> tuple[int, int]:
        """Say that this site's delta is trained; (members ready, members of the roster)."""
        request = pb.ReadyRequest(plan=plan, stage=stage, checkpoint=self.checkpoint())
        reply: pb.ReadyReply = self._call("Ready", request)
        return reply.ready, reply.expected

    def decline(self, plan: bytes, reason: str, *, waiting: bool) -> None:
        """Tell the operator why this site takes no part in a plan, or not yet."""
        self._call("Decline", pb.DeclineRequest(plan=plan, waiting=waiting, reason=reason))

    def next(self, plan: bytes, stage: int, seen: bytes) -> tuple[bytes, ToMember] | None:
        """(round id, message) once there is one other than ``seen``; ``None`` when nothing came for a while."""
        reply: pb.NextReply = self._call("Next", pb.NextRequest(plan=plan, stage=stage, seen=seen))
        if not reply.HasField("message"):
            return None
        message: ToMember = from_wire(reply.message, ToMember)
        return reply.round, message

    def send(self, round_id: bytes, message: FromMember) -> None:
        """One message of this member; repeating it is harmless."""
        request = pb.SendRequest(round=round_id, message=to_wire(message, FromMember), checkpoint=self.checkpoint())
        self._call("Send", request)

    def upload(self, round_id: bytes, message: Signed[MaskedInput], spool: Path, bits: int) -> None:
        """M5 with its vector: whatever is missing there goes, some chunks in flight; ends with a verified receipt.

        Raises:
            Unreachable: call again later, it goes on where it stopped. ProtocolError: refused, e.g. too late.
        """
        own = to_wire(message, Signed[MaskedInput])
        request = pb.UploadRequest(round=round_id, input=own, checkpoint=self.checkpoint())
        state: pb.UploadState = self._call("BeginUpload", request)
        self._counts.uploaded(message.body.length if state.finished else state.received, message.body.length)
        if not state.finished:
            self._send_chunks(round_id, spool, state, message.body.length, bits)
        receipt: pb.Receipt = self._call("FinishUpload", request)
        coordinator, body = bytes.fromhex(self._roster.roster.coordinator), message.body
        if not is_receipt(coordinator, receipt.signature, round_id, self._me, body.root, body.length):
            raise ProtocolError("the coordinator's receipt for the upload does not verify")
        self.redial()  # a connection that carried so much keeps buffers of megabytes at the coordinator

    def _send_chunks(self, round_id: bytes, spool: Path, state: pb.UploadState, length: int, bits: int) -> None:
        """All chunks from where the coordinator has them, as many in flight as it allows."""
        size, offset, window = chunk_bytes(bits), state.received, state.window
        if not 1 <= window <= WINDOW or (offset % size and offset != length):
            raise ProtocolError(f"BeginUpload: expected a window and whole chunks, found {window} and {offset} bytes")
        flying: deque[Any] = deque()
        acknowledged = offset
        with self._errors(), spool.open("rb") as file:
            file.seek(offset)
            while offset < length or flying:
                while offset < length and len(flying) < self._in_flight(window, size):
                    payload = file.read(size)
                    self._pace.take(CHUNK_HEADER + len(payload))
                    call = self._chunk.future(put_chunk(round_id, offset, payload), timeout=CHUNK_S)
                    flying.append(call)
                    self._counts.moved(sent=CHUNK_HEADER + len(payload))
                    offset += len(payload)
                window = read_chunk_reply(flying.popleft().result())
                self.progress += 1
                acknowledged = min(acknowledged + size, length)
                self._counts.uploaded(acknowledged, length)

    def _in_flight(self, window: int, size: int) -> int:
        """How much of its window an upload uses: what fills the line, and more only where there is room."""
        line = round(self._round_trip * LINE_BYTES_S / size)
        return min(window, max(1, line, window - SPARE))

    def releases(self, plan: bytes, stage: int) -> list[ReleasedCohort]:
        """The released rounds of a stage; once the next has begun, those that it starts from."""
        request = pb.ListReleasesRequest(plan=plan, stage=stage)
        reply: pb.ListReleasesReply = self._call("ListReleases", request)
        found = [ReleasedCohort(r.round, r.stage, from_wire(r.evidence, Evidence)) for r in reply.releases]
        return [cohort for cohort in found if cohort.stage == stage]

    def fetch_total(self, round_id: bytes, length: int, target: Path) -> None:
        """Download the packed total of a round, behind what ``target`` holds of it already; the caller verifies it.

        Raises:
            ProtocolError: the coordinator has a total of another length. DiskError: the disk is full.
        """
        with disk_errors(target), target.open("ab", buffering=0) as file:
            while file.tell() < length:
                request = pb.FetchTotalRequest(round=round_id, offset=file.tell())
                chunk: pb.TotalChunk = self._call("FetchTotal", request)
                if chunk.length != length or not 0 < len(chunk.data) <= length - file.tell():
                    raise ProtocolError(f"expected a total of {length} bytes, found {chunk.length}")
                file.write(chunk.data)
                self.progress += 1

    def fetch_blocks(self, round_id: bytes, wanted: Sequence[tuple[int, int]]) -> Iterator[Block]:
        """Blocks (member, block) of survivors' uploads, in that order, some in flight; the caller verifies them."""
        ahead, flying = iter(wanted), deque[Any]()
        with self._errors():
            for _ in wanted:
                for member, block in islice(ahead, WINDOW - len(flying)):
                    request = pb.FetchBlockRequest(round=round_id, member=member, block=block)
                    self._pace.take(request.ByteSize())
                    flying.append(self._stub.FetchBlock.future(request, timeout=TIMEOUT_S))
                reply: pb.UploadBlock = flying.popleft().result()
                self.progress += 1
                self._counts.moved(received=reply.ByteSize())
                yield reply.data, tuple(reply.path)
