"""CPU seconds and peak memory of one call, in this process.

Standard library only: the environment of the peers runs it too.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What a task cost: median CPU seconds, and the most memory it held beyond what stood before it."""

    cpu_s: float
    extra_bytes: int


def cpu_seconds() -> float:
    """User and system time of this process, its threads and those of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def memory_bytes(field: str, process: int | str = "self") -> int:
    """``VmRSS`` or ``VmHWM`` (the peak of it) of a process."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/{process}/status has no {field}")


def reset_peak(process: int | str = "self") -> None:
    """Let VmHWM begin anew at what is resident now (proc(5), clear_refs)."""
    Path(f"/proc/{process}/clear_refs").write_text("5")


def touch_memory(directory: Path, size: int) -> None:
    """Write and delete a file of ``size`` bytes, so that the next one finds its memory there.

    The host of a virtual machine may give a page only when it is first touched: 2 seconds a gigabyte where this was
    written, thirty times what the write itself takes. Whoever is measured first would pay it for all.
    """
    path, piece = directory / "touched.bin", os.urandom(1 << 20)
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(-(-size // len(piece))):
                file.write(piece)
    finally:
        path.unlink(missing_ok=True)


def measure(call: Callable[[], object], repeats: int) -> Cost:
    """Run ``call`` a few times: memory from the first, CPU time from the median."""
    spent, extra = [], 0
    for number in range(repeats):
        if number == 0:
            reset_peak()
            before = memory_bytes("VmRSS")
        began = cpu_seconds()
        call()
        spent.append(cpu_seconds() - began)
        if number == 0:
            extra = max(memory_bytes("VmHWM") - before, 0)
    return Cost(statistics.median(spent), extra)


def answer(tasks: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """The protocol of a task process: one JSON object as its argument, one as the last line of its output."""
    request: dict[str, Any] = json.loads(sys.argv[1])
    print(json.dumps(tasks[request.pop("task")](request)))


def as_reply(cost: Cost, **more: object) -> dict[str, Any]:
    """A cost as a reply of :func:`answer`."""
    return asdict(cost) | more
