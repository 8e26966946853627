"""Plans that need no model, and the delta that training would have left at a site."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from demo.federation import Federation
from participant.config import load_home
from participant.prepare import PLAIN_VECTOR
from participant.store import Store, Trained
from privacy.adapter import start_adapter, start_digest
from privacy.job import Job
from privacy.plan import PlanFile, parse_plan
from privacy.roster import load_roster
from privacy.sections import Adapter

ZERO = "0" * 64
#: Rows of the head, each 8 coordinates: one short block; an upload of 3.6 MB; one of 9.6 MB, of several chunks.
ROWS = {"small": 4, "medium": 150_000, "large": 400_000}

SITE = """keep_plain_vector = true
[models]
tiny = "base"
[datasets.toy]
path = "data.jsonl"
format = "jsonl"
[policy]
plans = ["*"]
min_cohort = 3
"""

PLAN = """name = "{name}"
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
head = {{ "classifier.weight" = [{rows}, 8] }}
[data]
dataset = "toy"
labels = ["a", "b"]
[training]
epochs = 1
learning_rate = 0.001
batch_size = 4
[round]
max_cohort = {largest}
min_cohort = {smallest}
min_survivors = 3
max_colluders = 1
bits = {bits}
clip = 0.5
max_weight = 1000
[deadlines]
join_s = {wait}
share_s = {wait}
upload_s = {wait}
sign_s = {wait}
unmask_s = {wait}
outcome_s = {brief}
"""


@dataclass(frozen=True)
class Shape:
    """One federation: how many sites, how large its cohorts, and the seconds a phase waits for silent members."""

    sites: int
    smallest: int
    largest: int
    wait_s: int

    @property
    def names(self) -> list[str]:
        return [f"site-{i}" for i in range(1, self.sites + 1)]

    @property
    def policy(self) -> dict[str, object]:
        return {"max_colluders": 1, "min_cohort": self.smallest, "min_survivors": 3}


def toy_plan(name: str, shape: Shape, size: str, bits: int = 24) -> PlanFile:
    """A plan with a correct start digest; nothing is trained, so no base model is needed."""
    rows = ROWS[size]
    modules: dict[str, tuple[int, int]] = {"encoder.query": (6, 8)}
    head: dict[str, tuple[int, ...]] = {"classifier.weight": (rows, 8)}
    adapter = Adapter(rank=2, alpha=4.0, seed=ZERO, digest=ZERO, modules=modules, head=head)
    text = PLAN.format(
        name=name,
        zero=ZERO,
        digest=start_digest(start_adapter(adapter)).hex(),
        rows=rows,
        largest=shape.largest,
        smallest=shape.smallest,
        bits=bits,
        wait=shape.wait_s if size == "small" else 3 * shape.wait_s,  # a busy machine takes its time over megabytes
        brief=max(2, shape.wait_s // 2),
    )
    return parse_plan(text.encode())


def put_trained(federation: Federation, plan: PlanFile, seed: int) -> None:
    """Leave a delta of its own at every site; only before the daemons run, since this opens their records."""
    job = Job.of(plan, load_roster(federation.coordinator / "roster.toml"))
    for index, name in enumerate(federation.names):
        rng = np.random.default_rng([seed, index])
        delta = rng.uniform(-0.5, 0.5, job.quantizer.size).astype(np.float32)
        weight = 100 + index
        vector = job.quantizer.quantize(delta, weight, {"weight": weight, "loss": 1000})
        store = Store(load_home(federation.site(name)))
        store.keep_trained(plan.plan.name, 1, vector, Trained(plan.digest.hex(), weight, 0.1, 1.0, weight))
        np.save(store.directory(plan.plan.name, 1) / PLAIN_VECTOR, vector)
