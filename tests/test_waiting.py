"""A site that is ready and has no cohort yet: what it does in the meantime, and what others see of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.contextvars import bound_contextvars

from coordinator import phases, report, service
from participant import daemon as module
from participant.client import OfferedPlan, seen_hash
from participant.policy import Waits
from privacy.encoding import encode
from privacy.job import Job
from privacy.plan import parse_plan
from privacy.secagg.dialogue import ToMember
from privacy.wire import federation_pb2 as pb
from tests.hostile import Hostile
from tests.on_disk import Direct, OnDisk
from tests.test_end_to_end import SITE

LATE = 4


class Enough(BaseException):
    """The daemon has run for as long as the test needs."""


class Asked:
    """What the daemon of one site asked for, poll by poll; an hour passes with each that brings nothing."""

    def __init__(self, world: OnDisk, most: int, each: Callable[[], None] = lambda: None) -> None:
        self.world, self.most, self.each = world, most, each
        self.plans: list[bytes] = []
        self.looked = 0

    def next(self, client: Direct, plan: bytes, stage: int, seen: bytes) -> tuple[bytes, ToMember] | None:
        self.plans.append(plan)
        if len(self.plans) > self.most:
            raise Enough
        self.each()
        self.world.wait(3600)
        found = self.world.engine.message_for(plan, stage, client.me)
        if found is None or seen_hash(found[1]) == seen:
            return None
        return found

    def look(self, _client: Direct) -> None:
        self.looked += 1


@pytest.fixture
def late(tmp_path: Path) -> OnDisk:
    """Everybody but one is released; that one comes now, and has a vector."""
    world = OnDisk(tmp_path, site_toml=SITE.replace('plans = ["toy"]', 'plans = ["toy", "second"]'))
    world.ready(0, 1, 2, 3)
    world.wait(10)
    world.run()
    assert world.totals()[0][0] == (0, 1, 2, 3)
    return world


def another(world: OnDisk, name: str, member: int = LATE) -> bytes:
    """A second plan, for which a member has trained; its digest."""
    raw = world.plan.replace(b'name = "toy"', f'name = "{name}"'.encode(), 1)
    digest = world.engine.submit_plan(raw)
    world.put_vector(member, world.vector_of(member), Job.of(parse_plan(raw), world.engine.roster))
    return digest


def run(world: OnDisk, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon of the late site, as the command runs it, until it has asked often enough."""
    monkeypatch.setattr(module, "IDLE_S", 0.0)
    monkeypatch.setattr(module, "Renewal", lambda *_: asked)
    monkeypatch.setattr(Direct, "hello", lambda _self: None, raising=False)
    monkeypatch.setattr(Direct, "next", lambda client, *about: asked.next(client, *about), raising=False)
    with bound_contextvars(member=""), pytest.raises(Enough):  # as before for whoever comes next
        world.daemons[LATE].run()


def test_a_site_without_a_cohort_goes_on_with_other_plans(late: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    other = another(late, "second")
    asked = Asked(late, 20)
    run(late, asked, monkeypatch)
    assert {late.digest, other} == set(asked.plans)
    assert LATE in late.engine.store.ready(late.digest, 1)
    assert LATE in late.engine.store.ready(other, 1)
    assert asked.looked >= 5, "a certificate that runs out is renewed meanwhile"
    notes = late.site(LATE).notes()
    assert [notes[name]["state"] for name in ("toy", "second")] == ["ready", "ready"]
    assert notes["toy"]["reason"].startswith("1 of 5 members are ready")


def test_a_site_that_withdraws_its_consent_does_not_wait_on(late: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    def withdraw() -> None:
        def refuse(*_: object, **__: object) -> None:
            raise Waits("plan 'toy' has no consent here")

        monkeypatch.setattr(module, "admit", refuse)

    asked, states = Asked(late, 12, withdraw), []
    consider = module.Daemon._consider

    def considered(daemon: module.Daemon, offered: OfferedPlan) -> str:
        states.append(consider(daemon, offered))
        if len(states) > 4:
            raise Enough
        return states[-1]

    monkeypatch.setattr(module.Daemon, "_consider", considered)
    run(late, asked, monkeypatch)
    assert len(asked.plans) == 1, "asked while there was consent, and no more"
    assert states == ["ready", *["waiting"] * 4]
    assert LATE not in late.engine.store.ready(late.digest, 1), "no round is opened with who left"


def test_who_works_on_one_plan_is_not_waited_for_in_another(late: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = late.daemons[LATE]
    asked = Asked(late, 1)
    monkeypatch.setattr(Direct, "next", lambda client, *about: asked.next(client, *about), raising=False)
    assert daemon._consider(OfferedPlan(late.plan, "released", "", 1)) == "ready"
    assert LATE in late.engine.store.ready(late.digest, 1)

    raw = late.plan.replace(b'name = "toy"', b'name = "second"', 1)
    late.engine.submit_plan(raw)
    seen: list[bool] = []

    def prepare(*_: object) -> None:
        seen.append(LATE in late.engine.store.ready(late.digest, 1))
        raise Enough

    monkeypatch.setattr(module, "prepare", prepare)
    with pytest.raises(Enough):
        daemon._consider(OfferedPlan(raw, "open", "", 1))
    assert seen == [False], "the training may take hours"
    found = json.loads(report.report(late.engine, "toy"))
    assert list(found["declined"].values()) == ["waiting: this site works on plan 'second' first"]
    assert list(found["declined_todo"].values()) == ["wait: it says again that it is ready"]
    monkeypatch.undo()
    monkeypatch.setattr(Direct, "next", lambda *_: None, raising=False)
    assert daemon._consider(OfferedPlan(late.plan, "released", "", 1)) == "ready"
    assert LATE in late.engine.store.ready(late.digest, 1)
    assert not late.engine.declined
    assert late.sent(LATE) == []


def test_an_aborted_round_is_told_once_however_often_a_site_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = OnDisk(tmp_path)
    world.away = {0, 1, 2}
    world.ready()
    for _ in range(4):
        world.wait(100)
        world.work()
    aborted = [r for r in world.engine.rounds.values() if isinstance(r.machine.phase, phases.Aborted)]
    assert aborted
    told: list[bytes] = []
    heard = module.Daemon._hear

    def hear(daemon: module.Daemon, job: Job, stage: int, run: object, round_id: bytes, message: ToMember) -> object:
        told.append(encode(message, ToMember))
        return heard(daemon, job, stage, run, round_id, message)  # type: ignore[arg-type]

    monkeypatch.setattr(module.Daemon, "_hear", hear)
    run(world, Asked(world, 12), monkeypatch)
    assert len(told) == len(set(told)), "the same ending came twice"


def test_a_poll_ends_when_a_round_of_another_plan_waits(tmp_path: Path) -> None:
    """Else who waits in many plans would miss a short join_s."""
    hostile = Hostile(tmp_path, large=False)
    try:
        engine, stub = hostile.world.engine, hostile.caller(1).stub
        request = pb.NextRequest(plan=hostile.world.digest, stage=1, seen=seen_hash(hostile.world.message_for(1)[1]))
        poll = stub.Next.future(request, timeout=service.POLL_S + 10)
        time.sleep(service.TURN_S / 2)
        other = engine.submit_plan(hostile.world.plan.replace(b'name = "toy"', b'name = "second"', 1))
        for member in range(hostile.world.n):
            engine.ready(other, 1, member)
        began = time.monotonic()
        assert not poll.result().HasField("message")
        assert time.monotonic() - began < service.POLL_S / 2
        (round_of_other,) = engine.stage_rounds(other, 1)
        assert round_of_other.asks_to_join(1)
        began = time.monotonic()
        assert not stub.Next(request, timeout=service.POLL_S + 10).HasField("message")
        assert service.TURN_S * 0.9 < time.monotonic() - began < service.POLL_S / 2, "no busy loop"
        assert stub.Next(pb.NextRequest(plan=other, stage=1), timeout=10).message.HasField("offer")
    finally:
        hostile.close()
