"""What a coordinator may list as releases, and what a site makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import participant.patience
from coordinator import phases
from participant.client import ReleasedCohort
from participant.fetch import audit_blocks, fetch_release
from participant.phases import Checking
from privacy.errors import ProtocolError
from privacy.outcome import Total
from privacy.secagg.transcript import verify_transcript
from tests.on_disk import Direct, OnDisk


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnDisk]:
    found = OnDisk(tmp_path_factory.mktemp("world"))
    found.ready()
    found.run()
    yield found
    found.engine.store.close()


def listed(world: OnDisk) -> ReleasedCohort:
    (cohort,) = world.engine.released(world.digest, 1)
    return ReleasedCohort(cohort.round_id, 1, cohort.evidence)


def fetch(world: OnDisk, monkeypatch: pytest.MonkeyPatch, *offered: ReleasedCohort) -> bool:
    monkeypatch.setattr(participant.patience, "BACKOFF_S", (0.0,))
    monkeypatch.setattr(Direct, "releases", lambda *_: list(offered), raising=False)
    daemon = world.daemons[0]
    return fetch_release(daemon.site, daemon.client, world.job, 1)


def test_a_round_that_is_listed_twice_is_refused(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProtocolError, match="expected each round once"):
        fetch(world, monkeypatch, listed(world), listed(world))


def test_a_total_is_not_replaced_after_it_was_verified(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Totals are read again from the disk, each from a file that its round's id names: two rounds under one id would be
    one file, and the adapter the second total twice."""
    calls: list[Any] = []
    monkeypatch.setattr(Direct, "fetch_total", lambda *found: calls.append(found))
    other = replace(listed(world), round_id=bytes(32))
    with pytest.raises(ProtocolError, match="expected each round once, under the hash of its header"):
        fetch(world, monkeypatch, other)
    assert calls == []


def test_an_honest_list_is_taken(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch(world, monkeypatch, listed(world))
    assert fetch(world, monkeypatch, listed(world))


@pytest.mark.parametrize(
    "block", [(bytes(1 << 20), ()), (b"", (bytes(32),) * 65), (b"", (bytes(33),))], ids=["data", "path", "hash"]
)
def test_a_block_larger_than_there_are_is_refused_before_the_next_is_asked_for(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch, block: Any
) -> None:
    """One of each survivor is held at a time."""
    phase = world.phase
    assert isinstance(phase, phases.HasTotal)
    verified = verify_transcript(world.rounds[-1].machine.context, phase.outcome.transcript)
    taken: list[int] = []

    def blocks(_: Direct, _round: bytes, wanted: Any) -> Iterator[Any]:
        for _ in wanted:
            taken.append(1)
            yield block

    monkeypatch.setattr(Direct, "fetch_blocks", blocks)
    checking, total = Checking(phase.outcome, verified, {}), Total(Path("none"), world.job.quantizer)
    monkeypatch.setattr(Total, "block", lambda *_: np.zeros(1, np.int64))
    with pytest.raises(ProtocolError, match="expected a block of at most"):
        audit_blocks(world.daemons[0].client, world.job, bytes(32), checking, 0, total)
    assert len(taken) == 1
