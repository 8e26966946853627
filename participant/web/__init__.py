"""A site's status page. Nothing of it but the curves is loaded where the settings do not ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from participant.site import Site
from participant.web.curves import Curves


@contextmanager
def status_page(site: Site) -> Iterator[Curves]:
    """Serve the page while the context lasts, if the settings name an address; yields what it draws curves of.

    Raises:
        UserError: the address is taken, or what it takes to be reached by others is missing.
    """
    curves, web = Curves(), site.home.settings.web
    if not web.listen:
        yield curves
        return
    from participant.web.app import make_page
    from privacy.web.server import serving

    with serving(web, make_page(site, curves), site.home.directory):
        yield curves
