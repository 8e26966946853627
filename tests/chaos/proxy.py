"""A site's way to the coordinator, made bad: cut in mid-chunk, delayed, throttled, stalled or refused.

Bytes are TLS records that the proxy cannot read; so it cannot reorder or repeat requests (``tests/chaos/echo.py``
does). Every disturbance is counted when it takes effect, never when it is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

READ_BYTES = 1 << 16
#: What a site says in a plan is shorter than this, but for its upload: a cut after more bytes falls into a chunk.
UPLOADING_BYTES = 1 << 17
#: Reads longer than this are bulk, and throttled.
BULK_BYTES = 1 << 14


@dataclass(frozen=True)
class Disturbance:
    """What happens to a connection, from ``at_s`` seconds after a plan was offered on.

    Attributes:
        kind: cut (reset once ``amount`` more bytes went up), delay (each read by ``amount`` ms), throttle (to
            ``amount`` kB/s), stall (nothing moves for ``amount`` ms) or refuse (connections are reset for
            ``amount`` ms).
    """

    kind: str
    at_s: float
    amount: int


@dataclass
class Proxy:
    """The proxy of one site; runs in the loop of :class:`Proxies`."""

    port: int
    target: int
    count: Callable[[str], None]
    cut_after: int | None = None
    cut_amount: int = 0
    delay_s: float = 0.0
    bytes_s: float = 0.0
    stalled_until: float = 0.0
    refused_until: float = 0.0
    told: set[str] = field(default_factory=set)
    open: set[asyncio.StreamWriter] = field(default_factory=set)

    def calm(self) -> None:
        """No disturbance any more."""
        self.cut_after, self.delay_s, self.bytes_s = None, 0.0, 0.0
        self.stalled_until = self.refused_until = 0.0
        self.told.clear()

    def disturb(self, disturbance: Disturbance) -> None:
        """Start one disturbance."""
        now, amount = time.monotonic(), disturbance.amount
        if disturbance.kind == "cut":
            self.cut_after = self.cut_amount = amount
        elif disturbance.kind == "delay":
            self.delay_s = amount / 1000
        elif disturbance.kind == "throttle":
            self.bytes_s = amount * 1000.0
        elif disturbance.kind == "stall":
            self.stalled_until = now + amount / 1000
        elif disturbance.kind == "refuse":
            self.refused_until = now + amount / 1000
            for writer in list(self.open):
                self._once("refuse")
                reset(writer)
        else:
            raise ValueError(f"no disturbance {disturbance.kind!r}")

    def _once(self, kind: str) -> None:
        if kind not in self.told:
            self.told.add(kind)
            self.count(kind)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of the site."""
        if time.monotonic() < self.refused_until:
            self._once("refuse")
            reset(writer)
            return
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            reset(writer)  # the coordinator is down
            return
        self.open |= {writer, up_writer}
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.wait(
                {
                    asyncio.ensure_future(self._pump(reader, up_writer, up=True)),
                    asyncio.ensure_future(self._pump(up_reader, writer, up=False)),
                },
                return_when=asyncio.FIRST_COMPLETED,
            )
        for each in (writer, up_writer):
            self.open.discard(each)
            reset(each)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(READ_BYTES):
                await self._hold(len(data))
                if up and self.cut_after is not None:
                    if len(data) >= self.cut_after:
                        writer.write(data[: self.cut_after])
                        await writer.drain()
                        self.cut_after = None
                        self.count("cut in mid-chunk" if self.cut_amount > UPLOADING_BYTES else "cut")
                        return
                    self.cut_after -= len(data)
                writer.write(data)
                await writer.drain()

    async def _hold(self, size: int) -> None:
        if self.delay_s:
            self._once("delay")
            await asyncio.sleep(self.delay_s)
        if self.bytes_s and size > BULK_BYTES:
            self._once("throttle")
            await asyncio.sleep(size / self.bytes_s)
        while (rest := self.stalled_until - time.monotonic()) > 0:
            self._once("stalled connection")
            await asyncio.sleep(rest)


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection by RST, as a broken line or a dead peer does."""
    with contextlib.suppress(OSError):
        sock = writer.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


class Proxies:
    """All proxies of one federation, in a thread with a loop of its own."""

    def __init__(self, target: int, names: list[str], count: Callable[[str], None]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.by_name = {
            name: asyncio.run_coroutine_threadsafe(self._open(target, count), self._loop).result(10) for name in names
        }

    async def _open(self, target: int, count: Callable[[str], None]) -> Proxy:
        proxy = Proxy(0, target, count)
        server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
        proxy.port = server.sockets[0].getsockname()[1]
        return proxy

    def disturb(self, name: str, disturbance: Disturbance) -> None:
        """Start a disturbance of one site's connection."""
        self._loop.call_soon_threadsafe(self.by_name[name].disturb, disturbance)

    def calm(self) -> None:
        """End all disturbances."""
        for proxy in self.by_name.values():
            self._loop.call_soon_threadsafe(proxy.calm)

    def close(self) -> None:
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_cancel_the_others(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)


async def _cancel_the_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
