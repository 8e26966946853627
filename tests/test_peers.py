"""A connection's certificate at every call: whose it is, and whether it has expired since the handshake."""

from __future__ import annotations

import datetime
from pathlib import Path
from unittest import mock

import pytest
from cryptography import x509

from coordinator import peers
from tests.certificates import make_authority, make_site

DAY = datetime.timedelta(days=1)


@pytest.fixture
def pem(tmp_path: Path) -> bytes:
    return (make_site(tmp_path / "north", make_authority(tmp_path / "ca"), "north") / "tls.crt").read_bytes()


def test_the_name_is_the_certificates() -> None:
    assert peers.common_name({"x509_common_name": [b"north"]}) == "north"
    assert peers.common_name({"x509_common_name": []}) == peers.common_name({}) == ""
    assert peers.common_name({"x509_common_name": [b"\xffnorth"]}) == "north"


def test_a_certificate_expires_while_its_connection_lives(pem: bytes) -> None:
    until = x509.load_pem_x509_certificate(pem).not_valid_after_utc
    auth = {"x509_pem_cert": [pem]}
    assert peers.expired_on(auth, until - DAY) is None
    assert peers.expired_on(auth, until) is None
    assert peers.expired_on(auth, until + DAY) == until


def test_without_a_certificate_nothing_expires() -> None:
    """Who has none never gets as far: TLS asks for one, and an empty name is no member's."""
    assert peers.expired_on({}, datetime.datetime.now(datetime.UTC)) is None


def test_a_certificate_is_parsed_once(pem: bytes) -> None:
    peers._valid_until.cache_clear()
    with mock.patch.object(x509, "load_pem_x509_certificate", wraps=x509.load_pem_x509_certificate) as parsed:
        for _ in range(100):
            peers.expired_on({"x509_pem_cert": [pem]}, datetime.datetime.now(datetime.UTC))
    assert parsed.call_count == 1


def test_a_certificate_from_before_a_removal_is_known_by_its_date(pem: bytes) -> None:
    certificate = x509.load_pem_x509_certificate(pem)
    since, leeway = certificate.not_valid_before_utc, datetime.timedelta(minutes=10)
    issued, auth = (since + leeway).timestamp(), {"x509_pem_cert": [pem]}
    assert not peers.issued_before(auth, 0.0, leeway)
    assert not peers.issued_before(auth, issued + 0.9, leeway)  # dates have whole seconds
    assert peers.issued_before(auth, issued + 1, leeway)
    assert not peers.issued_before({}, issued + 1, leeway)
