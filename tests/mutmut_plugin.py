"""A pytest plugin for mutmut alone: what test modules compute once is computed anew, so that every mutant reaches it.

mutmut runs pytest over and over in forks of one process. A value that a test module made at import, or that
``functools.cache`` kept, would be from before the mutant was there, and tests of that value would not see it. And
while mutmut measures which test reaches which function, whatever an import, a cache or a fixture of a module reaches
counts for every test of that module. The quickest tests come first, since most mutants fall to one of them.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from time import process_time
from types import ModuleType
from typing import Any

import pytest

#: Functions that a test module reaches at import, and those it reaches then or in a fixture, by the module's path.
_at_import: defaultdict[Path, set[str]] = defaultdict(set)
_reached: defaultdict[Path, set[str]] = defaultdict(set)
#: CPU seconds of each test, and how many of them may be spent on one mutant: what only the slowest tests would notice
#: counts as a survivor.
_seconds: defaultdict[str, float] = defaultdict(float)
BUDGET_S = 12.0


def _hits() -> set[str]:
    """Where mutmut notes the functions that are reached; a set that nobody reads unless it measures."""
    if os.environ.get("MUTANT_UNDER_TEST") != "stats":
        return set()
    from mutmut.state import state  # type: ignore[import-not-found]  # only mutmut's own process has it

    found: set[str] = state()._stats
    return found


@contextmanager
def _noting(*notes: set[str]) -> Iterator[None]:
    """What is reached meanwhile is added to these notes."""
    hits = _hits()
    before = set(hits)
    hits.clear()
    yield
    for note in notes:
        note |= hits
    hits |= before


def _test_modules() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.startswith("tests.")}


def _clear_caches() -> None:
    for module in _test_modules().values():
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def pytest_configure() -> None:
    """Nothing that the process this was forked from had computed is left."""
    _clear_caches()
    for name, module in _test_modules().items():
        if _at_import[Path(module.__file__ or "")]:
            package, _, own = name.rpartition(".")
            vars(sys.modules[package]).pop(own, None)  # else a patch by name would find the old module
            del sys.modules[name]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Note what importing a test module reaches."""
    with _noting(_at_import[collector.path], _reached[collector.path]):
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The quickest first, and no more than a mutant is worth."""
    items.sort(key=lambda item: _seconds[item.nodeid])
    spent = list(accumulate(_seconds[item.nodeid] for item in items))
    if os.environ.get("MUTANT_UNDER_TEST"):
        del items[bisect_right(spent, BUDGET_S) :]


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any, request: pytest.FixtureRequest) -> Generator[None, Any, Any]:
    """Note what a fixture reaches that several tests share."""
    if fixturedef.scope != "module":
        return (yield)
    with _noting(_reached[request.path]):
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """While mutmut measures: the caches of the test modules are empty before each test."""
    if os.environ.get("MUTANT_UNDER_TEST") == "stats":
        _clear_caches()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """While mutmut measures: every test reaches what its module reached, and takes so many seconds."""
    _hits().update(_reached[item.path])
    began = process_time()
    try:
        return (yield)
    finally:
        if os.environ.get("MUTANT_UNDER_TEST") == "stats":
            _seconds[item.nodeid] = process_time() - began
