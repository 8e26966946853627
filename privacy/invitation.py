"""An invitation, which one site may use once, and what a site signs when it uses it.

An invitation carries the certificate of the federation's authority, so a site never speaks to anybody unverified; and
a secret of 32 random bytes, of which the coordinator keeps a hash only. A hash made slow is for passwords, which can
be guessed; 32 random bytes cannot.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime

from privacy.encoding import decode, digest, encode, label
from privacy.errors import ProtocolError, UserError

#: What every invitation begins with, so that people and programs know one by sight.
PREFIX = "veilsum-join-1-"
SECRET_BYTES, CHECKSUM_BYTES = 32, 8
#: Longest text that is looked at.
MAX_TOKEN = 16384


@dataclass(frozen=True)
class Invitation:
    """What the operator gives to the administrator of one site."""

    federation: str
    member: str
    expires: int  # seconds since 1970
    authority: bytes  # certificate, DER
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != SECRET_BYTES:
            raise ProtocolError(f"invitation: expected a secret of {SECRET_BYTES} bytes, found {len(self.secret)}")

    def token(self) -> str:
        """One line of text: prefix, then encoding and checksum in base64url."""
        body = encode(self)
        return PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")


def _checksum(body: bytes) -> bytes:
    return digest("invitation", body)[:CHECKSUM_BYTES]


def read_token(text: str) -> Invitation:
    """The invitation in a token.

    Raises:
        UserError: not a token, or one that was cut or mistyped.
    """
    hint = "copy the whole line that veilsum-coordinator invite printed"
    text = "".join(text.split())
    if not text.startswith(PREFIX):
        raise UserError(f"expected an invitation that begins with {PREFIX}, found something else", hint=hint)
    if len(text) > MAX_TOKEN:
        raise UserError(f"expected an invitation of at most {MAX_TOKEN} characters, found {len(text)}", hint=hint)
    coded = text.removeprefix(PREFIX)
    try:
        content = base64.b64decode(coded + "=" * (-len(coded) % 4), altchars=b"-_", validate=True)
        body, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
        if checksum != _checksum(body):
            raise ValueError
        return decode(Invitation, body)
    except (ValueError, binascii.Error, ProtocolError) as error:
        raise UserError("expected a whole invitation, found one that was cut or changed", hint=hint) from error


def secret_hash(secret: bytes) -> bytes:
    """What the coordinator keeps of an invitation's secret, 32 bytes."""
    return digest("join-secret", secret)


def proof_input(secret: bytes, member: str, request: bytes) -> bytes:
    """What a site signs with its identity key: it has the key, and this certificate request is its own."""
    return label("join", secret_hash(secret), member.encode(), hashlib.sha256(request).digest())


def roster_input(roster: bytes) -> bytes:
    """What the coordinator signs with its identity key when it offers the roster of this hash."""
    return label("roster-offer", roster)


def moment(seconds: float) -> str:
    """A time for people, UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
