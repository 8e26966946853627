"""One step of DP-SGD: clipped per-example gradients, their sum, the noise, the optimiser (Abadi et al. 2016).

Opacus supplies the per-example gradients and nothing else; why the step around them is ours, and what each line guards
against, stands in docs/decisions/0009-dp-step.md. Everything that touches a clipped gradient is float32 or wider and
outside autocast: kernels in bf16 give an example other gradients in other company, by more than the noise accounts for.
``participant/self_test.py`` runs these very functions before each private job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import cross_entropy

from participant.features import Standard, standardised
from participant.noise import SecretRandom
from participant.training import Loaded, logits_of
from privacy.budget.events import DpSgd
from privacy.errors import Refusal
from privacy.guarantee import unsuitable
from privacy.plan import Plan

#: Examples that go through the model at a time, at most; a batch of any size is worked off in such chunks.
CHUNK = 32
#: Tokens of a language model at a time, at most, unless one record alone has more.
CHUNK_TOKENS = 2048
#: Bytes of per-example gradients at a time, at most (one example has 4 bytes for each trained coordinate).
CHUNK_BYTES = 1 << 28
#: Room for the rounding of float32 when an example is scaled down to norm C.
MARGIN = 1e-6

#: Positions in the data set -> (B,) losses, each a function of its own example alone.
Losses = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True)
class Step:
    """What a step needs, the same for every step of a job."""

    weights: list[Parameter]
    losses: Losses
    optimizer: torch.optim.Optimizer
    random: SecretRandom
    #: C, the largest L2 norm of one example's gradient.
    clip: float
    #: Noise multiplier: a sum gets noise of standard deviation sigma * C in each coordinate.
    sigma: float
    #: The public divisor.
    nominal_batch: int
    #: Examples that go through the model at a time, at most.
    most: int = CHUNK


def make_step(
    loaded: Loaded,
    terms: DpSgd,
    losses: Losses,
    optimizer: torch.optim.Optimizer,
    random: SecretRandom,
    most: int = CHUNK,
) -> Step:
    """The step of a mechanism on a model, see :func:`make_private`."""
    weights, clip, sigma = trainable(loaded.model), float(terms.clip), float(terms.sigma)
    return Step(weights, losses, optimizer, random, clip, sigma, terms.nominal_batch, most)


def most_at_a_time(plan: Plan) -> int:
    """Examples that may go through the model at a time: a language model has a number for each token and each word."""
    return CHUNK if plan.task != "generation" else max(1, min(CHUNK, CHUNK_TOKENS // plan.data.max_length))


def trainable(model: Any) -> list[Parameter]:
    """The trained tensors of a model, in its order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_private(model: Any) -> None:
    """Refuse a model whose per-example gradients cannot be had or bounded; let the hooks see what is trained.

    Raises:
        Refusal: A or an embedding, an expert, a DoRA magnitude or another module than a linear one is trained, or
            dropout or checkpointing is on.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise Refusal(f"private training: '{name}' has dropout, which is off here: no chance but the secret one")
        if getattr(module, "gradient_checkpointing", False):
            raise Refusal(f"private training: '{name}' is checkpointed, which loses per-example gradients")
        if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            continue
        if reason := _obstacle(name, module):
            raise Refusal(f"private training: '{name}' cannot be trained: {reason}")
        module.train()  # Opacus' hooks skip what is in eval mode; a linear module behaves the same in both


def _obstacle(name: str, module: torch.nn.Module) -> str:
    """Why this module must not be trained under privacy; empty if it may."""
    if "lora_A" in name:
        return "A times B has noise times noise, and with B zero A's first step is noise alone"
    if "magnitude" in name:
        return "DoRA divides by the norm of a whole matrix and has no per-example gradient here"
    if reason := unsuitable(name):
        return reason
    if type(module) is not torch.nn.Linear:
        return f"expected a linear module, found {type(module).__name__}, whose per-example gradients are not verified"
    return ""


def log_prior_of(plan: Plan) -> Tensor:
    """(classes,) float32: log of the plan's public class prior, zero where uniform or not asked for.

    Counting the site's own labels, as training without privacy does, would be a query without noise.
    """
    assert plan.privacy is not None
    if plan.training.loss != "logit_adjusted" or not plan.privacy.prior:
        return torch.zeros(len(plan.data.labels))
    return torch.log(torch.tensor(plan.privacy.prior))


def losses_on(
    loaded: Loaded, texts: Sequence[Tensor], labels: Tensor, prior: Tensor, standard: Standard | None = None
) -> Losses:
    """Losses of tokenised texts (each (length,) int64) with their labels (count,) int64, on the model's device."""
    return losses_by(
        loaded, texts, lambda logits, chosen: example_losses(logits + prior, labels[list(chosen)]), standard
    )


def losses_by(
    loaded: Loaded,
    texts: Sequence[Tensor],
    loss: Callable[[Tensor, Sequence[int]], Tensor],
    standard: Standard | None = None,
) -> Losses:
    """Losses of tokenised texts; ``loss`` says (B,) of the logits of the chosen, of each by itself.

    With a ``standard`` the frozen model sees each text once, now, and a step only the head.
    """
    features = None if standard is None else standardised(standard, loaded, texts)

    def losses(chosen: Sequence[int]) -> Tensor:
        if standard is None or features is None:
            logits = logits_of(loaded, [texts[i] for i in chosen])
        else:
            logits = standard.head(features[list(chosen)]).float()
        return loss(logits, chosen)

    return losses


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) cross-entropy of each example by itself. A model's own ``loss`` is a mean over the batch: never that."""
    return cross_entropy(logits, labels, reduction="none")


def example_gradients(weights: Sequence[Parameter], losses: Losses, chosen: Sequence[int]) -> list[Tensor]:
    """For each trained tensor the gradient of each chosen example, (B, *shape) float32.

    Raises:
        RuntimeError: a tensor has none, or one for something else than an example, such as a token.
    """
    each = losses(chosen)
    if each.shape != (len(chosen),):
        raise RuntimeError(f"expected a loss for each of {len(chosen)} examples, found {tuple(each.shape)}")
    each.sum().backward()  # type: ignore[no-untyped-call]
    found: list[Tensor] = []
    for weight in weights:
        gradient = getattr(weight, "grad_sample", None)
        # An ordinary gradient that stays behind could reach the optimiser without clipping or noise.
        weight.grad = weight.grad_sample = None  # type: ignore[attr-defined]
        if not isinstance(gradient, Tensor) or gradient.shape != (len(chosen), *weight.shape):
            shape = tuple(gradient.shape) if isinstance(gradient, Tensor) else type(gradient).__name__
            raise RuntimeError(f"expected gradients {(len(chosen), *weight.shape)}, one an example, found {shape}")
        found.append(gradient.float())
    return found


def clip_examples(gradients: Sequence[Tensor], clip: float) -> list[Tensor]:
    """The same, each example scaled to an L2 norm of at most ``clip`` over all tensors; one that is not finite is zero.

    The norm is that of the very float32 numbers that are summed. Where the factor would be below float32's normal
    numbers it has too few bits to bound anything, and the example is zero too.
    """
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1).double(), dim=1) for g in gradients]).norm(dim=0)  # (B,)
    factors = (clip / (norms * (1 + MARGIN))).clamp(max=1.0)
    usable = torch.isfinite(norms) & (factors >= torch.finfo(torch.float32).tiny)
    # Zero times infinity is not a number: hence where, not a factor.
    scale = torch.where(usable, factors, 0.0).float()
    return [torch.where(_column(usable, g), g * _column(scale, g), 0.0) for g in gradients]


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, 1 ...), to go with (B, *shape)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def chunk_size(weights: Sequence[Parameter]) -> int:
    """Examples at a time so that their gradients stay within :data:`CHUNK_BYTES`, one at least."""
    return max(1, min(CHUNK, CHUNK_BYTES // (4 * sum(weight.numel() for weight in weights))))


def clipped_sum(
    weights: Sequence[Parameter], losses: Losses, chosen: Sequence[int], clip: float, chunk: int | None = None
) -> list[Tensor]:
    """Sum of the clipped gradients of the chosen examples, float64, shaped as the weights; of none it is zero."""
    chunk = chunk or chunk_size(weights)
    sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    for low in range(0, len(chosen), chunk):
        gradients = example_gradients(weights, losses, chosen[low : low + chunk])
        for total, clipped in zip(sums, clip_examples(gradients, clip), strict=True):
            total += clipped.sum(0, dtype=torch.float64)
    return sums


def set_noisy_gradients(step: Step, sums: Sequence[Tensor]) -> None:
    """What the optimiser will see: (sum + sigma * C * Gaussian) / nominal batch, with fresh noise."""
    for weight, total in zip(step.weights, sums, strict=True):
        noise = torch.from_numpy(step.random.normal(total.numel())).view_as(total).to(total.device)
        weight.grad = ((total + step.sigma * step.clip * noise) / step.nominal_batch).to(weight.dtype)


def take_step(step: Step, chosen: Sequence[int]) -> None:
    """One logical step. An empty batch gets its noise like any other: whether it was empty must not show."""
    chunk = min(step.most, chunk_size(step.weights))
    set_noisy_gradients(step, clipped_sum(step.weights, step.losses, chosen, step.clip, chunk))
    step.optimizer.step()
    step.optimizer.zero_grad(set_to_none=True)
