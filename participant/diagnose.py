"""Why does the coordinator not answer? gRPC says UNAVAILABLE for every failure of a connection; this says which it was.

Nothing here is on the way of a message: it looks at the dates of the site's own certificate and makes one connection of
its own with the standard library's TLS, whose errors have names. It goes through the proxy that gRPC takes.
"""

from __future__ import annotations

import datetime
import socket
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from participant.enrol import AUTHORITY, TLS_CERTIFICATE, TLS_KEY
from participant.proxy import ProxyFault, Route
from privacy.errors import shown

#: Seconds for the connection, for the handshake, and for the first byte after it.
TIMEOUT_S = 5.0

#: OpenSSL's numbers (X509_V_ERR_...) of what is wrong with the coordinator's certificate.
NOT_YET, EXPIRED, WRONG_NAME = {9}, {10}, {62, 64}
#: TLS alerts by which a server says what is wrong with the client's certificate.
ALERTS = {
    "CERTIFICATE_EXPIRED": "it has expired there: compare the clocks of both machines",
    "UNKNOWN_CA": "it is of another authority than the coordinator's: ask for a certificate of this federation",
    "CERTIFICATE_REQUIRED": "it expects one and got none",
}
RENEW = "ask the coordinator's operator to issue another"


def explain(address: str, directory: Path) -> str | None:
    """One line that says why calls to the coordinator fail; ``None`` where nothing is wrong with the connection.

    Args:
        address: host:port, as in ``participant.toml``.
        directory: the site's directory, with its TLS key, its certificate and the federation's authority.
    """
    try:
        own = x509.load_pem_x509_certificate((directory / TLS_CERTIFICATE).read_bytes())
        authority = x509.load_pem_x509_certificate((directory / AUTHORITY).read_bytes())
    except (OSError, ValueError) as error:
        return f"expected the certificates of this site in PEM, found: {shown(str(error))}"
    if fault := _own_fault(own, authority, directory):
        return fault
    try:
        context = _context(directory)
    except (ssl.SSLError, OSError) as error:
        return f"{directory / TLS_KEY}: expected the key of {TLS_CERTIFICATE}, found: {_reason(error)}"
    return _connect(Route.to(address), context, authority)


def explain_joining(address: str, authority: bytes) -> str | None:
    """The same where a site has no certificate yet, only that of the authority (DER)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority)
    context.set_alpn_protocols(["h2"])
    return _connect(Route.to(address), context, x509.load_der_x509_certificate(authority))


def _own_fault(own: x509.Certificate, authority: x509.Certificate, directory: Path) -> str | None:
    now = datetime.datetime.now(datetime.UTC)
    for certificate, whose in ((own, "this site's certificate"), (authority, "the authority's certificate")):
        fault = _dates(certificate, now)
        if fault:
            return f"{whose} {fault}: {RENEW}"
    try:
        own.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        issuer = shown(own.issuer.rfc4514_string())
        return f"{directory / TLS_CERTIFICATE}: issued by {issuer}, not by the authority in {AUTHORITY}: {RENEW}"
    return None


def _dates(certificate: x509.Certificate, now: datetime.datetime) -> str | None:
    if certificate.not_valid_after_utc < now:
        return f"expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    if certificate.not_valid_before_utc > now:
        return f"is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC (is the clock right?)"
    return None


def _connect(route: Route, context: ssl.SSLContext, authority: x509.Certificate) -> str | None:
    address = route.address
    try:
        with route.open(TIMEOUT_S) as raw:
            return _handshake(context, raw, route, authority)
    except ProxyFault as error:
        return f"{address}: {error}"
    except TimeoutError:
        return f"{address}: no answer within {TIMEOUT_S:.0f} s: is a firewall in between, is the address right?"
    except ConnectionRefusedError:
        return f"{address}: connection refused: the coordinator is not running there"
    except socket.gaierror as error:
        return f"{address}: no such host: {error.strerror}"
    except OSError as error:
        return f"{address}: no connection: {error.strerror or error}"


def _context(directory: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(directory / AUTHORITY)
    context.load_cert_chain(directory / TLS_CERTIFICATE, directory / TLS_KEY)
    context.set_alpn_protocols(["h2"])
    return context


def _handshake(context: ssl.SSLContext, raw: socket.socket, route: Route, authority: x509.Certificate) -> str | None:
    address, via = route.address, route.via
    try:
        with context.wrap_socket(raw, server_hostname=route.host) as secure:
            # With TLS 1.3 the client is done before the server has looked at its certificate: a refusal, or the
            # server's first frame, comes with the first read.
            first = secure.recv(1)
    except ssl.SSLCertVerificationError as error:
        return _server_fault(error, route, authority)
    except TimeoutError:
        return f"{address}: something listens there and does not answer in TLS within {TIMEOUT_S:.0f} s{via}"
    except ssl.SSLError as error:
        alert = next((text for name, text in ALERTS.items() if name in (error.reason or "")), None)
        if alert:
            return f"{address}: the coordinator refuses this site's certificate: {alert}"
        return f"{address}: no TLS connection: {_reason(error)}{via}"
    except ConnectionError:
        first = b""
    if first:
        return None
    return f"{address}: the coordinator ended the connection after the handshake: it refuses this site's certificate"


def _reason(error: OSError) -> str:
    return (getattr(error, "reason", None) or error.strerror or str(error)).replace("_", " ").lower()


def _server_fault(error: ssl.SSLCertVerificationError, route: Route, authority: x509.Certificate) -> str:
    address, there = route.address, _certificate_at(route)
    if error.verify_code in WRONG_NAME:
        return (
            f"{address}: the coordinator's certificate is not for '{route.host}': use the name that it was issued for"
        )
    if error.verify_code in NOT_YET | EXPIRED:
        fault = _dates(there, datetime.datetime.now(datetime.UTC)) if there else None
        return f"{address}: the coordinator's certificate {fault or 'is out of date'}: its operator must renew it"
    return f"{address}: the coordinator's certificate is not of this federation's authority" + _stranger(
        error, route, there, authority
    )


def _stranger(
    error: ssl.SSLCertVerificationError, route: Route, there: x509.Certificate | None, authority: x509.Certificate
) -> str:
    """Who issued what is shown in the coordinator's place, and what that may mean."""
    if there is None:
        return f" ({error.verify_message}): this is another coordinator, or somebody in between"
    issuer, pinned = (shown(name.rfc4514_string()) for name in (there.issuer, authority.subject))
    same = " with another key" if issuer == pinned else ""
    issued = f"certificate issued by {issuer}{same} instead of the pinned authority {pinned}"
    if route.proxy is None:
        return f": {issued}: TLS is intercepted in between, or this is another coordinator"
    todo = f"ask for an exception for {route.address}, without inspection"
    return f": TLS is intercepted: {issued}, seen{route.via}: {todo}"


def _certificate_at(route: Route) -> x509.Certificate | None:
    """The certificate that is shown at the end of a route, believed by nobody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with route.open(TIMEOUT_S) as raw, context.wrap_socket(raw) as secure:
            found = secure.getpeercert(binary_form=True)
        return x509.load_der_x509_certificate(found) if found else None
    except (OSError, ValueError, ProxyFault):
        return None
