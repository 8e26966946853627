"""What a site's status page reads: notes, consent and policy, the ledgers, and the curves of this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from participant import charging
from participant.site import Site
from participant.web.curves import Curves
from participant.web.view import Facts, view_of
from privacy.errors import VeilsumError
from privacy.web.page import Page


class Accounts:
    """What each ledger says, computed again only where its file changed; a ledger of its own, beside the daemon's."""

    def __init__(self, site: Site) -> None:
        self._site = replace(site, _ledgers={})
        self._known: dict[str, tuple[object, Facts]] = {}

    def of(self, name: str) -> Facts:
        """The account of one data set, or why there is none."""
        mark = _mark(self._site.home.ledgers / f"{name}.jsonl")
        if name not in self._known or self._known[name][0] != mark:
            self._known[name] = (mark, self._account(name))
        return self._known[name][1]

    def _account(self, name: str) -> dict[str, Any]:
        try:
            return charging.account(self._site, name)
        except VeilsumError as error:
            return {"dataset": name, "fault": str(error)}


def _mark(path: Path) -> object:
    """What changes whenever a file does."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def make_page(site: Site, curves: Curves) -> Page:
    """The status page of a site."""
    accounts, settings = Accounts(site), site.home.settings

    def gather() -> Facts:
        return {
            "member": settings.member,
            "federation": site.roster.roster.federation,
            "coordinator": settings.coordinator,
            "rounds_joined": site.store.rounds_joined(),
            "policy": settings.policy.model_dump(mode="json"),
            "plans": site.notes(),
            "accounts": [accounts.of(name) for name in sorted(settings.datasets)],
            "curves": curves.seen(),
            "round": site.counts.live,
        }

    return Page("participant.web", lambda: view_of(gather()))
