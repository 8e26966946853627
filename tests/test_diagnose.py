"""Why a coordinator does not answer: each cause on a real gRPC server with mutual TLS, and the line that names it."""

from __future__ import annotations

import datetime
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from demo.federation import free_port
from participant import diagnose
from participant.diagnose import explain
from tests.certificates import certify, make_authority, make_server, make_site

YESTERDAY = f"{datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1):%Y-%m-%d}"


class World:
    """Two authorities, one site of the first, and servers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ours, self.theirs = make_authority(directory / "ours"), make_authority(directory / "theirs")
        self.site = make_site(directory / "north", self.ours, "north")
        self.stops: list[Callable[[], None]] = []

    def serve(self, authority: Path | None = None, hosts: Sequence[str] = ("localhost",), *, days: float = 30) -> str:
        """Start a server of an authority that asks for client certificates of the first; its address."""
        make_server(authority or self.ours, hosts, days=days)
        key, certificate = (((authority or self.ours) / name).read_bytes() for name in ("tls.key", "tls.crt"))
        asked = (self.ours / "ca.crt").read_bytes()
        return self.listen(grpc.ssl_server_credentials([(key, certificate)], asked, require_client_auth=True))

    def listen(self, credentials: grpc.ServerCredentials | None) -> str:
        """Start a server, without TLS where there are no credentials."""
        server = grpc.server(ThreadPoolExecutor(1))
        port = (
            server.add_secure_port("127.0.0.1:0", credentials)
            if credentials
            else server.add_insecure_port("127.0.0.1:0")
        )
        server.start()
        self.stops.append(lambda: void(server.stop(None)))
        return f"localhost:{port}"


def void(_: object) -> None: ...


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path)
    yield found
    for stop in found.stops:
        stop()


def test_nothing_is_wrong(world: World) -> None:
    assert explain(world.serve(), world.site) is None


def own_expired(world: World) -> str:
    certify(world.site, world.ours, "north", days=-1)
    return world.serve()


def own_of_another_authority(world: World) -> str:
    certify(world.site, world.theirs, "north")
    (world.site / "ca.crt").write_bytes((world.ours / "ca.crt").read_bytes())
    return world.serve()


def own_of_another_key(world: World) -> str:
    (world.site / "tls.key").write_bytes((make_site(world.directory / "x", world.ours, "x") / "tls.key").read_bytes())
    return world.serve()


def no_certificate(world: World) -> str:
    (world.site / "tls.crt").unlink()
    return world.serve()


def silent(world: World) -> str:
    listener = socket.create_server(("127.0.0.1", 0))
    world.stops.append(listener.close)
    return f"localhost:{listener.getsockname()[1]}"


CAUSES: dict[str, tuple[Callable[[World], str], str]] = {
    "the site's certificate expired": (own_expired, f"^this site's certificate expired on {YESTERDAY} .* UTC: ask"),
    "the site's certificate is of another authority": (
        own_of_another_authority,
        "tls.crt: issued by CN=theirs authority, not by the authority in ca.crt",
    ),
    "the site's key is another": (
        own_of_another_key,
        "tls.key: expected the key of tls.crt, found: key values mismatch",
    ),
    "the site has no certificate": (no_certificate, "expected the certificates of this site in PEM, found: .*No such"),
    "the coordinator's certificate expired": (
        lambda world: world.serve(days=-1),
        f"localhost:.*: the coordinator's certificate expired on {YESTERDAY} .* UTC: its operator must renew it",
    ),
    "the coordinator's certificate is of another authority": (
        lambda world: world.serve(world.theirs),
        "the coordinator's certificate is not of this federation's authority",
    ),
    "the coordinator's certificate has another name": (
        lambda world: world.serve(hosts=("elsewhere.example",)),
        "the coordinator's certificate is not for 'localhost'",
    ),
    "nobody listens": (lambda _: f"localhost:{free_port()}", "connection refused: the coordinator is not running"),
    "somebody listens and says nothing": (silent, "does not answer in TLS within 1 s"),
    "somebody listens without TLS": (lambda world: world.listen(None), "no TLS connection: wrong version number"),
    "no such host": (lambda _: "no-such-host.invalid:7443", "no-such-host.invalid:7443: no such host"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_cause_has_its_line(world: World, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnose, "TIMEOUT_S", 1.0)
    prepare, expected = CAUSES[cause]
    line = explain(prepare(world), world.site)
    assert line
    assert re.search(expected, line), line
    assert line.isprintable()


def test_a_certificate_that_only_the_coordinator_refuses(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TLS 1.3 the client is done before the server has looked at its certificate: it hears at the first read."""
    address = world.serve()
    certify(world.site, world.ours, "north", days=-1)
    monkeypatch.setattr(diagnose, "_own_fault", lambda *_: None)  # as where the clock here is behind
    assert "ended the connection after the handshake: it refuses this site's certificate" in str(
        explain(address, world.site)
    )


def test_dates(world: World) -> None:
    found = x509.load_pem_x509_certificate((world.site / "tls.crt").read_bytes())
    day = datetime.timedelta(days=1)
    assert diagnose._dates(found, found.not_valid_after_utc) is None
    assert diagnose._dates(found, found.not_valid_before_utc) is None
    assert "expired on" in str(diagnose._dates(found, found.not_valid_after_utc + day))
    assert "is not valid before" in str(diagnose._dates(found, found.not_valid_before_utc - day))
