"""What is repeated until the other end answers or the disk takes it: a round's secrets live in this process only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from privacy.console import Unreachable
from privacy.files import DiskError

log = structlog.get_logger()

BACKOFF_S = (0.5, 1, 2, 4, 8, 15, 30)

R = TypeVar("R")


def patiently(call: Callable[[], R], progress: Callable[[], object] = lambda: None) -> R:
    """Repeat a call for as long as it raises :class:`Unreachable` or :class:`DiskError`.

    Args:
        progress: what changes while the call gets on, although it fails in the end: then the pauses are short again.
    """
    attempt, before = 0, progress()
    while True:
        try:
            return call()
        except (Unreachable, DiskError) as error:
            if progress() != before:
                attempt, before = 0, progress()
            if attempt == 0:
                log.warning("trying again", reason=str(error), hint=error.hint)
            time.sleep(BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)])
            attempt += 1
