"""The base models: all-MiniLM-L6-v2 as it is, and the same network with random weights."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from demo.corpus import base_model

#: Of the random weights; public.
SEED = 2026
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


def base_of(weights: str, out: Path) -> Path:
    """The directory of a base model; the one with random weights is made below ``out`` when first asked for.

    Raises:
        UserError: the package with the model is not installed.
        ValueError: no such weights.
    """
    if weights == "pretrained":
        return base_model()
    if weights == "random":
        return _random(out / "models" / "random")
    raise ValueError(f"expected pretrained or random weights, found {weights!r}")


def _random(directory: Path) -> Path:
    """The architecture's own initialisation (normal, deviation 0.02) from a fixed seed."""
    return directory if directory.exists() else made(directory, _write_random)


def made(directory: Path, write: Callable[[Path], None]) -> Path:
    """The directory, written elsewhere and renamed, so that it is whole or not there."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    staging = Path(tempfile.mkdtemp(dir=directory.parent))
    write(staging)
    try:
        os.rename(staging, directory)
    except OSError:  # another worker was first
        shutil.rmtree(staging)
    return directory


def _write_random(staging: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(str(base_model()), local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = transformers.AutoModel.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        model.save_pretrained(staging)
    for name in TOKENIZER:
        if (base_model() / name).exists():
            shutil.copyfile(base_model() / name, staging / name)
