"""Behind an HTTP proxy: calls, joining and the look for a cause go one way; what it does wrong has its line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from demo.federation import free_port
from participant import diagnose
from participant.diagnose import explain, explain_joining
from participant.joining import Membership, join
from participant.proxy import EXCEPTIONS, VARIABLES, Proxy, Route, ignored, proxy_for
from privacy.console import Unreachable
from privacy.invitation import Invitation
from tests.certificates import make_server
from tests.connect_proxy import ConnectProxy, running_proxy
from tests.test_diagnose import World

HOST = "coordinator.example.org"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name in (*VARIABLES, *EXCEPTIONS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(diagnose, "TIMEOUT_S", 2.0)
    found = World(tmp_path)
    yield found
    for stop in found.stops:
        stop()


# --- which proxy: the rules of gRPC ----------------------------------------------------------------------------------

CHOICES: dict[str, tuple[dict[str, str], str | None]] = {
    "none": ({}, None),
    "https_proxy": ({"https_proxy": "http://p:3128"}, "http://p:3128 (https_proxy)"),
    "http_proxy, if nothing else": ({"http_proxy": "http://p:1"}, "http://p:1 (http_proxy)"),
    "grpc_proxy comes first": ({"grpc_proxy": "http://g:1", "https_proxy": "http://p:1"}, "http://g:1 (grpc_proxy)"),
    "an empty one means none": ({"grpc_proxy": "", "https_proxy": "http://p:1"}, None),
    "without a port it is 443": ({"https_proxy": "http://p"}, "http://p:443 (https_proxy)"),
    "an address of IPv6": ({"https_proxy": "http://[::1]:8"}, "http://[::1]:8 (https_proxy)"),
    "a password is never shown": ({"https_proxy": "http://u:s%40crt@p:1"}, "http://p:1 (https_proxy)"),
    "by TLS it is ignored": ({"https_proxy": "https://p:1"}, None),
    "without a scheme it is ignored": ({"https_proxy": "p:1"}, None),
    "upper case is ignored": ({"HTTPS_PROXY": "http://p:1"}, None),
    "no_proxy": ({"https_proxy": "http://p:1", "no_proxy": "x.org, example.org"}, None),
    "no_proxy of others": ({"https_proxy": "http://p:1", "no_proxy": "example.com,"}, "http://p:1 (https_proxy)"),
    "no_grpc_proxy hides no_proxy": (
        {"https_proxy": "http://p:1", "no_grpc_proxy": "x", "no_proxy": HOST},
        "http://p:1 (https_proxy)",
    ),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_proxy_is_the_one_of_grpc(choice: str) -> None:
    environ, expected = CHOICES[choice]
    found = proxy_for(HOST, environ)
    assert (str(found) if found else None) == expected
    assert "crt" not in repr(found)


def test_a_network_in_no_proxy() -> None:
    environ = {"https_proxy": "http://p:1", "no_proxy": "10.0.0.0/8"}
    assert proxy_for("10.1.2.3", environ) is None
    assert proxy_for("11.1.2.3", environ) is not None


def test_the_user_is_decoded() -> None:
    assert proxy_for(HOST, {"https_proxy": "http://u:s%40crt@p:1"}) == Proxy("p", 1, "https_proxy", "u:s@crt")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            {"https_proxy": "https://u:pw@p:1"},
            "https_proxy is ignored: expected http://HOST:PORT, found scheme 'https'",
        ),
        ({"https_proxy": "p:1"}, "found no such URL"),
        ({"https_proxy": "http://p:x"}, "found something else"),
        ({"HTTPS_PROXY": "http://p:1"}, "HTTPS_PROXY is ignored: expected https_proxy in lower case"),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": HOST}, "^$"),
        ({"https_proxy": "http://p:1", "HTTPS_PROXY": "http://p:1"}, "^$"),
        ({}, "^$"),
    ],
)
def test_what_is_ignored_is_told(environ: dict[str, str], expected: str) -> None:
    found = ignored(HOST, environ)
    assert re.search(expected, found), found
    assert "pw" not in found


# --- one way for everybody -------------------------------------------------------------------------------------------


def ask_for_a_roster(world: World, address: str) -> str:
    """What a real call says; the server behind knows no such method."""
    with pytest.raises(Exception, match="localhost") as caught:
        Membership(world.site, address).roster()
    return str(caught.value)


def test_calls_and_diagnosis_go_through_the_proxy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    address = world.serve()
    with running_proxy() as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        assert "without this call" in ask_for_a_roster(world, address)
        calls = len(proxy.passed)
        assert calls >= 1, "gRPC went through the proxy"
        assert explain(address, world.site) is None
        assert len(proxy.passed) == calls + 1, "so did the diagnosis"
        assert set(proxy.passed) == {address}
        monkeypatch.setenv("no_proxy", "localhost")
        assert explain(address, world.site) is None
        assert "without this call" in ask_for_a_roster(world, address)
        assert len(proxy.passed) == calls + 1, "and neither does with no_proxy"


def test_a_name_that_only_the_proxy_resolves(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    address = world.serve(hosts=("only-there.invalid",))
    with running_proxy() as proxy, monkeypatch.context() as patch:
        patch.setenv("https_proxy", proxy.url)
        found = explain(address.replace("localhost", "only-there.invalid"), world.site)
    assert found is not None
    assert "no such host" not in found, "the site did not look it up itself"


def test_joining_goes_through_the_proxy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    make_server(world.ours, ("localhost",))
    key, certificate = ((world.ours / name).read_bytes() for name in ("tls.key", "tls.crt"))
    address = world.listen(grpc.ssl_server_credentials([(key, certificate)]))
    token = Invitation("toy", "south", 1 << 32, der(world.ours / "ca.crt"), bytes(32)).token()
    with running_proxy() as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        with pytest.raises(Exception, match="without this call"):
            join(world.directory / "south", address, token)
        assert proxy.passed == [address]
        proxy.status = 403
        with pytest.raises(Unreachable, match="proxy refused: 403 Forbidden: ask who runs"):
            join(world.directory / "south", address, token)


def test_a_password_is_sent_and_asked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    address = world.serve()
    with running_proxy(password="u:s@crt") as proxy:
        monkeypatch.setenv("https_proxy", f"http://u:s%40crt@localhost:{proxy.port}")
        assert explain(address, world.site) is None
        assert "without this call" in ask_for_a_roster(world, address), "gRPC sends the same"
        monkeypatch.setenv("https_proxy", f"http://u:wrong@localhost:{proxy.port}")
        found = explain(address, world.site)
        assert found is not None
        assert "407 Proxy Authentication Required" in found
        assert "does not take the user and password in https_proxy" in found
        assert "wrong" not in found


# --- what the proxy does wrong ---------------------------------------------------------------------------------------


def dead(_: ConnectProxy) -> str:
    return f"http://localhost:{free_port()}"


FAULTS: dict[str, tuple[dict[str, object], str, str]] = {
    "it asks who we are": ({"status": 407}, "", "proxy refused: 407 .*: put it into https_proxy, as http://USER:PASS"),
    "it does not allow it": (
        {"status": 403},
        "",
        "proxy refused: 403 Forbidden: ask who runs .* to allow CONNECT to l",
    ),
    "it does not reach the coordinator": (
        {"status": 502},
        "",
        "proxy .*: 502 Bad Gateway: it does not reach localhost",
    ),
    "it is none": ({"babbles": b"SSH-2.0-x\r\n"}, "", "expected an HTTP proxy there, found something else"),
    "nobody listens": ({}, "dead", "connection refused: no proxy is running there: correct that variable"),
    "its name does not resolve": (
        {},
        "http://no-such-proxy.invalid:3128",
        r"proxy http://no-such-proxy.invalid:3128 \(https_proxy\): its name does not resolve: .*: correct",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_proxy_has_its_line(world: World, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    what, url, expected = FAULTS[fault]
    address = world.serve()
    with running_proxy(**what) as proxy:
        monkeypatch.setenv("https_proxy", dead(proxy) if url == "dead" else url or proxy.url)
        found = explain(address, world.site)
    assert found is not None
    assert re.search(expected, found), found
    assert found.isprintable()


def test_a_proxy_that_opens_tls_is_named_with_its_issuer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    make_server(world.theirs, ("localhost",))
    address = world.serve()
    with running_proxy(opens_as=world.theirs) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        for found in (
            explain(address, world.site),
            explain_joining(address, der(world.ours / "ca.crt")),
        ):
            assert found is not None
            assert "TLS is intercepted: certificate issued by CN=theirs authority" in found
            assert "instead of the pinned authority CN=ours authority" in found
            assert f"through the proxy {Route.to(address).proxy}" in found
            assert f"ask for an exception for {address}" in found


def der(path: Path) -> bytes:
    return x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(Encoding.DER)
