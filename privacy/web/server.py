"""Serves a status page from a thread and a loop of its own, so that no reader of it holds up the daemon."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
import uvicorn
from cryptography import x509

from privacy.errors import UserError
from privacy.files import read_file, read_private
from privacy.web.guard import Guard
from privacy.web.page import Page
from privacy.web.settings import Web

log = structlog.get_logger()

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
#: Connections at the same time; more are turned away.
MOST_CONNECTIONS = 64
#: Seconds for open answers when the daemon stops, and how long its stop waits for the page at most.
GRACE_S, STOP_S = 2, 5.0
LEAST_PASSWORD, MOST_PASSWORD = 16, 1024

Tls = tuple[Path, Path]


def read_password(path: Path) -> bytes:
    """The password of a page.

    Raises:
        UserError: missing, open to other accounts, too short or too long.
    """
    hint = f"write {LEAST_PASSWORD} characters or more into it, mode 0600"
    password = read_private(path, "the password of the status page", hint).rstrip(b"\r\n")
    found = len(password.decode("utf-8", "replace"))
    if not LEAST_PASSWORD <= found <= MOST_PASSWORD:
        raise UserError(
            f"{path}: expected a password of {LEAST_PASSWORD} to {MOST_PASSWORD} characters, found {found}", hint=hint
        )
    return password


def hosts_of(web: Web, tls: Tls | None) -> set[str]:
    """Names by which a browser may ask for the page: of this machine, of the certificate, and the address itself."""
    if tls is None:
        return {*LOCAL_NAMES, web.host}
    raw = read_file(tls[0], "the TLS certificate of the status page")
    try:
        names = x509.load_pem_x509_certificate(raw).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (ValueError, x509.ExtensionNotFound) as error:
        raise UserError(f"{tls[0]}: expected a certificate with names, found: {error}") from error
    found = names.value.get_values_for_type(x509.DNSName)
    found += [str(address) for address in names.value.get_values_for_type(x509.IPAddress)]
    return {*LOCAL_NAMES, *(name.lower() for name in found), web.host.lower()}


def tls_of(web: Web, directory: Path, own: Tls | None) -> Tls | None:
    """Certificate and key for the page; ``None`` where it is plain HTTP, on the loopback interface only.

    Raises:
        UserError: others can reach the address and there is no certificate to serve it with.
    """
    files = (directory / web.certificate_file, directory / web.key_file) if web.certificate_file else own
    if web.is_local and not web.certificate_file:
        return None
    if files is None:
        raise UserError(
            f"web.listen: expected certificate_file and key_file for {web.host}, found none: the password would cross "
            "the network in the clear",
            hint="name a server certificate and its key under [web], or listen on 127.0.0.1",
        )
    read_private(files[1], "the TLS key of the status page", "name it under [web] as key_file")
    return files


def bind(web: Web) -> socket.socket:
    """The socket of the page; raises UserError where the address is taken or not ours."""
    try:
        family = socket.AF_INET6 if _is_v6(web.host) else socket.AF_INET
        return socket.create_server((web.host, web.port), family=family)
    except OSError as error:
        raise UserError(
            f"expected to serve the status page at {web.listen}, found: {error.strerror or error}",
            hint="choose another address for 'listen' under [web], or leave it empty",
        ) from error


def _is_v6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def _server(web: Web, page: Page, directory: Path, own: Tls | None) -> uvicorn.Server:
    tls = tls_of(web, directory, own)
    password = read_password(directory / web.password_file) if web.password_file else None
    config = uvicorn.Config(
        Guard(page.app, hosts_of(web, tls), password),
        **({"ssl_certfile": str(tls[0]), "ssl_keyfile": str(tls[1])} if tls else {}),  # type: ignore[arg-type]
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=GRACE_S,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise UserError(
            f"{tls[0] if tls else web.listen}: expected a certificate and its key, found: {error}"
        ) from error
    return uvicorn.Server(config)


@contextmanager
def serving(web: Web, page: Page, directory: Path, own: Tls | None = None) -> Iterator[int]:
    """Serve a page while the context lasts; yields its port.

    Args:
        directory: of the daemon; files of the settings are relative to it.
        own: the daemon's certificate and key for servers, if it has them.

    Raises:
        UserError: the address is taken, or what it takes to be reached by others is missing.
    """
    server = _server(web, page, directory, own)
    bound = bind(web)
    port: int = bound.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([bound],), name="status-page", daemon=True)
    thread.start()
    log.info("status page", address=f"{web.host}:{port}", tls=server.config.is_ssl, login=bool(web.password_file))
    try:
        yield port
    finally:
        page.feed.stopping = True
        server.should_exit = True
        thread.join(STOP_S)
        page.feed.close()
        bound.close()
