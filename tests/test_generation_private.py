"""Private fine-tuning of a causal language model: the self-test passes, and notices records that are coupled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from participant import canaries, dp_step, generation
from participant.device import autocast
from participant.dp_sgd import train_private
from participant.self_test import SelfTest, SelfTestFailed
from participant.tokens import Tokens
from participant.training import Loaded, TrainingResult
from privacy.adapter import layout_of, start_adapter
from privacy.errors import UserError
from privacy.plan import Plan, parse_plan
from tests.helpers_learning import privacy_section
from tests.helpers_text import talks, text_draft, tiny_causal
from tests.test_self_test import CHECKS

PRIVACY = privacy_section(steps=6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal(tmp_path_factory.mktemp("base"))


def private(base: Path, privacy: str = PRIVACY, **changes: Any) -> Plan:
    return parse_plan(text_draft(base, privacy=privacy, **changes).encode()).plan


def run(plan: Plan, base: Path, on_selftest: Callable[[SelfTest], None] = lambda _: None) -> TrainingResult:
    start = start_adapter(plan.adapter)
    return train_private(
        plan=plan, base=base, start=start, examples=talks(24), device="cpu", threads=1, on_selftest=on_selftest
    )


def test_per_example_gradients_of_b_pass_the_self_test_and_train(base: Path) -> None:
    plan, found = private(base, targets=("q_proj", "v_proj", "down_proj")), list[SelfTest]()
    result = run(plan, base, found.append)
    assert found[0].passed
    assert {check.name for check in found[0].checks} == CHECKS
    assert (result.delta.shape, result.examples, result.loss) == ((layout_of(plan.adapter).size,), 24, 0.0)
    assert np.isfinite(result.delta).all()
    assert result.delta.any()


def test_steps_without_any_record_are_taken_all_the_same(base: Path) -> None:
    rare = PRIVACY.replace('rate = "0.25"', 'rate = "0.0001"').replace("nominal_size = 24", "nominal_size = 60000")
    plan = private(base, rare, weights="uniform")
    assert run(plan, base).delta.any()


def test_the_self_test_notices_records_that_are_coupled(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean over the tokens of a batch, as models give it themselves, is no loss of a record by itself."""

    def coupled(said: generation.Said, records: int) -> Tensor:
        return (said.losses.mean() / records).expand(records)

    monkeypatch.setattr(generation, "record_losses", coupled)
    with pytest.raises(SelfTestFailed, match="chunking"):
        run(private(base), base)


def test_the_self_test_notices_packing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = generation.lay_out

    def packed(batch: Sequence[Tokens], pad: int, _width: int | None = None) -> generation.Laid:
        return real(batch, pad, 256)

    monkeypatch.setattr(generation, "lay_out", packed)
    with pytest.raises(SelfTestFailed, match="no record was read"):
        run(private(base), base)


def test_nothing_private_is_computed_in_half_precision(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def noted(device: torch.device, bf16: bool = True) -> Any:
        asked.append(bf16)
        return autocast(device, bf16)

    monkeypatch.setattr(generation, "autocast", noted)
    run(private(base), base)
    assert asked
    assert not any(asked)


def test_a_long_record_leaves_room_for_few_at_a_time(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dp_step.most_at_a_time(private(base, max_length=96)) == 21
    assert dp_step.most_at_a_time(private(base, max_length=256)) == 8
    most = 0
    real = generation.private_losses

    def counted(loaded: Loaded, tokens: Sequence[Tokens]) -> dp_step.Losses:
        losses = real(loaded, tokens)

        def noted(chosen: Sequence[int]) -> Tensor:
            nonlocal most
            most = max(most, len(chosen))
            return losses(chosen)

        return noted if len(tokens) == 24 else losses

    monkeypatch.setattr(generation, "private_losses", counted)
    monkeypatch.setattr(dp_step, "CHUNK_TOKENS", 192)
    everybody = PRIVACY.replace('"0.25"', '"1"').replace("nominal_batch = 6", "nominal_batch = 24")
    run(private(base, everybody), base)
    assert most == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "packing = false",
            "packing = true",
            r"generation\.packing: expected false under \[privacy\].*clipped by itself",
        ),
        ('unit = "record"', 'unit = "user"', r'privacy\.unit: expected "record" for task = "generation", found "user"'),
        ("nominal_size = 24", "nominal_size = 24\nprior = [0.5, 0.5]", r"privacy\.prior: expected none"),
    ],
)
def test_what_a_private_plan_cannot_say(base: Path, old: str, new: str, message: str) -> None:
    text = text_draft(base, privacy=PRIVACY)
    assert old in text
    with pytest.raises(UserError, match=message):
        parse_plan(text.replace(old, new).encode())


def test_there_are_no_canaries_for_text_generation(base: Path) -> None:
    with pytest.raises(UserError, match="expected a plan for classification, found one for generation"):
        canaries.audit_training(plan=private(base), base=base, count=20)
