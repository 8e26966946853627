"""A reader of a status page without a browser."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def ask(port: int, path: str, *, method: str = "GET", headers: Mapping[str, str] | None = None) -> Answer:
    """One request and its whole answer."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        link.request(method, path, headers=dict(headers or {}))
        found = link.getresponse()
        return Answer(found.status, found.headers, found.read())
    finally:
        link.close()


def open_stream(port: int) -> http.client.HTTPResponse:
    """The stream of events; closing it closes the connection."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    link.request("GET", "/events", headers={"Connection": "close"})
    return link.getresponse()


def next_event(stream: http.client.HTTPResponse) -> dict[str, Any]:
    """The next change of the page."""
    while (line := stream.readline()) != b"event: page\n":
        if not line:
            raise EOFError("the stream has ended")
    found: dict[str, Any] = json.loads(stream.readline().removeprefix(b"data: "))
    assert stream.readline() == b"\n"
    return found


def first_event(stream: http.client.HTTPResponse) -> dict[str, Any]:
    """The first event, with the whole page."""
    assert stream.status == 200
    assert stream.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    return next_event(stream)
