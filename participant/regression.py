"""Regression: the squared error on the scaled target, of a batch and of each record by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from participant import dp_step
from participant.device import autocast
from participant.features import Standard
from participant.measured import Measured
from participant.training import Loaded, Seen, logits_by_length, logits_of, tokenise
from privacy.plan import Plan
from privacy.target import scaled


def targets_of(plan: Plan, examples: Measured, device: torch.device) -> Tensor:
    """(count,) float32, from -1 to 1."""
    assert plan.data.target is not None
    return torch.tensor([scaled(value, plan.data.target) for value in examples.targets], device=device)


def squared_errors(logits: Tensor, targets: Tensor) -> Tensor:
    """(B,) of each record by itself; logits (B, 1). A model's own loss for one output is a mean over the batch."""
    return (logits[:, 0] - targets).square()


def seen_by(loaded: Loaded, plan: Plan, examples: Measured) -> Seen:
    """The records as :func:`participant.training.train` sees them."""
    texts = tokenise(loaded.tokenizer, examples.texts, plan.data.max_length)
    targets = targets_of(plan, examples, loaded.device)

    def loss_of(chosen: list[int]) -> Tensor:
        with autocast(loaded.device):
            logits = logits_by_length(loaded, [texts[i] for i in chosen])
        return squared_errors(logits, targets[chosen]).mean()

    return Seen(texts, loss_of, lambda batch: logits_of(loaded, batch))


def private_losses(
    loaded: Loaded, texts: Sequence[Tensor], targets: Tensor, standard: Standard | None = None
) -> dp_step.Losses:
    """Positions in the data set -> (B,) squared errors, for ``participant/dp_step.py``."""
    return dp_step.losses_by(
        loaded, texts, lambda logits, chosen: squared_errors(logits, targets[list(chosen)]), standard
    )
