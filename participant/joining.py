"""The site's end of joining: an invitation becomes keys, a certificate and a file to fill in. Private keys stay here.

Everything is on disk before it is sent, so a join that was cut short is run again with the same invitation: the same
keys get the same certificate.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from participant import enrol
from participant.client import TIMEOUT_S, answered
from participant.config import CONFIG_FILE, Settings
from participant.diagnose import explain, explain_joining
from privacy.errors import ProtocolError, UserError, shown
from privacy.files import exclusively, write_durably
from privacy.invitation import Invitation, moment, proof_input, read_token, roster_input
from privacy.roster import RosterFile, parse_roster
from privacy.secagg.keys import identity_public, verify_signature
from privacy.settings import parse_toml
from privacy.wire import joining_pb2 as pb
from privacy.wire.joining_pb2_grpc import JoiningStub, MembershipStub
from privacy.wire.transport import CLIENT_OPTIONS

CONFIG = """\
# This site in the federation {federation}. Every key: docs/configuration.md.
coordinator = {coordinator}
member = {member}

# Base models: the name in plans = a directory, a GGUF file, or "hub:OWNER/NAME@REVISION".
[models]
#"all-MiniLM-L6-v2" = "models/minilm"

# Data sets: the name in plans, and where the records lie. They never leave.
#[datasets.news]
#path = "news.jsonl"
#format = "jsonl"

# Of roster, plan and this table the strictest wins. Nothing runs here without consent.
[policy]
#plans = ["newsrooms"]
#max_colluders = 1
"""


@dataclass(frozen=True)
class Joined:
    """What a site knows once it is in."""

    member: str
    federation: str
    coordinator: str  # host:port
    identity: bytes
    authority: bytes  # certificate, DER


def read_address(url: str) -> str:
    """host:port of what an operator calls a URL.

    Raises:
        UserError: no host, no port, or something behind them.
    """
    address = url.strip().removeprefix("https://").rstrip("/")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or any(c in address for c in "/?# "):
        raise UserError(f"expected the address of a coordinator, host:port, found '{url}'")
    return address


def join(directory: Path, url: str, token: str, clock: Callable[[], float] = time.time) -> Joined:
    """Use an invitation. May be repeated until it has succeeded.

    Raises:
        UserError: not an invitation, an expired one, or this site has joined already. Refusal: the coordinator says no.
        ProtocolError: it answered with what nobody asked for. Unreachable: no answer.
    """
    address, invitation = read_address(url), read_token(token)
    if clock() >= invitation.expires:
        raise UserError(f"this invitation expired on {moment(invitation.expires)}", hint="ask the operator for another")
    if (directory / enrol.TLS_CERTIFICATE).exists():
        raise UserError(
            f"{directory}: expected a site that has not joined yet, found its certificate",
            hint="choose another directory with --dir; to go on here: veilsum-participant roster show",
        )
    identity = enrol.own_identity(directory)
    request = enrol.pending_request(directory, invitation.member)
    message = pb.JoinRequest(
        secret=invitation.secret,
        member=invitation.member,
        identity=identity_public(identity),
        request=request,
        proof=identity.sign(proof_input(invitation.secret, invitation.member, request)),
    )
    reply = _ask(address, invitation.authority, message)
    _install(directory, invitation, request, reply)
    known = invitation.member, shown(reply.federation), shown(reply.coordinator)
    return Joined(*known, identity_public(identity), invitation.authority)


def _pem(authority: bytes) -> bytes:
    try:
        return x509.load_der_x509_certificate(authority).public_bytes(Encoding.PEM)
    except ValueError as error:
        raise UserError("invitation: expected the certificate of an authority in it, found something else") from error


def _ask(address: str, authority: bytes, message: pb.JoinRequest) -> pb.JoinReply:
    credentials = grpc.ssl_channel_credentials(_pem(authority))
    with (
        grpc.secure_channel(address, credentials, CLIENT_OPTIONS) as channel,
        answered(address, lambda: explain_joining(address, authority)),
    ):
        reply: pb.JoinReply = JoiningStub(channel).Join(message, timeout=TIMEOUT_S)
        return reply


def _install(directory: Path, invitation: Invitation, request: bytes, reply: pb.JoinReply) -> None:
    """Check everything, then keep it; the certificate comes last and says that the site has joined."""
    authority = _pem(invitation.authority)
    enrol.check_certificate(reply.certificate, request, authority, invitation.member)
    values = {"federation": reply.federation, "coordinator": reply.coordinator, "member": invitation.member}
    text = CONFIG.format(**{key: json.dumps(value) for key, value in values.items()}).encode()
    try:
        parse_toml(Settings, text, CONFIG_FILE)
    except UserError as error:
        raise ProtocolError(f"the coordinator's answer makes no configuration: {error}") from error
    if not (directory / CONFIG_FILE).exists():
        write_durably(directory / CONFIG_FILE, text)
    enrol.install_certificates(directory, reply.certificate, authority)


class Membership:
    """A member's connection about membership: it needs a certificate, and no roster."""

    def __init__(self, directory: Path, address: str) -> None:
        self._directory, self._address = directory, address

    def _call(self, method: str, request: Any) -> Any:
        credentials = grpc.ssl_channel_credentials(*enrol.tls_files(self._directory))
        with (
            grpc.secure_channel(self._address, credentials, CLIENT_OPTIONS) as channel,
            answered(self._address, lambda: explain(self._address, self._directory)),
        ):
            return getattr(MembershipStub(channel), method)(request, timeout=TIMEOUT_S)

    def roster(self) -> RosterFile:
        """The roster in force, signed by the coordinator whose key is in it; approved by nobody here yet.

        Raises:
            Refusal: none is published, or this site is not in it. ProtocolError: not signed by that coordinator.
        """
        reply: pb.GetRosterReply = self._call("GetRoster", pb.GetRosterRequest())
        found = parse_roster(reply.toml, "the coordinator's roster")
        coordinator = bytes.fromhex(found.roster.coordinator)
        if not verify_signature(coordinator, reply.signature, roster_input(found.hash)):
            raise ProtocolError("the coordinator's signature over its roster does not verify")
        return found

    def renew(self, member: str) -> None:
        """Make another TLS key, get a certificate for it and put both in the place of the old ones.

        Raises:
            Refusal: this coordinator does not issue certificates for this site. ProtocolError: it sent another one.
        """
        with exclusively(self._directory / "renew.lock"):  # the daemon may be about to do the same
            authority, *_ = enrol.tls_files(self._directory)  # also ends a change before this one
            request = enrol.create_request(self._directory, member, enrol.NEXT_KEY)
            reply: pb.RenewReply = self._call("Renew", pb.RenewRequest(request=request))
            enrol.check_certificate(reply.certificate, request, authority, member)
            enrol.install_renewed(self._directory, reply.certificate)
