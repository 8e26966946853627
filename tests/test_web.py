"""The status page's server, guard and stream, over real HTTP, and the rules that hold for the pages of both sides."""

from __future__ import annotations

import base64
import http.client
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from coordinator.pki import AUTHORITY_CERTIFICATE, create_authority, issue_server
from privacy.errors import UserError
from privacy.settings import Section, parse_toml
from privacy.web import feed as feeds
from privacy.web.feed import MOST_STREAMS
from privacy.web.guard import HEADERS, host_of, password_in
from privacy.web.page import Page
from privacy.web.server import read_password, serving
from privacy.web.settings import Web
from privacy.web.view import Part, View
from tests.web.reading import ask, first_event, next_event, open_stream

ROOT = Path(__file__).resolve().parent.parent
PASSWORD = "correct horse battery"


class File(Section):
    """As the file of either daemon."""

    web: Web = Web()


def web(toml: str) -> Web:
    return parse_toml(File, f"[web]\n{toml}".encode(), "daemon.toml").web


class Source:
    """A daemon that shows a few texts, for a page without one."""

    def __init__(self) -> None:
        self.texts = {"one": "first", "two": "second"}
        self.said, self.looks = "all is well", 0
        self.before: Callable[[], None] = lambda: None

    def look(self) -> View:
        self.before()
        self.looks += 1
        data = {"name": "x", "reason": "", "unread": True}
        parts = tuple(Part(k, "plan.html", data | {"state": text}) for k, text in self.texts.items())
        return View("Title", "about", self.said, parts)


@pytest.fixture
def source() -> Source:
    return Source()


@contextmanager
def served(source: Source, toml: str = 'listen = "0"', directory: Path = Path(), **own: object) -> Iterator[int]:
    page = Page("coordinator.web", source.look)
    page.feed.every_s = 0.05
    with serving(web(toml), page, directory, **own) as port:  # type: ignore[arg-type]
        yield port


def password_file(directory: Path, text: str = PASSWORD, mode: int = 0o600) -> str:
    path = directory / "page.password"
    path.write_text(f"{text}\n")
    path.chmod(mode)
    return f'password_file = "{path.name}"'


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "host", "port"),
    [
        ('listen = "8080"', "127.0.0.1", 8080),
        ('listen = "localhost:1"', "127.0.0.1", 1),
        ('listen = "127.0.0.2:1"', "127.0.0.2", 1),
        ('listen = "[::1]:65535"', "::1", 65535),
    ],
)
def test_an_address_of_this_machine_needs_no_password(toml: str, host: str, port: int) -> None:
    found = web(toml)
    assert (found.host, found.port, found.is_local) == (host, port, True)


@pytest.mark.parametrize("listen", ["0.0.0.0:8080", "[::]:8080", "192.168.1.5:80", "status.example.org:443"])
def test_an_address_that_others_can_reach_demands_a_password(listen: str) -> None:
    with pytest.raises(UserError, match="expected a password_file, since others can reach"):
        web(f'listen = "{listen}"')
    assert not web(f'listen = "{listen}"\npassword_file = "p"').is_local


@pytest.mark.parametrize(
    ("toml", "reason"),
    [
        ('listen = "65536"', "a port of at most 65535"),
        ('listen = "localhost"', "listen"),
        ('listen = "1"\ncertificate_file = "a"', "certificate_file and key_file, or neither"),
        ('listen = "1"\npassword = "x"', "unknown key 'web.password'"),
    ],
)
def test_settings_that_cannot_be_are_refused(toml: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        web(toml)


def test_without_a_table_there_is_no_page() -> None:
    assert parse_toml(File, b"", "daemon.toml").web.listen == ""


@pytest.mark.parametrize("text", ["", "fifteen letters", "x" * 1025])
def test_a_short_or_an_endless_password_is_refused(tmp_path: Path, text: str) -> None:
    password_file(tmp_path, text)
    with pytest.raises(UserError, match="expected a password of 16 to 1024 characters, found") as caught:
        read_password(tmp_path / "page.password")
    assert not text or text not in str(caught.value)


def test_a_password_that_others_can_read_is_refused(tmp_path: Path) -> None:
    password_file(tmp_path, mode=0o640)
    with pytest.raises(UserError, match="expected mode 0600, found 0640"):
        read_password(tmp_path / "page.password")


def test_a_page_for_the_network_without_a_certificate_is_refused(source: Source, tmp_path: Path) -> None:
    toml = f'listen = "0.0.0.0:0"\n{password_file(tmp_path)}'
    with (
        pytest.raises(UserError, match="the password would cross the network in the clear"),
        served(source, toml, tmp_path),
    ):
        pass


def test_an_address_that_is_taken_is_one_line(source: Source) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=f"status page at {port}, found: Address already in use"),
            served(source, f'listen = "{port}"'),
        ):
            pass


# --- who is answered -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/static/status.css", "/static/status.js", "/static/icon.svg"])
def test_get_and_head_are_answered_with_all_headers(source: Source, path: str) -> None:
    with served(source) as port:
        got, head = ask(port, path), ask(port, path, method="HEAD")
        assert (got.status, head.status) == (200, 200)
        assert got.body
        assert not head.body
        for answer in (got, head):
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert "server" not in got.headers


def test_the_policy_allows_nothing_inline_and_nothing_from_elsewhere() -> None:
    policy = dict(rule.split(" ", 1) for rule in HEADERS["Content-Security-Policy"].split("; "))
    allowed = {"script-src", "style-src", "img-src", "connect-src"}
    assert {name for name, value in policy.items() if value == "'self'"} == allowed
    assert {value for name, value in policy.items() if name not in allowed} == {"'none'"}
    assert {"default-src", "frame-ancestors", "base-uri", "form-action"} <= set(policy)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_nothing_but_get_and_head_is_taken(source: Source, method: str) -> None:
    with served(source) as port:
        answer = ask(port, "/", method=method)
        assert answer.status == 405
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS


@pytest.mark.parametrize("host", ["evil.example:80", "127.0.0.1.evil.example", "", "localhost.", "[::1"])
def test_another_host_is_refused_even_with_the_right_address(source: Source, host: str) -> None:
    with served(source) as port:
        answer = ask(port, "/", headers={"Host": host})
        assert answer.status in (400, 421)
        assert b"Title" not in answer.body
        assert source.looks == 0


def test_two_host_headers_are_refused(source: Source) -> None:
    with served(source) as port, socket.create_connection(("127.0.0.1", port)) as link:
        link.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert re.match(rb"HTTP/1.1 4(00|21) ", link.recv(1024))
        assert source.looks == 0


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9000", "127.0.0.1:1", "[::1]:80"])
def test_this_machine_is_answered_by_any_of_its_names_and_through_a_tunnel(source: Source, host: str) -> None:
    with served(source) as port:
        assert ask(port, "/", headers={"Host": host}).status == 200


def test_names_in_a_host_header() -> None:
    assert [host_of(h) for h in ("A.b:1", "[::1]:2", "[fe80::1]", " x ", "")] == ["a.b", "::1", "fe80::1", "x", ""]


def basic(text: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}


@pytest.mark.parametrize("path", ["/", "/events", "/static/status.css", "/nothing"])
def test_with_a_password_nothing_is_shown_without_it(source: Source, tmp_path: Path, path: str) -> None:
    with served(source, f'listen = "0"\n{password_file(tmp_path)}', tmp_path) as port:
        answer = ask(port, path)
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"].startswith("Basic realm=")
        assert source.looks == 0


@pytest.mark.parametrize(
    "headers",
    [
        basic(f"me:{PASSWORD}x"),
        basic(f"me:{PASSWORD[:-1]}"),
        basic(PASSWORD),
        basic("me:"),
        {"Authorization": f"Bearer {PASSWORD}"},
        {"Authorization": "Basic !!!"},
        {"Authorization": ""},
    ],
)
def test_a_wrong_login_is_refused(source: Source, tmp_path: Path, headers: dict[str, str]) -> None:
    with served(source, f'listen = "0"\n{password_file(tmp_path)}', tmp_path) as port:
        assert ask(port, "/", headers=headers).status == 401
        assert source.looks == 0


def test_the_right_password_opens_the_page_under_any_name(source: Source, tmp_path: Path) -> None:
    with served(source, f'listen = "0"\n{password_file(tmp_path)}', tmp_path) as port:
        for user in ("operator", ""):
            assert ask(port, "/", headers=basic(f"{user}:{PASSWORD}")).status == 200


def test_passwords_may_have_colons_and_umlauts() -> None:
    assert password_in(basic("me:a:ü")["Authorization"]) == "a:ü".encode()


def test_for_the_network_the_page_is_tls_with_the_certificate_and_its_names(source: Source, tmp_path: Path) -> None:
    create_authority(tmp_path, "authority")
    issue_server(tmp_path, ["status.example.org", "127.0.0.1"])
    own = (tmp_path / "tls.crt", tmp_path / "tls.key")
    with served(source, f'listen = "0.0.0.0:0"\n{password_file(tmp_path)}', tmp_path, own=own) as port:
        context = ssl.create_default_context(cafile=str(tmp_path / AUTHORITY_CERTIFICATE))
        link = http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
        link.request("GET", "/", headers=basic(f"me:{PASSWORD}") | {"Host": "status.example.org"})
        assert link.getresponse().status == 200
        link = http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
        link.request("GET", "/", headers=basic(f"me:{PASSWORD}") | {"Host": "other.example.org"})
        assert link.getresponse().status == 421
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            with suppress(ConnectionResetError):
                assert b"200" not in plain.recv(100)


def test_a_key_that_is_not_of_the_certificate_is_one_line(source: Source, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        create_authority(tmp_path / name, name)
        issue_server(tmp_path / name, ["localhost"])
    own = (tmp_path / "a" / "tls.crt", tmp_path / "b" / "tls.key")
    toml = f'listen = "0.0.0.0:0"\n{password_file(tmp_path)}'
    with pytest.raises(UserError, match="expected a certificate and its key"), served(source, toml, tmp_path, own=own):
        pass


# --- what is answered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/static/../server.py", "/static/%2e%2e/server.py", "/static/x", "/x", "/static/"])
def test_there_is_nothing_else(source: Source, path: str) -> None:
    with served(source) as port:
        answer = ask(port, path)
        assert answer.status == 404
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS


def test_what_others_wrote_is_escaped_in_the_page_and_in_the_stream(source: Source) -> None:
    evil = "<script>alert('x')</script>"
    source.texts, source.said = {"one": evil}, evil
    with served(source) as port:
        assert b"<script>alert" not in ask(port, "/").body
        assert b"&lt;script&gt;alert" in ask(port, "/").body
        with open_stream(port) as stream:
            told = first_event(stream)
    assert "<script" not in told["parts"]["one"]
    assert told["said"] == evil  # set as text, never as HTML
    assert "said.textContent = told.said" in (ROOT / "privacy/web/static/status.js").read_text()


def test_a_stream_begins_with_everything_and_goes_on_with_what_changes(source: Source) -> None:
    with served(source) as port, open_stream(port) as stream:
        told = first_event(stream)
        assert (told["order"], set(told["parts"]), told["said"]) == (["one", "two"], {"one", "two"}, "all is well")
        source.texts["two"] = "other"
        told = next_event(stream)
        assert (told["order"], set(told["parts"])) == (["one", "two"], {"two"})
        del source.texts["one"]
        told = next_event(stream)
        assert (told["order"], told["parts"]) == (["two"], {})
        source.said = "news"
        told = next_event(stream)
        assert (told["said"], told["parts"]) == ("news", {})


def test_a_silent_stream_says_that_it_is_there(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "BEAT_S", 0.2)
    with served(source) as port, open_stream(port) as stream:
        first_event(stream)
        assert stream.readline() == b"event: beat\n"


def test_streams_are_counted_and_bounded_and_their_places_come_back(source: Source) -> None:
    with served(source) as port:
        streams = [open_stream(port) for _ in range(MOST_STREAMS)]
        for stream in streams:
            first_event(stream)
        answer = ask(port, "/events")
        assert (answer.status, answer.headers["Retry-After"]) == (503, "30")
        assert ask(port, "/").status == 200
        for stream in streams:
            stream.close()
        deadline = time.monotonic() + 20
        while ask(port, "/events", method="HEAD").status != 200 or not _is_open(port):
            assert time.monotonic() < deadline, "no place came back"
            time.sleep(0.1)


def _is_open(port: int) -> bool:
    with open_stream(port) as stream:
        return stream.status == 200


def test_streams_end_when_the_daemon_stops_and_the_port_is_free(source: Source) -> None:
    with served(source) as port:
        stream = open_stream(port)
        first_event(stream)
        began = time.monotonic()
    assert time.monotonic() - began < 4
    assert stream.read() == b""
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_however_many_look_the_daemon_is_asked_once(source: Source) -> None:
    page = Page("coordinator.web", source.look)
    page.feed.every_s = 60.0
    with serving(web('listen = "0"'), page, Path()) as port:
        for _ in range(5):
            ask(port, "/")
        with open_stream(port) as stream:
            first_event(stream)
    assert source.looks == 1


def test_a_daemon_that_is_busy_holds_up_nobody_but_who_asks_for_it(source: Source) -> None:
    lock = threading.Lock()

    def wait() -> None:
        with lock:
            pass

    source.before = wait
    with served(source) as port:
        with lock:
            waiting = threading.Thread(target=ask, args=(port, "/"))
            waiting.start()
            began = time.monotonic()
            assert ask(port, "/static/status.css").status == 200
            assert time.monotonic() - began < 3
            assert waiting.is_alive()
        waiting.join(10)
        assert source.looks == 1


def test_a_bug_in_the_view_is_an_answer_without_its_text(source: Source) -> None:
    def fail() -> None:
        raise RuntimeError("a secret path")

    source.before = fail
    with served(source) as port:
        answer = ask(port, "/")
        assert answer.status == 500
        assert b"secret" not in answer.body
        source.before = lambda: None
        assert ask(port, "/").status == 200


def test_an_event_is_one_line_of_json(source: Source) -> None:
    source.texts = {"one": "a\nb\r\ndata: c\n\nevent: x"}
    page = Page("coordinator.web", source.look)
    view = source.look()
    told = feeds.event(None, feeds.Rendered(view, page.render(view), 1.0))
    assert told is not None
    head, data, *rest = told.split(b"\n")
    assert (head, rest) == (b"event: page", [b"", b""])
    assert json.loads(data.removeprefix(b"data: "))["order"] == ["one"]
