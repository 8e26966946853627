"""Base models whose linear layers lie in 4 bits (NF4). bitsandbytes reads them; what computes with them is ours.

A weight is what the files say: one of sixteen numbers times the scale of its block, in float32, the same to the bit on
every machine. bitsandbytes' own layers do not compute here: on CPUs they unpack some shapes wrongly and may lose the
gradient, and on GPUs short batches get another kernel than long ones (docs/decisions/0015-four-bit.md).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import linear, pad

from privacy.errors import UserError, shown

#: Ends the name of the tensor that says how a weight is packed; what is before it is the name of the layer.
STATE = ".weight.quant_state.bitsandbytes__nf4"
#: Scales that share a scale of their own, where they are packed too; bitsandbytes knows no other number.
NESTED = 256


def packed_layers(base: Path) -> frozenset[str]:
    """Names of the layers that the files of a base model hold in 4 bits.

    Raises:
        UserError: none, though config.json says so.
    """
    names: set[str] = set()
    for path in base.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            names |= {name.removesuffix(STATE) for name in file.keys() if name.endswith(STATE)}  # noqa: SIM118
    if not names:
        raise UserError(
            f"{base}: expected weights packed in 4 bits (nf4), as its config.json says, found none",
            hint="save a model that was loaded in 4 bits, see docs/how-to/gpu.md",
        )
    return frozenset(names)


def keep_in_full(auto: Any, config: Any, packed: Collection[str]) -> None:
    """Tell ``config`` which linear layers are not packed: all but those that the files hold so.

    By itself transformers leaves out what it takes for the output of the class that it loads. The head of a classifier
    over the files of a plain model would be packed at random, and what was left out when the files were written is not
    always what is left out now.
    """
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=False)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    prefix = f"{model.base_model_prefix}."
    full = [name for name in linears if not {name, name.removeprefix(prefix), prefix + name} & set(packed)]
    config.quantization_config = dict(config.quantization_config) | {"llm_int8_skip_modules": full}


def take_over(model: Any, base: Path) -> None:
    """From here on the packed layers of a model that was just loaded compute as this module says, the rest in float32.

    Raises:
        UserError: a layer is not packed after all, or not as its size asks for.
    """
    for name, module in model.named_modules():
        for own in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if own.is_floating_point():  # transformers leaves what is beside packed layers as the files have it
                own.data = own.data.float()
        if not _is_packed(module):
            continue
        if fault := _fault(module):
            raise UserError(
                f"{base}: expected a weight in 4 bits for {name!r}, found {fault}",
                hint="save the model anew, see docs/how-to/gpu.md",
            )
        module.forward = MethodType(_forward, module)


def _fault(layer: Any) -> str:
    """What is wrong with a packed weight; empty if nothing is."""
    state, count = layer.quant_state, layer.out_features * layer.in_features
    if state is None:
        return "one that is not packed"
    if tuple(state.shape) != (layer.out_features, layer.in_features):
        return f"one of shape {list(state.shape)}"
    if not isinstance(state.blocksize, int) or state.blocksize < 1 or state.code.dtype != torch.float32:
        return f"blocks of {shown(str(state.blocksize))}, of {state.code.dtype} numbers"
    blocks = -(-count // state.blocksize)
    sizes = (layer.weight.numel(), len(state.absmax), len(state.code))
    if sizes != (-(-count // 2), blocks, 16):
        return "{} bytes, {} blocks and {} numbers for {} weights".format(*sizes, count)
    if state.nested and (len(state.state2.absmax), len(state.state2.code)) != (-(-blocks // NESTED), 256):
        return f"{len(state.state2.absmax)} scales for {blocks} blocks"
    return ""


def weight_of(layer: torch.nn.Module) -> Tensor:
    """(out_features, in_features) the weight of a linear layer, packed or not."""
    return _unpacked(layer) if _is_packed(layer) else layer.weight.detach()  # type: ignore[operator]


def _is_packed(module: torch.nn.Module) -> bool:
    # By its name: whoever has no packed model needs no bitsandbytes.
    return type(module).__name__ == "Linear4bit" and isinstance(module, torch.nn.Linear)


def _unpacked(layer: Any) -> Tensor:
    """(out_features, in_features) float32."""
    state, packed = layer.quant_state, layer.weight.detach().reshape(-1)
    # What the upper and the lower half of a byte say, as one number of eight bytes, so that one look-up does for both.
    pairs = torch.cartesian_prod(state.code, state.code).view(torch.int64).reshape(-1)  # (256,)
    numbers = pairs.index_select(0, packed.int()).view(torch.float32)
    scales = _scales(state)
    if lacking := len(scales) * state.blocksize - len(numbers):  # the last block is not full
        numbers = pad(numbers, (0, lacking))
    numbers.view(-1, state.blocksize).mul_(scales[:, None])
    return numbers[: state.shape.numel()].view(state.shape)


def _scales(state: Any) -> Tensor:
    """(blocks,) float32, the largest number of each block; they may be packed in turn, in 8 bits."""
    if not state.nested:
        return state.absmax  # type: ignore[no-any-return]
    inner = state.state2
    outer = inner.absmax.repeat_interleave(NESTED)[: len(state.absmax)]
    return inner.code[state.absmax.int()] * outer + state.offset  # type: ignore[no-any-return]


def _forward(layer: Any, x: Tensor) -> Tensor:
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return _Product.apply(x.to(dtype), layer)  # type: ignore[no-untyped-call, no-any-return]


class _Product(torch.autograd.Function):
    """What a linear layer says of x. The weight is unpacked anew for the gradient: kept, it would take eight times the
    memory that packing saves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return linear(x, _unpacked(layer).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ _unpacked(ctx.layer).to(gradient.dtype), None
