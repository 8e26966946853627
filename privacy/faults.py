"""Named points at which a test kills this process or fills its disk; off, and free of cost, unless a variable asks.

``VEILSUM_FAULT=NAME`` or ``NAME@K`` ends the process by SIGKILL when it passes point NAME for the K-th time: nothing is
flushed, no handler runs; what the kernel has already stays. ``NAME@K@full`` raises ENOSPC there instead, as a
full disk would, and ``NAME@K@full@TIMES`` in that many passes in a row. ``VEILSUM_FAULT_FILE=FILE`` names a file that
holds such a text and is read in every pass, so that a driver can ask for a fault, and for the next one, while the
process runs; passes count from the change. ``VEILSUM_FAULT_TRACE=FILE`` appends the name of each passed point to FILE,
one a line, so that a driver learns which points a run has.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

#: What differs from run to run in a file's name: digests and random suffixes, then numbers.
_VARYING = re.compile(r"[0-9a-f]{12,}|[0-9]+")


@dataclass(frozen=True)
class Fault:
    """What happens at the point ``name``, from its pass number ``first`` (1 is the first) on, ``times`` times."""

    name: str
    first: int = 1
    full: bool = False
    times: int = 1


def parse_fault(text: str) -> Fault | None:
    """The fault that ``VEILSUM_FAULT`` asks for; None for an empty one.

    Raises:
        ValueError: not NAME, NAME@K, NAME@K@full or NAME@K@full@TIMES.
    """
    if not text:
        return None
    name, *rest = text.split("@")
    if len(rest) > 3 or rest[1:2] not in ([], ["full"]):
        raise ValueError(f"VEILSUM_FAULT: expected NAME, NAME@K, NAME@K@full or NAME@K@full@TIMES, found {text!r}")
    return Fault(name, int(rest[0]) if rest else 1, len(rest) > 1, int(rest[2]) if len(rest) > 2 else 1)


_text = os.environ.get("VEILSUM_FAULT", "")
_fault = parse_fault(_text)
_file = os.environ.get("VEILSUM_FAULT_FILE", "")
_trace = os.environ.get("VEILSUM_FAULT_TRACE", "")
_on = bool(_text or _file or _trace)
_lock = threading.Lock()
_passed = 0


def name_of(action: str, where: str | Path = "") -> str:
    """``action``, or ``action:file``; digests and numbers in the file's name become ``#``, a path its last part."""
    file = where.name if isinstance(where, Path) else where
    return f"{action}:{_VARYING.sub('#', file)}" if file else action


def point(action: str, where: str | Path = "") -> None:
    """Pass a fault point.

    Raises:
        OSError: ENOSPC, where a test asked for a full disk.
    """
    if _on:
        _pass(name_of(action, where))


def _pass(name: str) -> None:
    global _passed
    with _lock:
        if _trace:
            _note(name)
        if _file:
            _read_again()
        if _fault is None or name != _fault.name:
            return
        _passed += 1
        if not _fault.first <= _passed < _fault.first + _fault.times:
            return
    if _fault.full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.kill(os.getpid(), signal.SIGKILL)


def _note(name: str) -> None:
    descriptor = os.open(_trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, f"{name}\n".encode())
    os.close(descriptor)


def _read_again() -> None:
    global _text, _fault, _passed
    try:
        text = Path(_file).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        text = ""
    if text != _text:
        _text, _fault, _passed = text, parse_fault(text), 0
