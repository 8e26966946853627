"""What a training step holds in memory, by rank, length and batch, asked of torch; and its time on this CPU. No GPU.

    python -m bench.footprint --base DIRECTORY --task generation --target q_proj --batch-size 1 --batch-size 4

It runs the forward pass of ``participant/training.py`` for each batch size, on random tokens, and counts the bytes that
autograd keeps until the backward pass. All in float32, as on a CPU and in private training; the process itself,
the driver and what torch reserves beside it are not in the figures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from participant import generation
from participant.base_model import memory_of
from participant.drafting import draft_plan
from participant.training import Loaded, load_model, logits_of
from privacy.adapter import start_adapter
from privacy.errors import UserError
from privacy.plan import Plan, parse_plan
from privacy.sections import Task

LABELS = ("first", "second", "third", "fourth", "fifth")
#: A trained number, its gradient and the two moments of Adam, in float32.
BYTES_TRAINED = 16


@dataclass(frozen=True)
class Footprint:
    """Bytes of each kind, and seconds."""

    #: Of the base model once it is loaded.
    weights: int
    #: Of A, B and head, with gradients and optimiser.
    adapter: int
    #: What autograd keeps for one batch.
    kept: int
    #: CPU seconds of a forward and a backward pass, the quickest of three.
    cpu_s: float


def plan_for(base: Path, *, task: Task, targets: Sequence[str], rank: int, length: int) -> Plan:
    """A plan for the base model, as ``veilsum-participant draft`` would write it."""
    text = draft_plan(
        task=task,
        base=base,
        base_name=base.name,
        name="bench",
        dataset="bench",
        labels=LABELS if task == "classification" else (),
        targets=targets,
        rank=rank,
        max_length=length,
    )
    return parse_plan(text.encode()).plan


def footprint(plan: Plan, base: Path, loaded: Loaded, batch_size: int) -> Footprint:
    """Of a step on ``batch_size`` texts of the plan's full length."""
    trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for name, p in loaded.model.named_parameters() if "lora_A" in name and not p.requires_grad)
    loss = _forward(plan, loaded, batch_size)
    adapter = BYTES_TRAINED * trained + 4 * frozen
    return Footprint(memory_of(base), adapter, _kept(loaded, loss), min(_cpu_s(loss) for _ in range(3)))


def _forward(plan: Plan, loaded: Loaded, batch_size: int) -> Callable[[], Tensor]:
    """The loss of random texts."""
    records = generation.synthetic(loaded, [plan.data.max_length] * batch_size)
    if plan.task == "generation":
        laid = generation.lay_out(records, loaded.tokenizer.pad_token_id)
        return lambda: generation.say(loaded, laid).losses.mean()
    return lambda: torch.logsumexp(logits_of(loaded, [one.ids for one in records]), 1).mean()


def _kept(loaded: Loaded, loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass, each storage once, the model's own left out."""
    own = {p.untyped_storage().data_ptr() for p in loaded.model.parameters()}
    storages: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, or its place would be given to another
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        assert loss().requires_grad
    return sum(storage.nbytes() for storage in storages.values())


def _cpu_s(loss: Callable[[], Tensor]) -> float:
    began = time.process_time()
    loss().backward()  # type: ignore[no-untyped-call]
    return time.process_time() - began


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.footprint", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="directory of the base model")
    parser.add_argument("--task", default="classification", choices=["classification", "generation"])
    parser.add_argument("--target", action="append", help="linear modules to adapt (default: query and value)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapter (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens per text (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, action="append", help="texts per step, more than once for several")
    asked = parser.parse_args()
    targets = asked.target or ["query", "value"]
    torch.set_num_threads(1)  # so that waiting for each other is not counted
    try:
        if not asked.base.is_dir():
            raise UserError(f"{asked.base}: expected the directory of a base model, found none")
        plan = plan_for(asked.base, task=asked.task, targets=targets, rank=asked.rank, length=asked.length)
        loaded = load_model(plan, asked.base, start_adapter(plan.adapter), "cpu")
    except UserError as error:
        raise SystemExit(f"{error}\n{error.hint}".strip()) from error
    for batch_size in asked.batch_size or [16]:
        found = footprint(plan, asked.base, loaded, batch_size)
        print(
            f"{asked.base.name}: rank {asked.rank}, {batch_size} texts of {asked.length} tokens: "
            f"weights {found.weights / 2**20:.1f} MiB, adapter {found.adapter / 2**20:.1f}, "
            f"kept for the gradient {found.kept / 2**20:.1f}; {found.cpu_s:.2f} s of CPU time",
            flush=True,
        )


if __name__ == "__main__":
    main()
