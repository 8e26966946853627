"""How good an adapter is on a data set of the site's own: right answers and loss, without the training's prior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from participant.data import Examples
from participant.generation import encoded, foretell
from participant.text_data import Records
from participant.training import Device, Loaded, autocast, load_model, logits_of, tokenise
from privacy.adapter import start_adapter
from privacy.errors import UserError
from privacy.plan import Plan

#: Texts per forward pass; without gradients memory is no concern.
BATCH = 64


@dataclass(frozen=True)
class Evaluation:
    """Counts rather than a ratio, so that sites can add theirs up: of texts, or of the tokens that count."""

    correct: int
    total: int
    #: Mean cross-entropy in nats, of the logits as they are: per text, or per token that counts.
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.total


def accuracy(
    *,
    plan: Plan,
    base: Path,
    adapter: Mapping[str, Any] | None,
    examples: Examples | Records,
    device: Device = "auto",
    threads: int | None = None,
) -> Evaluation:
    """Classify ``examples``, or foretell the tokens of records, with the plan's base model and an adapter.

    Args:
        plan: names base, adapter and labels.
        base: directory of the base model.
        adapter: all tensors under PEFT's names, such as a release; None is the start adapter of stage 1. Its head is
            zero, every logit ties and argmax takes the first class, so the base model's accuracy is that class's
            share: about chance. A language model has no head, and is the base model itself.
        examples: what to classify; records for text generation, padded whatever the plan says.
        device: as in training.
        threads: CPU threads for torch in this process; None leaves torch's own choice.

    Raises:
        UserError: no examples, or another base model than the plan's.
        ValueError: ``adapter`` is not of the plan's layout.
    """
    if not len(examples):
        raise UserError("data: expected at least one example, found none", hint="check the data set")
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_model(plan, base, start_adapter(plan.adapter) if adapter is None else adapter, device)
    if isinstance(examples, Records):
        found = foretell(loaded, encoded(loaded, plan, examples))
        return Evaluation(found.right, found.tokens, found.nats / found.tokens)
    return _classify(loaded, plan, examples)


def _classify(loaded: Loaded, plan: Plan, examples: Examples) -> Evaluation:
    texts = tokenise(loaded.tokenizer, examples.texts, plan.data.max_length)
    labels = torch.tensor(examples.labels, device=loaded.device)
    # Texts of like length share a batch: less padding, and no order to keep, since only sums are taken.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    correct, loss = 0, 0.0
    with torch.inference_mode():
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            with autocast(loaded.device):
                logits = logits_of(loaded, [texts[i] for i in chosen])
            correct += int((logits.argmax(dim=1) == labels[chosen]).sum())
            loss += float(cross_entropy(logits, labels[chosen], reduction="sum"))
    return Evaluation(correct, len(texts), loss / len(texts))
