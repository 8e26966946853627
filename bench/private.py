"""What a step of DP-SGD costs over a step without privacy: CPU seconds, in turns on one thread, and memory.

The model is the demo's (six layers of width 384), LoRA of rank 8 on query and value, texts of 128 tokens. Both steps go
through the same examples and end with AdamW; the private one has per-example gradients, clipping, and fresh noise.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.meter import answer, as_reply, cpu_seconds, measure
from bench.rows import Bar, Row, row
from bench.scale import ROOT, Scale, run_text

Step = Callable[[], None]

BATCH, TOKENS, REPEATS = 16, 128, 15
PRIVACY = {
    "unit": "record",
    "sigma": "1.0",
    "delta": "1e-4",
    "clip": "1.0",
    "rate": "0.25",
    "steps": 10,
    "nominal_batch": BATCH,
    "nominal_size": 4 * BATCH,
}


def dp_step(scale: Scale) -> list[Row]:
    """The ratio of CPU seconds, and the most memory a step of each kind holds beyond what stood before."""
    batch, tokens = scale.members(BATCH, 2), 16 if scale.quick else TOKENS
    plain, private, size = _steps(batch, tokens)
    memory = [_memory(kind, batch, tokens) for kind in (0, 1)]
    spent: list[list[float]] = [[], []]
    for _ in range(1 if scale.quick else REPEATS):
        for step, seconds in zip((plain, private), spent, strict=True):
            began = cpu_seconds()
            step()
            seconds.append(cpu_seconds() - began)
    usual, noised = map(statistics.median, spent)
    what = f"batch {batch} of {tokens} tokens, LoRA on six layers; reference: the step without privacy"
    return [
        row("dp_step", noised, "CPU s", reference=usual, n=1, d=size, bar=Bar("ratio", most=1.25), note=what),
        row(
            "dp_step_memory",
            memory[1] / 2**20,
            "MiB",
            reference=memory[0] / 2**20,
            n=1,
            d=size,
            note=f"peak over what stood before; per-example gradients are {4 * size * batch / 2**20:.1f} MiB of it",
        ),
        row("dp_self_test", _self_test(tokens), "CPU s", n=1, d=size, note="before each private job, on its own model"),
    ]


def _memory(kind: int, batch: int, tokens: int) -> int:
    """Of one of the two steps, in a fresh process: freed memory of the other would hide what it takes."""
    task = json.dumps({"task": "memory", "kind": kind, "batch": batch, "tokens": tokens})
    reply = json.loads(run_text([sys.executable, "-m", "bench.private", task]).splitlines()[-1])
    return int(reply["extra_bytes"])


def _measured(request: dict[str, Any]) -> dict[str, Any]:
    *steps, _ = _steps(request["batch"], request["tokens"])
    return as_reply(measure(steps[request["kind"]], 1))


def _steps(batch: int, tokens: int) -> tuple[Step, Step, int]:
    """(a step without privacy, a private step, trained coordinates), each on a model of its own."""
    import torch

    from participant.training import load_model
    from privacy.adapter import layout_of, start_adapter

    torch.set_num_threads(1)
    plan, base = _plan(tokens)
    start = start_adapter(plan.adapter)
    models = [load_model(plan, base, start, "cpu") for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1000, 20000, (tokens,), generator=generator) for _ in range(batch)]
    labels = torch.arange(batch) % len(plan.data.labels)
    return (
        _plain(plan, models[0], texts, labels),
        _private(plan, models[1], texts, labels),
        layout_of(plan.adapter).size,
    )


def _self_test(tokens: int) -> float:
    """CPU seconds of the self-test of a job that trains LoRA and head."""
    from opacus.grad_sample import GradSampleHooks

    from participant import dp_step
    from participant.noise import SecretRandom
    from participant.self_test import run_self_test
    from participant.training import load_model
    from privacy.adapter import start_adapter
    from privacy.budget.events import DpSgd
    from privacy.budget.terms import mechanism

    plan, base = _plan(tokens)
    terms = mechanism(plan)
    assert isinstance(terms, DpSgd)
    loaded = load_model(plan, base, start_adapter(plan.adapter), "cpu")
    dp_step.make_private(loaded.model)
    GradSampleHooks(loaded.model, loss_reduction="sum")
    began = cpu_seconds()
    run_self_test(loaded, plan, terms, SecretRandom())
    return cpu_seconds() - began


def _plan(tokens: int) -> tuple[Any, Path]:
    """(the demo's plan with privacy, for LoRA and head; the directory of its base model)."""
    from demo import corpus
    from privacy.plan import Plan, load_plan

    fields = load_plan(ROOT / "demo" / "plan.toml").plan.model_dump()
    fields["data"]["max_length"] = tokens
    fields["training"] = {"learning_rate": 0.003}
    return Plan.model_validate(fields | {"privacy": PRIVACY}), corpus.base_model()


def _plain(plan: Any, loaded: Any, texts: Any, labels: Any) -> Step:
    """As the loop of ``participant/training.py``."""
    import torch

    from participant import training
    from participant.dp_step import trainable

    weights = trainable(loaded.model)
    optimizer = training.make_optimizer(plan, weights)

    def step() -> None:
        loss = torch.nn.functional.cross_entropy(training.logits_of(loaded, texts), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, training.MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _private(plan: Any, loaded: Any, texts: Any, labels: Any) -> Step:
    import warnings

    from opacus.grad_sample import GradSampleHooks

    from participant import dp_step
    from participant.noise import SecretRandom
    from participant.training import make_optimizer
    from privacy.budget.events import DpSgd
    from privacy.budget.terms import mechanism

    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    terms = mechanism(plan)
    assert isinstance(terms, DpSgd)
    dp_step.make_private(loaded.model)
    GradSampleHooks(loaded.model, loss_reduction="sum")
    losses = dp_step.losses_on(loaded, texts, labels, dp_step.log_prior_of(plan))
    optimizer = make_optimizer(plan, dp_step.trainable(loaded.model))
    step = dp_step.make_step(loaded, terms, losses, optimizer, SecretRandom())
    return lambda: dp_step.take_step(step, range(len(texts)))


if __name__ == "__main__":
    answer({"memory": _measured})
