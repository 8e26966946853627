"""Who may read the status page, and what every answer says to the browser; around everything that is served.

A page of another origin can make a browser ask here, by a name of its own that leads to this machine (DNS rebinding):
only requests that name this machine as their host are answered. Nothing here can be changed by a request, so none but
GET and HEAD is taken.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LOGIN = {"WWW-Authenticate": 'Basic realm="veilsum status", charset="UTF-8"'}
#: Seconds that a wrong password costs whoever tries.
WRONG_S = 0.5


def host_of(value: str) -> str:
    """The name in a Host header, without its port."""
    name = value.strip().lower()
    if name.startswith("["):
        inside, closed, _ = name[1:].partition("]")
        return inside if closed else ""
    return name.partition(":")[0]


def password_in(authorization: str) -> bytes | None:
    """The password in an Authorization header; the user's name does not matter."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        _, colon, password = base64.b64decode(value.strip(), validate=True).partition(b":")
    except binascii.Error:
        return None
    return password if colon else None


class Guard:
    """Refuses what is not for this page, and adds the headers to whatever is answered."""

    def __init__(self, app: ASGIApp, hosts: Collection[str], password: bytes | None) -> None:
        self._app, self._hosts = app, frozenset(hosts)
        self._expected = None if password is None else hashlib.sha256(password).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"expected HTTP, found {scope['type']}")

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        app = await self._refusal(scope) or self._app
        await app(scope, receive, with_headers)

    async def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        found = headers.getlist("host")
        if len(found) != 1 or host_of(found[0]) not in self._hosts:
            return PlainTextResponse("expected the name of this machine as the host\n", 421)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("expected GET or HEAD\n", 405, {"Allow": "GET, HEAD"})
        if self._expected is None or self._is_right(headers.getlist("authorization")):
            return None
        if "authorization" in headers:
            await asyncio.sleep(WRONG_S)
        return PlainTextResponse("expected the password\n", 401, LOGIN)

    def _is_right(self, given: list[str]) -> bool:
        assert self._expected is not None
        password = password_in(given[0]) if len(given) == 1 else None
        found = hashlib.sha256(password or b"").digest()  # of one length, so that the comparison tells no other
        return hmac.compare_digest(found, self._expected) and password is not None
