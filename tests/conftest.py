"""What every test starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

from tests.charging import charged_site, set_up_federation
from tests.turns import pytest_collection_modifyitems, pytest_runtest_protocol

__all__ = ["charged_site", "pytest_collection_modifyitems", "pytest_runtest_protocol", "set_up_federation"]

# On a busy machine any example may take long; that says nothing about the code.
settings.register_profile("veilsum", deadline=None)
settings.load_profile("veilsum")


@pytest.fixture(autouse=True)
def _fresh_logs() -> Iterator[None]:
    """A command run in this process sets up logs for the output of its own test, which is gone afterwards."""
    yield
    structlog.reset_defaults()
