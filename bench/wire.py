"""A whole round over mutual TLS on loopback, and its uploads against a raw TLS socket, near and far."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.fleet import Fleet, Pace
from bench.meter import touch_memory
from bench.raw_socket import send_all
from bench.rows import Bar, Row, row
from bench.scale import ROOT, Scale
from privacy.secagg.masking import packed_length

#: Round trips that a proxy adds, milliseconds, and how many rounds are measured; 0 is plain loopback.
ROUNDS = {0: 3, 50: 2, 200: 2}
QUICK_ROUNDS = {0: 1, 50: 1}
BITS = 24


@contextmanager
def listening(module: str, *arguments: object) -> Iterator[int]:
    """Run a module that prints the loopback port it listens on; ended with the block."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"{module} ended at once")
            yield int(line)
        finally:
            process.kill()


class Measured:
    """One federation, its coordinator, and a raw receiver beside it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._sites = [fleet.federation.site(name) for name in fleet.names]
        self._plans = 0
        self.length = 0

    def _near_or_far(self, stack: ExitStack, port: int, rtt_ms: int) -> int:
        if not rtt_ms:
            return port
        return stack.enter_context(listening("bench.delay", "--to", port, "--rtt", rtt_ms / 1000))

    def _touch(self) -> None:
        """Just before the uploads, here as there."""
        touch_memory(self._fleet.federation.directory, 2 * self._fleet.n * packed_length(self._fleet.size, BITS))

    def round(self, rtt_ms: int) -> tuple[float, float]:
        """(seconds of the round, seconds of its upload phase)."""
        self._plans += 1
        plan, n = f"bench-{self._plans}", self._fleet.n
        with ExitStack() as stack:
            port = self._near_or_far(stack, self._fleet.port, rtt_ms)
            pace = Pace(threading.Semaphore(n), threading.Barrier(n, self._touch))
            times = self._fleet.run_round(plan, pace, port)
        self._fleet.check_total(plan)
        self.spool = self._fleet.spool(plan)
        self.length = self.spool.stat().st_size
        return times.round_s, times.upload_s

    def raw(self, rtt_ms: int) -> float:
        """Seconds of the same bytes over plain TLS sockets."""
        out = self._fleet.federation.directory
        with ExitStack() as stack:
            coordinator = self._fleet.federation.coordinator
            port = stack.enter_context(listening("bench.raw_socket", coordinator, out, self.length))
            return send_all(self._sites, self.spool, self._near_or_far(stack, port, rtt_ms), self._touch)

    def rows(self, rtt_ms: int, repeats: int) -> list[Row]:
        """The rows of one distance: rounds, with raw uploads before and after each."""
        rounds, uploads, raws = [], [], []
        for _ in range(repeats):
            raws += [self.raw(rtt_ms)] if self.length else []
            seconds, upload = self.round(rtt_ms)
            rounds.append(seconds)
            uploads.append(upload)
            raws.append(self.raw(rtt_ms))
        name = "round_end_to_end" + (f"_{rtt_ms}ms" if rtt_ms else "")
        n, d = self._fleet.n, self._fleet.size
        total = n * self.length / 1e6
        far = f" with a round trip of {rtt_ms} ms" if rtt_ms else ""
        return [
            row(
                name,
                statistics.median(rounds),
                "s",
                n=n,
                d=d,
                note=f"whole round{far}, without training, all members on this machine",
            ),
            row(
                f"{name}_upload",
                total / statistics.median(uploads),
                "MB/s",
                reference=total / statistics.median(raws),
                n=n,
                d=d,
                bar=Bar("ratio", 0.6),
                note=f"all uploads at once{far}; reference: TLS sockets whose receiver hashes and fsyncs",
            ),
        ]


def round_end_to_end(scale: Scale) -> list[Row]:
    """Ten members, on loopback and through proxies of 50 and 200 ms."""
    n = scale.members(10)
    found: list[Row] = []
    with tempfile.TemporaryDirectory(dir=scale.scratch) as directory:
        fleet = Fleet(Path(directory), n, scale.size)
        with fleet.running():
            measured = Measured(fleet)
            for rtt_ms, repeats in (QUICK_ROUNDS if scale.quick else ROUNDS).items():
                found += measured.rows(rtt_ms, repeats)
    assert measured.length >= packed_length(scale.size, BITS)
    return found
