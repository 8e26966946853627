"""A small HTTP proxy in a thread: lets CONNECT through, refuses it, asks for a password, or opens the TLS itself."""

from __future__ import annotations

import base64
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

REASONS = {403: "Forbidden", 407: "Proxy Authentication Required", 502: "Bad Gateway"}


@dataclass
class ConnectProxy:
    """What it does, and what it was asked."""

    listener: socket.socket
    #: Answers every CONNECT with this status, if it is not 200.
    status: int = 200
    #: ``user:password`` that it asks for.
    password: str = ""
    #: Directory with ``tls.key`` and ``tls.crt`` of who opens the TLS; nobody does without.
    opens_as: Path | None = None
    #: Says this in the place of HTTP.
    babbles: bytes = b""
    #: ``host:port`` of each CONNECT that was let through.
    passed: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (more := client.recv(4096)):
                    return
                head += more
            if self.babbles:
                client.sendall(self.babbles)
                return
            lines = head.decode().split("\r\n")
            target, status = lines[0].split()[1], self._status(lines)
            if status != 200:
                client.sendall(f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Length: 0\r\n\r\n".encode())
                return
            self.passed.append(target)
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            if self.opens_as is not None:
                self._open_tls(client)
            else:
                host, _, port = target.rpartition(":")
                with socket.create_connection((host, int(port))) as server:
                    _relay(client, server)

    def _status(self, lines: list[str]) -> int:
        wanted = f"basic {base64.b64encode(self.password.encode()).decode()}".lower()
        given = [line.partition(":")[2].strip().lower() for line in lines if line.lower().startswith("proxy-auth")]
        return 407 if self.password and given != [wanted] else self.status

    def _open_tls(self, client: socket.socket) -> None:
        assert self.opens_as is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.opens_as / "tls.crt", self.opens_as / "tls.key")
        with context.wrap_socket(client, server_side=True) as opened:
            opened.recv(1)


def _relay(one: socket.socket, other: socket.socket) -> None:
    def copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    back = threading.Thread(target=copy, args=(other, one), daemon=True)
    back.start()
    copy(one, other)
    back.join()


@contextmanager
def running_proxy(**what: object) -> Iterator[ConnectProxy]:
    """A proxy that listens for as long as the context lasts."""
    with socket.create_server(("localhost", 0)) as listener:
        found = ConnectProxy(listener, **what)  # type: ignore[arg-type]
        threading.Thread(target=found.accept, daemon=True).start()
        yield found
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
