"""The tiny base models of the other tests, packed in 4 bits as a user would, and the same dequantised by hand."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from participant.four_bit import STATE
from tests.helpers_learning import tiny_base
from tests.helpers_text import tiny_causal

needs = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes (extra quantized)")
#: Whatever a tokenizer needs; what is quantised are config and weights.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "chat_template.jinja", "special_tokens_map.json")


def quantised(full: Path, directory: Path, auto: Any, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write ``full`` in 4 bits into ``directory``, in the way of docs/how-to/gpu.md."""
    settings: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    make: Any = transformers.BitsAndBytesConfig
    config = make(**settings | changes)
    model = auto.from_pretrained(str(full), quantization_config=config, dtype=dtype, device_map={"": "cpu"})
    model.save_pretrained(directory)
    for name in TOKENIZER:
        if (full / name).exists():
            shutil.copy(full / name, directory)
    return directory


def in_full(base: Path, directory: Path) -> Path:
    """The model of a directory that :func:`quantised` wrote, in float32, unpacked here by hand."""
    found, plain = load_file(base / "model.safetensors"), dict[str, Any]()
    layers = {name.removesuffix(STATE) for name in found if name.endswith(STATE)}
    for name, value in found.items():
        layer, _, rest = name.partition(".weight")
        if layer not in layers or not (rest or name.endswith(".weight")):
            plain[name] = value
    for layer in layers:
        plain[f"{layer}.weight"] = unpacked(found, layer)
    directory.mkdir()
    save_file(plain, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER:
        if (base / name).exists():
            shutil.copy(base / name, directory)
    return directory


def unpacked(found: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    """(out_features, in_features) float32 of a packed layer: QLoRA (arXiv 2305.14314), section 3."""
    about = json.loads(bytes(found[layer + STATE].tolist()))
    part = {
        name.removeprefix(f"{layer}.weight"): t.numpy()
        for name, t in found.items()
        if name.startswith(f"{layer}.weight")
    }
    scales = part[".absmax"]
    if "nested_blocksize" in about:  # they are packed too, in 8 bits
        outer = part[".nested_absmax"][np.arange(len(scales)) // about["nested_blocksize"]]
        scales = part[".nested_quant_map"][scales] * outer + np.float32(about["nested_offset"])
    codes = np.stack([part[""] >> 4, part[""] & 15], axis=-1).reshape(-1)  # the first number is in the upper half
    numbers = part[".quant_map"][codes] * scales[np.arange(len(codes)) // about["blocksize"]]
    return torch.from_numpy(numbers[: np.prod(about["shape"])].reshape(about["shape"]))  # an odd number has half a byte


@dataclass(frozen=True)
class Pair:
    """A base model in 4 bits, and what its files say in full."""

    packed: Path
    full: Path


def classifiers(directory: Path) -> Pair:
    """:func:`tiny_base` in 4 bits, its rows half as long as a block."""
    packed = quantised(tiny_base(directory / "original"), directory / "packed", transformers.AutoModel)
    return Pair(packed, in_full(packed, directory / "full"))


def causals(directory: Path) -> Pair:
    """:func:`tiny_causal` from bfloat16, its scales packed themselves, as most 4-bit models are made."""
    changes: dict[str, Any] = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    original = tiny_causal(directory / "original")
    auto = transformers.AutoModelForCausalLM
    packed = quantised(original, directory / "packed", auto, dtype=torch.bfloat16, **changes)
    return Pair(packed, in_full(packed, directory / "full"))
