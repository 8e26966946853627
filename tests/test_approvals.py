"""Consent to plans: by name, by an approval of the very plan, or by what the site's file admits; and nobody else's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.members import Members
from coordinator.report import report
from participant import approvals
from participant.approvals import approve, consider, is_approved
from participant.config import load_home
from participant.daemon import TELL_S, Daemon
from privacy.errors import UserError
from privacy.wire import federation_pb2 as pb
from tests.charging import PRIVACY, Silent, World, offered
from tests.hostile import ANSWER_S, Hostile

OPEN = '[policy.admits]\nbases = ["tiny"]\ndatasets = ["toy"]\n'


@pytest.fixture
def site(world: World) -> World:
    """A site whose file names no plan."""
    return policy(world, "")


def policy(world: World, text: str) -> World:
    """Put keys, or tables, into [policy]."""
    world.configure("")
    path = world.directory / "participant.toml"
    path.write_text(path.read_text().replace('plans = ["*"]\n', "") + text)
    return world


def changed() -> Any:
    before = offered("quiet")
    after = before.toml.replace(b"learning_rate = 0.001", b"learning_rate = 0.002")
    assert after != before.toml
    return replace(before, toml=after)


def daemon(world: World) -> Daemon:
    return Daemon(world.site, Silent())


# --- one plan at a time --------------------------------------------------------------------------------------------


def test_a_plan_waits_until_it_is_approved_and_reads_nothing_before(site: World) -> None:
    records = (site.directory / "data.jsonl").read_bytes()
    (site.directory / "data.jsonl").unlink()
    assert daemon(site)._consider(offered("quiet")) == "waiting"
    assert "no consent here" in site.site.notes()["quiet"]["reason"]
    assert "veilsum-participant approve" in site.site.notes()["quiet"]["reason"]
    assert site.kinds() == []
    (site.directory / "data.jsonl").write_bytes(records)
    assert consider(site.site, offered("quiet")).state == "waiting"
    approve(load_home(site.directory), "quiet")
    assert consider(site.site, offered("quiet")).state == "admitted"
    found = daemon(site)
    with pytest.raises(AttributeError):  # it goes on to say that it is ready, to a client that has no connection
        found._consider(offered("quiet"))
    assert site.trained == [("quiet", "started")]


def test_a_plan_that_changed_waits_for_another_approval(site: World) -> None:
    consider(site.site, offered("quiet"))
    approve(load_home(site.directory), "quiet")
    assert daemon(site)._consider(changed()) == "waiting"
    assert site.trained == []
    consider(site.site, changed())
    approve(load_home(site.directory), "quiet")
    assert consider(site.site, changed()).state == "admitted"
    assert daemon(site)._consider(offered("quiet")) == "waiting"


def test_what_is_approved_is_what_was_shown(site: World) -> None:
    home = load_home(site.directory)
    with pytest.raises(UserError, match="expected a plan that was shown, found 'quiet'; shown: none") as caught:
        approve(home, "quiet")
    assert "veilsum-participant plans" in caught.value.hint
    shown = consider(site.site, offered("quiet")).file
    for name in ("../quiet", "quie", ""):
        with pytest.raises(UserError, match="shown: quiet"):
            approve(home, name)
    with pytest.raises(UserError, match=f"expected digest {'0' * 16}…, found {shown.digest.hex()[:16]}"):
        approve(home, "quiet", "0" * 64)
    assert not is_approved(home, shown)
    assert approve(home, "quiet", shown.digest.hex()).digest == shown.digest
    assert is_approved(home, shown)
    assert not is_approved(home, consider(site.site, changed()).file)


def test_an_approval_does_not_stand_above_the_sites_own_rules(site: World) -> None:
    policy(site, "")
    consider(site.site, offered("quiet"))
    approve(load_home(site.directory), "quiet")
    path = site.directory / "participant.toml"
    path.write_text(path.read_text().replace("min_cohort = 3", "min_cohort = 5"))
    found = consider(site.site, offered("quiet"))
    assert (found.state, "demands at least 5" in found.reason) == ("refused", True)
    assert daemon(site)._consider(offered("quiet")) == "refused"


def test_a_plan_that_is_over_is_said_to_be(site: World) -> None:
    found = consider(site.site, replace(offered("quiet", "cancelled"), reason="wrong\n\x1blabels"))
    assert (found.state, found.reason) == ("cancelled", r"wrong\n\x1blabels")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"3"])
def test_a_damaged_file_of_approvals_admits_nothing(site: World, content: bytes) -> None:
    (site.directory / approvals.APPROVED).write_bytes(content)
    with pytest.raises(UserError, match=r"approved\.json: expected approved plans"):
        is_approved(load_home(site.directory), consider(policy(site, OPEN).site, offered("quiet", "cancelled")).file)
    assert daemon(site)._consider(offered("quiet")) == "failed"


# --- what the site's file admits -----------------------------------------------------------------------------------


def test_a_plan_that_is_admitted_needs_nobody(world: World) -> None:
    policy(world, OPEN)
    assert consider(world.site, offered("quiet")).reason == "by participant.toml"


# --- hours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hours", ["8:00-9:00", "24:00-06:00", "20:60-06:00", "20:00", "20:00-06:00 "])
def test_what_are_no_hours(world: World, hours: str) -> None:
    policy(world, f'hours = "{hours}"\n')
    with pytest.raises(UserError, match=r"key 'policy\.hours'"):
        load_home(world.directory)


def test_a_training_waits_for_its_hour_and_what_is_trained_does_not(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy(world, 'hours = "20:00-06:00"\n' + OPEN)
    noon, night = (time.struct_time((2026, 1, 1, hour, 0, 0, 0, 1, 0)) for hour in (12, 23))
    monkeypatch.setattr("participant.daemon.time.localtime", lambda: noon)
    found = daemon(world)
    assert found._consider(offered("quiet")) == "waiting"
    assert world.kinds() == []
    monkeypatch.setattr("participant.daemon.time.localtime", lambda: night)
    found._prepare(world.job("quiet", PRIVACY), 1)
    monkeypatch.setattr("participant.daemon.time.localtime", lambda: noon)
    found._prepare(world.job("quiet", PRIVACY), 1)
    assert len(world.trained) == 1


# --- the reason at the other end -----------------------------------------------------------------------------------


def test_the_operator_is_told_once_and_again_after_a_while(site: World, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("participant.daemon.time.monotonic", lambda: now[0])
    client = Silent()
    found = Daemon(site.site, client)
    for _ in range(3):
        found._consider(offered("quiet"))
    assert [waiting for waiting, _ in client.declined] == [True]
    assert client.declined[0][1] == site.site.notes()["quiet"]["reason"]
    now[0] += TELL_S
    found._consider(offered("quiet"))
    assert len(client.declined) == 2
    found._consider(offered("quiet", "cancelled"))
    assert len(client.declined) == 2


def test_the_operator_hears_that_the_reason_is_gone_when_the_training_begins(site: World) -> None:
    client = Silent()
    found = Daemon(site.site, client)
    found._consider(offered("quiet"))
    assert [reason != "" for _, reason in client.declined] == [True]
    for _ in range(2):  # as after an approval
        found._prepare(site.job("quiet", PRIVACY), 1)
    assert client.declined[1:] == [(True, "")]
    found._prepare(site.job("loud", PRIVACY), 1)  # of which nothing was said
    assert len(client.declined) == 2


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Hostile]:
    found = Hostile(tmp_path, large=False)
    yield found
    found.close()


def test_the_operator_sees_who_takes_no_part_and_why(hostile: Hostile) -> None:
    engine, caller = hostile.world.engine, hostile.caller(1)
    name, member = hostile.world.names[1], 1
    plan = hostile.world.digest

    def say(digest: bytes, reason: str, waiting: bool = True) -> None:
        caller.stub.Decline(pb.DeclineRequest(plan=digest, waiting=waiting, reason=reason), timeout=ANSWER_S)

    say(plan, "no consent\nhere" + "x" * 600)
    assert engine.declined[plan, member].startswith(r"waiting: no consent\nherexxx")
    assert len(engine.declined[plan, member]) < 520
    say(plan, "weak", waiting=False)
    assert f'"declined": {{"{name}": "refused: weak"}}' in report(engine, "")
    with pytest.raises(grpc.RpcError) as caught:
        say(bytes(32), "of no plan")
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert list(engine.declined) == [(plan, member)]
    say(plan, "")
    say(plan, "")
    assert engine.declined == {}


def test_a_removed_member_has_no_call_left_in_rounds_that_run(hostile: Hostile) -> None:
    caller, name = hostile.caller(1), hostile.world.names[1]
    caller.stub.Hello(pb.HelloRequest(), timeout=ANSWER_S)
    members = Members(hostile.home.members, time.time)
    members.add(name, "5" * 64)
    caller.stub.Hello(pb.HelloRequest(), timeout=ANSWER_S)
    members.remove(name)
    for call, request in (
        (caller.stub.Hello, pb.HelloRequest()),
        (caller.stub.ListPlans, pb.ListPlansRequest()),
        (caller.stub.BeginUpload, hostile.uploads[1].request),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(request, timeout=ANSWER_S)  # type: ignore[arg-type]
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert caught.value.details() == f"'{name}' was removed from this federation"
    hostile.caller(2).stub.Hello(pb.HelloRequest(), timeout=ANSWER_S)
