"""TLS certificates are replaced in time, key and certificate together or not at all."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from coordinator import service
from participant import enrol, renewal
from participant.joining import Membership
from participant.renewal import Renewal, is_due, valid_until
from privacy import faults
from privacy.errors import ProtocolError, Refusal, UserError
from tests.certificates import make_authority, make_site
from tests.joining import Coordinator
from tests.on_disk import full_disk

DAY = datetime.timedelta(days=1)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    found = Coordinator(tmp_path)
    found.join("north")
    yield found
    found.close()


def fits(site: Path) -> bool:
    """Are key and certificate a pair, also for whoever opens the site next?"""
    _, key, certificate = enrol.tls_files(site)
    own = load_pem_private_key(key, None).public_key()
    return bool(own == x509.load_pem_x509_certificate(certificate).public_key())


def test_a_certificate_is_due_when_a_third_of_its_time_is_left(coordinator: Coordinator) -> None:
    site = coordinator.site("north")
    until = valid_until(site)
    assert not is_due(site, until - 125 * DAY)
    assert is_due(site, until - 120 * DAY)
    assert is_due(site, until + DAY)


def test_a_renewal_is_another_key_and_the_same_name(coordinator: Coordinator) -> None:
    site = coordinator.site("north")
    before = {name: (site / name).read_bytes() for name in ("tls.key", "tls.crt", "identity.key")}
    coordinator.membership("north").renew("north")
    after = {name: (site / name).read_bytes() for name in before}
    assert after["tls.key"] != before["tls.key"]
    assert after["tls.crt"] != before["tls.crt"]
    assert after["identity.key"] == before["identity.key"]
    assert (site / "tls.key").stat().st_mode & 0o077 == 0
    assert fits(site)
    coordinator.membership("north").renew("north")  # with the new one


@pytest.mark.parametrize(
    "point",
    [f"{action}:{name}" for action in ("before-write", "before-rename") for name in ("tls.key.next", "tls.crt.next")]
    + [f"before-rename:{name}" for name in ("tls.key", "tls.crt")],
)
def test_a_renewal_that_was_cut_short_leaves_a_pair(
    coordinator: Coordinator, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = coordinator.site("north")
    full_disk(monkeypatch, point)
    with pytest.raises(UserError, match="No space left"):
        coordinator.membership("north").renew("north")
    assert faults._passed
    assert fits(site)
    coordinator.membership("north").renew("north")
    assert fits(site)


def test_a_certificate_that_nobody_asked_for_is_not_kept(tmp_path: Path, coordinator: Coordinator) -> None:
    site, other = coordinator.site("north"), make_site(tmp_path / "x", make_authority(tmp_path / "ca"), "north")
    before = (site / "tls.crt").read_bytes()
    reply = mock.Mock(certificate=(other / "tls.crt").read_bytes())
    with mock.patch.object(Membership, "_call", return_value=reply), pytest.raises(ProtocolError):
        coordinator.membership("north").renew("north")
    assert (site / "tls.crt").read_bytes() == before
    assert fits(site)


def test_what_was_not_issued_here_is_not_renewed_here(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Who joins and is removed in one second is not yet told apart; what comes after that question is the matter here.
    monkeypatch.setattr(service, "issued_before", lambda *_: False)
    coordinator.members.remove("north")
    coordinator.members.add("north", "2" * 64)
    with pytest.raises(Refusal, match="'north' was not issued here: renew it where it came from"):
        coordinator.membership("north").renew("north")


class Clock:
    def __init__(self, at: datetime.datetime) -> None:
        self.now = at.timestamp()

    def __call__(self) -> float:
        return self.now


def test_the_daemon_renews_in_time_and_looks_once_an_hour(coordinator: Coordinator) -> None:
    site, client = coordinator.site("north"), mock.Mock()
    clock = Clock(valid_until(site) - 130 * DAY)
    daemon = Renewal(site, coordinator.address, "north", clock)
    before = (site / "tls.crt").read_bytes()
    daemon.look(client)
    clock.now += 10 * 86400
    daemon.look(client)
    assert (site / "tls.crt").read_bytes() != before
    client.redial.assert_called_once_with()
    clock.now += 200 * 86400
    with mock.patch.object(renewal, "is_due", return_value=False) as asked:
        daemon.look(client)
        daemon.look(client)
        assert asked.call_count == 1
        clock.now += renewal.LOOK_S
        daemon.look(client)
    assert asked.call_count == 2


def test_a_renewal_that_fails_stops_nothing(coordinator: Coordinator) -> None:
    site, client = coordinator.site("north"), mock.Mock()
    coordinator.members.remove("north")
    daemon = Renewal(site, coordinator.address, "north", Clock(valid_until(site) - DAY))
    daemon.look(client)
    client.redial.assert_not_called()
    assert fits(site)
