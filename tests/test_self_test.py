"""The self-test passes on sound code, and each way of breaking the step makes a check of its own fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from participant import dp_sgd, dp_step
from participant.dp_sgd import train_private
from participant.noise import SecretRandom
from participant.self_test import Check, SelfTest, SelfTestFailed
from participant.training import Loaded, load_model
from privacy.adapter import start_adapter
from privacy.budget import self_tests
from privacy.errors import Refusal
from privacy.plan import Plan
from tests.helpers_learning import private_plan, tiny_base, word_examples

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


class Stopped(Exception):
    """The job got past its self-test; there is no need to train."""


def result_of(plan: Plan, base: Path) -> SelfTest:
    """The self-test of a job that ends right after it."""
    found: list[SelfTest] = []

    def stop(result: SelfTest) -> None:
        found.append(result)
        raise Stopped

    with pytest.raises(Stopped):
        train(plan, base, stop)
    return found[0]


def train(plan: Plan, base: Path, on_selftest: Callable[[SelfTest], None]) -> None:
    start, examples = start_adapter(plan.adapter), word_examples((8, 8, 8))
    train_private(plan=plan, base=base, start=start, examples=examples, device="cpu", on_selftest=on_selftest)


CHECKS = {
    "frozen_with_gradients",
    "trained_without_gradients",
    "sensitivity",
    "chunking",
    "not_finite",
    "empty_batch_sum",
    "empty_batch_unmoved",
    "noise_ks_p",
    "noise_size_deviations",
    "noise_repeat_deviations",
    "sampler_repeats",
    "sampler_inclusions_deviations",
    "sampler_sizes_deviations",
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": "head"},
        {"clip": "0.001"},
        {"clip": "1000"},
        {"rate": "1", "nominal_batch": 24},
        {"rate": "0.001", "nominal_size": 6000},
        {"unit": "user", "max_records_per_unit": 3},
    ],
    ids=["all", "head", "tight", "wide", "every record", "few records", "users"],
)
def test_sound_code_passes(base: Path, changes: dict[str, Any]) -> None:
    result = result_of(private_plan(base, **changes), base)
    assert result.passed
    assert {check.name for check in result.checks} == CHECKS


def test_the_result_is_for_a_ledger(base: Path) -> None:
    found = result_of(private_plan(base), base).to_json()
    assert found.keys() == CHECKS | {"passed"}
    assert found.pop("passed") is True
    assert all(isinstance(value, str) and math.isfinite(float(value)) for value in found.values())
    failed = SelfTest((Check("one", 1.0, passed=True), Check("two", 0.5, passed=False)))
    assert (failed.passed, failed.failures) == (False, ["two"])
    assert "self-test failed in two (0.5); no record was read" in str(SelfTestFailed(failed))
    assert "self-test failed in two (0.5): out of\\nmemory; no" in str(SelfTestFailed(failed, "out of\nmemory"))


def test_the_model_is_as_it_was(base: Path, monkeypatch: Patch) -> None:
    """What the self-test did to the trained tensors is undone, whether it passed or not."""
    plan = private_plan(base)
    loaded: list[Loaded] = []

    def load(*given: Any) -> Loaded:
        loaded.append(load_model(*given))
        return loaded[-1]

    monkeypatch.setattr(dp_sgd, "load_model", load)
    result_of(plan, base)
    monkeypatch.setitem(self_tests.BOUNDS, "sensitivity", ("0", "0"))
    with pytest.raises(SelfTestFailed):
        train(plan, base, lambda _: None)
    assert len(loaded) == 2
    assert not any(bool(w.any()) for one in loaded for w in dp_step.trainable(one.model)), (
        "B and the head start at zero"
    )


# --- ways to break it ------------------------------------------------------------------------------------------------


def mean_over_the_batch(patch: Patch) -> None:
    """What a model's own loss is: every example's gradient depends on how many others there are."""

    def coupled(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels).expand(len(labels)) / len(labels)

    patch.setattr(dp_step, "example_losses", coupled)


def weighted_by_class(patch: Patch) -> None:
    """Class weights out of the batch couple its examples too."""

    def coupled(logits: Tensor, labels: Tensor) -> Tensor:
        counts = torch.bincount(labels, minlength=logits.shape[1]).clamp(min=1)
        return cross_entropy(logits, labels, reduction="none") / counts[labels]

    patch.setattr(dp_step, "example_losses", coupled)


def clip_each_tensor(patch: Patch) -> None:
    def clipped(gradients: Sequence[Tensor], clip: float) -> list[Tensor]:
        return [sound([g], clip)[0] for g in gradients]

    sound = dp_step.clip_examples
    patch.setattr(dp_step, "clip_examples", clipped)


def no_clipping(patch: Patch) -> None:
    patch.setattr(dp_step, "clip_examples", lambda gradients, _clip: list(gradients))


def clip_the_sum(patch: Patch) -> None:
    """Clipping the batch's gradient bounds the batch, not the example."""

    def clipped(gradients: Sequence[Tensor], clip: float) -> list[Tensor]:
        norm = float(torch.cat([g.sum(0).flatten() for g in gradients]).norm())
        return [g * min(1.0, clip / norm) for g in gradients]

    patch.setattr(dp_step, "clip_examples", clipped)


def keep_what_is_not_finite(patch: Patch) -> None:
    def clipped(gradients: Sequence[Tensor], clip: float) -> list[Tensor]:
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        scale = torch.where(torch.isfinite(norms), (clip / (norms * 1.000001)).clamp(max=1.0), 0.0)
        return [g * scale.view(-1, *[1] * (g.dim() - 1)) for g in gradients]

    patch.setattr(dp_step, "clip_examples", clipped)


def skip_empty_batches(patch: Patch) -> None:
    sound = dp_step.take_step
    patch.setattr(dp_step, "take_step", lambda step, chosen: sound(step, chosen) if chosen else None)


def something_of_nothing(patch: Patch) -> None:
    """An empty batch that falls back to the first example."""
    sound = dp_step.clipped_sum

    def summed(weights: Any, losses: Any, chosen: Sequence[int], clip: float, chunk: int | None = None) -> list[Tensor]:
        return sound(weights, losses, chosen or [0], clip, chunk)

    patch.setattr(dp_step, "clipped_sum", summed)


def noise_off(patch: Patch) -> None:
    patch.setattr(SecretRandom, "normal", lambda _, count: np.zeros(count))


def half_the_noise(patch: Patch) -> None:
    sound = SecretRandom.normal
    patch.setattr(SecretRandom, "normal", lambda self, count: sound(self, count) / 2)


def slightly_less_noise(patch: Patch) -> None:
    sound = SecretRandom.normal
    patch.setattr(SecretRandom, "normal", lambda self, count: sound(self, count) * 0.97)


def uniform_noise(patch: Patch) -> None:
    """Of the right variance, and no Gaussian."""
    patch.setattr(SecretRandom, "normal", lambda self, count: (self.uniform(count) - 0.5) * math.sqrt(12))


def the_same_noise_again(patch: Patch) -> None:
    kept: dict[int, Any] = {}
    sound = SecretRandom.normal

    def repeated(self: SecretRandom, count: int) -> Any:
        if count not in kept:
            kept[count] = sound(self, count)
        return kept[count]

    patch.setattr(SecretRandom, "normal", repeated)


def divide_by_the_batch(patch: Patch) -> None:
    """Noise for a mean instead of a sum: too small by the batch's size."""

    def set_gradients(step: dp_step.Step, sums: Sequence[Tensor]) -> None:
        for weight, total in zip(step.weights, sums, strict=True):
            drawn = torch.from_numpy(step.random.normal(total.numel())).view_as(total)
            drawn = drawn * step.sigma * step.clip / step.nominal_batch
            weight.grad = ((total + drawn) / step.nominal_batch).to(weight.dtype)

    patch.setattr(dp_step, "set_noisy_gradients", set_gradients)


def sample_with_replacement(patch: Patch) -> None:
    def drawn(self: SecretRandom, size: int, rate: float) -> list[int]:
        return [int(u * size) for u in self.uniform(round(size * rate))]

    patch.setattr(SecretRandom, "subset", drawn)


def sample_a_fixed_size(patch: Patch) -> None:
    def drawn(self: SecretRandom, size: int, rate: float) -> list[int]:
        return sorted(int(i) for i in np.argsort(self.uniform(size))[: round(size * rate)])

    patch.setattr(SecretRandom, "subset", drawn)


def shuffle_in_epochs(patch: Patch) -> None:
    """Every record once an epoch, as training without privacy does."""
    left: list[int] = []

    def drawn(self: SecretRandom, size: int, rate: float) -> list[int]:
        if not left:
            left.extend(int(i) for i in np.argsort(self.uniform(size)))
        some, left[:] = left[: round(size * rate)], left[round(size * rate) :]
        return some

    patch.setattr(SecretRandom, "subset", drawn)


def sample_too_often(patch: Patch) -> None:
    sound = SecretRandom.subset
    patch.setattr(SecretRandom, "subset", lambda self, size, rate: sound(self, size, min(1.0, rate * 1.1)))


def favour_a_record(patch: Patch) -> None:
    sound = SecretRandom.subset
    patch.setattr(SecretRandom, "subset", lambda self, size, rate: sorted({0, *sound(self, size, rate)}))


def forget_b(patch: Patch) -> None:
    """The adapter is in the model and not in the graph, as when it was left on another device (opacus#820)."""
    sound = dp_step.example_gradients

    def without(weights: Any, losses: Any, chosen: Sequence[int]) -> list[Tensor]:
        gradients = sound(weights, losses, chosen)
        return [torch.zeros_like(gradients[0]), *gradients[1:]]

    patch.setattr(dp_step, "example_gradients", without)


def gradients_of_the_frozen(patch: Patch) -> None:
    """A frozen tensor that the hooks take for trained."""
    sound = dp_step.make_private

    def prepared(model: Any) -> None:
        sound(model)
        next(p for n, p in model.named_parameters() if "lora_A" in n).grad_sample = torch.zeros(1)

    patch.setattr(dp_step, "make_private", prepared)


def hooks_lost(patch: Patch) -> None:
    """The hooks skip what is in eval mode."""
    patch.setattr(dp_step, "make_private", lambda model: model.eval())


BROKEN: list[tuple[Callable[[Patch], None], str]] = [
    (mean_over_the_batch, "chunking"),
    (weighted_by_class, "chunking"),
    (clip_each_tensor, "sensitivity"),
    (no_clipping, "sensitivity"),
    (clip_the_sum, "chunking"),
    (keep_what_is_not_finite, "not_finite"),
    (skip_empty_batches, "empty_batch_unmoved"),
    (something_of_nothing, "empty_batch_sum"),
    (noise_off, "noise_size_deviations"),
    (half_the_noise, "noise_size_deviations"),
    (slightly_less_noise, "noise_size_deviations"),
    (uniform_noise, "noise_ks_p"),
    (the_same_noise_again, "noise_repeat_deviations"),
    (divide_by_the_batch, "noise_size_deviations"),
    (sample_with_replacement, "sampler_repeats"),
    (sample_a_fixed_size, "sampler_sizes_deviations"),
    (shuffle_in_epochs, "sampler_inclusions_deviations"),
    (sample_too_often, "sampler_inclusions_deviations"),
    (favour_a_record, "sampler_inclusions_deviations"),
    (forget_b, "trained_without_gradients"),
    (gradients_of_the_frozen, "frozen_with_gradients"),
    (hooks_lost, "per_example_gradients"),
]


@pytest.mark.parametrize(("broken", "check"), BROKEN, ids=[broken.__name__ for broken, _ in BROKEN])
def test_broken_code_is_stopped_before_a_record_is_read(
    base: Path, monkeypatch: Patch, broken: Callable[[Patch], None], check: str
) -> None:
    monkeypatch.setattr(dp_sgd, "tokenise", lambda *_: pytest.fail("a record was read"))
    broken(monkeypatch)
    with pytest.raises(SelfTestFailed) as stopped:
        train(private_plan(base), base, lambda _: pytest.fail("START was written"))
    assert isinstance(stopped.value, Refusal)
    assert check in stopped.value.result.failures
    assert not stopped.value.result.passed
