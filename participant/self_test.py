"""Before every private job: does this model, on this machine, do what the accounting assumes? Seconds, no real record.

The job's own functions run on the job's own model with public synthetic input; the trained tensors are random for the
while, since from zero they would have no gradients, and restored after. Any failed check ends the job before it reads
a record. The result goes to the site's ledger: a log proves bookkeeping, and this is what it can say of the training.

A healthy run fails less than once in a million. Five checks are of chance: the noise at a p-value of 1e-10 and at six
standard deviations (2e-9 each), the sampler at seven, since its sums of squares are a little skewed (below 1e-8 each).
The others are bounds on rounding, far above what was measured (docs/decisions/0009-dp-step.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from participant import dp_step, generation, regression
from participant.dp_step import Step
from participant.features import Standard, random_texts
from participant.noise import SecretRandom
from participant.training import Loaded, make_optimizer
from privacy.budget import self_tests
from privacy.budget.entries import decimal_text
from privacy.budget.events import DpSgd
from privacy.errors import Refusal, shown
from privacy.plan import Plan

EXAMPLES = 4
MAX_TOKENS = 32
#: Noise numbers looked at, in all and of one step.
NOISE_NUMBERS, STEP_NUMBERS = 1 << 17, 1 << 20
SAMPLER_RECORDS = 256
#: Variance of the number of times that a record is drawn. A rate below the least one would need millions of draws for
#: that, so the sampler is tried at the least one then.
SAMPLER_VARIANCE, SAMPLER_LEAST_RATE = 100.0, 0.005
#: Of the trained tensors meanwhile; public, and nothing of it stays.
SEED = 2026
SPREAD = 0.02


@dataclass(frozen=True)
class Check:
    """One check: what was measured, and whether it is within its bound."""

    name: str
    value: float
    passed: bool

    @classmethod
    def of(cls, name: str, value: float) -> Check:
        """A check judged by its bounds."""
        return cls(name, value, self_tests.within(name, value))


@dataclass(frozen=True)
class SelfTest:
    """What the self-test found, all checks in order."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[str]:
        """Names of the failed checks."""
        return [check.name for check in self.checks if not check.passed]

    def to_json(self) -> dict[str, Any]:
        """For the ledger: name -> decimal string, and ``passed``."""
        return {check.name: decimal_text(check.value) for check in self.checks} | {"passed": self.passed}


class SelfTestFailed(Refusal):
    """This model or machine does not do what the accounting assumes: nothing private was read, nothing trained."""

    def __init__(self, result: SelfTest, reason: str = "") -> None:
        found = ", ".join(f"{c.name} ({c.value:.6g})" for c in result.checks if not c.passed)
        because = f": {shown(reason)}" if reason else ""
        super().__init__(f"private training refused: the self-test failed in {found}{because}; no record was read")
        self.result = result


def run_self_test(
    loaded: Loaded, plan: Plan, terms: DpSgd, random: SecretRandom, standard: Standard | None = None
) -> SelfTest:
    """All checks, on a model that :func:`participant.dp_step.make_private` took and Opacus' hooks are attached to.

    Raises:
        SelfTestFailed: a check failed, or a per-example gradient could not be had at all.
    """
    weights = dp_step.trainable(loaded.model)
    with _random_weights(weights):
        losses = _losses(loaded, plan, standard)
        step = dp_step.make_step(loaded, terms, losses, make_optimizer(plan, weights), random)
        try:
            checks = [
                *_gradients(loaded.model, step),
                *_sensitivity(step),
                *_not_finite(step),
                *_empty_batch(step),
                *_noise(step),
                *_sampler(random, float(terms.rate)),
            ]
        except (RuntimeError, ValueError) as error:  # ours, and what Opacus raises where it sees no forward pass
            checks = [Check("per_example_gradients", 0.0, passed=False)]
            raise SelfTestFailed(SelfTest(tuple(checks)), str(error)) from error
    result = SelfTest(tuple(checks))
    if not result.passed:
        raise SelfTestFailed(result)
    return result


@contextmanager
def _random_weights(weights: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Small random numbers in the trained tensors for the while, from a public seed."""
    before = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(SEED)
    try:
        with torch.no_grad():
            for weight in weights:
                weight.copy_(SPREAD * torch.randn(weight.shape, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
                weight.grad = None


def _losses(loaded: Loaded, plan: Plan, standard: Standard | None) -> dp_step.Losses:
    """Losses of a few public synthetic examples of different lengths."""
    longest = max(2, min(plan.data.max_length, MAX_TOKENS))
    lengths = [max(1, longest * (k + 1) // EXAMPLES) for k in range(EXAMPLES)]
    if plan.task == "generation":
        return generation.private_losses(loaded, generation.synthetic(loaded, [max(2, length) for length in lengths]))
    texts = random_texts(loaded, EXAMPLES, lengths, longest)
    if plan.task == "regression":
        targets = torch.linspace(-1, 1, EXAMPLES, device=loaded.device)
        return regression.private_losses(loaded, texts, targets, standard)
    labels = torch.arange(EXAMPLES, device=loaded.device) % len(plan.data.labels)
    return dp_step.losses_on(loaded, texts, labels, dp_step.log_prior_of(plan).to(loaded.device), standard)


# --- what one example can do -----------------------------------------------------------------------------------------


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return _norm([a - b for a, b in zip(one, other, strict=True)])


def _gradients(model: Any, step: Step) -> Iterator[Check]:
    """Every trained tensor takes part, and no other has per-example gradients."""
    step.losses([0]).sum().backward()  # type: ignore[no-untyped-call]
    astray = [p for p in model.parameters() if not p.requires_grad and getattr(p, "grad_sample", None) is not None]
    yield Check.of("frozen_with_gradients", len(astray))
    for weight in step.weights:
        weight.grad = weight.grad_sample = None  # type: ignore[attr-defined]
    sums = dp_step.clipped_sum(step.weights, step.losses, range(EXAMPLES), step.clip)
    still = sum(not bool(total.any()) for total in sums)
    yield Check.of("trained_without_gradients", still)


def _sensitivity(step: Step) -> Iterator[Check]:
    """Leave one out, and other chunks, at the plan's C and at two between and above the examples' own norms.

    Where every example is clipped, a coupling of the examples does not show; where none is, it does.
    """
    everyone = range(EXAMPLES)
    norms = [_norm(dp_step.example_gradients(step.weights, step.losses, [i])) for i in everyone]
    moved, apart = 0.0, 0.0
    for clip in (step.clip, float(np.median(norms)), 2 * max(norms)):
        full = dp_step.clipped_sum(step.weights, step.losses, everyone, clip)
        for left in everyone:
            others = dp_step.clipped_sum(step.weights, step.losses, [i for i in everyone if i != left], clip)
            moved = max(moved, _distance(full, others) / clip)
        singly = dp_step.clipped_sum(step.weights, step.losses, everyone, clip, chunk=1)
        apart = max(apart, _distance(full, singly) / clip)
    yield Check.of("sensitivity", moved)
    yield Check.of("chunking", apart)


def _not_finite(step: Step) -> Iterator[Check]:
    """An example whose loss is not finite counts nothing, and the others count as without it."""

    def poisoned(chosen: Sequence[int]) -> Tensor:
        each = step.losses(chosen)
        return each * torch.tensor([math.inf if i == 0 else 1.0 for i in chosen], device=each.device)

    found = dp_step.clipped_sum(step.weights, poisoned, range(EXAMPLES), step.clip)
    others = dp_step.clipped_sum(step.weights, step.losses, range(1, EXAMPLES), step.clip)
    apart = _distance(found, others) / step.clip
    yield Check.of("not_finite", apart)


def _empty_batch(step: Step) -> Iterator[Check]:
    """A step without examples has a sum of zero and moves every trained tensor all the same."""
    total = _norm(dp_step.clipped_sum(step.weights, step.losses, [], step.clip))
    yield Check.of("empty_batch_sum", total)
    before = [weight.detach().clone() for weight in step.weights]
    dp_step.take_step(step, [])
    still = sum(torch.equal(weight, value) for weight, value in zip(step.weights, before, strict=True))
    yield Check.of("empty_batch_unmoved", still)


# --- chance ----------------------------------------------------------------------------------------------------------


def _drawn(step: Step) -> NDArray[np.float64]:
    """(count,) what the noise of one step is, in units of sigma * C, from a sum of zero."""
    dp_step.set_noisy_gradients(step, [torch.zeros_like(weight, dtype=torch.float64) for weight in step.weights])
    gradients = [weight.grad.double().flatten() for weight in step.weights if weight.grad is not None]
    for weight in step.weights:
        weight.grad = None
    drawn = torch.cat(gradients)[:STEP_NUMBERS] * (step.nominal_batch / (step.sigma * step.clip))
    return drawn.cpu().numpy()


def _noise(step: Step) -> Iterator[Check]:
    """Gaussian (Kolmogorov-Smirnov), of the right size, and never the same twice."""
    size = min(STEP_NUMBERS, sum(weight.numel() for weight in step.weights))
    drawn = np.stack([_drawn(step) for _ in range(max(2, -(-NOISE_NUMBERS // size)))])  # (steps, size)
    flat = drawn.reshape(-1)
    p = float(stats.kstest(flat, "norm").pvalue)
    yield Check.of("noise_ks_p", p)
    # The variance of n squared Gaussians is 2 / n.
    off = abs(float(np.mean(flat**2)) - 1) * math.sqrt(len(flat) / 2)
    yield Check.of("noise_size_deviations", off)
    products = drawn[:-1] * drawn[1:]
    again = abs(float(np.mean(products))) * math.sqrt(products.size)
    yield Check.of("noise_repeat_deviations", again)


def _sampler(random: SecretRandom, rate: float) -> Iterator[Check]:
    """Each record with probability ``rate``, by itself: inclusions and sizes scatter as they must (chi-square)."""
    rate = max(rate, SAMPLER_LEAST_RATE)
    draws = math.ceil(SAMPLER_VARIANCE / (rate * (1 - rate))) if rate < 1 else 2
    counts, sizes, repeats = np.zeros(SAMPLER_RECORDS), np.zeros(draws), 0
    for number in range(draws):
        chosen = random.subset(SAMPLER_RECORDS, rate)
        repeats += len(chosen) - len(set(chosen))
        np.add.at(counts, chosen, 1)
        sizes[number] = len(chosen)
    yield Check.of("sampler_repeats", repeats)
    for name, found, trials in (("inclusions", counts, draws), ("sizes", sizes, SAMPLER_RECORDS)):
        off = _scatter(found, trials, rate)
        yield Check.of(f"sampler_{name}_deviations", off)


def _scatter(found: NDArray[np.float64], trials: int, rate: float) -> float:
    """How many standard deviations the chi-square of binomial counts, of ``trials`` at ``rate``, is off its mean."""
    variance = trials * rate * (1 - rate)
    if variance == 0:  # every record in every batch
        return 0.0 if (found == trials).all() else math.inf
    statistic = float(((found - trials * rate) ** 2).sum()) / variance
    # The fourth moment of a binomial: its excess kurtosis adds to the two of a Gaussian.
    kurtosis = (1 - 6 * rate * (1 - rate)) / variance
    return abs(statistic - len(found)) / math.sqrt(len(found) * (2 + kurtosis))
