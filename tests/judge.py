"""A pytest plugin that judges mutants in forks of one process: ``tests/operators.py`` runs it on a mutated tree.

Everything is imported and collected once. The whole suite then runs once without any mutant, which says how long each
test takes and which functions it reaches; a mutant of a function is judged by the tests that reach it, the quickest
first, each mutant in a fork of its own. What a test module computed at import or ``functools.cache`` kept is from
before the mutant was there, so both are computed anew.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from time import process_time
from types import ModuleType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

#: CPU seconds that may be spent on one mutant; what only later tests would notice counts as a survivor.
BUDGET_S = 20.0
#: Exit codes of a fork: no test failed, one did, no test reaches the mutant.
SURVIVED, KILLED, NOT_COVERED = 0, 1, 33

#: Functions that the code in progress reaches, under mutmut's names.
_hits: set[str] = set()
#: Functions that a test module reaches at import or in a shared fixture.
_shared: defaultdict[str, set[str]] = defaultdict(set)
#: Test modules that reach any of them at import.
_stale: set[str] = set()


def _note(name: str, **_: object) -> None:
    _hits.add(name)


def _test_modules() -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if name.startswith("tests.")]


def _clear_caches() -> None:
    for module in _test_modules():
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def pytest_configure() -> None:
    """From here on the mutated functions are called through what notes them."""
    from mutmut.mutation import trampoline  # type: ignore[import-not-found]  # only the judging process has it

    trampoline.record_trampoline_hit = _note
    os.environ["MUTANT_UNDER_TEST"] = "stats"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[Any]:
    """Note what importing a test module reaches."""
    _hits.clear()
    report = yield
    if isinstance(collector, pytest.Module) and _hits:
        _stale.add(collector.obj.__name__)
        _shared[collector.nodeid] |= _hits
    return report


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Note what a fixture reaches that the tests of a module share."""
    before = set(_hits)
    _hits.clear()
    value = yield
    if fixturedef.scope == "module":
        _shared[request.node.nodeid] |= _hits
    _hits.update(before)
    return value


def _fails(items: Sequence[pytest.Item]) -> bool:
    """Run these tests until one fails."""
    for item, following in pairwise([*items, None]):
        assert item is not None
        if any(report.failed for report in runtestprotocol(item, nextitem=following, log=False)):
            return True
    return False


def _module_of(item: pytest.Item) -> str:
    parent = item.getparent(pytest.Module)
    assert parent is not None
    return parent.nodeid


class Suite:
    """The tests, with what each reaches and costs."""

    def __init__(self, items: list[pytest.Item]) -> None:
        self.seconds: dict[str, float] = {}
        self.reaching: defaultdict[str, list[pytest.Item]] = defaultdict(list)
        reached: dict[str, set[str]] = {}
        for item, following in pairwise([*items, None]):
            assert item is not None
            _clear_caches()
            _hits.clear()
            began = process_time()
            reports = runtestprotocol(item, nextitem=following, log=False)
            if failed := [report for report in reports if report.failed]:
                sys.exit(f"expected the tests to pass without a mutant: {item.nodeid}\n{failed[0].longreprtext}")
            self.seconds[item.nodeid] = process_time() - began
            reached[item.nodeid] = set(_hits)
        for item in sorted(items, key=lambda item: self.seconds[item.nodeid]):
            for name in reached[item.nodeid] | _shared[_module_of(item)]:
                self.reaching[name].append(item)

    def tests_of(self, mutant: str) -> list[pytest.Item]:
        """The tests that reach the function of a mutant, the quickest first, within the budget."""
        found: list[pytest.Item] = []
        spent = 0.0
        for item in self.reaching[mutant.partition("__mutmut_")[0]]:
            spent += self.seconds[item.nodeid]
            if spent < BUDGET_S or not found:
                found.append(item)
        return found

    def cost(self, mutant: str) -> float:
        """CPU seconds that a mutant costs if nothing notices it."""
        return sum(self.seconds[item.nodeid] for item in self.tests_of(mutant))


def _judge(mutant: str, items: list[pytest.Item]) -> None:
    """In a fork: run the tests with this mutant in place, and exit."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    seconds = int(20 * BUDGET_S)  # a mutant that runs on and on is noticed by that
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    os.environ["MUTANT_UNDER_TEST"] = mutant
    _clear_caches()
    try:
        for name in sorted({m.__name__ for m in map(_python_module, items)} & _stale):
            importlib.reload(sys.modules[name])
        os._exit(KILLED if _fails(items) else SURVIVED)
    except BaseException:
        os._exit(KILLED)  # the module cannot even be imported any more


def _python_module(item: pytest.Item) -> ModuleType:
    found = item.getparent(pytest.Module)
    assert found is not None
    module: ModuleType = found.obj
    return module


def pytest_runtestloop(session: pytest.Session) -> bool:
    """Judge every mutant that the file named by ``JUDGE`` lists; one line of JSON for each verdict."""
    task = json.loads(Path(os.environ["JUDGE"]).read_text())
    suite = Suite(session.items)
    running: dict[int, str] = {}
    with Path(task["verdicts"]).open("a") as out:

        def finish() -> None:
            pid, status = os.wait()
            code = os.waitstatus_to_exitcode(status)
            out.write(json.dumps([running.pop(pid), code]) + "\n")
            out.flush()

        for mutant in sorted(task["mutants"], key=suite.cost):
            if not (items := suite.tests_of(mutant)):
                out.write(json.dumps([mutant, NOT_COVERED]) + "\n")
                continue
            if len(running) >= task["workers"]:
                finish()
            if pid := os.fork():
                running[pid] = mutant
            else:
                _judge(mutant, items)
        while running:
            finish()
    return True
