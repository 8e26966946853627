"""Plans for regression whose base model is not needed: the records' features are made up."""

from __future__ import annotations

from privacy.adapter import start_adapter, start_digest
from privacy.sections import Adapter

ZERO = "0" * 64
HEAD = {"classifier.bias": (1,), "classifier.weight": (1, 12)}

PLAN = """name = "prices"
task = "regression"
[base]
name = "tiny"
digest = "{zero}"
[adapter]
rank = 2
alpha = 4.0
seed = "{zero}"
digest = "{digest}"
modules = {{ "encoder.query" = [6, 8] }}
train = "all"
[adapter.head]
"classifier.bias" = [1]
"classifier.weight" = [1, 12]
[data]
dataset = "toy"
target = [0, 5.5]
[training]
loss = "squared"
epochs = 1
learning_rate = 0.001
batch_size = 4
[aggregation]
weights = "examples"
[round]
max_cohort = 5
min_cohort = 4
min_survivors = 3
max_colluders = 1
clip = 0.5
max_weight = 512
"""
ANALYTIC = """head = "analytic"
[aggregation.analytic]
ridge = 0.001
feature_clip = 2.0
min_texts = 3
[round]"""


def plan_text() -> str:
    """A plan file with a correct start digest."""
    adapter = Adapter(rank=2, alpha=4.0, seed=ZERO, digest=ZERO, modules={"encoder.query": (6, 8)}, head=HEAD)
    return PLAN.format(zero=ZERO, digest=start_digest(start_adapter(adapter)).hex())


def analytic_text() -> str:
    """The same with an analytic head."""
    return plan_text().replace("[round]", ANALYTIC).replace('train = "all"', 'train = "head"')
