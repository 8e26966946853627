"""A site that trains fewer directions than the plan's adapter has, with the method "dense"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from privacy.adapter import a_name, b_name
from privacy.plan import Plan


def narrowed(plan: Plan, start: Mapping[str, Any], rank: int | None) -> tuple[Plan, Mapping[str, Any]]:
    """Plan and start for a site that trains ``rank`` directions at most, the first of the start adapter's.

    alpha / rank stays as it is, so that the products of all sites can be added.

    Raises:
        ValueError: a method other than "dense" cannot sum them.
    """
    adapter = plan.adapter
    if rank is None or rank >= adapter.rank:
        return plan, start
    if plan.aggregation.method != "dense":
        raise ValueError(f'a smaller rank than the plan\'s needs the method "dense", found "{plan.aggregation.method}"')
    narrow = adapter.model_copy(update={"rank": rank, "alpha": adapter.alpha * rank / adapter.rank})
    cut = dict(start)
    for module in adapter.modules:
        cut[a_name(module)] = np.ascontiguousarray(start[a_name(module)][:rank])
        cut[b_name(module)] = np.ascontiguousarray(start[b_name(module)][:, :rank])
    return plan.model_copy(update={"adapter": narrow}), cut


def keep_beneath(model: Any, plan: Plan, start: Mapping[str, Any], rank: int | None) -> None:
    """Adds the directions of the start that this site does not train to what its frozen layers give.

    Without them it would train against another model than the release that everybody starts from, and what it adds to
    make up for them would be summed onto a release that has them.

    Args:
        model: loaded with the narrowed start.
        plan: with all directions, and ``start`` too.
    """
    if rank is None or rank >= plan.adapter.rank:
        return
    layers = dict(model.named_modules())
    scale = plan.adapter.alpha / plan.adapter.rank
    for module in plan.adapter.modules:
        a, b = start[a_name(module)][rank:], start[b_name(module)][:, rank:]
        if np.any(b):  # zero in the first stage
            layer = layers[f"base_model.model.{module}"]
            device = layer.lora_B["default"].weight.device
            rest = (torch.from_numpy(np.ascontiguousarray(m, np.float32)).to(device) for m in (a, scale * b))
            layer.base_layer.register_forward_hook(_adding(*rest))


def _adding(a: Tensor, b: Tensor) -> Any:
    def hook(_layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + linear(linear(inputs[0].to(a.dtype), a), b).to(output.dtype)

    return hook
