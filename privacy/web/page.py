"""The web application of a status page: the page itself, its stream, two static files, and a side's own files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import jinja2
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from privacy import __version__
from privacy.web.feed import Feed
from privacy.web.view import View

STATIC = {
    "status.css": "text/css; charset=utf-8",
    "status.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


def environment(package: str) -> jinja2.Environment:
    """Templates of a side, and the shared ones; everything is escaped, and a name that is not there is an error."""
    loaders = [jinja2.PackageLoader(package), jinja2.PackageLoader("privacy.web")]
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


class Page:
    """One daemon's page.

    Args:
        package: that has the templates of the parts.
        look: the daemon's view of itself, called in a thread of its own.
        routes: what else is served.
    """

    def __init__(self, package: str, look: Callable[[], View], routes: Sequence[Route] = ()) -> None:
        self._templates = environment(package)
        self._static = {name: resources.files("privacy.web").joinpath("static", name).read_bytes() for name in STATIC}
        self.feed = Feed(look, self.render)
        own = [Route("/", self._page), Route("/events", self._events), Route("/static/{name}", self._file)]
        self.app = Starlette(routes=[*own, *routes])

    def render(self, view: View) -> dict[str, str]:
        """The parts of a view as HTML, by key."""
        return {part.key: self._templates.get_template(part.template).render(part.data) for part in view.parts}

    async def _page(self, _: Request) -> Response:
        now = await self.feed.now()
        about: dict[str, Any] = {"view": now.view, "html": now.html, "now": now.at, "version": __version__}
        return HTMLResponse(self._templates.get_template("page.html").render(about))

    async def _events(self, request: Request) -> Response:
        kind = "text/event-stream"
        if request.method == "HEAD":
            return Response(media_type=kind)
        if self.feed.is_full:
            return PlainTextResponse("expected fewer readers\n", 503, {"Retry-After": "30"})
        return StreamingResponse(self.feed.stream(), media_type=kind)

    async def _file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in STATIC:
            return PlainTextResponse("not found\n", 404)
        return Response(self._static[name], media_type=STATIC[name])
