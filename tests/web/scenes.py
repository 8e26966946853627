"""A coordinator in the middle of its work, the same each time, for pictures and for what a browser makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator import phases
from coordinator.web.app import make_page
from privacy.job import Job
from privacy.plan import parse_plan
from privacy.web.server import serving
from privacy.web.settings import Web
from privacy.wire.transport import chunk_bytes
from tests.hostile import large_plan
from tests.on_disk import OnDisk
from tests.staged import run_stage
from tests.test_evaluation_stage import evaluate, plan

#: Rows of a head that makes an upload of several chunks, and seconds since the silent site was heard of.
HEAD, SILENCE_S = 1_000_000, 25.0


def busy_coordinator(directory: Path, patch: pytest.MonkeyPatch) -> OnDisk:
    """Plan "toy" has a release with an evaluation; of "headlines" three sites uploaded, one is at it, one is silent."""
    world = OnDisk(directory, plan=plan())
    run_stage(world, 1)
    evaluate(world, patch)
    world.run()
    _second_plan(world)
    world.ready()
    world.run(phases.Uploading)
    for member in (0, 1, 4):
        world.tell(member)
        _count(world, member)
    _begin_upload(world, 2)
    _count(world, 2)
    world.rounds[-1].deadline -= SILENCE_S
    return world


def _second_plan(world: OnDisk) -> None:
    raw = large_plan(HEAD).replace(b'name = "toy"', b'name = "headlines"', 1)
    world.plan = raw.replace(b"upload_s = 2", b"upload_s = 900")
    world.later, world.stage, world.seen = 0.0, 1, {}
    world.job = Job.of(parse_plan(world.plan), world.engine.roster)
    world.digest = world.engine.submit_plan(world.plan)
    for member in range(world.n):
        world.restart(member)
        world.put_vector(member, np.zeros(world.job.quantizer.total_size, np.int32))


def _begin_upload(world: OnDisk, member: int) -> None:
    """The first half of a member's upload is there."""
    sent: list[Any] = []
    client: Any = world.daemons[member].client
    client.upload = lambda *about: sent.append(about)
    world.tell(member)
    [(round_id, message, spool, bits)] = sent
    content, size = spool.read_bytes(), chunk_bytes(bits)
    world.uploads.begin(round_id, message)
    for offset in range(0, len(content) // 2, size):
        world.uploads.put(round_id, member, offset, memoryview(content)[offset : offset + size])


def _count(world: OnDisk, member: int) -> None:
    """What the service would have counted: there is none between these sites and this engine."""
    row = world.rounds[-1].row
    here, _of, _ = world.uploads.progress(row.id).get(member, (world.job.quantizer.total_size * 3, 0, 0.0))
    world.engine.store.count_traffic(row.id, member, sent=here)


@contextmanager
def page_of(world: OnDisk) -> Iterator[int]:
    """Its status page; yields the port."""
    page = make_page(world.engine, world.uploads)
    with serving(Web(listen="0"), page, world.directory) as port:
        yield port
