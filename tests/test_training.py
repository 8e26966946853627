"""The training loop: what moves, what must not, what is refused, and that it is repeatable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from participant import training
from participant.base_model import base_digest
from participant.data import Examples
from participant.device import pick_device
from participant.evaluation import accuracy
from participant.training import (
    Loaded,
    TrainingResult,
    learning_rate_at,
    load_classifier,
    load_model,
    log_prior,
    logits_by_length,
    train,
)
from privacy.adapter import (
    Tensors,
    layout_of,
    release,
    save_peft,
    start_adapter,
    trained_part,
    unflatten,
)
from privacy.errors import UserError
from privacy.plan import Plan
from tests.helpers_learning import LABELS, tiny_base, tiny_plan, word_examples

EXAMPLES = word_examples((24, 24, 24))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plan(base: Path) -> Plan:
    return tiny_plan(base)


@pytest.fixture(scope="module")
def start(plan: Plan) -> Tensors:
    return start_adapter(plan.adapter)


def run(plan: Plan, base: Path, examples: Examples = EXAMPLES, **changes: Any) -> TrainingResult:
    start = start_adapter(plan.adapter)
    return train(plan=plan, base=base, start=start, examples=examples, device="cpu", **changes)


def changed(plan: Plan, section: str, **changes: Any) -> Plan:
    """``plan`` with some keys of one section replaced, not validated again."""
    return plan.model_copy(update={section: getattr(plan, section).model_copy(update=changes)})


def test_training_learns_and_gives_a_delta_of_the_plans_size(plan: Plan, base: Path, start: Tensors) -> None:
    steps: list[tuple[int, int, float]] = []
    result = run(plan, base, progress=lambda *step: steps.append(step))
    layout = layout_of(plan.adapter)
    assert result.delta.shape == (layout.size,)
    assert result.delta.dtype == np.float32
    assert result.examples == 72
    assert [step for step, _, _ in steps] == list(range(1, 37))
    assert {total for _, total, _ in steps} == {36}
    assert result.loss == pytest.approx(np.mean([loss for _, _, loss in steps[-9:]]))
    assert result.loss < 0.8 < 1.0 < steps[0][2]
    parts = unflatten(result.delta, layout)
    assert all(np.any(part) for part in parts.values()), "every B and the head must move"
    trained = release(start, result.delta, 1.0, layout)
    assert accuracy(plan=plan, base=base, adapter=trained, examples=EXAMPLES, device="cpu").accuracy > 0.8


def test_the_same_plan_and_data_give_the_same_delta(plan: Plan, base: Path) -> None:
    torch.manual_seed(1)
    first = run(plan, base)
    torch.manual_seed(2)
    assert np.array_equal(first.delta, run(plan, base).delta)
    assert not np.array_equal(first.delta, run(changed(plan, "training", seed=1), base).delta)


def test_training_goes_on_from_a_later_stages_start(plan: Plan, base: Path, start: Tensors) -> None:
    layout = layout_of(plan.adapter)
    first = run(plan, base)
    second = train(
        plan=plan, base=base, start=release(start, first.delta, 1.0, layout), examples=EXAMPLES, device="cpu"
    )
    assert second.loss < first.loss


def test_adapter_is_in_place_with_a_frozen_and_b_trainable(plan: Plan, base: Path, start: Tensors) -> None:
    model = load_model(plan, base, start, "cpu").model
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == len(layout_of(plan.adapter).trained)
    assert not any("lora_A" in name for name in trainable)
    assert not model.training


def test_peft_loads_a_saved_adapter_bit_for_bit(plan: Plan, base: Path, start: Tensors, tmp_path: Path) -> None:
    layout = layout_of(plan.adapter)
    mean = np.random.default_rng(0).standard_normal(layout.size, np.float32)
    released = release(start, mean, 1.0, layout)
    save_peft(tmp_path / "released", released, adapter=plan.adapter, base_name="tiny")
    model, tokenizer, _ = load_classifier(base, len(LABELS))
    loaded: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / "released"))
    state = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert state.keys() == released.keys()
    assert all(state[name].numpy().tobytes() == released[name].tobytes() for name in released)
    ours = load_model(plan, base, released, "cpu").model
    inputs = tokenizer(["the apple", "the rhine"], return_tensors="pt")
    assert torch.equal(loaded.eval()(**inputs).logits, ours(**inputs).logits)
    config = json.loads((tmp_path / "released" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8.0, "SEQ_CLS")


def test_the_head_alone_is_trained_and_loads_like_any_adapter(base: Path, tmp_path: Path) -> None:
    plan = tiny_plan(base, train="head")
    start, layout = start_adapter(plan.adapter), layout_of(plan.adapter)
    model = load_model(plan, base, start, "cpu").model
    assert all("modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)
    result = run(plan, base)
    assert result.delta.shape == (3 * 32 + 3,)
    released = release(start, result.delta, 1.0, layout)
    assert all(np.array_equal(released[name], start[name]) for name, _ in layout.frozen), "A and B stay"
    save_peft(tmp_path / "released", released, adapter=plan.adapter, base_name="tiny")
    plain, tokenizer, _ = load_classifier(base, len(LABELS))
    loaded: Any = peft.PeftModel.from_pretrained(plain, str(tmp_path / "released"))
    inputs = tokenizer(["the apple", "the rhine"], return_tensors="pt")
    assert torch.equal(loaded.eval()(**inputs).logits, load_model(plan, base, released, "cpu").model(**inputs).logits)
    evaluated = accuracy(plan=plan, base=base, adapter=released, examples=EXAMPLES, device="cpu")
    assert evaluated.accuracy > accuracy(plan=plan, base=base, adapter=start, examples=EXAMPLES, device="cpu").accuracy


def test_a_head_that_does_not_move_is_our_bug(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "learning_rate_at", lambda *_: 0.0)
    with pytest.raises(AssertionError, match="no tensor of the head moved"):
        run(tiny_plan(base, train="head"), base)


def test_sgd_is_plain(plan: Plan) -> None:
    some = training.make_optimizer(changed(plan, "training", optimizer="sgd"), [torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(some, torch.optim.SGD)
    assert (some.defaults["momentum"], some.defaults["weight_decay"]) == (0, 0)


def test_the_head_has_a_rate_of_its_own_where_the_plan_says_so(base: Path) -> None:
    """Both follow one schedule, each to its own peak."""
    plan = tiny_plan(base, learning_rate=0.002, head_learning_rate=0.05)
    model = load_model(plan, base, start_adapter(plan.adapter), "cpu").model
    optimizer = training.make_optimizer(plan, *training.trained_weights(model))
    adapter, head = optimizer.param_groups
    assert [len(group["params"]) for group in (adapter, head)] == [4, 2]
    assert {tuple(p.shape) for p in head["params"]} == {(3, 32), (3,)}
    for step in (0, 3, 9):
        training.set_rates(optimizer, step, 10)
        assert adapter["lr"] == learning_rate_at(0.002, step, 10)
        assert head["lr"] == learning_rate_at(0.05, step, 10)
    same = training.make_optimizer(tiny_plan(base), *training.trained_weights(model))
    assert [group["peak"] for group in same.param_groups] == [0.02, 0.02]


def test_a_rate_of_the_head_is_for_a_head_that_is_trained_beside_the_adapter(base: Path) -> None:
    for changes in ({"train": "head"}, {"head": "analytic", "max_weight": 1024}):
        with pytest.raises(UserError, match="head_learning_rate: expected none where no head is trained beside the ad"):
            tiny_plan(base, **{"head_learning_rate": 0.1} | changes)


def test_a_higher_rate_of_the_head_moves_the_head_further(base: Path) -> None:
    moved = []
    for rate in (None, 0.2):
        plan = tiny_plan(base, epochs=1, head_learning_rate=rate)
        parts = unflatten(run(plan, base).delta, layout_of(plan.adapter))
        moved.append(np.abs(parts["base_model.model.classifier.weight"]).max())
    assert moved[1] > 4 * moved[0]


def test_log_prior_is_the_sites_frequency() -> None:
    prior = log_prior((0, 0, 0, 1), 3)
    assert torch.equal(prior, torch.log(torch.tensor([0.75, 0.25, 0.0])))
    assert prior[2] == -torch.inf


def test_logit_adjustment_takes_the_sites_own_prior_out(plan: Plan, base: Path, start: Tensors) -> None:
    """Texts without any word of a class: plain training answers with the site's prior, adjusted training does not."""
    skewed = word_examples((60, 6, 6))
    nothing = Examples(("the a the", "a a", "the the"), (0, 0, 0))
    layout = layout_of(plan.adapter)
    loss = {}
    for name in ("logit_adjusted", "cross_entropy"):
        some = changed(plan, "training", loss=name, epochs=2, learning_rate=0.005)
        trained = release(start, run(some, base, skewed).delta, 1.0, layout)
        loss[name] = accuracy(plan=plan, base=base, adapter=trained, examples=nothing, device="cpu").loss
    # -log p(class 0): about -log(60/72) = 0.18 with the prior learned, -log(1/3) = 1.10 without any.
    assert loss["cross_entropy"] < 0.5
    assert loss["logit_adjusted"] > 0.8


def test_an_absent_class_is_left_alone(plan: Plan, base: Path) -> None:
    """A site without class 2 must not push it down for those who have it; plain cross-entropy does."""
    layout = layout_of(plan.adapter)
    for name, is_left in (("logit_adjusted", True), ("cross_entropy", False)):
        result = run(changed(plan, "training", loss=name, epochs=1), base, word_examples((36, 36, 0)))
        parts = unflatten(result.delta, layout)
        assert np.isfinite(result.delta).all()
        assert is_left == (not parts["base_model.model.classifier.weight"][2].any())
        assert is_left == (parts["base_model.model.classifier.bias"][2] == 0)


def test_a_single_label_teaches_nothing(plan: Plan, base: Path) -> None:
    with pytest.raises(UserError, match="expected two labels or more, found only 'metal'") as caught:
        run(plan, base, word_examples((0, 5, 0)))
    assert caught.value.hint


def test_no_examples_is_a_users_mistake(plan: Plan, base: Path) -> None:
    with pytest.raises(UserError, match="expected at least one example"):
        run(plan, base, Examples((), ()))


def test_a_loss_that_is_not_finite_is_named(plan: Plan, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> torch.Tensor:
        return torch.full((8, 3), torch.nan, requires_grad=True)

    monkeypatch.setattr(training, "logits_of", broken)
    with pytest.raises(UserError, match="expected a finite loss, found nan at step 1 of 36"):
        run(plan, base)


def test_short_texts_of_a_batch_are_not_padded_to_the_longest(
    plan: Plan, base: Path, start: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding changes neither logits nor gradients, but a CPU computes it like text."""
    loaded = load_model(plan, base, start, "cpu")
    weights = [p for p in loaded.model.parameters() if p.requires_grad]
    torch.manual_seed(1)
    for parameter in weights:
        torch.nn.init.normal_(parameter, std=0.3)
    batch = [torch.arange(5, 5 + length) for length in (2, 8, 4, 5)]
    real, computed = training.logits_of, list[list[int]]()

    def counted(loaded: Loaded, part: list[torch.Tensor]) -> torch.Tensor:
        computed.append([len(one) for one in part])
        return real(loaded, part)

    monkeypatch.setattr(training, "logits_of", counted)
    found = []
    for logits_of in (counted, logits_by_length):
        logits = logits_of(loaded, batch)
        targets = torch.tensor([0, 1, 2, 1])  # records in another order would have others
        found.append([logits, *torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets), weights)])
    assert computed == [[2, 8, 4, 5], [8, 5], [2, 4]]
    assert all(tensor.abs().max() > 0 for tensor in found[0])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole)
    logits_by_length(loaded, batch[1:2])
    assert computed[-1] == [8]


def test_b_that_does_not_move_is_our_bug(plan: Plan, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "learning_rate_at", lambda *_: 0.0)
    with pytest.raises(AssertionError, match="no LoRA B moved"):
        run(plan, base)


def test_a_site_with_a_single_batch_moves_the_head_alone(base: Path) -> None:
    """Behind a head of zeros B has no gradient yet."""
    plan = tiny_plan(base, epochs=1, batch_size=8)
    start = start_adapter(plan.adapter)
    result = train(plan=plan, base=base, start=start, examples=word_examples((2, 2, 1)), device="cpu")
    parts = unflatten(result.delta, layout_of(plan.adapter))
    assert [name for name, part in parts.items() if np.any(part)] == [n for n in parts if "lora_B" not in n]


def test_a_start_of_another_layout_is_refused(plan: Plan, base: Path, start: Tensors) -> None:
    with pytest.raises(ValueError, match="missing tensor"):
        train(plan=plan, base=base, start=trained_part(start, layout_of(plan.adapter)), examples=EXAMPLES)


def test_the_digest_sees_weights_config_and_tokenizer_only(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    digest = base_digest(base)
    (base / "README.md").write_text("x")
    (base / "onnx").mkdir()
    (base / "onnx" / "model.safetensors").write_text("x")
    assert base_digest(base) == digest
    for name in ("model.safetensors", "config.json", "vocab.txt", "tokenizer_config.json"):
        content = (base / name).read_bytes()
        (base / name).write_bytes(content + b" ")
        assert base_digest(base) != digest
        (base / name).write_bytes(content)
    (base / "merges.txt").write_text("")
    assert base_digest(base) != digest


def test_another_base_model_is_refused(plan: Plan, tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    (base / "vocab.txt").write_text((base / "vocab.txt").read_text() + "more\n")
    with pytest.raises(UserError, match=f"expected base model tiny with digest {plan.base.digest}, found ") as caught:
        run(plan, base)
    assert caught.value.hint


def test_a_base_model_without_a_pooler_is_refused(plan: Plan, tmp_path: Path) -> None:
    base = tiny_base(tmp_path, pooler=False)
    some = changed(plan, "base", digest=base_digest(base))
    with pytest.raises(UserError, match=r"found none for 'bert\.pooler\.dense\.bias'"):
        run(some, base)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"modules": {"bert.gone": (32, 32)}}, r"linear module 'bert\.gone' of shape \[32, 32\], found none"),
        (
            {"modules": {"bert.encoder.layer.0.attention.self.query": (32, 16)}},
            r"self\.query' of shape \[32, 16\], found \[32, 32\]",
        ),
        (
            {"head": {"classifier.bias": (3,), "classifier.weight": (3, 16)}},
            r"'classifier\.weight' of shape \[3, 16\], found \[3, 32\]",
        ),
        ({"head": {"classifier.weight": (3, 32)}}, r"found none for 'classifier\.bias'"),
    ],
    ids=["no such module", "another module shape", "another head shape", "a head tensor is forgotten"],
)
def test_a_plan_for_another_model_is_refused(plan: Plan, base: Path, adapter: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(changed(plan, "adapter", **adapter), base)


def test_longer_texts_than_the_model_takes_are_refused(plan: Plan, base: Path) -> None:
    with pytest.raises(UserError, match=r"expected data\.max_length <= 16 for tiny, found 17"):
        run(changed(plan, "data", max_length=17), base)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("gone", r"expected config\.json and .*, found no directory"),
        ("weights", r"expected config\.json and .*, found config.json"),
        ("config", "expected a base model for sequence classification, found: "),
    ],
)
def test_a_base_model_that_cannot_be_loaded_is_a_users_mistake(
    plan: Plan, tmp_path: Path, broken: str, message: str
) -> None:
    base = tiny_base(tmp_path / "base")
    if broken == "gone":
        base = tmp_path / "gone"
    if broken == "weights":
        (base / "model.safetensors").unlink()
    if broken == "config":
        (base / "config.json").write_text("{}")
        plan = changed(plan, "base", digest=base_digest(base))
    with pytest.raises(UserError, match=message) as caught:
        run(plan, base)
    assert "\n" not in str(caught.value)


def test_a_missing_gpu_is_a_users_mistake(plan: Plan, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="expected a CUDA device, found none"):
        train(plan=plan, base=base, start=start_adapter(plan.adapter), examples=EXAMPLES, device="cuda")
    assert pick_device("auto") == torch.device("cpu")


def test_the_thread_count_is_touched_only_when_asked(plan: Plan, base: Path) -> None:
    before = torch.get_num_threads()
    short = changed(plan, "training", epochs=1)
    run(short, base)
    assert torch.get_num_threads() == before
    try:
        run(short, base, threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_a_gpu_gives_a_float32_delta_that_works(plan: Plan, base: Path, start: Tensors) -> None:
    layout = layout_of(plan.adapter)
    result = train(plan=plan, base=base, start=start, examples=EXAMPLES, device="cuda")
    trained = release(start, result.delta, 1.0, layout)
    assert accuracy(plan=plan, base=base, adapter=trained, examples=EXAMPLES, device="cpu").accuracy > 0.9
