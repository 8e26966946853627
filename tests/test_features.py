"""A head that is trained alone sees its inputs shifted and scaled, by public numbers, and is an ordinary head after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from participant import dp_sgd, dp_step, features
from participant.dp_sgd import train_private
from participant.evaluation import accuracy
from participant.features import Standard, enter, inputs_of, leave, standard_of, standardised
from participant.training import Loaded, load_model, logits_of, tokenise
from privacy.adapter import layout_of, release, start_adapter
from privacy.plan import Plan
from tests.helpers_learning import private_plan, tiny_base, word_examples

EXAMPLES = word_examples((40, 40, 40))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def loaded_for(plan: Plan, base: Path) -> Loaded:
    found = load_model(plan, base, start_adapter(plan.adapter), "cpu")
    dp_step.make_private(found.model)
    return found


def the_standard(loaded: Loaded, plan: Plan) -> Standard:
    found = standard_of(loaded, plan)
    assert found is not None
    return found


def test_it_is_for_the_head_alone(base: Path) -> None:
    for train, wanted in (("all", False), ("head", True)):
        plan = private_plan(base, train=train)
        assert (standard_of(loaded_for(plan, base), plan) is not None) == wanted


def test_the_head_says_the_same_before_and_after(base: Path) -> None:
    plan = private_plan(base, train="head")
    loaded = loaded_for(plan, base)
    standard = the_standard(loaded, plan)
    with torch.no_grad():
        standard.head.weight.normal_(generator=torch.Generator().manual_seed(1))
        standard.head.bias.normal_(generator=torch.Generator().manual_seed(2))
        texts = tokenise(loaded.tokenizer, EXAMPLES.texts[:50], 8)
        said, weight = logits_of(loaded, texts), standard.head.weight.clone()
        enter(standard)
        assert not torch.allclose(standard.head.weight, weight)
        f = standardised(standard, loaded, texts)
        torch.testing.assert_close(standard.head(f), said, rtol=1e-4, atol=1e-4)
        leave(standard)
        torch.testing.assert_close(logits_of(loaded, texts), said, rtol=1e-4, atol=1e-4)


def test_no_record_has_a_part_in_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ready before the self-test, and so before the first record is tokenised."""
    plan = private_plan(base, train="head")
    first, again = (the_standard(loaded_for(plan, base), plan) for _ in range(2))
    assert torch.equal(first.mean, again.mean)
    assert first.deviation == again.deviation
    seen: list[str] = []

    def noted(word: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*given: Any) -> Any:
            seen.append(word)
            return call(*given)

        return noting

    monkeypatch.setattr(dp_sgd, "standard_of", noted("standard", standard_of))
    monkeypatch.setattr(dp_sgd, "tokenise", noted("records", tokenise))
    start = start_adapter(plan.adapter)
    train_private(
        plan=plan, base=base, start=start, examples=EXAMPLES, device="cpu", on_selftest=lambda _: seen.append("test")
    )
    assert seen == ["standard", "test", "records"]


def test_what_is_seen_of_a_text_is_the_same_to_the_bit_in_any_company(base: Path) -> None:
    plan = private_plan(base, train="head")
    loaded = loaded_for(plan, base)
    standard = the_standard(loaded, plan)
    texts = tokenise(loaded.tokenizer, EXAMPLES.texts[:40], 8)
    everyone, others = (standardised(standard, loaded, some) for some in (texts, texts[1:]))
    assert torch.equal(everyone[1:], others)


def test_a_record_that_is_not_finite_ends_no_job(base: Path) -> None:
    """Whether there is such a record would show; its gradient is zeroed instead."""
    plan = private_plan(base, train="head")
    loaded = loaded_for(plan, base)
    standard = the_standard(loaded, plan)
    texts = tokenise(loaded.tokenizer, EXAMPLES.texts[:2], 8)
    before = standardised(standard, loaded, texts)

    def poison(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs[0] * float("nan"),)

    handle = standard.head.register_forward_pre_hook(poison)
    try:
        poisoned = standardised(standard, loaded, texts[:1])
    finally:
        handle.remove()
    assert bool(poisoned.isnan().all())
    assert bool(before.isfinite().all())


def test_a_model_that_does_more_than_its_head_is_not_cut_short(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = private_plan(base, train="head")
    loaded = loaded_for(plan, base)
    texts = tokenise(loaded.tokenizer, EXAMPLES.texts[:3], 8)
    head = the_standard(loaded, plan).head
    monkeypatch.setattr(features, "logits_of", lambda *given: logits_of(*given) + 1)
    assert inputs_of(head, loaded, texts) is None
    assert standard_of(loaded, plan) is None


def test_the_head_alone_learns_with_noise(base: Path) -> None:
    plan = private_plan(
        base,
        train="head",
        training={"learning_rate": 0.05},
        rate="0.5",
        steps=60,
        sigma="1.5",
        nominal_size=120,
        nominal_batch=60,
    )
    start = start_adapter(plan.adapter)
    result = train_private(
        plan=plan, base=base, start=start, examples=EXAMPLES, device="cpu", on_selftest=lambda _: None
    )
    after = release(start, result.delta, 1.0, layout_of(plan.adapter))
    found = accuracy(plan=plan, base=base, adapter=after, examples=EXAMPLES, device="cpu").accuracy
    assert found > 0.5  # by chance a third; seven runs gave .65 to .70
