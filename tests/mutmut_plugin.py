"""A pytest plugin for mutmut alone: what test modules compute once is computed anew, so that every mutant reaches it.

mutmut runs pytest over and over in forks of one process. A value that a test module made at import, or that
``functools.cache`` kept, would be from before the mutant was there, and tests of that value would not see it. And
while mutmut measures which test reaches which function, whatever an import, a cache or a fixture of a module reaches
counts for every test of that module.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

#: Functions that a module reaches at import or in a fixture, by the module's path.
_reached: defaultdict[Path, set[str]] = defaultdict(set)


def _hits() -> set[str]:
    """Where mutmut notes the functions that are reached; a set that nobody reads unless it measures."""
    if os.environ.get("MUTANT_UNDER_TEST") != "stats":
        return set()
    from mutmut.state import state  # type: ignore[import-not-found]  # only mutmut's own process has it

    found: set[str] = state()._stats
    return found


@contextmanager
def _noting(path: Path) -> Iterator[None]:
    """What is reached meanwhile counts for every test of the module at ``path``."""
    hits = _hits()
    before = set(hits)
    hits.clear()
    yield
    _reached[path] |= hits
    hits |= before


def _test_modules() -> list[str]:
    return [m for m in sys.modules if m.startswith("tests.") and m not in (__name__, "tests.conftest")]


def pytest_configure() -> None:
    """Forget the test modules that the process this was forked from had imported."""
    for name in _test_modules():
        package, _, module = name.rpartition(".")
        vars(sys.modules[package]).pop(module, None)  # else a patch by name would still find the old one
    for name in _test_modules():
        del sys.modules[name]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Note what importing a test module reaches."""
    with _noting(collector.path):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any, request: pytest.FixtureRequest) -> Generator[None, Any, Any]:
    """Note what a fixture reaches that several tests share."""
    if fixturedef.scope != "module":
        return (yield)
    with _noting(request.path):
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """While mutmut measures: the caches of the test modules are empty before each test."""
    if os.environ.get("MUTANT_UNDER_TEST") == "stats":
        for name in _test_modules():
            for value in list(vars(sys.modules[name]).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """While mutmut measures: every test reaches what its module reached."""
    _hits().update(_reached[item.path])
    return (yield)
