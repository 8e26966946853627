"""The coordinator's status page. Nothing of it is loaded where the settings do not ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from coordinator.config import Home
from coordinator.engine import Engine
from coordinator.uploads import Uploads


@contextmanager
def status_page(home: Home, engine: Engine, uploads: Uploads) -> Iterator[int]:
    """Serve the page while the context lasts, if the settings name an address; yields its port, 0 without a page.

    Raises:
        UserError: the address is taken, or what it takes to be reached by others is missing.
    """
    if not home.settings.web.listen:
        yield 0
        return
    from coordinator.web.app import make_page
    from privacy.web.server import serving

    own = (home.tls_certificate, home.tls_key)
    with serving(home.settings.web, make_page(engine, uploads), home.directory, own) as port:
        yield port
