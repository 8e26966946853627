"""What every test starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def _fresh_logs() -> Iterator[None]:
    """A command run in this process sets up logs for the output of its own test, which is gone afterwards."""
    yield
    structlog.reset_defaults()
