"""A federation whose plan has an analytic head, with made-up features, and its round by the real state machines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coordinator import phases
from participant.analytic import means_of
from privacy.adapter import start_adapter, start_digest
from privacy.analytic import pack
from privacy.job import Job
from privacy.outcome import VerifiedCohort, verify_cohort
from privacy.plan import parse_plan
from privacy.roster import parse_roster
from privacy.secagg.keys import identity_public
from privacy.secagg.masking import pack as pack_words
from privacy.secagg.messages import Evidence
from privacy.sections import Adapter
from tests.simulation import Simulation, identity

SITES, COLLUDERS = 5, 1
FEATURES, CLASSES = 12, 3
LABELS = ("a", "b", "c")
HEAD = {"classifier.bias": (CLASSES,), "classifier.weight": (CLASSES, FEATURES)}

PLAN = """name = "sums"
task = "classification"
[base]
name = "tiny"
digest = "{zero}"
[adapter]
rank = 2
alpha = 4.0
seed = "{zero}"
digest = "{digest}"
modules = {{ "encoder.query" = [6, 8] }}
train = "head"
[adapter.head]
"classifier.bias" = [3]
"classifier.weight" = [3, 12]
[data]
dataset = "toy"
labels = ["a", "b", "c"]
[training]
epochs = 1
learning_rate = 0.001
batch_size = 4
[aggregation]
head = "analytic"
[aggregation.analytic]
ridge = {ridge}
feature_clip = 2.0
min_class_count = 3
[round]
max_cohort = 5
min_cohort = 4
min_survivors = 3
max_colluders = 1
bits = {bits}
clip = 0.5
max_weight = 512
"""

Matrix = NDArray[np.float64]
#: Features, and of each record the number of its label, or its target.
Part = tuple[Matrix, tuple[float, ...]]


def plan_text(bits: int = 32, ridge: float = 1e-3) -> str:
    """A plan file with a correct start digest; no base model is needed, since the features are made up."""
    zero = "0" * 64
    shape = {"encoder.query": (6, 8)}
    adapter = Adapter(rank=2, alpha=4.0, seed=zero, digest=zero, modules=shape, head=HEAD, train="head")
    return PLAN.format(zero=zero, digest=start_digest(start_adapter(adapter)).hex(), bits=bits, ridge=ridge)


def job_for(text: str) -> Job:
    """The plan under a roster of the simulation's members."""
    lines = ["federation = 'f'", f"coordinator = '{'9' * 64}'", "[policy]", "max_colluders = 1"]
    lines += ["min_cohort = 4", "min_survivors = 3"]
    for i in range(SITES):
        lines += ["[[members]]", f"name = 'm{i}'", f"key = '{identity_public(identity(i)).hex()}'"]
    return Job.of(parse_plan(text.encode()), parse_roster("\n".join(lines).encode()))


def records(count: int = 240) -> Part:
    """(count, FEATURES) with structure and noise, some beyond the clipping range, and labels that follow from them."""
    rng = np.random.default_rng(7)
    labels = rng.integers(CLASSES, size=count)
    centres = rng.normal(size=(CLASSES, FEATURES))
    return centres[labels] + 0.7 * rng.normal(size=(count, FEATURES)), tuple(labels.tolist())


def part_of(everything: Part, chosen: Sequence[int]) -> Part:
    """Some of the records."""
    return everything[0][list(chosen)], tuple(everything[1][i] for i in chosen)


def vector_of(job: Job, part: Part) -> NDArray[np.int32]:
    """What a site quantises, masks and uploads."""
    count = len(part[1])
    delta = pack(*means_of(*part, job.plan), job.plan.round.clip)
    return job.quantizer.quantize(delta, count, {"weight": count, "loss": 0})


def evidence_of(job: Job, vectors: Sequence[NDArray[np.int32]], path: Path, silent: dict[int, str]) -> Evidence:
    """One masked round of all sites; its packed total goes to ``path``."""
    simulation = Simulation(SITES, COLLUDERS, size=job.quantizer.total_size, bits=job.rules.bits, silent=silent)
    header = job.header(1, 1, bytes.fromhex(job.plan.adapter.digest))
    simulation.context = simulation.coordinator.context = job.context(header)
    simulation.vectors = dict(enumerate(vectors))
    phase = simulation.run().phase
    assert isinstance(phase, phases.Released)
    assert simulation.is_exact()
    assert simulation.total is not None
    path.write_bytes(pack_words(simulation.total, job.rules.bits))
    votes = tuple(phase.votes[i] for i in sorted(phase.votes))
    return Evidence(phase.outcome, votes, tuple(phase.shares[i] for i in sorted(phase.shares)))


def run_round(job: Job, vectors: Sequence[NDArray[np.int32]], path: Path, silent: dict[int, str]) -> VerifiedCohort:
    """As :func:`evidence_of`, and verified from plan and roster as every site does.

    Raises:
        ProtocolError: the total is garbled.
    """
    evidence = evidence_of(job, vectors, path, silent)
    return verify_cohort(job, 1, bytes.fromhex(job.plan.adapter.digest), evidence, path)
