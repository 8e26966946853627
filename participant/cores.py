"""Training R of B = U R: the method "core" (``privacy/factors.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from privacy.adapter import Tensors
from privacy.factors import out_name
from privacy.methods import core_name
from privacy.plan import Plan


class _Core(torch.nn.Module):
    """B of a layer, (out_features, rank), as U times the trained (rank, rank)."""

    left: Tensor

    def __init__(self, left: Tensor) -> None:
        super().__init__()
        self.register_buffer("left", left, persistent=False)

    def forward(self, core: Tensor) -> Tensor:
        """U R."""
        return self.left @ core

    def right_inverse(self, weight: Tensor) -> Tensor:
        """R of a B that is U R, since U has orthonormal columns."""
        return self.left.T @ weight


class Cores:
    """The matrices R of a model while they are trained; none for any other method."""

    def __init__(self, model: Any, plan: Plan, factors: Mapping[str, Any] | None) -> None:
        """From here on R is the parameter in the place of each B.

        Raises:
            ValueError: a plan with cores, and no factors.
        """
        self._layers: dict[str, Any] = {}
        self._before: dict[str, Tensor] = {}
        if plan.aggregation.core is None:
            return
        if factors is None:
            raise ValueError('the method "core" needs the factors of the base model')
        layers = dict(model.named_modules())
        for module in plan.adapter.modules:
            layer = layers[f"base_model.model.{module}.lora_B.default"]
            left = torch.from_numpy(np.array(factors[out_name(module)])).to(layer.weight.device)
            parametrize.register_parametrization(layer, "weight", _Core(left))
            core = layer.parametrizations.weight.original
            core.requires_grad_(True)
            self._layers[module], self._before[module] = layer, core.detach().clone()

    def leave(self) -> Tensors:
        """Puts B = U R in its place again; what was added to each R, under the name of its part."""
        moved: Tensors = {}
        for module, layer in self._layers.items():
            core = layer.parametrizations.weight.original.detach()
            moved[core_name(module)] = (core - self._before[module]).cpu().numpy().astype(np.float32)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        return moved
