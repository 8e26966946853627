"""The analytic head of a regression is the ridge solution of all records together, however they lie at the sites."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from coordinator.publish import CohortTotal, publish
from participant.analytic import features_of, means_of
from participant.drafting import draft_plan
from participant.evaluation import Fit, accuracy
from participant.fetch import fetch_release
from participant.policy import admit
from participant.prepare import kept_vector, prepare
from participant.training import load_model, tokenise
from privacy.adapter import Tensors, load_peft, start_adapter
from privacy.audit import audit_release
from privacy.job import Job
from privacy.outcome import combine, manifest
from privacy.plan import Plan
from tests.analytic import FEATURES, SITES, Matrix, Part, evidence_of, job_for, part_of, run_round, vector_of
from tests.helpers_learning import TARGET, tiny_base, word_numbers
from tests.on_disk import OnDisk
from tests.regression import analytic_text
from tests.test_end_to_end import POLICY

LOW, HIGH = 0.0, 5.5


def records(count: int = 240) -> Part:
    """(count, FEATURES), some beyond the clipping range, and numbers within the range that follow from them."""
    rng = np.random.default_rng(11)
    features = rng.normal(size=(count, FEATURES))
    numbers = 2.0 + features @ rng.normal(size=FEATURES) / 2 + 0.2 * rng.normal(size=count)
    return features, tuple(np.clip(numbers, LOW, HIGH).tolist())


EVERYTHING = records()


def text() -> str:
    return analytic_text().replace("clip = 0.5\n", "clip = 0.5\nbits = 32\n")


def lapack(plan: Plan, features: Matrix, numbers: Sequence[float]) -> Matrix:
    """(inputs, 1) on scaled features, from the records themselves and nothing of the product but the plan's numbers."""
    settings, target = plan.aggregation.analytic, plan.data.target
    assert settings is not None
    assert target is not None
    scaled = np.clip(features / settings.feature_clip, -1, 1)
    z = np.concatenate([scaled, np.ones((len(scaled), 1))], axis=1)
    y = 2 * (np.array(numbers) - target[0]) / (target[1] - target[0]) - 1
    gram = z.T @ z / len(z) + settings.ridge * np.eye(z.shape[1])
    return np.asarray(np.linalg.solve(gram, z.T @ y[:, None] / len(z)))


def head_in(tensors: Tensors, plan: Plan) -> Matrix:
    """(inputs, 1): the released head, as it acts on scaled features."""
    settings = plan.aggregation.analytic
    assert settings is not None
    weight = tensors["base_model.model.classifier.weight"].astype(np.float64)
    bias = tensors["base_model.model.classifier.bias"].astype(np.float64)
    return np.concatenate([weight.T * settings.feature_clip, bias[None]])


#: Sentence -> who holds which records.
SPLITS: dict[str, list[list[int]]] = {
    "evenly": [list(range(i, 240, SITES)) for i in range(SITES)],
    "by their number": [sorted(range(240), key=lambda i: EVERYTHING[1][i])[48 * k : 48 * k + 48] for k in range(5)],
    "nearly all at one site": [list(range(236)), [236], [237], [238], [239]],
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_the_release_is_the_ridge_solution_of_the_pooled_records(split: list[list[int]], tmp_path: Path) -> None:
    job = job_for(text())
    vectors = [vector_of(job, part_of(EVERYTHING, part)) for part in split]
    cohort = run_round(job, vectors, tmp_path / "total", {})
    combined, exact = combine(job, [cohort]), lapack(job.plan, *EVERYTHING)
    error = float(np.linalg.norm(head_in(combined.tensors, job.plan) - exact))
    assert error <= 1e-4 * np.linalg.norm(exact)
    alone = lapack(job.plan, *part_of(EVERYTHING, split[1]))
    assert float(np.linalg.norm(alone - exact)) > 1e-2 * np.linalg.norm(exact)
    found = manifest(job, 1, [cohort], combined)
    assert (found["head"], found["coordinates"], found["target"]) == ("analytic", 13 * 14 // 2 + 13, [LOW, HIGH])
    assert "training_loss" not in found


def test_the_statistics_stay_in_their_ranges() -> None:
    job = job_for(text())
    gram, products = means_of(np.full((4, FEATURES), 1e9), (LOW, HIGH, LOW, LOW), job.plan)
    assert products.shape == (FEATURES + 1, 1)
    assert products[-1, 0] == -0.5
    assert max(np.abs(gram).max(), np.abs(products).max()) == 1.0


def test_an_auditor_solves_for_the_same_bits(tmp_path: Path) -> None:
    job = job_for(text())
    vectors = [vector_of(job, part_of(EVERYTHING, part)) for part in SPLITS["evenly"]]
    evidence = evidence_of(job, vectors, tmp_path / "total", {})
    round_id = evidence.outcome.transcript.header.hash()
    facts = publish(job, 1, [CohortTotal(1, round_id, evidence, tmp_path / "total")], tmp_path)
    report = audit_release(tmp_path / "prices" / "stage-1", job.roster_file.hash)
    assert report.facts["adapter_digest"] == facts["adapter_digest"]
    assert facts["target"] == [LOW, HIGH]


# --- with a model and sites on disk ----------------------------------------------------------------------------------

RECORDS = word_numbers((16, 16, 16))
SHARES = {
    "evenly": [list(range(i, 48, 4)) for i in range(4)],
    "by their number": [sorted(range(48), key=lambda i: RECORDS.targets[i])[12 * k : 12 * k + 12] for k in range(4)],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def plan_bytes(base: Path) -> bytes:
    about: dict[str, Any] = {"base_name": "tiny", "dataset": "words", "name": "weights", "max_length": 8}
    found = draft_plan(base=base, task="regression", target=TARGET, head="analytic", max_weight=64, **about)
    return found.replace("min_texts = 20", "min_texts = 3").encode()


@dataclass
class Regressing(OnDisk):
    """Each site reads its own records and prepares its vector from them with the real model."""

    shares: list[list[int]] = field(default_factory=list)
    vectors: dict[int, NDArray[np.int32]] = field(default_factory=dict)

    def restart(self, member: int) -> None:
        rows = RECORDS.some(self.shares[member])
        lines = [{"text": one, "target": number} for one, number in zip(rows.texts, rows.targets, strict=True)]
        place = self.federation.site(self.names[member])
        (place / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        super().restart(member)

    def vector_of(self, member: int, stage: int = 1) -> NDArray[np.int32]:
        if member not in self.vectors:
            site = self.site(member)
            admit(self.job, site.home.settings)
            assert prepare(site, self.job, stage).weight == len(self.shares[member])
            self.vectors[member] = np.concatenate(list(kept_vector(site, self.job, stage))).astype(np.int32)
        return self.vectors[member]

    def put_vector(self, member: int, vector: NDArray[np.int32], job: Job | None = None, stage: int = 1) -> None:
        """It lies there already."""


SITE_TOML = """device = "cpu"
threads = 1
[models]
tiny = "{base}"
[datasets.words]
path = "words.jsonl"
format = "jsonl"
[policy]
plans = ["*"]
min_texts = 3
"""


def pooled(base: Path, plan: Plan) -> Matrix:
    """The solution of all records at one place, features by the frozen model."""
    loaded = load_model(plan, base, start_adapter(plan.adapter), "cpu")
    texts = tokenise(loaded.tokenizer, RECORDS.texts, plan.data.max_length)
    return lapack(plan, features_of(loaded, texts).double().numpy(), RECORDS.targets)


def test_whatever_the_split_the_released_head_is_that_of_the_pooled_records(base: Path, tmp_path: Path) -> None:
    site_toml, heads, adapters = SITE_TOML.replace("{base}", str(base)), [], []
    for name, shares in SHARES.items():
        (tmp_path / name).mkdir()
        world = Regressing(tmp_path / name, 4, plan_bytes(base), dict(POLICY), site_toml, shares=shares)
        world.ready()
        world.run()
        world.assert_exact()
        daemon = world.daemons[0]
        assert fetch_release(daemon.site, daemon.client, world.job, 1)
        adapters.append(load_peft(daemon.site.release_directory("weights", 1) / "adapter"))
        heads.append(head_in(adapters[-1], world.job.plan))
        audit_release(world.engine.home.releases / "weights" / "stage-1", world.job.roster_file.hash)
        plan = world.job.plan
        world.engine.store.close()
    exact = pooled(base, plan)
    for head in heads:
        assert np.linalg.norm(head - exact) <= 2e-3 * np.linalg.norm(exact)
    about: dict[str, Any] = {"plan": plan, "base": base, "examples": RECORDS, "device": "cpu"}
    after, before = accuracy(**about, adapter=adapters[0]), accuracy(**about, adapter=None)
    assert isinstance(after, Fit)
    assert isinstance(before, Fit)
    assert after.mean_squared < before.mean_squared / 4
