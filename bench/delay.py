"""A loopback proxy that makes a connection as slow as a long way: ``python -m bench.delay --to PORT --rtt 0.2``.

Every byte arrives half a round trip after it was sent, and a sender has at most a window of bytes in flight, which
come back to it a round trip after they were sent: what TCP does on a long way with Linux's default send buffer
(net.ipv4.tcp_wmem, 4 MiB). Slow start, loss and limits of bandwidth are not imitated.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import deque

WINDOW = 4 << 20
PIECE = 1 << 18


class Direction:
    """One direction of one connection."""

    def __init__(self, rtt: float, window: int) -> None:
        self._rtt, self._free = rtt, window
        self._changed = asyncio.Event()
        self._flying: deque[tuple[float, bytes]] = deque()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry bytes until the sender has no more."""
        delivery = asyncio.create_task(self._deliver(writer))
        try:
            while True:
                while self._free <= 0:
                    self._changed.clear()
                    await self._changed.wait()
                piece = await reader.read(min(PIECE, self._free))
                loop = asyncio.get_running_loop()
                self._free -= len(piece)
                loop.call_later(self._rtt, self._acknowledge, len(piece))
                self._flying.append((loop.time() + self._rtt / 2, piece))
                self._changed.set()
                if not piece:
                    break
            await delivery
        finally:
            delivery.cancel()
            writer.close()

    def _acknowledge(self, count: int) -> None:
        self._free += count
        self._changed.set()

    async def _deliver(self, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._flying:
                self._changed.clear()
                await self._changed.wait()
            due, piece = self._flying.popleft()
            await asyncio.sleep(max(due - loop.time(), 0))
            if not piece:
                return
            writer.write(piece)
            await writer.drain()


async def serve(to: int, rtt: float, window: int) -> None:
    """Listen on a free loopback port, print it, and carry connections to port ``to`` for ever."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", to)
        except OSError:
            writer.close()
            return
        pumps = [Direction(rtt, window).pump(reader, far_writer), Direction(rtt, window).pump(far_reader, writer)]
        await asyncio.gather(*pumps, return_exceptions=True)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=PIECE)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.delay", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=int, required=True, help="port that connections are carried to")
    parser.add_argument("--rtt", type=float, required=True, help="round trip, seconds")
    parser.add_argument("--window", type=int, default=WINDOW, help="bytes in flight (default: %(default)s)")
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.to, arguments.rtt, arguments.window))


if __name__ == "__main__":
    main()
