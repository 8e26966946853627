"""The HTTP proxy that gRPC would take from the environment, and a connection through it for those who look why.

The rules are those of gRPC's own mapper (``http_proxy_mapper.cc``), not those of curl: names in lower case only, a
proxy by plain HTTP only, and ``no_proxy`` holds ends of host names and networks.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import socket
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from urllib.parse import unquote, urlsplit

from privacy.errors import shown
from privacy.exposition import split_address

#: The first that is set counts, even if it is empty: then there is no proxy.
VARIABLES, EXCEPTIONS = ("grpc_proxy", "https_proxy", "http_proxy"), ("no_grpc_proxy", "no_proxy")
#: gRPC's default where a proxy has no port.
DEFAULT_PORT = 443


class ProxyFault(Exception):
    """The proxy is why there is no connection; the text is one line for people, and says what to do."""


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy, and the variable that names it."""

    host: str
    port: int
    variable: str
    #: ``user:password``, percent-decoded; never shown.
    user: str = field(default="", repr=False)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{shown(host)}:{self.port} ({self.variable})"


def _first(names: tuple[str, ...], environ: Mapping[str, str]) -> tuple[str, str]:
    return next(((name, environ[name]) for name in names if name in environ), ("", ""))


def proxy_for(host: str, environ: Mapping[str, str] = os.environ) -> Proxy | None:
    """The proxy by which gRPC reaches a host; ``None``: it dials directly."""
    variable, url = _first(VARIABLES, environ)
    if not url or _unusable(url) or _is_excepted(host, _first(EXCEPTIONS, environ)[1]):
        return None
    found = urlsplit(url)
    userinfo, at, _ = found.netloc.rpartition("@")
    return Proxy(found.hostname or "", found.port or DEFAULT_PORT, variable, unquote(userinfo) if at else "")


def ignored(host: str, environ: Mapping[str, str] = os.environ) -> str:
    """What the environment says about a proxy that gRPC does not heed; empty where there is nothing of the kind."""
    variable, url = _first(VARIABLES, environ)
    if url and (fault := _unusable(url)):
        return f"{variable} is ignored: expected http://HOST:PORT, found {fault}; connections are made directly"
    upper = next((name.upper() for name in VARIABLES if environ.get(name.upper())), "")
    if not variable and upper and not _is_excepted(host, environ.get("NO_PROXY", "")):
        return f"{upper} is ignored: expected {upper.lower()} in lower case; connections are made directly"
    return ""


def _unusable(url: str) -> str:
    """What is wrong with a proxy's URL, without the password that may be in it; empty if it will do."""
    try:
        found = urlsplit(url)
        host, _ = found.hostname, found.port
    except ValueError:
        return "something else"
    if not found.scheme or not found.netloc:
        return "no such URL"
    if found.scheme != "http":
        return f"scheme '{shown(found.scheme)}'"
    return "" if host else "no host"


def _is_excepted(host: str, exceptions: str) -> bool:
    entries = [entry.strip() for entry in exceptions.split(",")]
    return any(entry and (host.lower().endswith(entry.lower()) or _in_network(host, entry)) for entry in entries)


def _in_network(host: str, network: str) -> bool:
    try:
        return "/" in network and ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False


@dataclass(frozen=True)
class Route:
    """How an address is reached: directly, or through a proxy."""

    address: str
    host: str
    port: int
    proxy: Proxy | None

    @classmethod
    def to(cls, address: str) -> Route:
        """The way that gRPC takes to ``host:port``."""
        host, port = split_address(address)
        return cls(address, host, port, proxy_for(host))

    @property
    def via(self) -> str:
        """For the end of a sentence: nothing, or through which proxy."""
        return f" through the proxy {self.proxy}" if self.proxy else ""

    def open(self, timeout: float) -> socket.socket:
        """A connection that TLS may begin on.

        Raises:
            ProxyFault: the proxy is not there or does not let this through. OSError: as a direct connection fails.
        """
        if self.proxy is None:
            return socket.create_connection((self.host, self.port), timeout)
        opened = _dial(self.proxy, timeout)
        try:
            self._connect(self.proxy, opened)
        except BaseException:
            opened.close()
            raise
        return opened

    def _connect(self, proxy: Proxy, opened: socket.socket) -> None:
        lines = [f"CONNECT {self.address} HTTP/1.1", f"Host: {self.address}"]
        if proxy.user:
            lines.append(f"Proxy-Authorization: Basic {base64.b64encode(proxy.user.encode()).decode()}")
        try:
            opened.sendall("\r\n".join([*lines, "", ""]).encode())
            with closing(HTTPResponse(opened, method="CONNECT")) as reply:
                reply.begin()
        except TimeoutError as error:
            raise ProxyFault(f"proxy {proxy}: it does not answer CONNECT {self.address}: {_ASK}") from error
        except (HTTPException, OSError) as error:
            raise ProxyFault(
                f"proxy {proxy}: expected an HTTP proxy there, found something else: {_CORRECT}"
            ) from error
        if not 200 <= reply.status < 300:
            raise ProxyFault(self._refusal(proxy, reply.status, shown(reply.reason)))

    def _refusal(self, proxy: Proxy, status: int, reason: str) -> str:
        found = f"{status} {reason}".strip()
        if status == 407 and proxy.user:
            return f"proxy refused: {found}: {proxy} does not take the user and password in {proxy.variable}"
        if status == 407:
            return (
                f"proxy refused: {found}: {proxy} asks who you are: put it into {proxy.variable}, "
                "as http://USER:PASSWORD@HOST:PORT"
            )
        if status in (502, 503, 504):
            return (
                f"proxy {proxy}: {found}: it does not reach {self.address}: is the address right, is the coordinator "
                "running, does the proxy resolve its name?"
            )
        return f"proxy refused: {found}: ask who runs {proxy} to allow CONNECT to {self.address}"


_CORRECT = "correct that variable, or name the coordinator's host in no_proxy"
_ASK = "ask who runs it, or name the coordinator's host in no_proxy"


def _dial(proxy: Proxy, timeout: float) -> socket.socket:
    try:
        return socket.create_connection((proxy.host, proxy.port), timeout)
    except TimeoutError as error:
        raise ProxyFault(f"proxy {proxy}: no answer within {timeout:.0f} s: {_CORRECT}") from error
    except ConnectionRefusedError as error:
        raise ProxyFault(f"proxy {proxy}: connection refused: no proxy is running there: {_CORRECT}") from error
    except socket.gaierror as error:
        raise ProxyFault(f"proxy {proxy}: its name does not resolve: {error.strerror}: {_CORRECT}") from error
    except OSError as error:
        raise ProxyFault(f"proxy {proxy}: no connection: {error.strerror or error}: {_CORRECT}") from error
