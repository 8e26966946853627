"""The coordinator's engine on a real disk with real sites: restarts, uploads, retries, cohorts, and cancelled plans."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import participant.patience
import participant.running
from coordinator import phases
from coordinator.store import Event
from participant.phases import Stopped
from privacy import merkle
from privacy.console import Unreachable
from privacy.encoding import decode, encode
from privacy.errors import ProtocolError, Refusal, UserError
from privacy.secagg.dialogue import FromMember, ToMember, message_name
from privacy.secagg.messages import MaskedInput, RoundAborted
from privacy.secagg.signed import Signed, sign
from tests.on_disk import Direct, OnDisk
from tests.test_end_to_end import POLICY, toy_plan

THREE = {"policy": dict(POLICY) | {"min_cohort": 3}, "plan": toy_plan().replace(b"min_cohort = 4", b"min_cohort = 3")}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(participant.patience, "BACKOFF_S", (0.0,))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[OnDisk]:
    found = OnDisk(tmp_path)
    found.ready()
    yield found
    found.engine.store.close()


def three(directory: Path, **more: Any) -> OnDisk:
    return OnDisk(directory, 3, **(THREE | more))


# --- restarts ---------------------------------------------------------------------------------------------------------


def told(world: OnDisk) -> list[bytes]:
    """What every member is told now, byte for byte."""
    found = [world.engine.message_for(world.digest, 1, i) for i in range(world.n)]
    return [b"" if f is None else f[0] + encode(f[1], ToMember) for f in found]


def test_a_restart_after_every_event_tells_every_member_the_same(tmp_path: Path) -> None:
    world = three(tmp_path)
    world.ready()
    restarts = 0
    for _ in range(30):
        for step in [*(lambda i=i: world.tell(i) for i in range(3)), world.work]:
            before = len(world.events)
            step()
            if len(world.events) > before:
                expected = told(world)
                world.open()
                assert told(world) == expected
                restarts += 1
    assert isinstance(world.phase, phases.Released)
    assert len(world.phase.shares) == 3
    assert restarts > 18
    world.assert_exact()


def name_of(event: Event) -> str:
    if event.kind != "message":
        return event.kind
    message: FromMember = decode(FromMember, event.payload)  # type: ignore[arg-type]
    return message_name(message)


#: The K-th event of this name is the last thing that the coordinator stores before its power is cut.
CUTS = [("proofs", 1), ("M1", 1), ("M1", 3), ("M3", 3), ("M5", 1), ("M5", 3), ("sum", 1), ("M7", 3), ("M9", 3)]
CUTS += [("M11", 2), ("M11", 3), ("M13", 3)]


@pytest.mark.parametrize(
    ("name", "count"),
    [*CUTS, ("publish", 1)],
    ids=str,
)
def test_a_power_cut_right_after_an_event_was_stored_loses_nothing(tmp_path: Path, name: str, count: int) -> None:
    """Between the event and whatever follows it in memory, on disk or on the wire."""
    world = three(tmp_path)
    cuts = 0

    def cut(event: Event) -> bool:
        nonlocal cuts
        found = name_of(event) == name and [name_of(e) for e in world.events].count(name) == count and not cuts
        cuts += found
        return found

    world.cut = cut
    world.ready()
    world.run()
    assert cuts == 1
    assert isinstance(world.phase, phases.Released)
    assert len(world.phase.shares) == 3
    assert world.rounds[0].row.state == "released"
    assert world.engine.store.plans()[0].state == "released"
    assert (world.engine.home.releases / "toy" / "stage-1" / "manifest.json").exists()
    world.assert_exact()


def test_a_power_cut_right_after_an_abort_was_stored_does_not_end_the_stage(tmp_path: Path) -> None:
    world = three(tmp_path, away={2})
    world.cut = lambda event: event.kind == "close"
    world.ready()
    world.run()
    assert isinstance(world.phase, phases.Aborted)
    world.cut, world.away = lambda _event: False, set()
    for _ in range(10):
        for i in range(3):
            world.tell(i)
        world.wait(1)
    assert [r.row.state for r in world.rounds][:1] == ["aborted"]
    assert len(world.rounds) == 2


# --- uploads ----------------------------------------------------------------------------------------------------------


def upload_of(world: OnDisk, member: int) -> tuple[bytes, Signed[MaskedInput], bytes]:
    """Round, M5 and spool of a member, as its daemon made them."""
    (message,) = [m for m in world.sent(member) if isinstance(m, Signed) and isinstance(m.body, MaskedInput)]
    header = world.rounds[-1].machine.context.header
    found: Signed[MaskedInput] = message
    return header.hash(), found, world.site(member).store.spool("toy", header).read_bytes()


def client(world: OnDisk, member: int) -> Direct:
    found = world.daemons[member].client
    assert isinstance(found, Direct)
    return found


def held_back(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, Signed[MaskedInput], bytes]:
    """Member 4 has masked its vector, and nothing of it has arrived."""
    world.run(phases.Uploading)
    with monkeypatch.context() as patch:
        patch.setattr(Direct, "put", lambda *_: None)
        world.tell(4)
    return upload_of(world, 4)


def test_a_late_upload_is_refused_after_the_phase_closed(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    round_id, message, content = held_back(world, monkeypatch)
    world.away = {4}
    world.run(phases.Signing)
    with pytest.raises(ProtocolError, match="M5 of member 4 in phase Signing: too late"):
        client(world, 4).put(round_id, message, content)
    assert 4 not in world.engine.store.receipts(round_id)
    world.run()
    assert world.totals()[0][0] == (0, 1, 2, 3)
    world.assert_exact()


def test_an_upload_that_is_late_by_its_last_call_is_refused(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun in time, finished too late: U3 is fixed, so it may not be counted, nor get a receipt."""
    round_id, message, content = held_back(world, monkeypatch)
    world.uploads.begin(round_id, message)
    world.uploads.put(round_id, 4, 0, memoryview(content))
    world.away = {4}
    world.run(phases.Signing)
    with pytest.raises(ProtocolError, match="M5 of member 4 in phase Signing: too late"):
        world.uploads.finish(round_id, message)
    assert 4 not in world.engine.store.receipts(round_id)
    with pytest.raises(Refusal, match="shows no upload"):
        world.engine.upload_block(round_id, 4, 0)
    world.run()
    world.assert_exact()


def other_upload(world: OnDisk, member: int) -> tuple[Signed[MaskedInput], bytes]:
    """Another vector of the same member, signed by it, with a root that fits."""
    _, message, content = upload_of(world, member)
    changed = bytes([content[0] ^ 1]) + content[1:]
    body = replace(message.body, root=merkle.root([merkle.leaf_hash(changed)]))
    return sign(world.site(member).identity, member, body, world.rounds[-1].machine.context.header_hash), changed


def test_a_second_different_upload_changes_nothing(world: OnDisk) -> None:
    """It is refused, and the bytes on disk stay."""
    world.run(phases.Signing)
    round_id, message, content = upload_of(world, 4)
    other, changed = other_upload(world, 4)
    with pytest.raises(ProtocolError, match="member 4 begins a second, different upload"):
        client(world, 4).put(round_id, other, changed)
    receipt = world.uploads.receipt(round_id, 4)
    assert receipt is not None
    assert receipt.root == message.body.root
    assert world.engine.store.upload(round_id, 4).read_bytes() == content
    world.run()
    world.assert_exact()


def test_a_second_different_upload_is_refused_while_the_first_is_under_way(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_id, message, content = held_back(world, monkeypatch)
    other, _ = other_upload(world, 4)
    assert world.uploads.begin(round_id, message) == 0
    with pytest.raises(ProtocolError, match="member 4 begins a second, different upload"):
        world.uploads.begin(round_id, other)
    client(world, 4).put(round_id, message, content)
    assert world.uploads.receipt(round_id, 4) is not None


def test_an_upload_with_a_wrong_root_is_refused_and_can_be_sent_again(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_id, message, content = held_back(world, monkeypatch)
    damaged = content[:5] + bytes([content[5] ^ 128]) + content[6:]
    with pytest.raises(ProtocolError, match="upload of member 4 does not have its signed root") as caught:
        client(world, 4).put(round_id, message, damaged)
    assert caught.value.culprit == 4
    assert world.uploads.receipt(round_id, 4) is None
    assert not world.engine.store.upload(round_id, 4).exists()
    client(world, 4).put(round_id, message, content)
    assert world.uploads.receipt(round_id, 4) is not None
    world.run()
    assert world.totals()[0][0] == (0, 1, 2, 3, 4)
    world.assert_exact()


def test_an_upload_is_not_finished_before_all_of_it_is_here(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    round_id, message, content = held_back(world, monkeypatch)
    with pytest.raises(UserError, match="expected BeginUpload first"):
        world.uploads.put(round_id, 4, 0, memoryview(content))
    with pytest.raises(UserError, match="expected BeginUpload first"):
        world.uploads.finish(round_id, message)
    world.uploads.begin(round_id, message)
    for offset, payload in ((0, content[:-1]), (len(content), b"x"), (0, content + b"x")):
        with pytest.raises(ProtocolError, match="chunk of member 4 at"):
            world.uploads.put(round_id, 4, offset, memoryview(payload))
    with pytest.raises(UserError, match=f"expected {len(content)} bytes, found 0"):
        world.uploads.finish(round_id, message)


def test_another_upload_after_a_power_cut_does_not_replace_the_one_that_was_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power goes between the event of M5 and its receipt; then a cheat comes with other bytes."""
    world = OnDisk(tmp_path)
    world.ready()
    world.run(phases.Uploading)
    world.cut = lambda event: event.kind == "message" and name_of(event) == "M5"
    with monkeypatch.context() as patch:
        patch.setattr(participant.running, "patiently", lambda call, *_: call())
        with pytest.raises(Unreachable):
            world.tell(4)
    world.cut = lambda _event: False
    round_id, _, content = upload_of(world, 4)
    other, changed = other_upload(world, 4)
    with pytest.raises(ProtocolError, match="different"):
        client(world, 4).put(round_id, other, changed)
    assert world.engine.store.upload(round_id, 4).read_bytes() == content


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [phases.Joining, phases.Sharing, phases.Uploading, phases.Signing, phases.Unmasking])
def test_a_cancelled_plan_aborts_its_running_round_for_good(world: OnDisk, phase: type) -> None:
    world.run(phase)
    world.engine.cancel_plan("toy", "a mistake")
    assert isinstance(world.phase, phases.Aborted)
    assert world.phase.reason == "plan cancelled: a mistake"
    assert isinstance(world.message_for(0)[1], RoundAborted)
    (plan,) = world.engine.store.plans()
    assert (plan.state, plan.reason) == ("cancelled", "a mistake")
    with pytest.raises(Refusal, match="plan 'toy' is cancelled: a mistake"):
        world.engine.ready(world.digest, 1, 0)
    world.open()
    world.wait(1e6)
    assert len(world.rounds) == 1
    assert isinstance(world.phase, phases.Aborted)


@pytest.mark.parametrize("phase", [phases.Confirming, phases.Projecting, phases.Released])
def test_a_cancelled_plan_never_takes_a_release_back(world: OnDisk, phase: type) -> None:
    world.run(phase)
    world.engine.cancel_plan("toy", "too late")
    assert isinstance(world.phase, phase)
    world.open()
    assert isinstance(world.phase, phase)
    world.run()
    assert world.engine.store.plans()[0].state == "cancelled"
    assert world.rounds[0].row.state == "released"
    world.assert_exact()


def test_a_cancelled_plan_with_a_release_opens_no_further_round(tmp_path: Path) -> None:
    world = OnDisk(tmp_path, 8)
    world.ready(0, 1, 2, 3)
    world.wait(10)
    world.run()
    assert len(world.rounds) == 1
    world.engine.cancel_plan("toy", "enough")
    for i in (4, 5, 6, 7):
        with contextlib.suppress(Refusal):
            world.engine.ready(world.digest, 1, i)
    world.wait(10)
    assert len(world.rounds) == 1


def test_a_plan_that_nobody_knows_is_not_cancelled(world: OnDisk) -> None:
    with pytest.raises(UserError, match="expected the name of a plan, found 'toys'; known: toy"):
        world.engine.cancel_plan("toys", "x")
    with pytest.raises(Refusal, match="no plan with digest 0000000000000000… is known here"):
        world.engine.ready(bytes(32), 1, 0)
    with pytest.raises(Refusal, match="expected stage 1 of plan 'toy', found 2"):
        world.engine.ready(world.digest, 2, 0)


# --- a wrong total at a site ------------------------------------------------------------------------------------------


def test_a_stopped_machine_of_a_refused_outcome_says_nothing_more(world: OnDisk) -> None:
    world.run(phases.Confirming)
    run = world.runs[0]
    assert run is not None
    total = world.engine.store.total(world.rounds[-1].row.id)
    whole = total.read_bytes()
    total.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    said = len(world.sent(0))
    world.tell(0)
    assert isinstance(run.machine.phase, Stopped)
    total.write_bytes(whole)
    world.say(0, *world.message_for(0))
    assert len(world.sent(0)) == said


def test_an_upload_that_was_never_finished_gives_its_place_back(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or members that vanish in mid-upload would in the end leave no place for anybody."""
    round_id, message, _ = held_back(world, monkeypatch)
    world.uploads.begin(round_id, message)
    world.uploads._forget_closed()
    assert len(world.uploads._running) == 1
    world.engine.cancel_plan("toy", "over")
    world.uploads._forget_closed()
    assert not world.uploads._running


def test_a_release_of_an_earlier_version_is_written_anew(world: OnDisk) -> None:
    """Its manifest does not say which evidence it is about; the coordinator must not stumble over it at its start."""
    world.run()
    while world.work():
        pass
    manifest = world.engine.home.releases / "toy" / "stage-1" / "manifest.json"
    written = manifest.read_bytes()
    manifest.write_bytes(written.replace(b'"evidence_sha256"', b'"another_key"'))
    world.open()
    while world.work():
        pass
    assert manifest.read_bytes() == written
