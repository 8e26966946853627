"""What a site's training becomes in the vector it sends, by the method; ``privacy/methods.py`` has the other end.

Whatever is said of records beside the trained tensors is computed here, after training, under the trained adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import structlog
import torch
from torch import Tensor

from participant.data import Examples
from participant.different import texts_by_label
from privacy.adapter import Matrix, Tensors, Vector, a_name, b_name, flatten, layout_of, unflatten
from privacy.methods import SHARES, dense_name, fisher_name, gram_name, head_parts, probe_name, probes, sent
from privacy.plan import Plan

log = structlog.get_logger()

#: Texts in one forward pass for statistics.
BATCH = 16

#: The logits of a batch, which here is run for what A says in it.
Forward = Callable[[list[Tensor]], object]


def vector_of(
    *,
    plan: Plan,
    start: Mapping[str, Any],
    after: Tensors,
    delta: Vector,
    cores: Tensors,
    model: Any,
    texts: Sequence[Tensor],
    shares: Sequence[float],
    squares: Tensors,
    forward: Forward,
) -> Vector:
    """(d,) float32: the vector of a site that trained.

    Args:
        start: the whole adapter before training.
        after: the whole adapter after training.
        delta: after minus start, on the trained tensors.
        cores: what was added to each R, of the method "core".
        model: the base model with the adapter in place, as trained.
        texts: token ids of the site's records.
        shares: of the classes among the records, for a counted head.
        squares: mean squared gradients of the trained tensors, for the method "fisher".
        forward: runs the model on a batch of them, padded on the right.
    """
    method, counts = plan.aggregation.method, plan.aggregation.counted is not None
    if method == "freeze_a" and not counts:
        return delta
    parts = unflatten(delta, layout_of(plan.adapter))
    if counts:
        parts |= counted(plan, parts, shares)
    if method == "both":
        parts |= probed(plan, after)
    elif method == "core":
        trained = {b_name(module) for module in plan.adapter.modules}
        parts = {name: part for name, part in parts.items() if name not in trained} | cores
    elif method == "dense":
        parts = dense(plan, parts, start, after)
    elif method == "fisher":
        parts |= by_fisher(plan, parts, squares)
    elif method == "regmean":
        parts |= weighted(plan, parts, gram_means(plan, model, texts, forward))
    return flatten(parts, sent(plan))


def class_shares(examples: Examples, plan: Plan, own_minimum: int, seen: Iterable[Hashable]) -> list[float]:
    """The share of each class among the records, 0 where fewer different texts have it than plan and site ask for.

    ``seen`` is what the model sees of each record, see ``participant/different.py``.
    """
    settings = plan.aggregation.counted
    if settings is None:
        return []
    least = max(settings.min_class_count, own_minimum)
    different = texts_by_label(examples, seen)
    counts = Counter(examples.labels)
    rare = [label for label in range(len(plan.data.labels)) if 0 < different[label] < least]
    if rare:
        log.warning("left out", plan=plan.name, fewer_than=least, classes=[plan.data.labels[c] for c in rare])
    return [
        counts[label] / len(examples) if different[label] >= least else 0.0 for label in range(len(plan.data.labels))
    ]


def counted(plan: Plan, deltas: Tensors, shares: Sequence[float]) -> Tensors:
    """Each row of the head times the share of its class, and the shares."""
    share = np.array(shares)
    found = {SHARES: (plan.round.clip * share).astype(np.float32)}
    for name in head_parts(plan):
        clipped = np.clip(deltas[name].astype(np.float64), -plan.round.clip, plan.round.clip)
        found[name] = (clipped * share.reshape(-1, *[1] * (clipped.ndim - 1))).astype(np.float32)
    return found


def probed(plan: Plan, after: Tensors) -> Tensors:
    """B (A v) of this site in the public directions."""
    found: Tensors = {}
    for module in plan.adapter.modules:
        a, b = after[a_name(module)].astype(np.float64), after[b_name(module)].astype(np.float64)
        found[probe_name(module)] = ((probes(plan, module) @ a.T) @ b.T).astype(np.float32)
    if beyond := sum(int((np.abs(part) > plan.round.clip).sum()) for part in found.values()):
        log.warning("clipping the probe", plan=plan.name, numbers=beyond, clip=plan.round.clip)
    return found


# --- dense: products of any rank ------------------------------------------------------------------------------------


def dense(plan: Plan, parts: Tensors, start: Mapping[str, Any], after: Tensors) -> Tensors:
    """For each module what was added to B A, in the place of what was added to A and to B."""
    found = dict(parts)
    for module in plan.adapter.modules:
        a, b = a_name(module), b_name(module)
        del found[a], found[b]
        added = after[b].astype(np.float64) @ after[a] - start[b].astype(np.float64) @ start[a]
        found[dense_name(module)] = added.astype(np.float32)
    return found


# --- fisher: how much the records depend on each number -------------------------------------------------------------


def squared_gradients(model: Any, losses: Iterator[Tensor]) -> None:
    """Puts in the place of each trained parameter the mean over records of its squared gradient (empirical Fisher).

    Args:
        losses: of one record each, nats.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    totals, count = [torch.zeros_like(parameter) for parameter in trained], 0
    for loss in losses:
        for total, gradient in zip(totals, torch.autograd.grad(loss, trained), strict=True):
            total += gradient.square()
        count += 1
    with torch.no_grad():
        for parameter, total in zip(trained, totals, strict=True):
            parameter.copy_(total / count)


def by_fisher(plan: Plan, deltas: Tensors, squares: Tensors) -> Tensors:
    """Each number times its weight, and the weights: relative to the tensor's own mean, and at most 1.

    Without the mean, a site whose gradients are larger throughout would decide alone (Matena and Raffel 2022, arXiv
    2111.09832, bring the matrices to one length).
    """
    settings, clip = plan.aggregation.fisher, plan.round.clip
    assert settings is not None
    found: Tensors = {}
    for name, _ in layout_of(plan.adapter).trained:
        fisher = squares[name].astype(np.float64)
        top = settings.reach * fisher.mean()
        own = np.minimum(fisher / top, 1.0) if top > 0 else np.zeros_like(fisher)
        weight = (own + settings.ridge) / (1.0 + settings.ridge)
        found[name] = (np.clip(deltas[name].astype(np.float64), -clip, clip) * weight).astype(np.float32)
        found[fisher_name(name)] = (clip * weight).astype(np.float32)
    return found


# --- regmean: what A says of the tokens -----------------------------------------------------------------------------


def gram_means(plan: Plan, model: Any, texts: Sequence[Tensor], forward: Forward) -> dict[str, Matrix]:
    """Module -> (rank, rank) float64: of z z^T the mean over the tokens of a record, and of that over the records.

    z is what A says of a token, clipped and scaled to +-1. The mean comes first within a record, so that a long one
    counts no more than a short one.
    """
    settings = plan.aggregation.regmean
    assert settings is not None
    clip, rank = settings.feature_clip, plan.adapter.rank
    totals = {module: torch.zeros(rank, rank, dtype=torch.float64) for module in plan.adapter.modules}
    seen = clipped = 0
    with torch.no_grad(), _heard(model, totals) as said:
        for first in range(0, len(texts), BATCH):
            batch = list(texts[first : first + BATCH])
            forward(batch)
            for module, heard in said.items():
                for features, text in zip(heard, batch, strict=True):
                    own = features[: len(text)].double().cpu() / clip  # without the padding
                    seen, clipped = seen + own.numel(), clipped + int((own.abs() > 1).sum())
                    z = own.clamp(-1, 1)
                    totals[module] += z.T @ z / len(z)
    if clipped:
        log.warning("clipping", plan=plan.name, share=round(clipped / seen, 6), feature_clip=clip)
    return {module: (total / len(texts)).numpy() for module, total in totals.items()}


@contextmanager
def _heard(model: Any, modules: Mapping[str, object]) -> Iterator[dict[str, Tensor]]:
    """Module -> (batch, tokens, rank): what A said in the last forward pass."""
    said: dict[str, Tensor] = {}
    layers = dict(model.named_modules())
    handles = [
        layers[f"base_model.model.{module}.lora_A.default"].register_forward_hook(
            lambda _, __, output, module=module: said.__setitem__(module, output)
        )
        for module in modules
    ]
    try:
        yield said
    finally:
        for handle in handles:
            handle.remove()


def weighted(plan: Plan, deltas: Tensors, grams: Mapping[str, Matrix]) -> Tensors:
    """For each module D (G + ridge I) / (1 + ridge) in the place of D, what was added to B; the upper triangle of G."""
    settings = plan.aggregation.regmean
    assert settings is not None
    rank, found = plan.adapter.rank, {}
    for module, gram in grams.items():
        weights = (gram + settings.ridge * np.eye(rank)) / (1.0 + settings.ridge)
        found[b_name(module)] = (deltas[b_name(module)].astype(np.float64) @ weights).astype(np.float32)
        found[gram_name(module)] = (plan.round.clip * gram[np.triu_indices(rank)]).astype(np.float32)
    return found
