"""Authorities, sites and servers with certificates of any age, for tests of what TLS refuses."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from coordinator import pki
from participant import enrol


@contextmanager
def certificates_of(days: float) -> Iterator[None]:
    """Certificates made inside are valid for so many days from now; below zero, they expired so long ago."""
    with (
        mock.patch.object(pki, "CERTIFICATE_DAYS", days),
        mock.patch.object(pki, "LEEWAY", datetime.timedelta(days=9)),
    ):
        yield


def make_authority(directory: Path) -> Path:
    """A new authority in a new directory."""
    directory.mkdir()
    pki.create_authority(directory, directory.name)
    return directory


def make_site(directory: Path, authority: Path, member: str, *, days: float = 30) -> Path:
    """A site with a certificate of this authority."""
    enrol.create_site(directory)
    certify(directory, authority, member, days=days)
    return directory


def certify(site: Path, authority: Path, member: str, *, days: float = 30) -> None:
    """Give a site another key and a certificate for it, and the authority's own certificate."""
    with certificates_of(days):
        certificate = pki.sign_request(authority, enrol.create_request(site, member), member)
    enrol.install_certificates(site, certificate, (authority / pki.AUTHORITY_CERTIFICATE).read_bytes())


def make_server(authority: Path, hosts: Sequence[str] = ("localhost", "127.0.0.1"), *, days: float = 30) -> None:
    """Key and certificate of a coordinator, in the authority's own directory."""
    with certificates_of(days):
        pki.issue_server(authority, hosts)
