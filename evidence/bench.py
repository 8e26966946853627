"""What the measurement of a cell works with: its records, its plan, its training, and how an adapter is judged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from evidence.arms import ALPHA, ARMS, BATCH, CLIP, CORE_CLIP, MAX_WEIGHT, RANK, Arm
from evidence.cells import Cell
from evidence.corpora import CORPORA, Corpus
from evidence.scoring import score
from evidence.splits import deal
from participant.data import Examples
from participant.different import keys_of
from participant.drafting import draft_plan
from participant.sending import class_shares, vector_of
from participant.training import TrainingResult, load_model, logits_of, tokenise, train
from privacy.adapter import Tensors, Vector, layout_of, release
from privacy.factors import first_start, load_factors
from privacy.methods import merged
from privacy.plan import Plan, PlanFile, parse_plan


@dataclass
class Bench:
    """What the measurement of one cell works with."""

    cell: Cell
    corpus: Corpus
    base: Path
    out: Path

    @property
    def arm(self) -> Arm:
        return ARMS[self.cell.arm]

    @property
    def held_out(self) -> Examples:
        """The records that the cell is judged by."""
        return self.corpus.test if self.cell.part == "test" else self.corpus.validation

    @property
    def parts(self) -> list[Examples]:
        """The training records of each site."""
        train_set, c = self.corpus.train, self.cell
        dealt = deal(c.split, train_set.labels, len(self.corpus.labels), c.sites, c.seed)
        return [picked(train_set, numbers) for numbers in dealt]

    def plan(self, round_number: int = 1, epochs: int = 1) -> PlanFile:
        """The plan of one round of this cell, as the product drafts it."""
        c = self.cell
        text = draft_plan(
            base=self.base,
            base_name=c.weights,
            name=f"evidence-{round_number}",
            dataset=c.corpus,
            labels=self.corpus.labels,
            rank=RANK,
            alpha=ALPHA,
            max_length=self.corpus.max_length,
            head=self.arm.head,
            stages=2 if self.arm.kind == "aligned" else 1,
            method=self.arm.method,
            weights=self.arm.site_weights,
            epochs=epochs,
            learning_rate=c.rate or 1e-3,  # where nothing is trained, the plan's rate is not read
            head_learning_rate=None if self.arm.head_rate == 1.0 else self.arm.head_rate * c.rate,
            batch_size=BATCH,
            training_seed=1000 * c.seed + round_number,
            max_cohort=c.sites,
            min_cohort=c.sites - 2,
            min_survivors=c.sites - 4 if c.sites > 7 else 3,
            clip=CORE_CLIP if self.arm.method == "core" else CLIP,
            max_weight=MAX_WEIGHT,
            factors_to=self.factors_directory,
            seed=hashlib.sha256(f"evidence {c.seed}".encode()).digest(),
        )
        text = text.replace("server_lr = 1.0", f"server_lr = {self.arm.server_lr}")
        return parse_plan(text.encode(), c.name)

    @property
    def factors_directory(self) -> Path:
        """Where drafting leaves the factors of the method "core"."""
        return self.out / "factors"

    def factors(self, plan: Plan) -> Tensors | None:
        """Those that a plan pins; None where its method has none."""
        return load_factors(self.factors_directory, plan) if plan.aggregation.core is not None else None

    def start(self, plan: Plan) -> Tensors:
        """The whole adapter before the first round."""
        return first_start(plan.adapter, self.factors(plan))

    def merge(self, plan: Plan, start: Tensors, mean: Vector) -> Tensors:
        """The adapter that a mean of sites' vectors gives."""
        return merged(start, mean.copy(), plan, factors=self.factors(plan)).tensors

    def alone(self, plan: Plan, start: Tensors, vector: Vector) -> Tensors:
        """The adapter that one site's vector gives: the server's rate is not the site's."""
        return self.merge(plan.with_server_lr(1.0), start, vector)

    def train(self, plan: Plan, start: Tensors, examples: Examples) -> TrainingResult:
        """The product's own training, on one CPU thread."""
        return train(
            plan=plan,
            base=self.base,
            start=start,
            examples=examples,
            device="cpu",
            threads=1,
            factors=self.factors(plan),
        )

    def vector(self, plan: Plan, start: Tensors, delta: Vector, examples: Examples) -> Vector:
        """What a site sends of what it trained, where that is another vector and takes no other training."""
        if plan.aggregation.counted is None and plan.aggregation.regmean is None:
            return delta
        after = release(start, delta, 1.0, layout_of(plan.adapter))
        loaded = load_model(plan, self.base, after, "cpu")
        texts = tokenise(loaded.tokenizer, examples.texts, plan.data.max_length)
        return vector_of(
            plan=plan,
            start=start,
            after=after,
            delta=delta,
            cores={},
            model=loaded.model,
            texts=texts,
            shares=class_shares(examples, plan, 1, keys_of(texts)),
            squares={},
            forward=lambda batch: logits_of(loaded, batch),
        )

    def judge(self, plan: Plan, adapter: Tensors) -> dict[str, Any]:
        """``accuracy``, ``loss`` and, record by record, ``right`` on the held-out records."""
        found = score(plan, self.base, adapter, self.held_out)
        return {"accuracy": found.accuracy, "loss": found.loss, "right": list(found.right)}


def picked(examples: Examples, numbers: Sequence[int]) -> Examples:
    """These records, in this order."""
    return Examples(tuple(examples.texts[i] for i in numbers), tuple(examples.labels[i] for i in numbers))


@lru_cache(maxsize=2)
def corpus_of(name: str) -> Corpus:
    """A corpus, read once in a process."""
    return CORPORA[name]()
