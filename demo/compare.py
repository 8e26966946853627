"""Is the unmasked total the plain sum? Reads what the sites kept for this and what the coordinator released."""

from __future__ import annotations

import json

import numpy as np

from demo.federation import Federation
from participant.prepare import PLAIN_VECTOR
from privacy.evidence import TOTAL_FILE
from privacy.job import Job
from privacy.plan import PlanFile
from privacy.roster import load_roster
from privacy.vectors import read_total


def secure_equals_plain(federation: Federation, plan: PlanFile, number: int = 1) -> bool:
    """Of a stage: the unmasked total against the plain sum of the survivors' quantised vectors, integer for integer."""
    job = Job.of(plan, load_roster(federation.coordinator / "roster.toml")).at(number)
    stage = federation.coordinator / "releases" / plan.plan.name / f"stage-{number}"
    cohort = json.loads((stage / "manifest.json").read_bytes())["cohorts"][0]
    path = stage / "rounds" / str(cohort["round"]) / TOTAL_FILE
    total = job.quantizer.lift(read_total(path, job.quantizer.total_size, job.rules.bits))
    plain = np.zeros(job.quantizer.total_size, np.int64)
    for name in cohort["survivors"]:
        plain += np.load(federation.site(name) / "work" / plan.plan.name / f"stage-{number}" / PLAIN_VECTOR)
    return bool(np.array_equal(total, plain))
