"""Who may join and who has: the coordinator's file, and what an invitation is good for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator import pki
from coordinator.config import Home, load_home
from coordinator.members import Members
from coordinator.membership import admit
from coordinator.setup import Ports, create_coordinator
from participant.enrol import create_request
from privacy.errors import ProtocolError, Refusal, UserError
from privacy.invitation import proof_input
from privacy.secagg.keys import identity_public
from privacy.wire import joining_pb2 as pb
from tests.certificates import make_authority, make_server
from tests.on_disk import full_disk

SECRET, OTHER = bytes(32), bytes([1]) * 32
LOW_ORDER = (1).to_bytes(32, "little")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Door:
    """A coordinator's end of joining, without a network."""

    def __init__(self, directory: Path) -> None:
        create_coordinator(directory / "c", "newsrooms", "example.org", Ports("127.0.0.1", 7443, 7444))
        self.directory, self.clock = directory, Clock()
        self.home: Home = load_home(directory / "c")
        self.key = Ed25519PrivateKey.generate()
        self.request = create_request(directory, "whatever the request says")

    @property
    def members(self) -> Members:
        """Read anew, as after a restart."""
        return Members(self.home.members, self.clock)

    def message(self, secret: bytes = SECRET, member: str = "north", **other: bytes) -> pb.JoinRequest:
        key = self.key
        proof = key.sign(proof_input(secret, member, other.get("request", self.request)))
        fields = {"identity": identity_public(key), "request": self.request, "proof": proof, **other}
        return pb.JoinRequest(secret=secret, member=member, **fields)

    def join(self, message: pb.JoinRequest) -> pb.JoinReply:
        return admit(self.home, self.members, message)


@pytest.fixture
def door(tmp_path: Path) -> Door:
    found = Door(tmp_path)
    found.members.invite("north", SECRET, 2000)
    return found


def names(certificate: bytes) -> str:
    return x509.load_pem_x509_certificate(certificate).subject.rfc4514_string()


def test_a_site_with_an_invitation_gets_a_certificate_for_the_invited_name(door: Door) -> None:
    reply = door.join(door.message())
    assert names(reply.certificate) == "CN=north"
    assert (reply.coordinator, reply.federation) == ("example.org:7443", "newsrooms")
    [member] = door.members.read().active()
    assert (member.name, member.key) == ("north", identity_public(door.key).hex())


def test_the_secret_is_nowhere_on_the_coordinators_disk(tmp_path: Path) -> None:
    door, secret = Door(tmp_path), b"0123456789abcdef0123456789abcdef"
    door.members.invite("north", secret, 2000)
    door.join(door.message(secret))
    for path in (p for p in door.home.directory.rglob("*") if p.is_file()):
        assert secret not in path.read_bytes()
        assert secret.hex().encode() not in path.read_bytes()


def test_a_lost_answer_is_given_again_to_the_same_keys_and_to_nobody_else(door: Door) -> None:
    first = door.join(door.message())
    assert door.join(door.message()) == first
    with pytest.raises(Refusal, match=r"used already, with other keys.*tell the operator to remove 'north'"):
        door.join(door.message(request=create_request(door.directory, "north")))
    door.key = Ed25519PrivateKey.generate()
    with pytest.raises(Refusal, match="used already, with other keys"):
        door.join(door.message())
    assert len(door.members.read().active()) == 1
    door.clock.now = 2000.0
    with pytest.raises(Refusal, match="expired on 1970-01-01 00:33 UTC"):
        door.join(door.message())


def test_an_unknown_a_late_and_an_invitation_for_another_name_are_refused(door: Door) -> None:
    with pytest.raises(Refusal, match="not known here"):
        door.join(door.message(OTHER))
    with pytest.raises(Refusal, match="for another member, not for 'south'"):
        door.join(door.message(member="south"))
    door.clock.now = 2000.0
    with pytest.raises(Refusal, match="expired on"):
        door.join(door.message())
    assert not door.members.read().members


def test_a_second_invitation_replaces_the_first(door: Door) -> None:
    door.members.invite("north", OTHER, 2000)
    with pytest.raises(Refusal, match="a later one replaced it"):
        door.join(door.message())
    door.join(door.message(OTHER))
    with pytest.raises(Refusal, match="'north' has joined already; remove it first"):
        door.members.invite("north", SECRET, 2000)


def test_without_the_identity_key_there_is_no_proof(door: Door) -> None:
    stranger = Ed25519PrivateKey.generate()
    for proof in (
        b"",
        stranger.sign(proof_input(SECRET, "north", door.request)),
        door.key.sign(proof_input(OTHER, "north", door.request)),
        door.key.sign(proof_input(SECRET, "south", door.request)),
        door.key.sign(proof_input(SECRET, "north", door.request + b"\n")),
    ):
        with pytest.raises(ProtocolError, match="signature of the identity key over this request does not verify"):
            door.join(door.message(proof=proof))


def test_a_key_for_which_anybody_can_sign_is_refused(door: Door) -> None:
    with pytest.raises(ProtocolError, match="identity key of full order"):
        door.join(door.message(identity=LOW_ORDER))


@pytest.mark.parametrize("field", ["identity", "secret"])
def test_a_field_of_another_size_is_refused(door: Door, field: str) -> None:
    message = door.message()
    setattr(message, field, b"short")
    with pytest.raises(ProtocolError, match="a secret and a key of 32 bytes"):
        door.join(message)


def test_what_is_no_certificate_request_does_not_use_the_invitation_up(door: Door) -> None:
    with pytest.raises(ProtocolError, match="expected a certificate request in PEM"):
        door.join(door.message(request=b"not a request"))
    assert not door.members.read().members
    door.join(door.message())


def test_a_key_that_is_another_members_is_refused(door: Door) -> None:
    door.join(door.message())
    door.members.invite("south", OTHER, 2000)
    with pytest.raises(Refusal, match="belongs to 'north' already"):
        door.join(door.message(OTHER, "south"))


def test_a_full_disk_admits_nobody(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch, "before-write:members.jsonl")
    with pytest.raises(UserError, match="No space left"):
        door.join(door.message())
    assert not door.members.read().members
    door.join(door.message())


# --- removed, renewed, with a certificate of their own -------------------------------------------------------------


def test_a_removed_member_gets_no_certificate_and_comes_back_only_by_invitation(door: Door) -> None:
    door.join(door.message())
    assert door.members.renew("north", lambda: "new") == "new"
    door.members.remove("north")
    with pytest.raises(Refusal, match="'north' is not a member"):
        door.members.renew("north", lambda: "another")
    with pytest.raises(Refusal, match="not known here"):
        door.join(door.message())
    with pytest.raises(UserError, match="found 'north'; members: none"):
        door.members.remove("north")
    door.members.invite("north", OTHER, 2000)
    door.join(door.message(OTHER))
    assert [m.name for m in door.members.read().active()] == ["north"]


def test_an_invitation_that_nobody_used_is_withdrawn(door: Door) -> None:
    door.members.remove("north")
    assert not door.members.read().invited
    with pytest.raises(Refusal, match="not known here"):
        door.join(door.message())
    assert not door.members.read().members
    with pytest.raises(UserError, match="found 'north'; members: none"):
        door.members.remove("north")
    door.members.invite("north", OTHER, 2000)
    door.join(door.message(OTHER))
    door.members.remove("north")
    door.members.invite("north", SECRET, 2000)
    door.members.remove("north")  # a removed member that was invited again
    with pytest.raises(Refusal, match="not known here"):
        door.join(door.message())


def test_members_with_their_own_certificate(door: Door) -> None:
    door.join(door.message())
    for name, key in (("north", "2" * 64), ("south", identity_public(door.key).hex())):
        with pytest.raises(Refusal, match="belongs to member 'north' already"):
            door.members.add(name, key)
    door.members.add("south", "2" * 64)
    with pytest.raises(Refusal, match="'south' was not issued here"):
        door.members.renew("south", lambda: "new")
    assert [m.name for m in door.members.read().active()] == ["north", "south"]


@pytest.mark.parametrize(
    "line", [b"no json", b"{}", b'{"kind": "NEW", "member": "x"}', b'{"kind": "REMOVED", "member": "x"}', b"[]"]
)
def test_a_damaged_file_is_refused_with_its_line(door: Door, line: bytes) -> None:
    with door.home.members.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(UserError, match=r"members\.jsonl:2: expected a line about a member") as caught:
        door.members.read()
    assert "backup" in caught.value.hint


def test_half_a_line_of_a_crash_is_cut_off(door: Door) -> None:
    with door.home.members.open("ab") as file:
        file.write(json.dumps({"kind": "REMOVED"}).encode()[:9])
    assert door.members.read().invited
    assert door.home.members.read_bytes().endswith(b"}\n")


# --- a new coordinator ---------------------------------------------------------------------------------------------


def test_init_never_replaces_a_coordinator_and_goes_on_where_it_was_cut_short(tmp_path: Path) -> None:
    ports, directory = Ports("127.0.0.1", 7443, 7444), tmp_path / "c"
    key, authority = create_coordinator(directory, "newsrooms", "example.org", ports)
    with pytest.raises(UserError, match="expected no coordinator here yet, found one"):
        create_coordinator(directory, "newsrooms", "example.org", ports)
    (directory / "coordinator.toml").unlink()
    assert create_coordinator(directory, "newsrooms", "example.org", ports) == (key, authority)
    (directory / "coordinator.toml").unlink()
    (directory / "ca.crt").unlink()  # as if cut between the authority's key and its certificate
    assert create_coordinator(directory, "newsrooms", "example.org", ports)[0] == key
    assert load_home(directory).settings.join_listen == "127.0.0.1:7444"
    for name in ("identity.key", "ca.key", "tls.key", "coordinator.toml"):
        assert (directory / name).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("host", ["", "a b", 'a"', "a/b", "a\nb"])
def test_a_host_that_is_none_makes_nothing(tmp_path: Path, host: str) -> None:
    with pytest.raises(UserError, match="expected a host name or an address"):
        create_coordinator(tmp_path / "c", "newsrooms", host, Ports("127.0.0.1", 7443, 7444))
    assert not (tmp_path / "c").exists()


def test_addresses_of_ipv6_stand_in_brackets(tmp_path: Path) -> None:
    create_coordinator(tmp_path / "c", "newsrooms", "2001:db8::1", Ports("::", 7443, 7444))
    settings = load_home(tmp_path / "c").settings
    assert (settings.address, settings.listen) == ("[2001:db8::1]:7443", "[::]:7443")


def test_what_init_leaves_in_comments_is_a_configuration(tmp_path: Path) -> None:
    create_coordinator(tmp_path / "c", "newsrooms", "example.org", Ports("127.0.0.1", 7443, 7444))
    path = tmp_path / "c" / "coordinator.toml"
    path.write_text(re.sub(r"^#(\w+ = |\[)", r"\1", path.read_text(), flags=re.MULTILINE))
    settings = load_home(tmp_path / "c").settings
    assert (settings.metrics_listen, settings.web.listen, settings.keep_uploads) == ("9464", "8080", False)


# --- the coordinator's own certificate -----------------------------------------------------------------------------


def test_the_coordinators_certificate_is_renewed_in_time_for_the_same_key_and_hosts(door: Door) -> None:
    directory = door.home.directory
    assert not pki.is_server_due(directory)
    make_server(directory, ["example.org", "192.0.2.1"], days=4)  # of 13 days, 9 are over
    before, key = (directory / "tls.crt").read_bytes(), (directory / "tls.key").read_bytes()
    assert pki.is_server_due(directory)
    pki.renew_server(directory)
    after = (directory / "tls.crt").read_bytes()
    assert (directory / "tls.key").read_bytes() == key
    old, new = map(x509.load_pem_x509_certificate, (before, after))
    assert new.public_key() == old.public_key()
    assert new.subject == old.subject
    names = x509.SubjectAlternativeName
    assert new.extensions.get_extension_for_class(names) == old.extensions.get_extension_for_class(names)
    assert not pki.is_server_due(directory)


def test_a_coordinators_certificate_of_another_authority_is_left_alone(door: Door, tmp_path: Path) -> None:
    other = make_authority(tmp_path / "ca")
    make_server(other, days=0.1)
    (door.home.directory / "tls.crt").write_bytes((other / "tls.crt").read_bytes())
    assert not pki.is_server_due(door.home.directory)
    (door.home.directory / "ca.key").unlink()
    assert not pki.is_server_due(door.home.directory)
