"""A plan with several stages on a real engine with real sites, and what plain numpy makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from participant.fetch import fetch_release
from privacy.adapter import Tensors, flatten, load_peft, start_adapter, start_digest, trained_part
from privacy.audit import audit_release
from tests.on_disk import OnDisk
from tests.test_end_to_end import toy_plan


def staged(stages: int, stage_s: int = 100_000) -> bytes:
    """The toy plan with so many stages."""
    raw = toy_plan().replace(b'task = "classification"', b'task = "classification"\nstages = %d' % stages)
    return raw + b"stage_s = %d\n" % stage_s


def released(world: OnDisk, stage: int) -> Path:
    return world.engine.home.releases / "toy" / f"stage-{stage}"


def manifest(world: OnDisk, stage: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((released(world, stage) / "manifest.json").read_bytes())
    return found


def flat(world: OnDisk, tensors: Tensors) -> NDArray[np.float32]:
    return flatten(trained_part(tensors, world.job.layout), world.job.layout)


def plain_release(world: OnDisk, stage: int) -> NDArray[np.float64]:
    """What the stages up to this one give in plain numpy: start + sum over stages of server_lr * weighted mean."""
    plan = world.job.plan
    found = flat(world, start_adapter(plan.adapter)).astype(np.float64)
    size, qmax = world.job.quantizer.size, world.job.quantizer.qmax
    for number in range(1, stage + 1):
        members = [m for survivors, _ in world.totals(number) for m in survivors]
        vectors = [world.vector_of(m, number).astype(np.int64)[:size] for m in members]
        weight = sum(100 + m for m in members)
        scale = plan.round.clip * plan.round.max_weight / (qmax * weight)
        found = (found + plan.aggregation.server_lr * np.sum(vectors, axis=0) * scale).astype(np.float32)
    return found.astype(np.float64)


def assert_released(world: OnDisk, stage: int) -> None:
    """A stage's release is the plain computation, an audit accepts it, and each site computes the same bits."""
    audit_release(released(world, stage), world.job.roster_file.hash)
    adapter = load_peft(released(world, stage) / "adapter")
    assert np.abs(flat(world, adapter) - plain_release(world, stage)).max() < 1e-6
    for i in range(world.n):
        site = world.site(i)
        assert fetch_release(site, world.daemons[i].client, world.job, stage)
        own = load_peft(site.release_directory("toy", stage) / "adapter")
        assert start_digest(own) == start_digest(adapter)


def run_stage(world: OnDisk, stage: int) -> None:
    """A whole stage with everybody."""
    if stage > 1:
        world.begin(stage)
        world.train()
    world.ready()
    world.run()
