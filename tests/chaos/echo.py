"""Requests of a site, repeated and in another order: a second client with the site's certificate, as a network that
delivers twice and late, or an administrator who started a copy of the daemon, would be.

The uploads it repeats are signed again with the site's own key: Ed25519 gives the same signature, so the bytes are
those that the site sends.
"""

from __future__ import annotations

import contextlib
import random
import threading

import grpc

from participant.enrol import AUTHORITY, TLS_CERTIFICATE, TLS_KEY
from participant.records import Spent
from privacy.identity import load_identity
from privacy.plan import Plan
from privacy.secagg.dialogue import FromMember
from privacy.secagg.messages import MaskedInput, Shares
from privacy.secagg.signed import Signed, sign
from privacy.wire import federation_pb2 as pb
from privacy.wire.convert import to_wire
from privacy.wire.federation_pb2_grpc import FederationStub
from privacy.wire.transport import CLIENT_OPTIONS, PUT_CHUNK, chunk_bytes, put_chunk
from tests.chaos.disk import messages, records
from tests.chaos.world import World

TIMEOUT_S = 10.0
#: Messages of a burst; an accepted one is answered as a repeat, any other is refused, and neither changes anything.
BURST = 8


class Echo(threading.Thread):
    """Repeats what one site said, until stopped."""

    def __init__(self, world: World, name: str, plan: Plan, seed: int) -> None:
        super().__init__(daemon=True)
        self._world, self._plan, self._bits = world, plan.name, plan.round.bits
        self._rng = random.Random(seed)
        self._stopped = threading.Event()
        self._told: set[str] = set()
        site = world.federation.site(name)
        credentials = grpc.ssl_channel_credentials(
            *((site / file).read_bytes() for file in (AUTHORITY, TLS_KEY, TLS_CERTIFICATE))
        )
        options = (*CLIENT_OPTIONS, ("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 500))
        self._channel = grpc.secure_channel(f"localhost:{world.port}", credentials, options)
        self._stub = FederationStub(self._channel)
        self._chunk: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(PUT_CHUNK)
        self._site = site
        self._me = world.shape.names.index(name)
        self._identity = load_identity(site)

    def run(self) -> None:
        while not self._stopped.wait(self._rng.uniform(0.2, 0.8)):
            self._repeat_messages()
            self._repeat_upload()

    def stop(self) -> None:
        self._stopped.set()
        self.join(TIMEOUT_S * 2)
        self._channel.close()

    def _repeat_messages(self) -> None:
        """The last messages of this site, of this round and those before, shuffled, some of them twice."""
        database = self._world.federation.coordinator / "state.db"
        mine = [(r, m) for r, m in messages(database) if sender_of(m) == self._me and not is_input(m)][-BURST:]
        again = mine + self._rng.sample(mine, len(mine) // 2)
        self._rng.shuffle(again)
        answered = 0
        for round_id, message in again:
            request = pb.SendRequest(round=round_id, message=to_wire(message, FromMember))
            answered += self._try(lambda: self._stub.Send(request, timeout=TIMEOUT_S))  # noqa: B023
        if answered:
            self._count("messages of a site repeated, in another order")

    def _repeat_upload(self) -> None:
        """The chunks of this site's newest spool, shuffled, some twice; before, while or after it uploads itself."""
        spent = [r for r in records(self._site) if isinstance(r, Spent) and r.plan == self._plan]
        if not spent:
            return
        header = spent[-1].header
        spool = self._site / "work" / spent[-1].plan / f"stage-{header.stage}" / f"spool-{header.round}.bin"
        try:
            packed = spool.read_bytes()
        except FileNotFoundError:
            return
        body = MaskedInput(spent[-1].t2, spent[-1].root, len(packed))
        message = sign(self._identity, self._me, body, header.hash())
        request = pb.UploadRequest(round=header.hash(), input=to_wire(message, Signed[MaskedInput]))
        if not self._try(lambda: self._stub.BeginUpload(request, timeout=TIMEOUT_S)):
            return
        size = chunk_bytes(self._bits)
        offsets = list(range(0, len(packed), size))
        again = offsets + self._rng.sample(offsets, len(offsets) // 2)
        self._rng.shuffle(again)
        taken = 0
        for offset in again:
            chunk = put_chunk(header.hash(), offset, packed[offset : offset + size])
            taken += self._try(lambda: self._chunk(chunk, timeout=TIMEOUT_S))  # noqa: B023
        taken += self._try(lambda: self._stub.FinishUpload(request, timeout=TIMEOUT_S))
        if taken:
            self._count("upload of a site repeated, in another order")

    def _count(self, kind: str) -> None:
        """Once for each plan, however often."""
        if kind not in self._told:
            self._told.add(kind)
            self._world.count(kind)

    def _try(self, call: object) -> bool:
        """Was the request taken? A refusal is an answer too; no answer at all is none."""
        with contextlib.suppress(grpc.RpcError):
            call()  # type: ignore[operator]
            return True
        return False


def is_input(message: FromMember) -> bool:
    return not isinstance(message, Shares) and isinstance(message.body, MaskedInput)


def sender_of(message: FromMember) -> int:
    return message.root.sender if isinstance(message, Shares) else message.sender
