"""A real coordinator over mutual TLS in this process, whose round is taking uploads, and clients that mean no good."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import structlog

from coordinator import config, daemon, metrics, phases
from coordinator.counts import Counts
from coordinator.pulse import Wellbeing
from participant.enrol import AUTHORITY, TLS_CERTIFICATE, TLS_KEY
from privacy.adapter import start_adapter, start_digest
from privacy.secagg.messages import MaskedInput
from privacy.secagg.signed import Signed
from privacy.sections import Adapter
from privacy.wire import federation_pb2 as pb
from privacy.wire.convert import to_wire
from privacy.wire.federation_pb2_grpc import FederationStub
from privacy.wire.transport import CLIENT_OPTIONS, PUT_CHUNK, SERVICE, chunk_bytes, put_chunk
from tests.on_disk import OnDisk
from tests.test_end_to_end import PLAN, toy_plan

#: A head that makes thirteen blocks of a vector, and one that makes two chunks of an upload.
HEAD, TWO_CHUNKS = 400_000, 200_000
ANSWER_S = 10.0


def large_plan(size: int = HEAD) -> bytes:
    """The plan of the other tests with a large head."""
    zero, modules = "0" * 64, {"encoder.query": (6, 8)}
    head: dict[str, tuple[int, ...]] = {"classifier.weight": (2, size)}
    adapter = Adapter(rank=2, alpha=4.0, seed=zero, digest=zero, modules=modules, head=head)
    digest = start_digest(start_adapter(adapter)).hex()
    return PLAN.format(zero=zero, digest=digest).replace("[2, 8]", f"[2, {size}]").encode()


class Log:
    """Every structured log line of this process, from all threads."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def __call__(self, _logger: object, method: str, event: Any) -> Any:
        self.lines.append({**event, "level": method})
        raise structlog.DropEvent

    def find(self, text: str, since: int = 0) -> list[dict[str, Any]]:
        """Lines that say ``text`` anywhere."""
        return [line for line in self.lines[since:] if text in " ".join(map(str, line.values()))]


@dataclass(frozen=True)
class Upload:
    """What a site would send as M5."""

    round_id: bytes
    message: Signed[MaskedInput]
    spool: Path

    @property
    def request(self) -> pb.UploadRequest:
        return pb.UploadRequest(round=self.round_id, input=to_wire(self.message, Signed[MaskedInput]))

    def chunks(self, bits: int = 24) -> list[bytes]:
        """The requests of all its chunks."""
        content, size = self.spool.read_bytes(), chunk_bytes(bits)
        return [put_chunk(self.round_id, at, content[at : at + size]) for at in range(0, len(content), size)]


@dataclass
class Hostile:
    """The coordinator, its sites, and what the sites are about to upload."""

    directory: Path
    settings: str = ""
    large: bool = True
    log: Log = field(default_factory=Log)
    uploads: dict[int, Upload] = field(default_factory=dict)
    clients: dict[Path, Caller] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.world = OnDisk(self.directory, plan=large_plan(TWO_CHUNKS) if self.large else toy_plan())
        path = self.world.federation.coordinator / config.CONFIG_FILE
        path.write_text(path.read_text() + self.settings)
        self.home = self.world.engine.home = config.load_home(self.world.federation.coordinator)
        self.address = f"localhost:{self.home.settings.listen.rpartition(':')[2]}"
        for member, site in self.world.daemons.items():
            site.client.upload = self._keeping(member)  # type: ignore[method-assign]
        self.world.ready()
        self.world.run(until=phases.Uploading)
        for member in range(self.world.n):
            if member not in self.uploads:
                self.world.tell(member)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.wellbeing, self.counts = Wellbeing(self.world.engine), Counts()
        metrics.register(self.counts, self.world.engine, self.wellbeing)
        self.rounds = daemon.Rounds(self.world.engine, self.wellbeing, self.counts)
        starting = daemon._start_members(self.home, self.world.engine.identity, self.rounds)
        self.server: grpc.aio.Server = self.on_loop(starting)

    def _keeping(self, member: int) -> Callable[..., None]:
        def upload(round_id: bytes, message: Signed[MaskedInput], spool: Path, _bits: int) -> None:
            self.uploads[member] = Upload(round_id, message, spool)

        return upload

    def on_loop(self, work: Any) -> Any:
        """Run a coroutine where the server runs."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def close(self) -> None:
        for client in self.clients.values():
            client.channel.close()
        self.on_loop(self.server.stop(0))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.world.engine.store.close()

    def caller(self, member: int) -> Caller:
        """A client with this member's real certificate."""
        return self.caller_from(self.world.federation.site(self.world.names[member]))

    def caller_from(self, site: Path, certificate: bool = True) -> Caller:
        """A client with the certificate that lies at a site, or with none."""
        if site not in self.clients:
            self.clients[site] = Caller(self.address, site, certificate=certificate)
        return self.clients[site]


class Caller:
    """A gRPC client without manners: it sends what it is told to."""

    def __init__(self, address: str, site: Path, *, certificate: bool = True) -> None:
        authority = (site / AUTHORITY).read_bytes()
        credentials = grpc.ssl_channel_credentials(authority)
        if certificate:
            pair = ((site / name).read_bytes() for name in (TLS_KEY, TLS_CERTIFICATE))
            credentials = grpc.ssl_channel_credentials(authority, *pair)
        options = [o for o in CLIENT_OPTIONS if o[0] != "grpc.max_send_message_length"]
        self.channel = grpc.secure_channel(address, credentials, [*options, ("grpc.max_send_message_length", -1)])
        self.stub = FederationStub(self.channel)
        self.chunk: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(PUT_CHUNK)

    def raw(self, method: str, request: bytes) -> bytes:
        """Any bytes as the request of any call."""
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(f"/{SERVICE}/{method}")
        return call(request, timeout=ANSWER_S)

    def upload(self, upload: Upload) -> pb.Receipt:
        """A correct upload."""
        state = self.stub.BeginUpload(upload.request, timeout=ANSWER_S)
        for chunk in [] if state.finished else upload.chunks():
            self.chunk(chunk, timeout=ANSWER_S)
        return self.stub.FinishUpload(upload.request, timeout=ANSWER_S)


# --- below gRPC: HTTP/2 by hand ----------------------------------------------------------------------------------


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One HTTP/2 frame (RFC 9113, section 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def headers(method: str) -> bytes:
    """The header block of a call: every field literal and never indexed (RFC 7541, section 6.2.3)."""
    fields = {
        ":method": "POST",
        ":scheme": "https",
        ":path": f"/{SERVICE}/{method}",
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    return b"".join(
        b"\x10" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )


class RawCaller:
    """A TLS connection on which HTTP/2 is spoken by hand, to begin calls and never end them."""

    def __init__(self, address: str, site: Path, *, hello: bool = True) -> None:
        """Connect; with ``hello``, greet as an HTTP/2 client does."""
        context = ssl.create_default_context(cafile=site / AUTHORITY)
        context.load_cert_chain(site / TLS_CERTIFICATE, site / TLS_KEY)
        context.set_alpn_protocols(["h2"])
        host, _, port = address.rpartition(":")
        self.socket = context.wrap_socket(socket.create_connection((host, int(port)), 5), server_hostname=host)
        if hello:
            self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(4, 1, 0, b""))
        self.stream = 1

    def begin(self, method: str, announced: int, sent: bytes) -> None:
        """Begin a call whose message is announced with a length, send a part of it, and stop."""
        block, prefix = headers(method), b"\0" + announced.to_bytes(4, "big")
        self.socket.sendall(frame(1, 4, self.stream, block) + frame(0, 0, self.stream, prefix + sent))
        self.stream += 2

    def close(self) -> None:
        self.socket.close()
