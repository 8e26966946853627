"""A site that trains fewer directions than the plan's adapter has, from a start in which none of them is zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from participant.ranks import keep_beneath, narrowed
from participant.training import load_model, logits_of, tokenise, train
from privacy.adapter import a_name, b_name, start_adapter, unflatten
from privacy.methods import dense_name, merged, sent
from privacy.plan import Plan
from tests.helpers_learning import tiny_base, tiny_plan, word_examples

EXAMPLES = word_examples((24, 24, 24))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def later(base: Path) -> tuple[Plan, dict[str, Any]]:
    """A plan with the method "dense", and the release that its second stage starts from."""
    plan = tiny_plan(base, method="dense", clip=8.0)
    start = start_adapter(plan.adapter)
    found = train(plan=plan, base=base, start=start, examples=EXAMPLES, device="cpu", threads=1)
    return plan, dict(merged(start, found.delta, plan).tensors)


def logits(plan: Plan, base: Path, start: Any, whole: tuple[Plan, Any] | None, rank: int) -> torch.Tensor:
    loaded = load_model(plan, base, start, "cpu")
    if whole is not None:
        keep_beneath(loaded.model, *whole, rank)
    with torch.no_grad():
        texts = tokenise(loaded.tokenizer, EXAMPLES.texts[:6], plan.data.max_length)
        found: torch.Tensor = logits_of(loaded, texts)
    return found


def test_a_later_stage_starts_from_the_whole_release(base: Path, later: tuple[Plan, dict[str, Any]]) -> None:
    plan, start = later
    exact = logits(plan, base, start, None, 1)
    narrow, cut = narrowed(plan, start, 1)
    torch.testing.assert_close(logits(narrow, base, cut, (plan, start), 1), exact, atol=1e-5, rtol=1e-5)
    assert (logits(narrow, base, cut, None, 1) - exact).abs().max() > 1e-3, "the rest of the directions says nothing"


def test_what_is_not_trained_is_not_made_up_for(base: Path, later: tuple[Plan, dict[str, Any]]) -> None:
    """The first step is taken where the release is: its loss is that of a site with all directions."""
    plan, start = later
    first: list[float] = []
    for rank in (None, 1):
        losses: list[float] = []
        found = train(
            plan=plan,
            base=base,
            start=start,
            examples=EXAMPLES,
            device="cpu",
            threads=1,
            rank=rank,
            progress=lambda _step, _steps, loss, losses=losses: losses.append(loss),  # type: ignore[misc]
        )
        first.append(losses[0])
    assert first[1] == pytest.approx(first[0], abs=1e-5)
    for module in plan.adapter.modules:
        added = unflatten(found.delta, sent(plan))[dense_name(module)]
        assert np.linalg.matrix_rank(added, tol=1e-4) <= 2, "what was added to one direction, and what it was before"


def test_the_first_stage_is_as_it_was(base: Path) -> None:
    plan = tiny_plan(base, method="dense", clip=8.0)
    start = start_adapter(plan.adapter)
    narrow, cut = narrowed(plan, start, 1)
    loaded = load_model(narrow, base, cut, "cpu")
    keep_beneath(loaded.model, plan, start, 1)
    for module in plan.adapter.modules:
        layer = loaded.model.get_submodule(f"base_model.model.{module}")
        assert not layer.base_layer._forward_hooks
        assert cut[a_name(module)].shape[0] == cut[b_name(module)].shape[1] == 1
