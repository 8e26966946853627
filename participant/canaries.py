"""The one-run audit's training part: the site's own private training on synthetic canaries, and what they score.

Public and synthetic data only: differential privacy is about every data set, so it may be tested on any, and a lower
bound that was computed on records would itself tell about them. Nothing of this run is ever released.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from participant import dp_sgd, dp_step
from participant.data import Examples
from participant.device import Device
from participant.training import Loaded, load_model, logits_of, tokenise
from privacy.adapter import Tensors, layout_of, release, start_adapter
from privacy.budget.empirical import Scores
from privacy.budget.events import DpSgd
from privacy.budget.terms import mechanism
from privacy.errors import UserError
from privacy.plan import Plan

#: Words of a canary; few, so that it stands out.
WORDS = 6
BATCH = 64


def make_canaries(loaded: Loaded, plan: Plan, count: int) -> Examples:
    """``count`` texts of random words with random labels: nothing to be learnt but each by heart."""
    special = set(loaded.tokenizer.all_special_ids)
    usable = [i for i in range(len(loaded.tokenizer)) if i not in special]

    def chosen(many: int, out_of: int) -> list[int]:
        return [int.from_bytes(os.urandom(8), "big") % out_of for _ in range(many)]

    texts = [loaded.tokenizer.decode([usable[i] for i in chosen(WORDS, len(usable))]) for _ in range(count)]
    return Examples(tuple(texts), tuple(chosen(count, len(plan.data.labels))))


def audit_training(
    *,
    plan: Plan,
    base: Path,
    count: int,
    device: Device = "auto",
    threads: int | None = None,
) -> Scores:
    """Train as a site would, on about half of ``count`` canaries, and score all of them.

    The score of a canary is by how much the training lowered its loss. The run is a whole ordinary one, self-test
    included; the scores take two passes over the canaries.

    Raises:
        UserError: the plan has no ``[privacy]``. SelfTestFailed, Refusal: as in training.
    """
    terms = mechanism(plan)
    if not isinstance(terms, DpSgd):
        raise UserError(
            f"plan '{plan.name}': expected a section [privacy], found none",
            hint="there is nothing to audit in a training that promises nothing",
        )
    if plan.task != "classification":
        raise UserError(
            f"plan '{plan.name}': expected a plan for classification, found one for {plan.task}",
            hint="there are no canaries for it yet",
        )
    start = start_adapter(plan.adapter)
    canaries = make_canaries(load_model(plan, base, start, device), plan, count)
    included = tuple(bool(byte & 1) for byte in os.urandom(count))
    inside = [i for i, is_in in enumerate(included) if is_in]
    examples = Examples(tuple(canaries.texts[i] for i in inside), tuple(canaries.labels[i] for i in inside))
    result = dp_sgd.train_private(
        plan=plan,
        base=base,
        start=start,
        examples=examples,
        device=device,
        threads=threads,
        on_selftest=lambda _: None,
    )
    tuned = release(start, result.delta, 1.0, layout_of(plan.adapter))
    before, after = (_losses(plan, base, adapter, canaries, device) for adapter in (start, tuned))
    scores = tuple(b - a for b, a in zip(before, after, strict=True))
    return Scores(terms, included, scores)


def _losses(plan: Plan, base: Path, adapter: Tensors, examples: Examples, device: Device) -> list[float]:
    loaded = load_model(plan, base, adapter, device)
    texts = tokenise(loaded.tokenizer, examples.texts, plan.data.max_length)
    labels = torch.tensor(examples.labels, device=loaded.device)
    found: list[float] = []
    with torch.inference_mode():
        for first in range(0, len(texts), BATCH):
            logits = logits_of(loaded, texts[first : first + BATCH])
            found += dp_step.example_losses(logits, labels[first : first + BATCH]).tolist()
    return found
