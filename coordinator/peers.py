"""What a connection's client certificate says: the member's name, and until when it may be used.

TLS checks the dates once, in the handshake; a connection may live for weeks after it. So every call looks at them.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from functools import lru_cache

from cryptography import x509

#: What gRPC knows of the other end of a connection: name of a property -> its values.
AuthContext = Mapping[str, Iterable[bytes]]


def _first(auth: AuthContext, name: str) -> bytes:
    return next(iter(auth.get(name, ())), b"")


def common_name(auth: AuthContext) -> str:
    """The name that the authority put into the certificate; empty without a certificate or for a name not in UTF-8."""
    return _first(auth, "x509_common_name").decode("utf-8", errors="ignore")


@lru_cache(maxsize=4096)
def _valid_until(pem: bytes) -> datetime.datetime:
    """End of validity, UTC; one parse for every certificate, not for every call."""
    return x509.load_pem_x509_certificate(pem).not_valid_after_utc


def expired_on(auth: AuthContext, now: datetime.datetime) -> datetime.datetime | None:
    """When the certificate of this connection expired; ``None`` while it is valid."""
    pem = _first(auth, "x509_pem_cert")
    if not pem:
        return None
    until = _valid_until(pem)
    return until if until < now else None


@lru_cache(maxsize=4096)
def _valid_from(pem: bytes) -> datetime.datetime:
    return x509.load_pem_x509_certificate(pem).not_valid_before_utc


def issued_before(auth: AuthContext, moment: float, leeway: datetime.timedelta) -> bool:
    """Was the certificate of this connection issued before a moment (seconds since 1970)?

    Args:
        leeway: by how much the authority dates certificates back.
    """
    pem = _first(auth, "x509_pem_cert")
    return bool(pem) and (_valid_from(pem) + leeway).timestamp() < int(moment)
