"""Counting right answers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from participant.data import Examples
from participant.evaluation import BATCH, accuracy
from participant.training import load_model
from privacy.adapter import start_adapter
from privacy.errors import UserError
from privacy.plan import Plan
from tests.helpers_learning import tiny_base, tiny_plan, word_examples


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plan(base: Path) -> Plan:
    return tiny_plan(base)


def test_the_start_adapter_answers_with_the_first_class(plan: Plan, base: Path) -> None:
    found = accuracy(plan=plan, base=base, adapter=None, examples=word_examples((5, 2, 3)), device="cpu")
    assert (found.correct, found.total) == (5, 10)
    assert found.loss == pytest.approx(math.log(3))
    assert found.accuracy == 0.5


def test_counts_and_loss_are_those_of_one_text_at_a_time(plan: Plan, base: Path) -> None:
    """Batches are ordered by length and padded; neither may change an answer."""
    examples = word_examples((BATCH // 2, BATCH // 2, 3))
    adapter = start_adapter(plan.adapter)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in adapter.items():
        if "lora_A" not in name:
            tensor += torch.randn(tensor.shape, generator=generator).numpy()
    loaded = load_model(plan, base, adapter, "cpu")
    correct, loss = 0, 0.0
    for text, label in zip(examples.texts, examples.labels, strict=True):
        with torch.inference_mode():
            logits = loaded.model(**loaded.tokenizer([text], return_tensors="pt")).logits
        correct += int(logits.argmax() == label)
        loss -= float(logits.log_softmax(dim=1)[0, label])
    found = accuracy(plan=plan, base=base, adapter=adapter, examples=examples, device="cpu")
    assert 0 < correct < len(examples)
    assert (found.correct, found.total) == (correct, len(examples))
    assert found.loss == pytest.approx(loss / len(examples), rel=1e-4)


def test_no_examples_is_a_users_mistake(plan: Plan, base: Path) -> None:
    with pytest.raises(UserError, match="expected at least one example"):
        accuracy(plan=plan, base=base, adapter=None, examples=Examples((), ()), device="cpu")


def test_another_layout_is_refused(plan: Plan, base: Path) -> None:
    adapter = start_adapter(plan.adapter)
    del adapter["base_model.model.classifier.bias"]
    with pytest.raises(ValueError, match="missing tensor"):
        accuracy(plan=plan, base=base, adapter=adapter, examples=word_examples((1, 1, 1)), device="cpu")
