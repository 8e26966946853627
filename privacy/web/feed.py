"""The page as it is now, looked up at most once a second however many look, and a stream of what changes in it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from privacy.web.view import View

#: Seconds between two looks at the daemon, if anybody reads.
EVERY_S = 1.0
#: Seconds of silence after which a stream says that it is still there.
BEAT_S = 10.0
#: Streams at the same time.
MOST_STREAMS = 16


@dataclass(frozen=True)
class Rendered:
    """A view with its parts as HTML, and when it was looked up."""

    view: View
    html: dict[str, str]
    at: float


def event(before: Rendered | None, now: Rendered) -> bytes | None:
    """What has to be sent to a reader that has ``before``, as one server-sent event; ``None`` if nothing changed."""
    known = before.html if before is not None else {}
    changed = {key: html for key, html in now.html.items() if known.get(key) != html}
    is_same = before is not None and (list(before.html), before.view.said) == (list(now.html), now.view.said)
    if is_same and not changed:
        return None
    told = {"now": round(now.at, 1), "said": now.view.said, "order": list(now.html), "parts": changed}
    return f"event: page\ndata: {json.dumps(told)}\n\n".encode()


@dataclass
class Feed:
    """Looks by a thread of its own: the loop that serves never waits for the daemon's lock or its disk.

    Attributes:
        look: the daemon's view of itself.
        render: a view's parts as HTML.
        stopping: set from any thread; streams end within :data:`EVERY_S`.
    """

    look: Callable[[], View]
    render: Callable[[View], dict[str, str]]
    every_s: float = EVERY_S
    streams: int = 0
    stopping: bool = False
    _last: Rendered | None = None
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "status-look"))

    def _looked(self) -> Rendered:
        view = self.look()
        return Rendered(view, self.render(view), time.time())

    async def now(self) -> Rendered:
        """The page, at most :attr:`every_s` old."""
        async with self._turn:
            if self._last is None or not 0 <= time.time() - self._last.at < self.every_s:
                self._last = await asyncio.get_running_loop().run_in_executor(self._thread, self._looked)
            return self._last

    @property
    def is_full(self) -> bool:
        return self.streams >= MOST_STREAMS

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events until the reader leaves or the daemon stops: first the page, then what changes."""
        self.streams += 1
        try:
            sent, silent = None, 0.0
            while not self.stopping:
                now = await self.now()
                told, silent = event(sent, now), silent + self.every_s
                if told is None and silent >= BEAT_S:
                    told = b"event: beat\ndata: {}\n\n"
                if told is not None:
                    silent = 0.0
                    yield told
                sent = now
                await asyncio.sleep(self.every_s)
        finally:
            self.streams -= 1

    def close(self) -> None:
        """No more looks; for when the server has stopped."""
        self.stopping = True
        self._thread.shutdown(wait=False, cancel_futures=True)
