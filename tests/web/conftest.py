"""One browser for all checks of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.web.browser import Browser, chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found
