"""How fast this site sends: one bucket for all that its daemon sends, and whether an upload can be in time with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from privacy.job import Job
from privacy.secagg.masking import packed_length

#: Share of a plan's ``upload_s`` from which an upload is called tight: masking and broken connections take time too.
TIGHT = 0.8


class Pace:
    """A token bucket without a depth: what is sent is paid for first, so no pause is ever made up for by a burst.

    Between any two moments ``t`` seconds apart at most ``rate * t`` bytes and one message more begin to be sent. The
    largest message is a chunk of an upload, 1 MiB.
    """

    def __init__(
        self,
        rate: int | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Args: rate: bytes a second; ``None``: as fast as the line."""
        self.rate, self._clock, self._sleep = rate, clock, sleep
        self._lock = threading.Lock()
        self._paid_until = float("-inf")

    def take(self, count: int) -> None:
        """Wait until ``count`` bytes may be sent; whoever comes meanwhile waits behind them."""
        if self.rate is None:
            return
        with self._lock:
            now = self._clock()
            self._paid_until = max(now, self._paid_until) + count / self.rate
            pause = self._paid_until - now
        self._sleep(pause)


@dataclass(frozen=True)
class UploadTime:
    """What one upload of a plan takes at this site's rate."""

    bytes: int
    #: At the rate of the site's file; ``None`` where it has none, and the line decides.
    seconds: float | None
    #: How long the coordinator waits for uploads, by the plan.
    deadline_s: int
    rate: int | None

    @classmethod
    def of(cls, job: Job, rate: int | None, stage: int = 1) -> UploadTime:
        """Of the largest upload from this stage on."""
        stages = (job.at(number) for number in range(stage, job.plan.last + 1))
        size = max(packed_length(one.quantizer.total_size, one.rules.bits) for one in stages)
        return cls(size, None if rate is None else size / rate, job.plan.deadlines.upload_s, rate)

    @property
    def state(self) -> str:
        """``late``: it cannot be in time. ``tight``, ``in time``; without a rate ``unknown``."""
        if self.seconds is None:
            return "unknown"
        late, tight = self.seconds > self.deadline_s, self.seconds > TIGHT * self.deadline_s
        return "late" if late else "tight" if tight else "in time"

    @property
    def least_rate(self) -> int:
        """Bytes a second with which it is not even tight."""
        return -int(-self.bytes // (TIGHT * self.deadline_s))

    def __str__(self) -> str:
        text = f"uploads {self.bytes / 1e6:,.1f} MB"
        if self.seconds is None:
            return text
        return (
            f"{text}, which takes {self.seconds:,.0f} s at max_upload_rate {self.rate}; upload_s is {self.deadline_s} s"
        )

    @property
    def todo(self) -> str:
        """What somebody can do about an upload that is late or tight."""
        return f"set max_upload_rate to {self.least_rate} or more, or ask for a plan with a longer upload_s"
