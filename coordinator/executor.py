"""Where the long work of the coordinator runs: one small interface, threads of this process behind it.

Another engine, say a cluster, needs only :class:`Executor`. A job holds everything its work needs and its work may be
done twice, so an engine may move or repeat it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Executor(Protocol):
    """Runs jobs that do not depend on each other."""

    def run(self, work: Callable[[T], R], jobs: Sequence[T]) -> Iterator[tuple[T, R]]:
        """(job, result) of each job as it ends, in any order; the first error ends it and drops what has not begun."""
        ...


class Threads:
    """Threads of this process, one for each core it may use: AES, hashing and numpy release the GIL."""

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers or len(os.sched_getaffinity(0))

    def run(self, work: Callable[[T], R], jobs: Sequence[T]) -> Iterator[tuple[T, R]]:
        with ThreadPoolExecutor(self._workers, "shard") as pool:
            futures = {pool.submit(work, job): job for job in jobs}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                for future in futures:
                    future.cancel()
