"""A site's TLS certificate is replaced before it expires, by the daemon itself."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
from cryptography import x509

from participant.client import Client
from participant.enrol import tls_files
from participant.joining import Membership
from privacy.errors import UserError, VeilsumError

log = structlog.get_logger()

#: A certificate is replaced when less than this part of its time is left.
LEFT = 1 / 3
#: Seconds between two looks.
LOOK_S = 3600.0


def _certificate(directory: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(tls_files(directory)[2])
    except ValueError as error:
        raise UserError(f"{directory}: expected this site's certificate in PEM, found something else") from error


def valid_until(directory: Path) -> datetime.datetime:
    """When this site's certificate expires, UTC."""
    return _certificate(directory).not_valid_after_utc


def is_due(directory: Path, now: datetime.datetime) -> bool:
    """Is it time for another certificate?"""
    found = _certificate(directory)
    until, since = found.not_valid_after_utc, found.not_valid_before_utc
    return until - now < (until - since) * LEFT


@dataclass
class Renewal:
    """The daemon's part: looks now and then, and says in a log line what came of it."""

    directory: Path
    address: str
    member: str
    clock: Callable[[], float] = time.time
    looked: float = float("-inf")

    def look(self, client: Client) -> None:
        """Renew if it is time; a failure is tried again at the next look, and nothing else waits for it."""
        now = self.clock()
        if now - self.looked < LOOK_S:
            return
        self.looked = now
        try:
            if is_due(self.directory, datetime.datetime.fromtimestamp(now, datetime.UTC)):
                Membership(self.directory, self.address).renew(self.member)
                client.redial()
                log.info("certificate renewed", until=f"{valid_until(self.directory):%Y-%m-%d}")
        except VeilsumError as error:
            log.warning("certificate not renewed", reason=str(error))
