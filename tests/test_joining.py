"""A site joins over real TLS: what is on its disk after every mishap, and what a stranger at the port gets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import grpc
import pytest
from cryptography import x509

from coordinator import daemon, pki
from coordinator.membership import BURST, MAX_REQUEST
from participant import joining
from participant.config import load_home
from participant.enrol import create_request, own_identity, pending_request
from participant.joining import join, read_address
from privacy import faults
from privacy.console import Unreachable
from privacy.errors import ProtocolError, Refusal, UserError
from privacy.identity import load_identity
from privacy.invitation import Invitation, read_token
from privacy.secagg.keys import identity_public
from privacy.wire import federation_pb2, joining_pb2
from privacy.wire.federation_pb2_grpc import FederationStub
from privacy.wire.joining_pb2_grpc import JoiningStub, MembershipStub
from tests.certificates import make_authority, make_site
from tests.joining import Coordinator
from tests.on_disk import full_disk

SECRETS = ("identity.key", "tls.key")


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    found = Coordinator(tmp_path)
    yield found
    found.close()


def test_a_site_joins_and_its_private_keys_are_in_its_own_directory_only(coordinator: Coordinator) -> None:
    joined = coordinator.join("north")
    site = coordinator.site("north")
    assert (joined.member, joined.federation, joined.coordinator) == ("north", "newsrooms", coordinator.address)
    assert joined.identity == identity_public(load_identity(site))
    settings = load_home(site).settings
    assert (settings.member, settings.coordinator, settings.policy.plans) == ("north", coordinator.address, ())
    for name in SECRETS:
        content = (site / name).read_bytes()
        assert (site / name).stat().st_mode & 0o077 == 0
        for path in (p for p in coordinator.home.directory.rglob("*") if p.is_file()):
            assert content.splitlines()[1] not in path.read_bytes(), path
    assert not (site / "tls.csr").exists()


def test_two_coordinators_do_not_share_an_address(coordinator: Coordinator) -> None:
    """Linux would let them, and calls would then end at one or the other."""
    home = coordinator.home
    with pytest.raises(UserError, match="found it taken") as caught:
        coordinator.on_loop(daemon._start_members(home, load_identity(home.directory), None))
    assert "under 'listen'" in caught.value.hint
    with pytest.raises(UserError, match="found it taken") as caught:
        coordinator.on_loop(daemon._start_joining(home))
    assert "under 'join_listen'" in caught.value.hint


def test_a_site_joins_once(coordinator: Coordinator) -> None:
    coordinator.join("north")
    with pytest.raises(UserError, match="a site that has not joined yet, found its certificate") as caught:
        join(coordinator.site("north"), coordinator.url, coordinator.invite("south"))
    assert "roster show" in caught.value.hint


@pytest.mark.parametrize(
    "point",
    [f"{action}:{name}" for action in ("before-write", "before-rename") for name in (*SECRETS, "tls.csr")]
    + [f"before-rename:{name}" for name in ("participant.toml", "ca.crt", "tls.crt")],
)
def test_a_join_that_was_cut_short_goes_on_with_the_same_keys(
    coordinator: Coordinator, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, site = coordinator.invite("north"), coordinator.site("north")
    full_disk(monkeypatch, point)
    with pytest.raises(UserError, match="No space left"):
        join(site, coordinator.url, token)
    assert not (site / "tls.crt").exists()
    before = {name: (site / name).read_bytes() for name in SECRETS if (site / name).exists()}
    sent = (site / "tls.csr").exists()
    assert join(site, coordinator.url, token).member == "north"
    assert (site / "identity.key").read_bytes() == before.get("identity.key", (site / "identity.key").read_bytes())
    if sent:
        assert (site / "tls.key").read_bytes() == before["tls.key"]
    assert faults._passed


def test_a_lost_answer_does_not_use_the_invitation_up(coordinator: Coordinator) -> None:
    token, site = coordinator.invite("north"), coordinator.site("north")
    with mock.patch.object(joining, "_install", side_effect=Unreachable("cut")), pytest.raises(Unreachable):
        join(site, coordinator.url, token)
    assert [m.name for m in coordinator.members.read().active()] == ["north"]
    join(site, coordinator.url, token)
    kept = coordinator.members.read().members["north"].certificate
    assert (site / "tls.crt").read_text() == kept


def test_an_administrators_file_is_never_replaced(coordinator: Coordinator) -> None:
    site = coordinator.site("north")
    site.mkdir()
    (site / "participant.toml").write_text("# mine\n")
    coordinator.join("north")
    assert (site / "participant.toml").read_text() == "# mine\n"


# --- who is at the other end ---------------------------------------------------------------------------------------


def test_a_coordinator_of_another_authority_hears_nothing(tmp_path: Path, coordinator: Coordinator) -> None:
    (tmp_path / "b").mkdir()
    other = Coordinator(tmp_path / "b")
    try:
        with pytest.raises(Unreachable, match="not of this federation's authority"):
            join(coordinator.site("north"), other.url, coordinator.invite("north"))
        assert not other.home.members.exists()
        assert not coordinator.members.read().members
    finally:
        other.close()


def test_nobody_there_is_said_in_words(coordinator: Coordinator) -> None:
    token = coordinator.invite("north")
    coordinator.on_loop(coordinator.servers[0].stop(0))
    with pytest.raises(Unreachable, match="connection refused: the coordinator is not running there"):
        join(coordinator.site("north"), coordinator.url, token)


def test_an_answer_with_another_certificate_is_not_kept(tmp_path: Path, coordinator: Coordinator) -> None:
    token, site = coordinator.invite("north"), coordinator.site("north")
    good = coordinator.join("south")
    stranger = make_site(tmp_path / "x", make_authority(tmp_path / "ca"), "north")
    own_identity(site)
    another_name = pki.sign_request(coordinator.home.directory, pending_request(site, "north"), "south")
    another_key = pki.sign_request(coordinator.home.directory, create_request(stranger, "north"), "north")
    for certificate in (
        another_name,
        another_key,
        (coordinator.site("south") / "tls.crt").read_bytes(),  # another's
        (stranger / "tls.crt").read_bytes(),  # of another authority
        b"none",
    ):
        reply = joining_pb2.JoinReply(certificate=certificate, coordinator=good.coordinator, federation="f")
        with (
            mock.patch.object(joining, "_ask", return_value=reply),
            pytest.raises(ProtocolError, match="expected a certificate"),
        ):
            join(site, coordinator.url, token)
        assert not (site / "tls.crt").exists()
        assert not (site / "participant.toml").exists()


def test_an_answer_that_makes_no_configuration_is_not_kept(coordinator: Coordinator) -> None:
    token, site, asked = coordinator.invite("north"), coordinator.site("north"), joining._ask

    def answer(address: str, authority: bytes, message: joining_pb2.JoinRequest) -> joining_pb2.JoinReply:
        reply = asked(address, authority, message)
        reply.coordinator = "nowhere"
        return reply

    with (
        mock.patch.object(joining, "_ask", answer),
        pytest.raises(ProtocolError, match=r"makes no configuration.*key 'coordinator'"),
    ):
        join(site, coordinator.url, token)
    assert not (site / "tls.crt").exists()


def test_what_the_coordinator_calls_itself_does_not_reach_a_terminal_as_it_is(coordinator: Coordinator) -> None:
    token, site, asked = coordinator.invite("north"), coordinator.site("north"), joining._ask

    def answer(address: str, authority: bytes, message: joining_pb2.JoinRequest) -> joining_pb2.JoinReply:
        reply = asked(address, authority, message)
        reply.federation = "f\x1b[2J\nmember = 'south'"
        return reply

    with mock.patch.object(joining, "_ask", answer):
        joined = join(site, coordinator.url, token)
    assert joined.federation == r"f\x1b[2J\nmember = 'south'"
    assert load_home(site).settings.member == "north"
    assert "\x1b" not in (site / "participant.toml").read_text()


def test_an_expired_invitation_makes_no_keys(coordinator: Coordinator) -> None:
    with pytest.raises(UserError, match="this invitation expired on"):
        join(coordinator.site("north"), coordinator.url, coordinator.invite("north", 0))
    assert not coordinator.site("north").exists()


def test_an_invitation_without_an_authority_is_refused(coordinator: Coordinator) -> None:
    token = Invitation("f", "north", int(time.time()) + 9, b"no certificate", bytes(32)).token()
    with pytest.raises(UserError, match="expected the certificate of an authority in it"):
        join(coordinator.site("north"), coordinator.url, token)


def test_what_the_coordinator_refuses_is_told_with_its_words(coordinator: Coordinator) -> None:
    token = coordinator.invite("north")
    coordinator.invite("north-2")
    coordinator.members.invite("north", bytes(32), int(time.time()) + 60)
    with pytest.raises(Refusal, match="the coordinator refused: this invitation is not known here, or a later one"):
        join(coordinator.site("north"), coordinator.url, token)


@pytest.mark.parametrize("url", ["", "host", "host:", ":1", "host:0", "host:99999", "host:x", "a/b:1", "http://h:1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UserError, match="expected the address of a coordinator, host:port"):
        read_address(url)


def test_addresses() -> None:
    assert read_address("https://host.example:7444/") == read_address(" host.example:7444 ") == "host.example:7444"


# --- what a stranger gets ------------------------------------------------------------------------------------------


def stranger(coordinator: Coordinator, address: str) -> grpc.Channel:
    """A connection without a client certificate."""
    authority = (coordinator.home.directory / "ca.crt").read_bytes()
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority))


def code(call: object, request: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=10)  # type: ignore[operator]
    return caught.value.code(), caught.value.details() or ""


def test_the_joining_port_has_one_call_and_the_members_port_none_without_a_certificate(
    coordinator: Coordinator,
) -> None:
    with stranger(coordinator, read_address(coordinator.url)) as channel:
        for call, request in (
            (FederationStub(channel).ListPlans, federation_pb2.ListPlansRequest()),
            (MembershipStub(channel).GetRoster, joining_pb2.GetRosterRequest()),
            (MembershipStub(channel).Renew, joining_pb2.RenewRequest()),
        ):
            assert code(call, request)[0] == grpc.StatusCode.UNIMPLEMENTED
    with stranger(coordinator, coordinator.address) as channel:
        assert code(MembershipStub(channel).GetRoster, joining_pb2.GetRosterRequest())[0] == grpc.StatusCode.UNAVAILABLE
        assert code(JoiningStub(channel).Join, joining_pb2.JoinRequest())[0] == grpc.StatusCode.UNAVAILABLE


def test_before_there_is_a_roster_the_members_port_has_no_rounds(coordinator: Coordinator) -> None:
    coordinator.join("north")
    site = coordinator.site("north")
    pair = [(site / name).read_bytes() for name in ("ca.crt", "tls.key", "tls.crt")]
    with grpc.secure_channel(coordinator.address, grpc.ssl_channel_credentials(*pair)) as channel:
        found = code(FederationStub(channel).ListPlans, federation_pb2.ListPlansRequest())
        assert found[0] == grpc.StatusCode.UNIMPLEMENTED
        assert code(JoiningStub(channel).Join, joining_pb2.JoinRequest())[0] == grpc.StatusCode.UNIMPLEMENTED


def test_guesses_are_slow_and_large_requests_are_not_read(coordinator: Coordinator) -> None:
    with stranger(coordinator, read_address(coordinator.url)) as channel:
        stub = JoiningStub(channel)
        large = joining_pb2.JoinRequest(request=bytes(MAX_REQUEST + 1))
        assert code(stub.Join, large)[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        found = [code(stub.Join, joining_pb2.JoinRequest(secret=bytes(32))) for _ in range(int(BURST) + 10)]
    assert {f[0] for f in found[:10]} == {grpc.StatusCode.INVALID_ARGUMENT}
    assert found[-1][0] == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "come back shortly" in found[-1][1]
    assert not coordinator.members.read().members


def test_somebody_who_read_the_invitation_first_keeps_the_site_out_and_the_site_says_so(
    tmp_path: Path, coordinator: Coordinator
) -> None:
    token = coordinator.invite("north")
    join(tmp_path / "thief", coordinator.url, token)
    with pytest.raises(Refusal, match=r"used already, with other keys.*somebody else has read it"):
        join(coordinator.site("north"), coordinator.url, token)
    assert read_token(token).member == "north"


def test_the_name_in_a_certificate_is_the_invited_one_whatever_the_request_says(coordinator: Coordinator) -> None:
    site = coordinator.site("north")
    site.mkdir()
    (site / "tls.csr").write_bytes(create_request(site, "south"))
    coordinator.join("north")
    subject = x509.load_pem_x509_certificate((site / "tls.crt").read_bytes()).subject
    assert subject.rfc4514_string() == "CN=north"
