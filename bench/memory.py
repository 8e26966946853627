"""How much memory a real coordinator takes for a round, and whether that depends on the number of members."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

from bench.fleet import Fleet, Pace
from bench.meter import memory_bytes, reset_peak
from bench.rows import Bar, Row, row
from bench.scale import Scale


def peak_over_idle(scale: Scale, n: int) -> int:
    """Bytes that the coordinator's resident set grew by, at most, between its start and the end of a round.

    All members begin their uploads at the same moment: how many are taken at a time is the coordinator's business.
    """
    with tempfile.TemporaryDirectory(dir=scale.scratch) as directory:
        fleet = Fleet(Path(directory), n, scale.size)
        with fleet.running():
            reset_peak(fleet.coordinator_pid)
            idle = memory_bytes("VmRSS", fleet.coordinator_pid)
            fleet.run_round("bench", Pace(threading.Semaphore(2), threading.Barrier(n)))
            fleet.check_total("bench")
            return memory_bytes("VmHWM", fleet.coordinator_pid) - idle


def coordinator_memory(scale: Scale) -> list[Row]:
    """Five members against forty."""
    few, many = scale.members(5, 3), scale.members(40, 5)
    small, large = peak_over_idle(scale, few), peak_over_idle(scale, many)
    bound = 3 * 4 * scale.size / 2**20
    return [
        row(
            "coordinator_memory",
            large / 2**20,
            "MiB",
            reference=small / 2**20,
            n=many,
            d=scale.size,
            bar=Bar("ratio", 0.9, 1.1),
            note=f"peak resident memory over idle, a whole round to its last vote; reference: {few} members",
        ),
        row(
            "coordinator_memory_bound",
            max(small, large) / 2**20,
            "MiB",
            reference=bound,
            n=many,
            d=scale.size,
            bar=Bar("ratio", most=1.0),
            note="the larger of the two; reference: three vectors of 4 bytes a coordinate",
        ),
    ]
