"""Which device a site trains on, and what is asked of it there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Literal, ParamSpec, TypeVar, cast

import torch

from privacy.errors import UserError

Device = Literal["auto", "cpu", "cuda"]
Given = ParamSpec("Given")
Found = TypeVar("Found")

#: Where cuBLAS has work space for each stream, it sums in one order. It reads this when CUDA begins in a process.
CUBLAS, CUBLAS_FIXED = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


def pick_device(device: Device) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU.

    Raises:
        UserError: ``cuda`` was asked for and there is none.
    """
    there = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not there:
        raise UserError("device: expected a CUDA device, found none", hint='set device = "auto" or "cpu"')
    if there:
        os.environ.setdefault(CUBLAS, CUBLAS_FIXED)  # here, since whoever uses CUDA picked it first
    return torch.device("cuda" if there else "cpu")


def autocast(device: torch.device, bf16: bool = True) -> AbstractContextManager[object]:
    """bf16 autocast where the CUDA device has it, else nothing; parameters and the delta stay float32."""
    if device.type == "cuda" and bf16 and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On CUDA torch is asked for deterministic algorithms while the block runs, and says where it has none.

    On a CPU nothing is asked: there one number of threads is enough, and other algorithms would give other bits.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False  # it would choose by what happened to be faster
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


def repeatable(training: Callable[Given, Found]) -> Callable[Given, Found]:
    """A training that runs under :func:`deterministic`, on the device of its keyword argument ``device``."""

    @wraps(training)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        with deterministic(pick_device(cast(Device, kwargs.get("device", "auto")))):
            return training(*args, **kwargs)

    return run
