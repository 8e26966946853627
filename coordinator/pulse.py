"""Is the coordinator well? What its two loops are at, and whether the disk takes anything, for health and metrics."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from coordinator.engine import Engine
from privacy.files import DiskError

#: Seconds that one look at the deadlines may take; it takes milliseconds where nothing holds the lock or the disk.
STUCK_S = 60.0
#: Bytes that must be free for messages to be taken; a round asks for its own space before it opens.
LEAST_FREE = 64 << 20


@dataclass
class Pulse:
    """One loop that runs a step again and again."""

    name: str
    #: Its steps are short: one that takes longer than :data:`STUCK_S` hangs.
    short: bool
    clock: Callable[[], float] = time.monotonic
    began: float | None = None
    ended: bool = False
    waits_for_disk: bool = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step; whatever it raises goes on to the caller."""
        self.began = self.clock()
        try:
            yield
            self.waits_for_disk = False
        except DiskError:
            self.waits_for_disk = True
            raise
        finally:
            self.began = None

    @contextmanager
    def turning(self) -> Iterator[None]:
        """The loop lives as long as this context."""
        try:
            yield
        finally:
            self.ended = True

    def stuck(self) -> str:
        """What a restart may mend in one line; empty while the loop turns."""
        if self.ended:
            return f"the loop '{self.name}' has ended"
        began = self.began
        if self.short and began is not None and self.clock() - began > STUCK_S:
            return f"the loop '{self.name}' has been at one step for {self.clock() - began:.0f} s"
        return ""

    def fault(self) -> str:
        """What is wrong with the loop in one line; empty while it turns."""
        waits = f"the loop '{self.name}' waits for the disk" if self.waits_for_disk else ""
        return self.stuck() or waits


@dataclass
class Wellbeing:
    """The engine's loops and its disk."""

    engine: Engine
    deadlines: Pulse = field(default_factory=lambda: Pulse("deadlines", short=True))
    work: Pulse = field(default_factory=lambda: Pulse("work", short=False))
    stopping: bool = False

    def free(self) -> int:
        """Bytes free where uploads and messages go."""
        return shutil.disk_usage(self.engine.store.directory).free

    def stuck(self) -> str:
        """Why this process had better be started again; empty where that would mend nothing."""
        return self.deadlines.stuck() or self.work.stuck()

    def fault(self) -> str:
        """Why this coordinator cannot do its work now; empty while it can."""
        if self.stopping:
            return "the coordinator stops"
        for pulse in (self.deadlines, self.work):
            if found := pulse.fault():
                return found
        now = self.engine.clock()
        if any(running.try_again > now for running in list(self.engine.rounds.values())):
            return "a round waits for the disk"
        if (free := self.free()) < LEAST_FREE:
            return f"the disk is full: {free / 1e6:,.1f} MB free"
        return ""
