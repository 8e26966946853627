"""Named points at which a test kills this process; off, and free of cost, unless VEILSUM_FAULT names one.

``VEILSUM_FAULT=NAME`` or ``NAME:K`` ends the process by SIGKILL when it passes point NAME for the K-th time, exactly
as a power cut between two writes would: nothing is flushed, no handler runs.
"""

from __future__ import annotations

import os
import signal

_NAME, _, _COUNT = os.environ.get("VEILSUM_FAULT", "").partition(":")
_left = int(_COUNT or "1")


def point(name: str) -> None:
    """Pass a fault point."""
    global _left
    if name != _NAME:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
