"""What the stages of a plan are charged with: all of them must be left before the first trains, and each is a job."""

from __future__ import annotations

import numpy as np
import pytest

from participant import prepare
from participant.store import StartNote
from privacy.adapter import start_digest
from privacy.budget import filter as budget_filter
from privacy.budget import terms
from privacy.budget.events import DpSgd
from privacy.errors import Refusal
from privacy.job import Job
from privacy.plan import parse_plan
from privacy.stages import Start, first_start
from tests.charging import BUDGET, PRIVACY, World, admit, plan


def staged_job(world: World, stages: int) -> Job:
    raw = plan("quiet", PRIVACY).replace(b'task = "classification"', b'task = "classification"\nstages = %d' % stages)
    return Job.of(parse_plan(raw), world.site.roster)


def test_the_cost_of_all_stages_must_be_left_before_the_first_trains(world: World) -> None:
    mechanism = terms.mechanism(world.job("quiet", PRIVACY).plan)
    assert isinstance(mechanism, DpSgd)
    world.configure(BUDGET.format(8))
    policy = world.site.home.settings.datasets["toy"].policy()
    two, three = (budget_filter.enforced_epsilon(policy, (mechanism,) * count) for count in (2, 3))
    budget = f"{(two + three) / 2:.4f}".rstrip("0")
    world.configure(BUDGET.format(budget) + "order = 3\n")
    said = f"would cost epsilon {three:.3f} in 3 stages and bring the data set to {three:.3f} of {budget}; 0.000 is"
    job = staged_job(world, 3)
    for refused in (lambda: admit(world, job), lambda: prepare.prepare(world.site, job, 1)):
        with pytest.raises(Refusal) as raised:
            refused()
        assert said in str(raised.value)
        assert f"{float(budget):.3f} is left" in str(raised.value)
    assert world.trained == []
    assert world.kinds() == ["REGISTER"]
    admit(world, staged_job(world, 2))
    prepare.prepare(world.site, staged_job(world, 2), 1)
    assert world.kinds() == ["REGISTER", "RESERVE", "START"]


def test_each_stage_is_a_job_of_its_own_from_its_own_start(world: World) -> None:
    job, site = staged_job(world, 2), world.site
    prepare.prepare(site, job, 1)
    tensors = {name: tensor + np.float32(0.25) for name, tensor in first_start(job).tensors.items()}
    start = Start(tensors, start_digest(tensors))
    with pytest.raises(Refusal, match="has not computed where stage 2 of plan 'quiet' starts"):
        prepare.prepare(site, job, 2, None, start)
    site.store.keep_start("quiet", 2, StartNote(job.plan_file.digest.hex(), start.digest.hex(), []))
    with pytest.raises(RuntimeError, match="needs the start that this site computed"):
        prepare.prepare(site, job, 2, None, first_start(job))
    trained = prepare.prepare(site, job, 2, None, start)
    assert world.started[-1] is start.tensors
    assert trained.start == start.digest.hex()
    reserved = [e.facts.model_dump() for e in world.site.ledger("toy").entries if e.kind == "RESERVE"]
    assert [r["stage"] for r in reserved] == [1, 2]
    assert [r["model"]["start"] for r in reserved] == [job.plan.adapter.digest, start.digest.hex()]
    assert prepare.prepare(site, job, 2, None, start) == trained  # what is kept is not trained again
    assert len(world.trained) == 2
