"""What one member, or the coordinator, must not be able to stop for good."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import participant.patience
from coordinator import phases
from privacy.secagg.dialogue import FromMember
from privacy.secagg.messages import ProjectionShare
from privacy.secagg.signed import Signed, sign
from tests.on_disk import Direct, OnDisk


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnDisk]:
    monkeypatch.setattr(participant.patience, "BACKOFF_S", (0.0,))
    found = OnDisk(tmp_path)
    found.ready()
    yield found
    found.engine.store.close()


def lie_about_the_projection(world: OnDisk, member: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this member's M13 has another value."""
    client, send = world.daemons[member].client, Direct.send

    def lying(self: Direct, round_id: bytes, message: FromMember) -> None:
        if self is client and isinstance(message, Signed) and isinstance(message.body, ProjectionShare):
            body = replace(message.body, value=message.body.value ^ 1)
            message = sign(world.site(member).identity, member, body, round_id)
        send(self, round_id, message)

    monkeypatch.setattr(Direct, "send", lying)


def test_a_member_that_lies_about_its_projection_does_not_stop_the_coordinator(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other members' rounds wait for the same worker, and the sites for a release that verifies."""
    lie_about_the_projection(world, 4, monkeypatch)
    world.run()
    assert isinstance(world.phase, phases.Released)
    for _ in range(5):
        if not world.work():
            break
    assert not world.work(), "this work is never done"
    (cohort,) = world.engine.released(world.digest, 1)
    assert cohort.evidence.projection == ()
    manifest = world.engine.home.releases / "toy" / "stage-1" / "manifest.json"
    assert '"projection": "inconclusive"' in manifest.read_text()
