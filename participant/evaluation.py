"""How good an adapter is on a data set of the site's own: right answers and loss, without the training's prior."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from participant.data import Examples
from participant.device import Device, autocast
from participant.generation import encoded, foretell
from participant.measured import Measured
from participant.task_data import TaskData
from participant.text_data import Records
from participant.training import Loaded, load_model, logits_of, tokenise
from privacy.adapter import start_adapter
from privacy.errors import UserError
from privacy.plan import Plan
from privacy.target import half_width, scaled, unscaled

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


@dataclass(frozen=True)
class Fit(Evaluation):
    """Of a regression: ``loss`` is the mean squared error on the scaled target, and right is what is off by no more
    than the plan's tolerance, if it has one."""

    #: In the target's own unit, squared.
    mean_squared: float
    #: In the target's own unit.
    mean_absolute: float
    #: Share of the targets' variance that the answers explain; None where the targets are all the same.
    r2: float | None


def accuracy(
    *,
    plan: Plan,
    base: Path,
    adapter: Mapping[str, Any] | None,
    examples: TaskData,
    device: Device = "auto",
    threads: int | None = None,
) -> Evaluation:
    """Classify ``examples``, foretell their numbers or the tokens of records, with the plan's model and an adapter.

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
    if isinstance(examples, Measured):
        return _foretell_numbers(loaded, plan, examples)
    return _classify(loaded, plan, examples)


def _logits(loaded: Loaded, plan: Plan, texts: tuple[str, ...]) -> Iterator[tuple[list[int], Tensor]]:
    """(positions, what the model says of them), until all texts were seen.

    Texts of like length share a batch: less padding, and no order to keep, since only sums are taken.
    """
    tokens = tokenise(loaded.tokenizer, texts, plan.data.max_length)
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        with torch.inference_mode(), autocast(loaded.device):
            logits = logits_of(loaded, [tokens[i] for i in chosen])
        yield chosen, logits


def _classify(loaded: Loaded, plan: Plan, examples: Examples) -> Evaluation:
    labels = torch.tensor(examples.labels, device=loaded.device)
    correct, loss = 0, 0.0
    for chosen, logits in _logits(loaded, plan, examples.texts):
        correct += int((logits.argmax(dim=1) == labels[chosen]).sum())
        loss += float(cross_entropy(logits, labels[chosen], reduction="sum"))
    return Evaluation(correct, len(examples), loss / len(examples))


def _foretell_numbers(loaded: Loaded, plan: Plan, examples: Measured) -> Fit:
    count, target = len(examples), plan.data.target
    assert target is not None
    tolerance, unit = None if plan.evaluation is None else plan.evaluation.tolerance, half_width(target)
    said = [0.0] * count
    for chosen, logits in _logits(loaded, plan, examples.texts):
        for i, number in zip(chosen, logits[:, 0].tolist(), strict=True):
            said[i] = number
    wanted = [scaled(value, target) for value in examples.targets]
    off = [number - one for number, one in zip(said, wanted, strict=True)]
    middle = math.fsum(wanted) / count
    spread = math.fsum((one - middle) ** 2 for one in wanted) / count
    loss = math.fsum(one * one for one in off) / count
    # In the target's own unit: an error of just the tolerance is within it, and scaling would round it up or down.
    misses = [abs(unscaled(number, target) - value) for number, value in zip(said, examples.targets, strict=True)]
    return Fit(
        correct=0 if tolerance is None else sum(miss <= tolerance for miss in misses),
        total=count,
        loss=loss,
        mean_squared=loss * unit * unit,
        mean_absolute=math.fsum(map(abs, off)) / count * unit,
        r2=1 - loss / spread if spread > 0 else None,
    )
