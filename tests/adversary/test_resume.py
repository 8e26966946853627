"""An upload that a restarted site goes on with: of this plan, and of the spool that was spent, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator import phases
from privacy.job import Job
from privacy.plan import parse_plan
from privacy.secagg.messages import Header
from tests.on_disk import OnDisk
from tests.test_end_to_end import toy_plan


@pytest.fixture
def world(tmp_path: Path) -> Iterator[OnDisk]:
    found = OnDisk(tmp_path)
    found.ready()
    yield found
    found.engine.store.close()


def header(world: OnDisk) -> Header:
    return world.rounds[-1].machine.context.header


def inbox_of(world: OnDisk) -> tuple[bytes, Any]:
    """Member 0 has spent its delta, and was restarted; M4 of that round."""
    world.run(phases.Uploading)
    found = world.message_for(0)
    world.tell(0)
    world.restart(0)
    return found


def test_an_upload_goes_on_under_its_own_plan_only(world: OnDisk) -> None:
    """Under another plan the file would be that plan's spool, which may be unspent, and M5 would have its length."""
    round_id, inbox = inbox_of(world)
    job = Job.of(parse_plan(toy_plan().replace(b'name = "toy"', b'name = "second"')), world.engine.roster)
    world.site(0).store.spool("second", header(world)).write_bytes(b"masked, and spent in no round")
    world.daemons[0]._hear(job, 1, None, round_id, inbox)
    assert world.sent(0) == []
    world.say(0, round_id, inbox)
    assert len(world.sent(0)) == 1


@pytest.mark.parametrize("content", [None, b"", bytes(93)], ids=["gone", "empty", "another"])
def test_a_spool_that_is_not_the_one_that_was_spent_is_not_sent(world: OnDisk, content: bytes | None) -> None:
    round_id, inbox = inbox_of(world)
    spool = world.site(0).store.spool("toy", header(world))
    spool.unlink()
    if content is not None:
        spool.write_bytes(content)
    world.say(0, round_id, inbox)
    assert world.sent(0) == []
