"""gRPC for who joins and who has joined: ``Joining`` on a port of its own, ``Membership`` on the members' port.

gRPC's TLS server either demands client certificates or never asks for one, so whoever has none yet needs another port.
All it offers is one call, which an invitation opens once.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
from typing import Any

import grpc
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from structlog.contextvars import bind_contextvars

from coordinator import pki
from coordinator.config import Home
from coordinator.gate import Gate, Quotas
from coordinator.members import Members
from coordinator.peers import common_name, expired_on
from coordinator.service import Call, guarded, shut_out
from privacy.errors import ProtocolError, Refusal, UserError
from privacy.files import DiskError
from privacy.invitation import SECRET_BYTES, proof_input, roster_input
from privacy.roster import load_roster
from privacy.secagg.keys import is_low_order, verify_signature
from privacy.wire import joining_pb2 as pb
from privacy.wire import joining_pb2_grpc
from privacy.wire.transport import SERVER_OPTIONS

log = structlog.get_logger()

#: Everybody who joins, together: calls in flight, calls a second in the long run, and how many may come at once.
IN_FLIGHT, RATE, BURST = 8, 2.0, 20.0
#: A request to join is below 2 KiB.
MAX_REQUEST = 16 << 10
#: Connections and calls that gRPC itself holds for the joining port.
MOST_CALLS = 32


def _certificate(home: Home, request: bytes, member: str) -> str:
    try:
        return pki.sign_request(home.directory, request, member).decode()
    except DiskError:
        raise
    except UserError as error:  # the caller's request is wrong, and asking again does not mend it
        raise ProtocolError(str(error)) from error


def admit(home: Home, members: Members, request: pb.JoinRequest) -> pb.JoinReply:
    """Let a site in that has an invitation and proves that it has its identity key.

    Raises:
        ProtocolError: a field of the wrong size, a key for which anybody can sign, no proof of possession, or not a
            certificate request.
        Refusal: the invitation is not good for this.
    """
    key = request.identity
    if len(request.secret) != SECRET_BYTES or len(key) != 32:
        raise ProtocolError(
            f"join: expected a secret and a key of 32 bytes, found {len(request.secret)} and {len(key)}"
        )
    if is_low_order(key):
        raise ProtocolError("join: expected an identity key of full order, anybody can sign for this one")
    if not verify_signature(key, request.proof, proof_input(request.secret, request.member, request.request)):
        raise ProtocolError("join: the signature of the identity key over this request does not verify")

    def issue() -> str:
        return _certificate(home, request.request, request.member)

    tls = hashlib.sha256(request.request).hexdigest()
    certificate = members.admit(request.secret, request.member, key.hex(), tls, issue)
    settings = home.settings
    return pb.JoinReply(certificate=certificate.encode(), coordinator=settings.address, federation=settings.federation)


class JoiningService(joining_pb2_grpc.JoiningServicer):
    """The one call of whoever has no certificate yet."""

    def __init__(self, home: Home, members: Members) -> None:
        self._home, self._members, self._lines = home, members, Quotas()

    async def Join(self, request: pb.JoinRequest, context: Call) -> pb.JoinReply:
        bind_contextvars(peer=context.peer())
        work = asyncio.to_thread(admit, self._home, self._members, request)
        reply = await guarded(context, work, lambda error: self._lines.shall_say(b"", type(error).__name__))
        log.info("joined", member=request.member)
        return reply


class MembershipService(joining_pb2_grpc.MembershipServicer):
    """What a member needs beside the rounds; it works before there is a roster."""

    def __init__(self, home: Home, members: Members, identity: Ed25519PrivateKey) -> None:
        self._home, self._members, self._identity = home, members, identity

    async def GetRoster(self, request: pb.GetRosterRequest, context: Call) -> pb.GetRosterReply:
        name = await self._caller(context)
        return await guarded(context, asyncio.to_thread(self._roster, name))

    def _roster(self, name: str) -> pb.GetRosterReply:
        if not self._home.roster.exists():
            raise Refusal("no roster is published yet: the operator does so once everybody has joined")
        found = load_roster(self._home.roster)
        found.roster.index(name)
        return pb.GetRosterReply(toml=found.raw, signature=self._identity.sign(roster_input(found.hash)))

    async def Renew(self, request: pb.RenewRequest, context: Call) -> pb.RenewReply:
        name = await self._caller(context)

        def issue() -> str:
            return _certificate(self._home, request.request, name)

        certificate = await guarded(context, asyncio.to_thread(self._members.renew, name, issue))
        log.info("certificate renewed")
        return pb.RenewReply(certificate=certificate.encode())

    async def _caller(self, context: Call) -> str:
        """The name in the certificate, unless that member was removed or the certificate is good no more."""
        auth = context.auth_context()
        name = common_name(auth)
        if (text := shut_out(self._members, auth, name)) is not None:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, text)
        if expired_on(auth, datetime.datetime.now(datetime.UTC)) is not None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, f"the certificate of '{name}' has expired")
        return name


def joining_server(home: Home, members: Members) -> grpc.aio.Server:
    """The server of the joining port, not yet bound to it."""
    quotas = Quotas(in_flight=IN_FLIGHT, rate=RATE, burst=BURST)
    limits: dict[str, Any] = {**dict(SERVER_OPTIONS), "grpc.max_receive_message_length": MAX_REQUEST}
    server = grpc.aio.server(
        interceptors=[Gate(quotas)], options=list(limits.items()), maximum_concurrent_rpcs=MOST_CALLS
    )
    joining_pb2_grpc.add_JoiningServicer_to_server(JoiningService(home, members), server)
    return server


def add_membership(server: grpc.aio.Server, service: MembershipService) -> None:
    """Register the members' calls that are about membership."""
    joining_pb2_grpc.add_MembershipServicer_to_server(service, server)
