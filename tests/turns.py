"""Several tests at once, save those marked ``alone``: they hold a clock to a server, or flood it.

``make test`` divides the files of tests among worker processes. A test that says "within three seconds" would measure
the other workers too. So each test takes a lock that it shares with the others, and a test that is marked ``alone``
takes it for itself. A second lock is the queue: while such a test waits, no other begins.

The locks lie on two files that are here anyway, so there is nothing to make or to clean up, and the system lets go of
them if a worker dies. Two runs of the suite in one checkout take turns as well.
"""

from __future__ import annotations

import fcntl
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

#: Files that take longest, by what `make test ARGS=--durations=0` says: workers begin with them, in this order, or one
#: ends with such a file while the others have nothing left to do. A file that is missing here costs time, no more.
LONG = tuple(
    f"test_{name}.py"
    for name in (
        *("joining_end_to_end", "end_to_end", "audit_federation", "stages", "evidence", "chaos", "uploads"),
        *("end_to_end_stages", "accounting", "audit_budget", "engine", "web_coordinator", "language_model"),
        *("methods_end_to_end", "end_to_end_evaluation", "empirical", "stage_restarts", "aligned", "doctor"),
    )
)
QUEUE, ROOM = Path(__file__).with_name("conftest.py"), Path(__file__)


@contextmanager
def turn(*, alone: bool) -> Iterator[None]:
    """Runs the body beside others, or alone."""
    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    with QUEUE.open("rb") as waiting, ROOM.open("rb") as running:
        fcntl.flock(waiting, kind)
        fcntl.flock(running, kind)
        fcntl.flock(waiting, fcntl.LOCK_UN)
        try:
            yield
        finally:
            # Said, and not left to the closing: a fork that a test leaves behind holds the file open.
            fcntl.flock(running, fcntl.LOCK_UN)


def beside_others(config: pytest.Config) -> bool:
    """Is this a worker of pytest-xdist? A run that a test starts is none, and must not wait for that test."""
    return hasattr(config, "workerinput")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """One test with its fixtures, those of its file too."""
    if not beside_others(item.config):
        return (yield)
    with turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Workers take whole files: the long ones first, and last those with tests that run alone.

    For each of these all others wait, and by then no test takes long.
    """
    if beside_others(config):
        order = {name: place for place, name in enumerate(LONG)}
        alone = {item.path for item in items if item.get_closest_marker("alone")}
        items.sort(key=lambda item: (item.path in alone, order.get(item.path.name, len(order))))
