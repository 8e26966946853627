"""Veilsum's own work as tasks in a fresh process, so that peak memory is the task's: ``python -m bench.own '{...}'``.

Every task takes and returns JSON; ``bench/peer_flower.py`` has the same tasks for the other side.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.costs import Driver
from bench.masking import keys
from bench.meter import answer, as_reply, measure
from coordinator import phases
from coordinator.executor import Threads
from coordinator.unmask import unmask
from privacy.outcome import Total
from privacy.secagg.masking import engine_for, masked_blocks, packed_length
from privacy.secagg.quantize import Extra, Quantizer
from privacy.secagg.transcript import Streams
from privacy.vectors import read_total
from privacy.wire.transport import CHUNK_HEADER, chunk_bytes

BITS = 24
CLIP = 0.05
WEIGHT = 500
MAX_WEIGHT = 1000


def quantizer_of(size: int, n: int) -> Quantizer:
    """A quantiser for cohorts of up to ``n`` members."""
    return Quantizer(size, BITS, n, CLIP, MAX_WEIGHT, (Extra("weight", MAX_WEIGHT),))


class RoundDriver(Driver):
    """A round of the real machines with one dropout; keeps the streams that its releases open.

    Args:
        confirming: how many members check the outcome, which ends the round there; ``None`` for all, to its last M13.
    """

    def __init__(self, n: int, confirming: int | None = None) -> None:
        super().__init__(n)
        self.costs.dropouts = 1
        self._confirming = confirming

    def _confirm(self, survivors: Sequence[int]) -> None:
        if self._confirming is None:
            super()._confirm(survivors)
        else:
            self._each(survivors[: self._confirming], self._hear)

    def _unmask(self) -> None:
        phase = self.coordinator.phase
        assert isinstance(phase, phases.Publishing)
        self.streams: Streams = phase.streams
        super()._unmask()


def participant(vector: Path, n: int, repeats: int) -> dict[str, Any]:
    """Quantise, mask and pack a float32 vector into a spool file, with one self mask and n - 1 pair masks."""
    delta = np.load(vector)
    quantizer = quantizer_of(len(delta), n)
    plus, minus = keys(n - n // 2), keys(n // 2)
    engine = engine_for(len(delta))  # loaded once in a process, and before training ends
    with tempfile.TemporaryFile(dir=vector.parent) as spool:

        def spool_one() -> None:
            spool.seek(0)
            tiles = quantizer.tiles(delta, WEIGHT, {"weight": WEIGHT})
            for block in masked_blocks(tiles, plus, minus, BITS, engine):
                spool.write(block)

        cost = measure(spool_one, repeats)
    return as_reply(cost, size=len(delta))


def coordinator(size: int, n: int, repeats: int, directory: Path) -> dict[str, Any]:
    """Open the seeds of a round with one dropout, take the masks off a running sum, decode the mean.

    The sum is zero masked with those very streams, so the decoded vector is checked too.
    """
    driver = RoundDriver(n)
    driver.run()
    streams, quantizer = driver.streams, quantizer_of(size, n)
    survivors, weight = n - driver.costs.dropouts, (n - driver.costs.dropouts) * WEIGHT
    running_sum, total = directory / "sum.bin", directory / "total.bin"
    vector = np.zeros(quantizer.total_size, np.int32)
    vector[size:] = weight
    masked = b"".join(masked_blocks(vector, streams.plus, streams.minus, 32))
    running_sum.write_bytes(_unplaned(masked, quantizer.total_size))

    engine_for(size)  # loaded when a coordinator starts

    def unmask_and_decode() -> None:
        total.unlink(missing_ok=True)
        unmask(running_sum, total, streams, quantizer.total_size, BITS, Threads(), {}, lambda _first, _hashes: None)
        mean, summed = decode(Total(total, quantizer), survivors)
        if summed != weight or mean.any():
            raise RuntimeError("the unmasked total is not the sum that was masked")

    cost = measure(unmask_and_decode, repeats)
    return as_reply(cost, opening_s=driver.costs.opening_ms / 1e3)


def decode(sums: Total, survivors: int) -> tuple[NDArray[np.float32], int]:
    """The mean delta (d,) and the weight in a total of one cohort, tile by tile as a release is computed."""
    quantizer = sums.quantizer
    weight = quantizer.decode_extras(sums.extras(), survivors)["weight"]
    mean, low = np.empty(quantizer.size, np.float32), 0
    for lifted in sums.tiles():
        part = lifted[: quantizer.size - low]
        mean[low : low + len(part)] = quantizer.decode_part(part, weight)
        low += len(part)
    return mean, weight


def _unplaned(packed: bytes, size: int) -> bytes:
    """A vector packed in planes of 32 bits as plain little-endian uint32, the format of a running sum."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(packed)
        file.flush()
        return read_total(Path(file.name), size, 32).astype("<u4").tobytes()


def upload(size: int, n: int) -> dict[str, Any]:
    """Bytes that one member of a cohort of ``n`` sends: its vector in chunks, and every message of a round."""
    costs = RoundDriver(n).run()
    messages = sum(costs.row(name)["bytes"] for name in costs.size if int(name[1:]) % 2)
    length = packed_length(quantizer_of(size, n).total_size, BITS)
    headers = -(-length // chunk_bytes(BITS)) * CHUNK_HEADER
    return {"bytes": length + headers + messages, "messages": messages}


TASKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "participant": lambda r: participant(Path(r["vector"]), r["n"], r["repeats"]),
    "coordinator": lambda r: coordinator(r["size"], r["n"], r["repeats"], Path(r["directory"])),
    "upload": lambda r: upload(r["size"], r["n"]),
}

if __name__ == "__main__":
    answer(TASKS)
