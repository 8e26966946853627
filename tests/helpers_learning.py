"""A base model small enough for tests: a BERT of two layers with random weights, and texts it can tell apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from participant.data import Examples
from participant.drafting import draft_plan
from participant.measured import Measured
from privacy.plan import Plan, parse_plan

# Tiny tensors gain nothing from threads, which wait for each other on a busy machine.
torch.set_num_threads(1)

LABELS = ("fruit", "metal", "river")
WORDS = {
    "fruit": ("apple", "pear", "plum", "cherry"),
    "metal": ("iron", "zinc", "copper", "nickel"),
    "river": ("rhine", "elbe", "danube", "oder"),
}
#: Range of the numbers of a toy regression; neither end, nor zero, is where they lie.
TARGET = (10.0, 50.0)
VOCABULARY = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "a",
    *(word for words in WORDS.values() for word in words),
)
#: What tells spellings of one text apart, for all but the model: :func:`tiny_base` sees each kind as one text, within 8
#: tokens. Number -> spelling, of which the first 24 differ.
SPELLINGS: dict[str, Callable[[int], str]] = {
    "case": lambda i: "".join(c.upper() if i >> k & 1 else c for k, c in enumerate("rhine the")),
    "white space": lambda i: "the" + " " * (i + 1) + "rhine",
    "what is cut off": lambda i: "the rhine " * 3 + "apple " * i,
    "words it does not know": lambda i: f"the rhine {i}",
}
#: A section ``[privacy]`` for 24 records.
PRIVACY: dict[str, Any] = {
    "unit": "record",
    "sigma": "1.0",
    "delta": "1e-4",
    "clip": "1.0",
    "rate": "0.25",
    "steps": 12,
    "nominal_batch": 6,
    "nominal_size": 24,
}


def tiny_base(directory: Path, *, pooler: bool = True, hidden: int = 32) -> Path:
    """Write a BERT with config, weights and tokenizer into ``directory``; the same bits at each call."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=16,
        initializer_range=0.3,  # at the usual 0.02 a random BERT says nearly the same of every text
    )
    transformers.BertModel(config, add_pooling_layer=pooler).save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 16}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def tiny_plan(base: Path, **changes: Any) -> Plan:
    """A plan drafted for :func:`tiny_base`; ``changes`` are arguments of :func:`draft_plan`."""
    arguments: dict[str, Any] = {
        "base": base,
        "base_name": "tiny",
        "name": "tiny-plan",
        "dataset": "words",
        "labels": LABELS,
        "rank": 4,
        "max_length": 8,
        "epochs": 4,
        "learning_rate": 0.02,
        "batch_size": 8,
        "seed": bytes(32),
    }
    return parse_plan(draft_plan(**arguments | changes).encode()).plan


def privacy_section(**changes: Any) -> str:
    """The section ``[privacy]`` of :func:`private_plan` as the text of a plan."""
    lines = (f"{key} = {json.dumps(value)}\n" for key, value in (PRIVACY | changes).items())
    return "[privacy]\n" + "".join(lines)


def private_plan(base: Path, *, train: str = "all", training: dict[str, Any] | None = None, **changes: Any) -> Plan:
    """:func:`tiny_plan` with a section ``[privacy]`` for 24 records; ``changes`` are its keys."""
    fields = tiny_plan(base).model_dump()
    fields["adapter"]["train"] = train
    fields["training"] = training or {"learning_rate": 0.02}
    fields["privacy"] = PRIVACY | changes
    return Plan.model_validate(fields)


def word_examples(counts: tuple[int, ...]) -> Examples:
    """``counts[c]`` texts of class c: two of its words and a filler."""
    texts: list[str] = []
    labels: list[int] = []
    for number, count in enumerate(counts):
        words = WORDS[LABELS[number]]
        for i in range(count):
            texts.append(f"the {words[i % 4]} {'a ' * (i % 3)}{words[(i // 4) % 4]}")
            labels.append(number)
    return Examples(tuple(texts), tuple(labels))


def spelled(kind: str, count: int) -> tuple[str, ...]:
    """Spellings of one text, see :data:`SPELLINGS`."""
    found = tuple(map(SPELLINGS[kind], range(count)))
    assert len(set(found)) == count
    return found


def regression_plan(base: Path, **changes: Any) -> Plan:
    """:func:`tiny_plan` for the numbers of :func:`word_numbers`."""
    return tiny_plan(base, **{"task": "regression", "labels": (), "target": TARGET} | changes)


def word_numbers(counts: tuple[int, ...]) -> Measured:
    """The texts of :func:`word_examples`, each with a number that its two words decide: 12 to 45."""
    texts = word_examples(counts).texts
    order = VOCABULARY[VOCABULARY.index("a") + 1 :]
    numbers = [12 + 1.5 * sum(order.index(word) for word in text.split() if word in order) for text in texts]
    return Measured(texts, tuple(numbers))
