"""How fast a training step is on this machine's GPU: fp32 against bf16 autocast, written to build/gpu.json.

    python -m bench.gpu --base DIRECTORY        (the demo's base model where none is named)

It measures the very functions of ``participant/training.py``, on texts of full length. Where there is no GPU it says
so and ends well, so that it can be part of any script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from participant.device import autocast
from participant.drafting import draft_plan
from participant.training import Loaded, load_model, logits_of
from privacy.adapter import start_adapter
from privacy.errors import UserError
from privacy.plan import parse_plan

LABELS = ("first", "second", "third", "fourth", "fifth")
WARM_UP_STEPS = 5


def step(loaded: Loaded, weights: list[Any], optimizer: Any, batch: list[torch.Tensor], bf16: bool) -> None:
    """One training step as in :func:`participant.training.train`."""
    labels = torch.arange(len(batch), device=loaded.device) % len(LABELS)
    with autocast(loaded.device, bf16):
        logits = logits_of(loaded, batch)
    cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def measure(loaded: Loaded, *, batch_size: int, length: int, steps: int, bf16: bool) -> dict[str, float]:
    """Median milliseconds per step, examples and tokens per second, peak memory in MiB."""
    weights = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    size = loaded.model.config.vocab_size
    batch = list(torch.randint(0, size, (batch_size, length), generator=generator))
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(WARM_UP_STEPS + steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step(loaded, weights, optimizer, batch, bf16)
        torch.cuda.synchronize()
        if number >= WARM_UP_STEPS:
            seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    return {
        "step_ms": 1e3 * median,
        "examples_per_s": batch_size / median,
        "tokens_per_s": batch_size * length / median,
        "peak_memory_mib": torch.cuda.max_memory_allocated() / 2**20,
    }


def report(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole measurement as a JSON object; ``available`` is false, and nothing else said, without a GPU."""
    if not torch.cuda.is_available():
        return {"available": False, "torch": torch.__version__}
    base = arguments.base or _demo_base()
    text = draft_plan(
        base=base,
        base_name=base.name,
        name="bench",
        dataset="bench",
        labels=LABELS,
        targets=arguments.targets.split(","),
        rank=arguments.rank,
        max_length=arguments.length,
    )
    plan = parse_plan(text.encode()).plan
    loaded = load_model(plan, base, start_adapter(plan.adapter), "cuda")
    sizes = {"batch_size": arguments.batch_size, "length": arguments.length, "steps": arguments.steps}
    modes = {"fp32": False} | ({"bf16": True} if torch.cuda.is_bf16_supported() else {})
    return {
        "available": True,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "base": base.name,
        "rank": arguments.rank,
        **sizes,
        **{mode: measure(loaded, bf16=bf16, **sizes) for mode, bf16 in modes.items()},
    }


def _demo_base() -> Path:
    from demo.corpus import base_model

    return base_model()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, help="directory of the base model (default: the demo's)")
    parser.add_argument("--targets", default="query,value", help="linear modules to adapt (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapter (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="examples per step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens per example (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="steps measured (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/gpu.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        found = report(arguments)
    except UserError as error:
        raise SystemExit(f"{error}\n{error.hint}".strip()) from error
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2) if found["available"] else "no CUDA device: nothing measured")


if __name__ == "__main__":
    main()
