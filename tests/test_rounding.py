"""The same training rounds the same way: plan, stage and member fix the vector, and members round apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from participant import prepare
from participant.store import Trained
from privacy.job import Job
from tests.charging import World, plan

DELTA = np.float32(0.1)


def kept(world: World, job: Job, stage: int = 1) -> NDArray[np.int32]:
    delta = np.linspace(-DELTA, DELTA, job.quantizer.size, dtype=np.float32)
    trained = Trained(job.plan_file.digest.hex(), 20, 0.5, 1.0, 20)
    prepare._keep(world.site, job, stage, delta, trained)
    return np.fromfile(world.site.store.quantised(job.plan.name, stage).path, "<i4")


def test_the_same_training_gives_the_same_vector(world: World) -> None:
    job = world.job()
    first = kept(world, job)
    assert np.array_equal(kept(world, job), first)
    other = Job.of(type(job.plan_file)(job.plan, plan() + b"# another file\n"), job.roster_file)
    for changed in (kept(world, job, 2), kept(world, other)):
        apart = np.abs(changed - first)
        assert apart.sum() > 0
        assert apart.max() == 1


def test_members_round_apart(world: World) -> None:
    site, job = world.site, world.job()
    keys = set()
    for member in (0, 1, 2, 256, 999):  # a roster may have a thousand
        site.me = member
        keys.add(prepare.rounding_key(job, 1, site.me))
    assert len(keys) == 5
