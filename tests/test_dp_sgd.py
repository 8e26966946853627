"""Private training: its sums against Opacus' own engine and against one example at a time, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import opacus
import pytest
import structlog
import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor

from participant import dp_sgd, dp_step
from participant.data import Examples
from participant.dp_sgd import train_private
from participant.noise import SecretRandom
from participant.self_test import SelfTest
from participant.training import Loaded, TrainingResult, load_model, make_optimizer, tokenise
from privacy.adapter import layout_of, start_adapter, unflatten
from privacy.errors import Refusal
from privacy.plan import Plan
from tests.helpers_learning import private_plan, tiny_base, word_examples

EXAMPLES = word_examples((9, 8, 7))
NOISELESS = 1e-30


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plan(base: Path) -> Plan:
    return private_plan(base)


def with_random_weights(loaded: Loaded) -> Loaded:
    """From B = 0 and a head of zero there would be no gradient of B."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in dp_step.trainable(loaded.model):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return loaded


@pytest.fixture
def loaded(plan: Plan, base: Path) -> Iterator[Loaded]:
    found = with_random_weights(load_model(plan, base, start_adapter(plan.adapter), "cpu"))
    dp_step.make_private(found.model)
    hooks = GradSampleHooks(found.model, loss_reduction="sum")
    yield found
    hooks.cleanup()


def losses_on(loaded: Loaded, plan: Plan, examples: Examples = EXAMPLES) -> dp_step.Losses:
    texts = tokenise(loaded.tokenizer, examples.texts, plan.data.max_length)
    return dp_step.losses_on(loaded, texts, torch.tensor(examples.labels), dp_step.log_prior_of(plan))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def one_by_one(plan: Plan, base: Path, clip: float, chosen: Sequence[int]) -> Tensor:
    """The clipped sum by plain autograd, one unpadded example at a time, no Opacus."""
    loaded = with_random_weights(load_model(plan, base, start_adapter(plan.adapter), "cpu"))
    weights = dp_step.trainable(loaded.model)
    total = torch.zeros(sum(w.numel() for w in weights), dtype=torch.float64)
    for i in chosen:
        losses_on(loaded, plan)([i]).sum().backward()  # type: ignore[no-untyped-call]
        gradient = flat([w.grad for w in weights if w.grad is not None])
        total += gradient * min(1.0, clip / float(gradient.norm()))
        for w in weights:
            w.grad = None
    return total


# --- the sum ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.05, 1.0, 100.0])
def test_the_sum_is_that_of_one_example_at_a_time(plan: Plan, base: Path, loaded: Loaded, clip: float) -> None:
    chosen = range(0, 24, 2)
    found = flat(dp_step.clipped_sum(dp_step.trainable(loaded.model), losses_on(loaded, plan), chosen, clip, chunk=5))
    wanted = one_by_one(plan, base, clip, chosen)
    assert float((found - wanted).norm()) < 1e-5 * float(wanted.norm())


def test_no_example_counts_more_than_c(plan: Plan, loaded: Loaded) -> None:
    weights, losses = dp_step.trainable(loaded.model), losses_on(loaded, plan)
    for clip in (0.01, 0.5):
        gradients = dp_step.clip_examples(dp_step.example_gradients(weights, losses, range(24)), clip)
        norms = torch.stack([g.flatten(1).double().norm(dim=1) for g in gradients]).norm(dim=0)
        assert float(norms.max()) <= clip
        assert clip == 0.5 or float(norms.min()) > 0.999 * clip


def test_an_example_that_is_not_finite_counts_nothing() -> None:
    gradients = [torch.ones(3, 2, 2), torch.ones(3, 4)]
    gradients[0][1, 0, 0], gradients[1][2, 3] = math.nan, math.inf
    clipped = dp_step.clip_examples(gradients, 1.0)
    assert [float(flat([g[i] for g in clipped]).norm()) for i in range(3)] == pytest.approx([1.0, 0.0, 0.0], abs=1e-5)


@pytest.mark.parametrize(("clip", "size"), [(1e-20, 8e24), (1e-20, 3e24), (1e-6, 3e37), (1.0, 1e38), (1e-20, 1.0)])
def test_no_gradient_is_too_large_to_be_clipped(clip: float, size: float) -> None:
    """A factor of few bits, below float32's normal numbers, once let an example count for 1.12 C."""
    (clipped,) = dp_step.clip_examples([torch.tensor([[size, 0.0]])], clip)
    assert float(clipped.double().norm()) <= clip


def test_gradients_of_tokens_are_refused() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    weight.grad_sample = torch.zeros(12, 2, 3)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"expected gradients \(4, 2, 3\), one an example, found \(12, 2, 3\)"):
        dp_step.example_gradients([weight], lambda chosen: weight.sum().expand(len(chosen)), range(4))


def test_a_loss_of_the_whole_batch_is_refused() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match="expected a loss for each of 4 examples"):
        dp_step.example_gradients([weight], lambda _: weight.sum(), range(4))


def test_chunks_are_bounded_by_memory() -> None:
    assert dp_step.chunk_size([torch.nn.Parameter(torch.zeros(10))]) == dp_step.CHUNK
    huge = torch.nn.Parameter(torch.empty(dp_step.CHUNK_BYTES // 8, device="meta"))
    assert dp_step.chunk_size([huge]) == 2
    assert dp_step.chunk_size([huge, huge, huge]) == 1


# --- Opacus' own engine is the oracle --------------------------------------------------------------------------------


class PerExample(torch.utils.data.Dataset[int]):
    """Positions in the examples; the model finds the texts itself."""

    def __len__(self) -> int:
        return len(EXAMPLES)

    def __getitem__(self, i: int) -> int:
        return i


def oracle(plan: Plan, base: Path, clip: float, steps: int) -> list[Tensor]:
    """The trained tensors after steps of Opacus' PrivacyEngine without noise, every example in every batch."""
    loaded = with_random_weights(load_model(plan, base, start_adapter(plan.adapter), "cpu"))
    loaded.model.train()  # what the engine demands; so dropout has to be taken out by hand
    for module in loaded.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    weights = dp_step.trainable(loaded.model)
    optimizer = torch.optim.SGD(weights, lr=plan.training.learning_rate)
    hooks, optimizer, data = opacus.PrivacyEngine().make_private(
        module=loaded.model,
        optimizer=optimizer,
        data_loader=torch.utils.data.DataLoader(PerExample(), batch_size=len(EXAMPLES)),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        grad_sample_mode="hooks",
        wrap_model=False,
        poisson_sampling=False,
    )
    for _ in range(steps):
        for chosen in data:
            losses_on(loaded, plan)(chosen.tolist()).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    hooks.cleanup()
    return [weight.detach().clone() for weight in weights]


@pytest.mark.parametrize("clip", [0.05, 2.0])
@pytest.mark.filterwarnings("ignore")
def test_steps_without_noise_are_those_of_opacus_engine(plan: Plan, base: Path, loaded: Loaded, clip: float) -> None:
    sgd = plan.model_copy(update={"training": plan.training.model_copy(update={"optimizer": "sgd"})})
    weights = dp_step.trainable(loaded.model)
    before = flat([w.detach() for w in weights])
    step = dp_step.Step(
        weights, losses_on(loaded, plan), make_optimizer(sgd, weights), SecretRandom(), clip, NOISELESS, len(EXAMPLES)
    )
    for _ in range(3):
        dp_step.take_step(step, range(len(EXAMPLES)))
    found, wanted = flat([w.detach() for w in weights]), flat(oracle(sgd, base, clip, 3))
    assert float((wanted - before).norm()) > 0
    assert float((found - wanted).norm()) < 1e-4 * float((wanted - before).norm())


# --- the whole job ---------------------------------------------------------------------------------------------------


def run(plan: Plan, base: Path, examples: Examples = EXAMPLES, **changes: Any) -> TrainingResult:
    arguments: dict[str, Any] = {"device": "cpu", "on_selftest": lambda _: None}
    return train_private(
        plan=plan, base=base, start=start_adapter(plan.adapter), examples=examples, **arguments | changes
    )


def test_a_private_job_tells_the_delta_and_nothing_else(plan: Plan, base: Path) -> None:
    told: list[tuple[int, int, float]] = []
    tested: list[SelfTest] = []
    result = run(plan, base, progress=lambda *step: told.append(step), on_selftest=tested.append)
    assert plan.privacy is not None
    assert [step for step, _, _ in told] == list(range(1, plan.privacy.steps + 1))
    assert all(math.isnan(loss) for _, _, loss in told)
    assert (result.loss, result.examples) == (0.0, 24)
    assert np.isfinite(result.delta).all()
    assert all(np.any(part) for part in unflatten(result.delta, layout_of(plan.adapter)).values())
    assert tested[0].passed
    assert not np.array_equal(result.delta, run(plan, base).delta), "two runs must not share their noise"


def test_much_noise_is_said_in_the_sites_log(plan: Plan, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_sgd, "run_self_test", lambda *_: SelfTest(()))
    monkeypatch.setattr(dp_step, "take_step", lambda *_: None)
    with structlog.testing.capture_logs() as lines, pytest.raises(AssertionError, match="no LoRA B moved"):
        run(plan, base)
    assert [line["log_level"] for line in lines if "sigma / nominal_batch" in line.get("reason", "")] == ["warning"]


def test_the_head_alone_is_trained_where_the_plan_says_so(base: Path) -> None:
    plan = private_plan(base, train="head")
    result = run(plan, base)
    assert result.delta.shape == (3 * 32 + 3,)
    assert np.any(result.delta)


def test_without_noise_a_private_job_learns(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping, sampling and divisor leave the direction: what is lost to noise is lost to noise alone."""
    monkeypatch.setattr(dp_sgd, "run_self_test", lambda *_: SelfTest(()))
    monkeypatch.setattr(SecretRandom, "normal", lambda _, count: np.zeros(count))
    examples = word_examples((24, 24, 24))
    plan = private_plan(base, rate="0.5", steps=70, nominal_size=72, nominal_batch=36)
    delta = unflatten(run(plan, base, examples).delta, layout_of(plan.adapter))
    from participant.evaluation import accuracy
    from privacy.adapter import release

    start = start_adapter(plan.adapter)
    flat_delta = np.concatenate([delta[name].reshape(-1) for name, _ in layout_of(plan.adapter).trained])
    after = release(start, flat_delta, 1.0, layout_of(plan.adapter))
    assert accuracy(plan=plan, base=base, adapter=after, examples=examples, device="cpu").accuracy > 0.8


def test_the_rate_of_the_head_holds_in_a_private_job_too(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of noise alone, which AdamW takes at the full rate: the head goes as many times further."""
    monkeypatch.setattr(dp_sgd, "run_self_test", lambda *_: SelfTest(()))
    plan = private_plan(base, training={"learning_rate": 0.002, "head_learning_rate": 0.2})
    parts = unflatten(run(plan, base).delta, layout_of(plan.adapter))
    furthest = {name: float(np.abs(part).max()) for name, part in parts.items()}
    head = furthest.pop("base_model.model.classifier.weight")
    assert head > 30 * max(part for name, part in furthest.items() if "lora_B" in name) > 0


def test_steps_are_counted_whatever_the_batches(plan: Plan, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_sgd, "run_self_test", lambda *_: SelfTest(()))
    monkeypatch.setattr(SecretRandom, "subset", lambda *_: [])
    told: list[int] = []
    result = run(plan, base, progress=lambda step, _steps, _loss: told.append(step))
    assert plan.privacy is not None
    assert len(told) == plan.privacy.steps
    assert np.any(result.delta), "batches without a record are noised and stepped like any other"


def test_the_class_prior_is_the_plans_never_the_sites(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.equal(dp_step.log_prior_of(private_plan(base)), torch.zeros(3))
    with_prior = private_plan(base, prior=(0.5, 0.25, 0.25))
    assert torch.equal(dp_step.log_prior_of(with_prior), torch.log(torch.tensor([0.5, 0.25, 0.25])))
    from participant import training

    def counted(*_: Any) -> Tensor:
        raise AssertionError("the site's labels were counted")

    monkeypatch.setattr(training, "log_prior", counted)
    run(with_prior, base, word_examples((5, 0, 0)))


def test_the_job_ends_where_the_ledger_does(plan: Plan, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """START cannot be written: then no record is looked at."""

    def full(_: SelfTest) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(dp_sgd, "tokenise", lambda *_: pytest.fail("a record was read"))
    with pytest.raises(OSError, match="disk full"):
        run(plan, base, on_selftest=full)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("train", ["all", "head"])
def test_a_private_job_runs_on_a_gpu(base: Path, train: str) -> None:
    tested: list[SelfTest] = []
    result = run(private_plan(base, train=train), base, device="cuda", on_selftest=tested.append)
    assert tested[0].passed
    assert np.isfinite(result.delta).all()


# --- what is refused -------------------------------------------------------------------------------------------------


def model_of(plan: Plan, base: Path) -> Any:
    return load_model(plan, base, start_adapter(plan.adapter), "cpu").model


def unfreeze(model: Any, part: str) -> None:
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.requires_grad_(True)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("lora_A", "noise times noise"),
        ("word_embeddings", "a trained embedding has no per-example gradient"),
        ("output.LayerNorm", "expected a linear module, found LayerNorm"),
    ],
)
def test_other_trained_parts_are_refused(plan: Plan, base: Path, part: str, reason: str) -> None:
    model = model_of(plan, base)
    unfreeze(model, part)
    with pytest.raises(Refusal, match=reason):
        dp_step.make_private(model)


def test_dora_is_refused(base: Path) -> None:
    import peft

    from participant.training import load_classifier

    model, _, _ = load_classifier(base, 3)
    config = peft.LoraConfig(r=2, target_modules=["query"], use_dora=True, task_type="SEQ_CLS")
    wrapped: Any = peft.get_peft_model(model, config).eval()
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_("magnitude" in name)
    with pytest.raises(Refusal, match="DoRA divides by the norm"):
        dp_step.make_private(wrapped)


def test_dropout_and_checkpointing_are_refused(plan: Plan, base: Path) -> None:
    model = model_of(plan, base).train()
    with pytest.raises(Refusal, match="has dropout"):
        dp_step.make_private(model)
    model.eval().gradient_checkpointing_enable()
    with pytest.raises(Refusal, match="is checkpointed"):
        dp_step.make_private(model)
