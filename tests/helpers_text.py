"""A causal language model small enough for tests: a Llama of two layers with random weights, a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from participant.drafting import draft_plan
from participant.text_data import Message, Record, Records
from privacy.plan import Plan, parse_plan

# Tiny tensors gain nothing from threads, which wait for each other on a busy machine.
torch.set_num_threads(1)

START, END = "<|im_start|>", "<|im_end|>"
#: As many models have it: a system turn of its own where the conversation has none.
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Kenya": "Nairobi",
    "Japan": "Tokyo",
    "Cuba": "Havana",
}


def tiny_tokenizer(template: str | None = TEMPLATE) -> Any:
    """Every byte is a token, and the two marks of a turn are one each; an end-of-sequence token, no padding."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {token: number for number, token in enumerate([*alphabet, START, END])}
    built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    fast: Any = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=built, eos_token=END, additional_special_tokens=[START], chat_template=template)


def tiny_causal(directory: Path, *, template: str | None = TEMPLATE, **changes: Any) -> Path:
    """Write a Llama with config, weights and tokenizer into ``directory``; the same bits at each call."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(template)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    config = transformers.LlamaConfig(**shape | changes)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def text_plan(base: Path, **changes: Any) -> Plan:
    """A plan drafted for :func:`tiny_causal`; ``changes`` are arguments of :func:`draft_plan`."""
    return parse_plan(text_draft(base, **changes).encode()).plan


def text_draft(base: Path, **changes: Any) -> str:
    """The file of :func:`text_plan`."""
    arguments: dict[str, Any] = {
        "task": "generation",
        "base": base,
        "base_name": "tiny",
        "name": "tiny-text",
        "dataset": "talks",
        "rank": 4,
        "max_length": 96,
        "epochs": 2,
        "learning_rate": 0.02,
        "batch_size": 4,
        "seed": bytes(32),
    }
    return draft_plan(**arguments | changes)


def conversation(*turns: str, where: str = "here") -> Record:
    """A conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    return Record(where, "conversation", tuple(Message(roles[i % 2], said) for i, said in enumerate(turns)))


def pair(prompt: str, response: str) -> Record:
    """A prompt and its response."""
    return Record("here", "pair", (Message("user", prompt), Message("assistant", response)))


def plain(text: str) -> Record:
    """A plain text."""
    return Record("here", "text", (Message("", text),))


def talks(count: int, shift: int = 0) -> Records:
    """``count`` questions for a capital; the first forty differ from one another."""
    asked = ("Capital of {}?", "{}: which capital?", "Name the capital of {}", "Which city rules {}?", "{}?")
    countries = list(CAPITALS)
    return Records(
        tuple(
            conversation(asked[i % 5].format(countries[i % 8]), CAPITALS[countries[i % 8]], where=f"talk {i}")
            for i in range(shift, shift + count)
        )
    )
