"""Tests beside each other: one that is marked ``alone`` has the machine for itself, and what takes long begins."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pytest

from demo.federation import free_port
from tests import turns
from tests.turns import turn

ROOT = Path(__file__).resolve().parent.parent
#: So long nothing happens where something must not; a busy machine makes no such test fail.
NOTHING_S, PATIENCE_S = 0.2, 60.0


@pytest.fixture(autouse=True)
def _own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's own are held by the test that runs."""
    for name in ("QUEUE", "ROOM"):
        (tmp_path / name).touch()
        monkeypatch.setattr(turns, name, tmp_path / name)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as found:
        yield found


def take(alone: bool, began: Event, end: Event) -> None:
    with turn(alone=alone):
        began.set()
        assert end.wait(PATIENCE_S)


def test_tests_that_are_not_marked_run_beside_each_other(pool: ThreadPoolExecutor) -> None:
    both = Barrier(2)

    def meet() -> None:
        with turn(alone=False):
            both.wait(PATIENCE_S)

    for done in [pool.submit(meet) for _ in range(2)]:
        done.result()


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (True, True)])
def test_nothing_runs_beside_one_that_is_marked(pool: ThreadPoolExecutor, first: bool, second: bool) -> None:
    began, then, end = Event(), Event(), Event()
    running = pool.submit(take, first, began, end)
    assert began.wait(PATIENCE_S)
    waiting = pool.submit(take, second, then, end)
    assert not then.wait(NOTHING_S)
    end.set()
    for done in (running, waiting):
        done.result()
    assert then.is_set()


def test_no_test_overtakes_a_marked_one_that_waits(pool: ThreadPoolExecutor) -> None:
    began, marked, late, end, last = (Event() for _ in range(5))
    running = [pool.submit(take, False, began, end)]
    assert began.wait(PATIENCE_S)
    running.append(pool.submit(take, True, marked, last))
    assert not marked.wait(NOTHING_S)
    running.append(pool.submit(take, False, late, last))
    assert not late.wait(NOTHING_S)
    end.set()
    assert marked.wait(PATIENCE_S)
    assert not late.wait(NOTHING_S)
    last.set()
    for done in running:
        done.result()


@dataclass
class Worker:
    """The configuration of a worker, as far as it is looked at."""

    workerinput: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """A test of a file, with at most one mark."""

    path: Path
    mark: str

    def get_closest_marker(self, name: str) -> bool:
        return name == self.mark


def test_workers_begin_with_what_takes_long_and_end_with_what_runs_alone() -> None:
    short, first, second = Path("tests/test_short.py"), *(Path("tests") / name for name in turns.LONG[:2])
    alone = [Item(Path("tests/test_alone.py"), mark) for mark in ("", "alone")]
    found = [Item(second, ""), Item(short, "gpu"), Item(short, ""), Item(first, ""), Item(first, "slow")]
    items: list[Any] = [*alone, *found]
    turns.pytest_collection_modifyitems(Worker(), items)  # type: ignore[arg-type]
    assert items == [*found[3:], found[0], *found[1:3], *alone]


def test_the_long_files_are_there() -> None:
    assert [name for name in turns.LONG if not (ROOT / "tests" / name).is_file()] == []


def test_a_free_port_is_free_and_none_that_a_connection_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.SystemRandom.randrange
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port: int = taken.getsockname()[1]
        assert port < 32_768
        first = [port]
        monkeypatch.setattr(random.SystemRandom, "randrange", lambda *about: first.pop() if first else draw(*about))
        assert free_port() != port
        assert first == []


def test_a_free_port_is_given_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its daemon listens later, in a process of its own; nobody else may have it by then."""
    draw, port = random.SystemRandom.randrange, free_port()
    first = [port]
    monkeypatch.setattr(random.SystemRandom, "randrange", lambda *about: first.pop() if first else draw(*about))
    assert free_port() != port
    assert first == []


#: Tests that say in one file when they begin and end.
SAID = """import time
def said(request):
    for word in ("begins", "ends"):
        with open("said", "a") as out:
            out.write(f"{word} {request.path.stem}\\n")
        time.sleep(0.3 * (word == "begins"))
"""
CONFTEST = """from pathlib import Path
from tests import turns
from tests.turns import pytest_collection_modifyitems, pytest_runtest_protocol
turns.QUEUE, turns.ROOM = Path("said.py").absolute(), Path("conftest.py").absolute()
"""
TESTS = "import pytest\nfrom said import said\ntest_1 = test_2 = test_3 = test_4 = {}\n"


def test_workers_take_turns(tmp_path: Path) -> None:
    ini = f"[pytest]\npythonpath = . {ROOT}\nmarkers = alone\n  slow\n"
    files = {"said.py": SAID, "conftest.py": CONFTEST, "pytest.ini": ini}
    files |= {"test_a.py": TESTS.format("pytest.mark.alone(said)"), "test_b.py": TESTS.format("said")}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "8 passed" in done.stdout, done.stdout + done.stderr
    words = (tmp_path / "said").read_text().split()
    assert words[::2] == ["begins", "ends"] * 8
    assert words[1::4] == words[3::4]
