"""A site's statistics for an analytic head: what the frozen model says of its records, summed; nothing is trained."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from torch import Tensor

from participant.data import Examples
from participant.device import Device, repeatable
from participant.different import looks_of, texts_by_label
from participant.features import inputs_of, trained_head
from participant.measured import Measured
from participant.training import Loaded, Progress, TrainingResult, load_model, tokenise
from privacy.adapter import Matrix
from privacy.analytic import head_of, pack
from privacy.errors import UserError
from privacy.plan import Plan
from privacy.target import scaled

log = structlog.get_logger()

#: Texts between two calls of the progress.
STEP = 32


def frequent(examples: Examples, plan: Plan, own_minimum: int, seen: Iterable[Hashable] | None = None) -> Examples:
    """The records of the classes that the site has often enough, by the plan and by its own file.

    A sum over one record is that record's features; the other sites may have none of the class. Copies of a text count
    once, since their sum is a multiple of its features, and so do texts of which the model sees the same.

    Args:
        examples: the site's records.
        plan: with an analytic head.
        own_minimum: the site's own.
        seen: what the model sees of each record, see ``participant/different.py``; None where no base model is at
            hand, and then texts count by how they look.

    Raises:
        UserError: no class is left.
    """
    settings = plan.aggregation.analytic
    assert settings is not None
    assert settings.min_class_count is not None
    least = max(settings.min_class_count, own_minimum)
    counts = texts_by_label(examples, looks_of(examples.texts) if seen is None else seen)
    rare = sorted(label for label, count in counts.items() if count < least)
    if rare:
        log.warning("left out", plan=plan.name, fewer_than=least, classes=[plan.data.labels[c] for c in rare])
    kept = [i for i, label in enumerate(examples.labels) if counts[label] >= least]
    if not kept:
        raise UserError(
            f"data: expected a class with at least {least} different texts (min_class_count), found none",
            hint="sit this plan out, or agree on a smaller minimum",
        )
    return Examples(tuple(examples.texts[i] for i in kept), tuple(examples.labels[i] for i in kept))


def check_spread(examples: Measured, least: int, seen: Iterable[Hashable]) -> None:
    """Raise UserError where nearly all records have one number c and few another.

    Everybody learns the sums of z y and of z, hence that of z (y - c): the features of the few alone. Those are few
    of which the model sees few different things, which ``seen`` says of each record.
    """
    common, _ = Counter(examples.targets).most_common(1)[0]
    others = {one for one, number in zip(seen, examples.targets, strict=True) if number != common}
    if 0 < len(others) < least:
        raise UserError(
            f"data: expected at least {least} different texts (min_texts) with another number than {common!r}, "
            f"which is the most frequent, or none, found {len(others)}",
            hint="sit this plan out, or agree on a smaller minimum",
        )


def features_of(loaded: Loaded, texts: list[Tensor], progress: Progress | None = None) -> Tensor:
    """(count, features) float32: the inputs of the head, one text at a time, so that no text depends on another.

    Raises:
        UserError: the model has no head that is linear in them.
    """
    head = trained_head(loaded)
    found: list[Tensor] = []
    for first in range(0, len(texts), STEP):
        seen = None if head is None else inputs_of(head, loaded, texts[first : first + STEP])
        if seen is None:
            raise UserError(
                "model: expected logits that are linear in the inputs of the head, found others",
                hint='an analytic head needs a linear one; take head = "trained"',
            )
        found.append(seen.float().cpu())
        if progress is not None:
            progress(min(first + STEP, len(texts)), len(texts), math.nan)  # there is no loss
    return torch.cat(found)


def means_of(features: Matrix, answers: Sequence[float], plan: Plan) -> tuple[Matrix, Matrix]:
    """Means over the records of z z^T, (inputs, inputs), and of z y^T, (inputs, classes), in float64.

    Args:
        features: (count, features), as they come out of the model; clipped and scaled here.
        answers: of each record the number of its label, or its target.
    """
    settings, head = plan.aggregation.analytic, head_of(plan)
    assert settings is not None
    z = np.clip(features / settings.feature_clip, -1.0, 1.0)
    if head.bias:
        z = np.concatenate([z, np.ones((len(z), 1))], axis=1)
    y = _answers(answers, plan)
    return z.T @ z / len(z), z.T @ y / len(z)


def _answers(answers: Sequence[float], plan: Plan) -> Matrix:
    """(count, classes): one-hot, or the scaled target."""
    if plan.data.target is None:
        return np.eye(plan.outputs)[[int(label) for label in answers]]
    return np.array([[scaled(value, plan.data.target)] for value in answers])


@repeatable
def collect(
    *,
    plan: Plan,
    base: Path,
    start: Mapping[str, Any],
    examples: Examples | Measured,
    device: Device = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """The statistics of a site's records under the frozen start model, in place of a delta; arguments as of ``train``.

    Raises:
        UserError: another base model than the plan's, or one whose head is not linear.
        ValueError: ``start`` is not of the plan's layout.
    """
    began = time.monotonic()
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_model(plan, base, start, device)
    texts = tokenise(loaded.tokenizer, examples.texts, plan.data.max_length)
    features = features_of(loaded, texts, progress).double().numpy()
    settings = plan.aggregation.analytic
    assert settings is not None
    if share := float(np.mean(np.abs(features) > settings.feature_clip)):
        log.warning("clipping", plan=plan.name, share=round(share, 6), feature_clip=settings.feature_clip)
    answers = examples.targets if isinstance(examples, Measured) else examples.labels
    vector = pack(*means_of(features, answers, plan), plan.round.clip)
    return TrainingResult(vector, len(examples), 0.0, time.monotonic() - began)
