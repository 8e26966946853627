"""What is measured of an adapter: right answers, record by record, and how far it moved the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch.nn.functional import cross_entropy

from participant.data import Examples
from participant.training import load_model, logits_of, tokenise
from privacy.adapter import Tensors, a_name, b_name
from privacy.plan import Plan

BATCH = 64


@dataclass(frozen=True)
class Score:
    """``right[i]`` is 1 if record i got the right answer; ``loss`` is the mean cross-entropy in nats."""

    right: tuple[int, ...]
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.right) / len(self.right)


def score(plan: Plan, base: Path, adapter: Mapping[str, Any], examples: Examples) -> Score:
    """Classify the records with the plan's base model and an adapter, on one CPU thread.

    Raises:
        UserError: another base model than the plan's.
        ValueError: ``adapter`` is not of the plan's layout.
    """
    loaded = load_model(plan, base, adapter, "cpu")
    texts = tokenise(loaded.tokenizer, examples.texts, plan.data.max_length)
    labels = torch.tensor(examples.labels)
    right, loss = [0] * len(texts), 0.0
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of like length share a batch
    with torch.inference_mode():
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            logits = logits_of(loaded, [texts[i] for i in chosen])
            loss += float(cross_entropy(logits, labels[chosen], reduction="sum"))
            for i, hit in zip(chosen, (logits.argmax(dim=1) == labels[chosen]).tolist(), strict=True):
                right[i] = int(hit)
    return Score(tuple(right), loss / len(texts))


def update_size(plan: Plan, base: Path, start: Tensors, after: Tensors) -> dict[str, float]:
    """tau = ||delta|| / ||w0||, Frobenius, of what the adapter adds to the adapted matrices: alpha / rank * B A.

    ``adapted`` divides by those matrices alone, ``network`` by all weights of the base model. The head has no w0.
    """
    weights = safetensors.numpy.load_file(base / "model.safetensors")
    whole = sum(float(np.square(w.astype(np.float64)).sum()) for w in weights.values())
    moved = adapted = 0.0
    scale = plan.adapter.alpha / plan.adapter.rank
    for module in plan.adapter.modules:
        a, b = a_name(module), b_name(module)
        delta = scale * (after[b].astype(np.float64) @ after[a] - start[b].astype(np.float64) @ start[a])
        moved += float(np.square(delta).sum())
        # The classifier's modules carry the name of the encoder before those of the bare model's file.
        name = next(n for n in (f"{module}.weight", f"{module.partition('.')[2]}.weight") if n in weights)
        adapted += float(np.square(weights[name].astype(np.float64)).sum())
    return {"adapted": (moved / adapted) ** 0.5, "network": (moved / whole) ** 0.5}
