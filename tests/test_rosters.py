"""From who has joined to a roster that every site approved: what people see, and what is refused before they look."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from coordinator import rosters as drafting
from coordinator.gate import BURST
from participant import rosters
from participant.enrol import create_request, tls_files
from participant.joining import Membership
from participant.site import Site
from privacy.errors import ProtocolError, Refusal, UserError
from privacy.identity import load_identity
from privacy.roster import Roster, RosterFile, parse_roster
from privacy.secagg.keys import identity_public
from privacy.wire import joining_pb2
from privacy.wire.joining_pb2_grpc import MembershipStub
from tests.certificates import certificates_of
from tests.joining import Coordinator

NAMES = ("north", "south", "west")


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    found = Coordinator(tmp_path)
    for name in NAMES:
        found.join(name)
    yield found
    found.close()


def show(coordinator: Coordinator, name: str) -> rosters.Shown:
    return rosters.keep_offered(coordinator.site(name), coordinator.membership(name).roster(), name)


def approve(coordinator: Coordinator, name: str) -> RosterFile:
    show(coordinator, name)
    return rosters.approve(coordinator.site(name), name)


def test_every_site_sees_the_same_words_and_opens_with_what_it_approved(coordinator: Coordinator) -> None:
    coordinator.publish()
    shown = [show(coordinator, name) for name in NAMES]
    assert len({s.words for s in shown}) == 1
    assert len(shown[0].words.split()) == 24
    assert [m["member"] for m in shown[0].members()] == list(NAMES)
    assert [m["key"] for m in shown[0].members()] == [
        identity_public(load_identity(coordinator.site(name))).hex() for name in NAMES
    ]
    assert all(not s.pinned and s.changes is None for s in shown)
    for index, name in enumerate(NAMES):
        with pytest.raises(UserError, match="expected the pinned roster hash") as caught:
            Site.open(coordinator.site(name))
        assert "veilsum-participant roster show" in caught.value.hint
        approve(coordinator, name)
        assert Site.open(coordinator.site(name)).me == index
    again = show(coordinator, "north")
    assert again.pinned
    assert again.changes == ()
    assert not (coordinator.site("north") / rosters.OFFERED).exists()


def test_without_a_roster_there_is_nothing_to_show(coordinator: Coordinator) -> None:
    with pytest.raises(Refusal, match="no roster is published yet"):
        coordinator.membership("north").roster()


def test_a_coordinator_that_puts_another_key_in_this_sites_place_is_refused(coordinator: Coordinator) -> None:
    own = identity_public(load_identity(coordinator.site("north"))).hex()
    coordinator.publish((own, "7" * 64))
    with pytest.raises(Refusal, match=r"has the key 77777777.* for 'north'.*Do not approve it"):
        show(coordinator, "north")
    assert not (coordinator.site("north") / rosters.OFFERED).exists()


def test_a_coordinator_that_shows_each_site_another_roster_is_found_out_by_the_words(coordinator: Coordinator) -> None:
    honest = identity_public(load_identity(coordinator.site("south"))).hex()
    coordinator.publish()
    north = show(coordinator, "north")
    coordinator.publish((identity_public(load_identity(coordinator.site("north"))).hex(), "7" * 64))
    south = show(coordinator, "south")
    assert north.words != south.words
    assert next(m["key"] for m in south.members() if m["member"] == "south") == honest


def test_a_roster_that_the_coordinator_in_it_did_not_sign_is_refused(coordinator: Coordinator) -> None:
    own = identity_public(load_identity(coordinator.home.directory)).hex()
    coordinator.publish((f'coordinator = "{own}"', f'coordinator = "{"7" * 64}"'))
    with pytest.raises(ProtocolError, match="signature over its roster does not verify"):
        coordinator.membership("north").roster()


def test_what_is_approved_is_what_was_shown(coordinator: Coordinator) -> None:
    site = coordinator.site("north")
    with pytest.raises(UserError, match="expected a roster that was shown") as caught:
        rosters.approve(site, "north")
    assert "roster show" in caught.value.hint
    coordinator.publish()
    shown = show(coordinator, "north")
    coordinator.publish(("max_colluders = 1", "max_colluders = 0"))  # after somebody looked
    with pytest.raises(UserError, match=f"expected the roster {'0' * 16}…, found"):
        rosters.approve(site, "north", "0" * 64)
    assert rosters.approve(site, "north", shown.file.hash.hex()).hash == shown.file.hash


def test_an_approval_checks_the_own_key_again(coordinator: Coordinator) -> None:
    coordinator.publish()
    show(coordinator, "north")
    path = coordinator.site("north") / rosters.OFFERED
    own = identity_public(load_identity(coordinator.site("north"))).hex()
    path.write_text(path.read_text().replace(own, "7" * 64))
    with pytest.raises(Refusal, match="Do not approve it"):
        rosters.approve(coordinator.site("north"), "north")


def test_a_site_that_is_not_in_the_roster_is_told_so(coordinator: Coordinator) -> None:
    coordinator.members.remove("west")
    coordinator.publish()
    with pytest.raises(Refusal, match="'west' was removed from this federation"):
        coordinator.membership("west").roster()
    with pytest.raises(Refusal, match="'west' was removed from this federation"):
        coordinator.membership("west").renew("west")
    coordinator.join("east")
    with pytest.raises(Refusal, match="'east' is not a member of the federation"):
        coordinator.membership("east").roster()


def test_who_comes_back_after_a_removal_needs_the_certificate_of_its_return(coordinator: Coordinator) -> None:
    coordinator.publish()
    stolen = coordinator.site("north").rename(coordinator.directory / "stolen")
    time.sleep(1.1)  # dates of certificates have whole seconds
    coordinator.members.remove("north")
    coordinator.join("north")
    coordinator.publish()
    approve(coordinator, "north")
    with pytest.raises(Refusal, match="'north' is from before that member was removed"):
        Membership(stolen, coordinator.address).roster()


# --- what changed --------------------------------------------------------------------------------------------------


def test_every_change_is_a_line() -> None:
    def roster(text: str) -> Roster:
        old, new = text.split("|")
        head = f'federation = "f"\ncoordinator = "{"4" * 64}"\n[policy]\nmax_colluders = 1\nmin_cohort = 3\n'
        members = "".join(f'[[members]]\nname = "{n}"\nkey = "{k * 64}"\n' for n, k in zip("abc", "123", strict=True))
        return parse_roster(f"{head}min_survivors = 3\n{members}".replace(old, new).encode()).roster

    before = roster("x|x")
    for change, line in {
        "x|x": (),
        '"f"|"g"': ("the federation is called 'g', was 'f'",),
        f"{'4' * 64}|{'5' * 64}": ("the coordinator has ANOTHER KEY: is it still the same coordinator?",),
        '"c"|"d"': ("'c' is no longer a member", "'d' is a new member"),
        f"{'3' * 64}|{'6' * 64}": ("'c' has ANOTHER KEY: ask it why",),
        "max_colluders = 1|max_colluders = 0": ("policy: max_colluders is 0, was 1",),
    }.items():
        assert rosters.changes(before, roster(change)) == line
    turned = before.model_copy(update={"members": before.members[::-1]})
    assert rosters.changes(before, turned) == ("the members are in another order",)


def test_a_daemon_waits_for_the_approval_of_another_roster(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator.publish()
    known = approve(coordinator, "north").hash
    coordinator.publish(("max_colluders = 1", "max_colluders = 0"))
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            approve(coordinator, "north")

    monkeypatch.setattr(time, "sleep", sleep)
    rosters.wait_for_approval(coordinator.site("north"), known, "another one")
    assert len(waits) == 3
    rosters.wait_for_approval(coordinator.site("north"), known, "approved while the daemon was busy")
    assert len(waits) == 3


# --- at the coordinator --------------------------------------------------------------------------------------------


def test_a_draft_has_everybody_who_joined_and_the_policy_in_force(coordinator: Coordinator) -> None:
    found = parse_roster(drafting.draft(coordinator.home).encode()).roster
    assert [m.name for m in found.members] == list(NAMES)
    assert (found.federation, found.policy.max_colluders, found.policy.min_survivors) == ("newsrooms", 1, 3)
    coordinator.publish(("min_cohort = 3", "min_cohort = 3\nbits = [24]\nmax_clip = 2.5\nallow_two_members = true"))
    coordinator.members.remove("south")
    again = parse_roster(drafting.draft(coordinator.home).encode()).roster
    assert [m.name for m in again.members] == ["north", "west"]
    assert (again.policy.bits, again.policy.max_clip, again.policy.allow_two_members) == ((24,), 2.5, True)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('name = "west"', 'name = "east"', "found 'east'"),
        ("max_colluders = 1", "max_colluders = 9", "min_survivors: expected at least"),
        ("federation", "fedration", "missing key 'federation'|unknown key 'fedration'"),
    ],
)
def test_a_bad_roster_is_not_published(coordinator: Coordinator, old: str, new: str, reason: str) -> None:
    path = coordinator.home.roster_draft
    path.write_text(drafting.draft(coordinator.home).replace(old, new))
    with pytest.raises(UserError, match=reason):
        drafting.publish(coordinator.home, path)
    assert not coordinator.home.roster.exists()


def test_a_roster_with_other_keys_than_those_that_joined_is_not_published(coordinator: Coordinator) -> None:
    path, text = coordinator.home.roster_draft, drafting.draft(coordinator.home)
    own = identity_public(load_identity(coordinator.home.directory)).hex()
    path.write_text(text.replace(own, "7" * 64))
    with pytest.raises(UserError, match=f"expected this coordinator's key {own[:16]}"):
        drafting.publish(coordinator.home, path)
    north = identity_public(load_identity(coordinator.site("north"))).hex()
    path.write_text(text.replace(north, "7" * 64))
    with pytest.raises(UserError, match="joined with the key they have here, found 'north'") as caught:
        drafting.publish(coordinator.home, path)
    assert "veilsum-coordinator add" in caught.value.hint
    path.write_text(text)
    assert drafting.publish(coordinator.home, path)[1] is False  # no coordinator with its socket runs here
    assert coordinator.home.roster.read_text() == text


# --- counts of rounds outlive a roster -----------------------------------------------------------------------------


def test_counts_of_rounds_follow_their_member_to_its_place_in_another_roster(coordinator: Coordinator) -> None:
    coordinator.publish()
    before = approve(coordinator, "west")
    coordinator.members.remove("north")
    coordinator.publish()
    approve(coordinator, "west")
    site = Site.open(coordinator.site("west"))
    assert [site._index_now(before.hash, member) for member in range(4)] == [None, 0, 1, None]
    assert [site._index_now(site.roster.hash, member) for member in range(3)] == [0, 1, None]
    assert site._index_now(bytes(32), 0) is None


# --- certificates --------------------------------------------------------------------------------------------------


def test_an_expired_certificate_gets_neither_roster_nor_another_certificate(coordinator: Coordinator) -> None:
    with certificates_of(2 / 86400):
        coordinator.join("east")
    membership = Membership(coordinator.site("east"), coordinator.address)
    time.sleep(2.5)
    for call in (membership.roster, lambda: membership.renew("east")):
        with pytest.raises(UserError, match="expected an answer"):
            call()


def test_a_certificate_that_expires_on_an_open_connection_gets_nothing_either(coordinator: Coordinator) -> None:
    with certificates_of(4 / 86400):
        coordinator.join("east")
    coordinator.publish()
    credentials = grpc.ssl_channel_credentials(*tls_files(coordinator.site("east")))
    with grpc.secure_channel(coordinator.address, credentials) as channel:
        stub = MembershipStub(channel)
        assert b"east" in stub.GetRoster(joining_pb2.GetRosterRequest(), timeout=10).toml
        time.sleep(5)
        for call, request in (
            (stub.GetRoster, joining_pb2.GetRosterRequest()),
            (stub.Renew, joining_pb2.RenewRequest(request=create_request(coordinator.site("east"), "east"))),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(request, timeout=10)  # type: ignore[arg-type]
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert caught.value.details() == "the certificate of 'east' has expired"


@pytest.mark.alone  # quotas fill up again with time, so the calls must come fast
def test_the_members_port_counts_calls(coordinator: Coordinator) -> None:
    """The gate of the rounds stands before these calls too."""
    credentials = grpc.ssl_channel_credentials(*tls_files(coordinator.site("north")))
    codes = set()
    with grpc.secure_channel(coordinator.address, credentials) as channel:
        stub = MembershipStub(channel)
        for call in [stub.GetRoster.future(joining_pb2.GetRosterRequest()) for _ in range(int(BURST) + 200)]:
            codes.add(call.code())
    assert grpc.StatusCode.RESOURCE_EXHAUSTED in codes
