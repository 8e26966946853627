"""The mask engine alone: against OpenSSL's own speed, and two threads against two processes."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time

import numpy as np
from numpy.typing import NDArray

from bench.meter import cpu_seconds
from bench.rows import Bar, Row, row
from bench.scale import ROOT, Scale, run_text
from privacy.errors import UserError
from privacy.secagg.masking import TILE, Engine, MaskStreams, apply_in_threads, best_engine, pyca

SEEDS = 16
BITS = 32
#: OpenSSL's block size, bytes; seconds it measures each time.
OPENSSL_BLOCK = 16384


def openssl_rate() -> float:
    """Bytes a CPU second of AES-256-CTR in OpenSSL's own benchmark.

    Raises:
        UserError: there is no ``openssl`` command.
    """
    if shutil.which("openssl") is None:
        raise UserError("expected the command openssl on the PATH, found none", hint="install openssl")
    command = ["openssl", "speed", "-mr", "-evp", "aes-256-ctr", "-bytes", str(OPENSSL_BLOCK), "-seconds", "1"]
    return parse_speed(run_text(command))


def parse_speed(output: str) -> float:
    """The rate in ``openssl speed -mr``: a line such as ``+F:25:AES-256-CTR:7864294400.00``."""
    for line in output.splitlines():
        if line.startswith("+F:"):
            return float(line.split(":")[3])
    raise RuntimeError(f"openssl speed: expected a line +F:..., found {output[-200:]!r}")


def keys(count: int) -> list[bytes]:
    """Fresh AES-256 keys."""
    return [os.urandom(32) for _ in range(count)]


def expand(vector: NDArray[np.uint32], plus: list[bytes], start: int = 0, engine: Engine = pyca) -> None:
    """Add all streams to a stretch of a vector that begins at coordinate ``start``."""
    MaskStreams(plus, [], BITS, start, engine).apply(vector)


def _against_openssl(scale: Scale, engine: Engine, name: str, bar: Bar, note: str) -> list[Row]:
    """Expand and add 16 seeds on one core, in alternation with ``openssl speed``."""
    vector, plus = np.zeros(scale.size, np.uint32), keys(SEEDS)
    expand(vector, plus, engine=engine)  # touches the pages
    ours, theirs = [], []
    for _ in range(scale.repeats):
        theirs.append(openssl_rate())
        began = cpu_seconds()
        expand(vector, plus, engine=engine)
        ours.append(vector.nbytes * SEEDS / (cpu_seconds() - began))
    rates = {"value": statistics.median(ours) / 1e9, "reference": statistics.median(theirs) / 1e9}
    note += ", one core, CPU time; reference: openssl speed -evp aes-256-ctr, 16 KiB blocks"
    return [row(name, unit="GB/s", n=SEEDS, d=scale.size, bar=bar, note=note, **rates)]


def mask_stream(scale: Scale) -> list[Row]:
    """The engine that is always there."""
    return _against_openssl(scale, pyca, "mask_stream", Bar("ratio", 0.65), "PRG expand and add")


def mask_stream_fast(scale: Scale) -> list[Row]:
    """The engine of the extra ``fast``; no row where it is not installed or the processor lacks VAES."""
    engine, why = best_engine()
    if engine is pyca:
        print(f"    no row: {why}")
        return []
    return _against_openssl(scale, engine, "mask_stream_fast", Bar("ratio", 1.4), "the same with the extra fast")


def _halves(vector: NDArray[np.uint32]) -> list[tuple[int, NDArray[np.uint32]]]:
    middle = len(vector) // 2 // TILE * TILE
    return [(0, vector[:middle]), (middle, vector[middle:])]


def _by_threads(vector: NDArray[np.uint32], plus: list[bytes]) -> float:
    """Wall seconds of two threads, half of the coordinates each."""
    began = time.perf_counter()
    apply_in_threads(vector, plus, [], BITS, workers=2)
    return time.perf_counter() - began


class _Half:
    """A process that expands one half whenever told to."""

    def __init__(self, size: int, half: int) -> None:
        command = [sys.executable, "-m", "bench.masking", str(size), str(half)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        self.wait()

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def wait(self) -> None:
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError("a process of mask_threads ended early")

    def stop(self) -> None:
        self._process.communicate(timeout=30)


def _by_processes(halves: list[_Half]) -> float:
    began = time.perf_counter()
    for half in halves:
        half.go()
    for half in halves:
        half.wait()
    return time.perf_counter() - began


def mask_threads(scale: Scale) -> list[Row]:
    """Two threads over coordinate ranges against two processes that do the same, wall time, in alternation."""
    vector, plus = np.zeros(scale.size, np.uint32), keys(SEEDS)
    halves = [_Half(scale.size, half) for half in range(2)]
    threads, processes = [], []
    try:
        _by_threads(vector, plus)
        for _ in range(2 * scale.repeats):
            processes.append(_by_processes(halves))
            threads.append(_by_threads(vector, plus))
    finally:
        for half in halves:
            half.stop()
    total = vector.nbytes * SEEDS / 1e9
    note = "two threads, half of the coordinates each, wall time; reference: two processes with the same halves"
    rates = {"value": total / statistics.median(threads), "reference": total / statistics.median(processes)}
    return [row("mask_threads", unit="GB/s", n=SEEDS, d=scale.size, bar=Bar("ratio", 0.85), note=note, **rates)]


def main() -> None:
    """One process of :func:`mask_threads`: a line in, one half expanded, a line out."""
    size, half = int(sys.argv[1]), int(sys.argv[2])
    start, part = _halves(np.zeros(size, np.uint32))[half]
    plus = keys(SEEDS)
    expand(part, plus, start)
    print("ready", flush=True)
    for _ in sys.stdin:
        expand(part, plus, start)
        print("done", flush=True)


if __name__ == "__main__":
    main()
