"""Local fine-tuning at one site: one plain loop in torch, from the start adapter and a data set to a delta.

Everything a site must agree on with the others comes from the plan and is checked before the first step: the digest of
the base model, the modules' shapes, the start adapter. Dropout is off, in the base as in the adapter: B starts at zero,
the epochs are few, and so one plan on one data set gives one delta on one CPU and one number of threads. On a GPU torch
is asked for the same (``participant/device.py``), and has not been held to it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from participant.base_model import base_digest as base_digest  # the name others look for here
from participant.base_model import check_base
from participant.cores import Cores
from participant.data import Examples
from participant.device import Device, autocast, pick_device, repeatable
from participant.different import keys_of
from participant.loading import check_model, load_base
from participant.loading import load_classifier as load_classifier
from participant.measured import Measured
from participant.ranks import keep_beneath, narrowed
from participant.sending import class_shares, squared_gradients, vector_of
from participant.task_data import TaskData
from participant.text_data import Records
from privacy.adapter import Tensors, Vector, check_tensors, flatten, layout_of, peft_config, trained_part
from privacy.errors import UserError
from privacy.plan import Plan
from privacy.sections import Adapter

#: Share of the steps over which the learning rate rises to the plan's, before it falls linearly to zero.
WARM_UP = 0.1
#: Largest L2 norm of one step's gradient; an outlier batch moves the adapter no further.
MAX_GRADIENT_NORM = 1.0

#: Called after each step with (steps done, steps in all, loss of the step).
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class TrainingResult:
    """What a site's training gives: ``delta`` goes to masking, the rest to the log."""

    #: (d,) float32: trained minus start, see :func:`privacy.adapter.flatten`, or what the plan's method makes of it.
    delta: Vector
    #: Number of examples in the data set; the site's weight.
    examples: int
    #: Mean training loss over the last epoch, as trained (adjusted logits if the plan says so), nats.
    loss: float
    seconds: float


@dataclass(frozen=True)
class Loaded:
    """A base model with the adapter in place, on its device."""

    model: Any
    tokenizer: Any
    device: torch.device


@dataclass(frozen=True)
class Seen:
    """A site's records as the plan's task sees them."""

    #: Token ids of each, (length,) int64.
    texts: list[Tensor]
    #: Positions in the data set -> the scalar loss of that batch.
    loss_of: Callable[[list[int]], Tensor]
    #: Token ids -> what the model says of them, padded on the right; one row a text.
    forward: Callable[[list[Tensor]], Tensor]


def load_model(plan: Plan, base: Path, adapter: Mapping[str, Any], device: Device) -> Loaded:
    """The plan's base model with ``adapter`` (PEFT names) in place: trainable is the plan's trained part, dropout off.

    Raises:
        UserError: the base model is not the plan's, or misses a tensor beyond the head.
        ValueError: ``adapter`` is not of the plan's layout.
    """
    check_tensors(adapter, layout_of(plan.adapter))
    check_base(plan, base)
    where = pick_device(device)
    model, tokenizer, missing = load_base(base, plan.outputs)
    check_model(model, missing, plan.adapter, base)
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 1 << 30)
    if plan.data.max_length > limit:
        raise UserError(
            f"plan: expected data.max_length <= {limit} for {plan.base.name}, found {plan.data.max_length}",
            hint="correct data.max_length",
        )
    fields: dict[str, Any] = peft_config(plan.adapter, str(base)) | {"inference_mode": False}
    config = peft.get_peft_config(fields)
    # Moved before PEFT wraps it: adapters made on the CPU can otherwise stay there (opacus#820).
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 asks transformers for a renamed property
        warnings.filterwarnings("ignore", "The PEFT config's", UserWarning)  # of a GGUF file the model knows the folder
        wrapped = peft.get_peft_model(model.to(where), config)
    tensors = {name: torch.from_numpy(np.array(value)).to(where) for name, value in adapter.items()}
    report: Any = peft.set_peft_model_state_dict(wrapped, tensors)
    assert not report.unexpected_keys, report.unexpected_keys
    for name, parameter in wrapped.named_parameters():
        in_lora = ("lora_B" in name and plan.adapter.train != "head") or (
            "lora_A" in name and plan.adapter.train == "both"
        )
        in_head = "modules_to_save" in name and plan.adapter.train != "lora"
        parameter.requires_grad_(in_lora or in_head)
    wrapped.eval()
    placed = read_adapter(wrapped)
    assert all(np.array_equal(placed[name], value) for name, value in adapter.items()), "PEFT lost a tensor"
    return Loaded(wrapped, tokenizer, where)


def read_adapter(model: Any) -> Tensors:
    """The adapter's tensors as they are now, under the names of a saved PEFT adapter, float32 on the CPU."""
    # The embeddings are never part of the adapter; on "auto" PEFT would ask a model hub about them.
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", torch.float32).numpy().copy() for name, tensor in state.items()}


def tokenise(tokenizer: Any, texts: tuple[str, ...], max_length: int) -> list[Tensor]:
    """One (length,) int64 tensor of token ids per text, cut at ``max_length``; all at once, since it is quick."""
    ids = tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
    return [torch.tensor(one, dtype=torch.int64) for one in ids]


def logits_of(loaded: Loaded, batch: list[Tensor]) -> Tensor:
    """(batch, outputs) float32 logits; the batch is padded on the right to its own longest text."""
    ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=loaded.tokenizer.pad_token_id)
    lengths = torch.tensor([len(one) for one in batch])
    mask = (torch.arange(ids.shape[1])[None, :] < lengths[:, None]).to(torch.int64)  # (batch, longest)
    output = loaded.model(input_ids=ids.to(loaded.device), attention_mask=mask.to(loaded.device))
    return output.logits.float()  # type: ignore[no-any-return]


def logits_by_length(loaded: Loaded, batch: list[Tensor]) -> Tensor:
    """The same logits; on a CPU texts of at most half the longest one's length are computed apart, with less padding.

    There time goes by positions, padding included: with texts of 3 to 30 tokens, 16 a batch, a step takes a third less.
    A GPU would rather have one large batch.
    """
    half = max(len(one) for one in batch) // 2
    short = [i for i, one in enumerate(batch) if len(one) <= half]
    if not short or loaded.device.type != "cpu":
        return logits_of(loaded, batch)
    long = [i for i, one in enumerate(batch) if len(one) > half]
    parts = [logits_of(loaded, [batch[i] for i in part]) for part in (long, short)]
    return torch.cat(parts)[torch.tensor(long + short).argsort()]


def log_prior(labels: tuple[int, ...], classes: int) -> Tensor:
    """(classes,) float32: log of the site's own class prior, n_c / n; minus infinity for a class the site has none of.

    So an absent class takes no part in the site's softmax and its row of the head stays where it was: the site knows
    nothing of the class and says nothing. Smoothing (n_c + 1/2) does not do that: its gradients are small, but Adam
    divides by their size, and the sites without the class push it down at full speed. Measured with five sites, one
    class found at a single one of them: linear heads on MiniLM's features averaged to .82 this way, to .69 smoothed.
    """
    counts = torch.bincount(torch.tensor(labels), minlength=classes).float()
    return torch.log(counts / len(labels))


def batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """One epoch: every example once, in an order that the generator fixes; the last batch may be smaller."""
    order = torch.randperm(count, generator=generator).tolist()
    for start in range(0, count, batch_size):
        yield order[start : start + batch_size]


def trained_weights(model: Any) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Of the trained tensors those of the adapter, and those of the head; each in the model's order."""
    adapter: list[torch.nn.Parameter] = []
    head: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if "modules_to_save" in name else adapter).append(parameter)
    return adapter, head


def make_optimizer(
    plan: Plan, adapter: list[torch.nn.Parameter], head: Sequence[torch.nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The plan's optimiser without weight decay, which would move B and the head without looking at any record.

    Each group of parameters has its ``peak``, which :func:`set_rates` goes by.
    """
    rate = plan.training.learning_rate
    own = plan.training.head_learning_rate or rate
    parts = ((adapter, rate), (head, own))
    groups = [{"params": list(weights), "lr": peak, "peak": peak} for weights, peak in parts if weights]
    if plan.training.optimizer == "sgd":
        return torch.optim.SGD(groups)
    return torch.optim.AdamW(groups, weight_decay=0.0)


def learning_rate_at(peak: float, step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero, so that a site does not end in the noise of its last steps."""
    warm = max(1, round(WARM_UP * steps))
    return peak * min((step + 1) / warm, (steps - step) / max(1, steps - warm + 1))


def set_rates(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Give every group of parameters its rate for a step: the same share of its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(group["peak"], step, steps)


@repeatable
def train(
    *,
    plan: Plan,
    base: Path,
    start: Mapping[str, Any],
    examples: TaskData,
    device: Device = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    factors: Mapping[str, Any] | None = None,
    rank: int | None = None,
    min_class_count: int = 1,
) -> TrainingResult:
    """Fine-tune B and the head from ``start`` on the site's examples, as the plan says, and return the delta.

    A language model's loss is told in ``participant/generation.py``, that of a regression is the mean squared error on
    the scaled target. A classifier's is cross-entropy per example; with
    ``logit_adjusted`` the log of the site's own class prior is added to the logits in training only (Menon et al. 2021,
    arXiv 2007.07314; for federated learning Zhang et al. 2022, "FedLC"). The trained logits then stand for a uniform
    prior at every site, so their average is not torn between the sites' label skews. Behind a fixed analytic head the
    logits are ``sharpness`` times its scores.

    Args:
        plan: what to train; base, adapter, data and training are read.
        base: directory of the base model.
        start: the whole start adapter of this stage, under PEFT's names.
        examples: the site's records, labels numbered as in the plan; or with numbers, or for text generation.
        device: ``auto`` is CUDA, then CPU; on CUDA bf16 autocast where it has it, and deterministic algorithms.
        threads: CPU threads for torch in this process; None leaves torch's own choice.
        progress: called after each step.
        factors: the frozen ones of the method "core".
        min_class_count: the site's own minimum for a counted head.
        rank: most directions that this site trains, with the method "dense".

    Raises:
        UserError: no examples or one label only, another base model than the plan's, a loss that is not finite, or a
            record or packing that the language model cannot do with.
        ValueError: ``start`` is not of the plan's layout.
    """
    began = time.monotonic()
    _check_examples(examples, plan)
    if threads is not None:
        torch.set_num_threads(threads)
    whole, everything = plan, start
    plan, start = narrowed(plan, start, rank)
    layout, settings = layout_of(plan.adapter), plan.training
    loaded = load_model(plan, base, start, device)
    keep_beneath(loaded.model, whole, everything, rank)
    seen = _seen(loaded, plan, examples)
    cores = Cores(loaded.model, plan, factors)
    weights = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(plan, *trained_weights(loaded.model))
    generator = torch.Generator().manual_seed(settings.seed)
    epochs, batch_size = settings.epochs, settings.batch_size
    assert epochs is not None, "a private plan is trained by train_private"
    assert batch_size is not None
    steps = epochs * -(-len(examples) // batch_size)
    step, epoch_loss = 0, 0.0
    for _ in range(epochs):
        epoch_loss = 0.0
        for chosen in batches(len(examples), batch_size, generator):
            set_rates(optimizer, step, steps)
            loss = seen.loss_of(chosen)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            value = _finite(loss.item(), step, steps)
            epoch_loss += value * len(chosen)
            if progress is not None:
                progress(step, steps, value)
    moved = cores.leave()
    after = read_adapter(loaded.model)
    delta = delta_of(start, after, plan.adapter, step)
    assert delta.shape == (layout.size,)
    squares: Tensors = {}
    shares: list[float] = []
    if isinstance(examples, Examples):
        shares = class_shares(examples, plan, min_class_count, keys_of(seen.texts))
    if plan.aggregation.fisher is not None:
        squared_gradients(loaded.model, (seen.loss_of([i]) for i in range(len(examples))))
        squares = read_adapter(loaded.model)
    vector = vector_of(
        plan=plan,
        start=start,
        after=after,
        delta=delta,
        cores=moved,
        model=loaded.model,
        texts=seen.texts,
        squares=squares,
        shares=shares,
        forward=seen.forward,
    )
    return TrainingResult(vector, len(examples), epoch_loss / len(examples), time.monotonic() - began)


def _seen(loaded: Loaded, plan: Plan, examples: TaskData) -> Seen:
    """What the plan's task makes of a site's records."""
    if isinstance(examples, Records):
        from participant.generation import seen_by  # which builds on this module

        return seen_by(loaded, plan, examples)
    if isinstance(examples, Measured):
        from participant import regression

        return regression.seen_by(loaded, plan, examples)
    texts = tokenise(loaded.tokenizer, examples.texts, plan.data.max_length)
    labels = torch.tensor(examples.labels, device=loaded.device)
    prior = torch.zeros(len(plan.data.labels))
    if plan.training.loss == "logit_adjusted":
        prior = log_prior(examples.labels, len(prior))
    prior, sharpness = prior.to(loaded.device), plan.training.sharpness or 1.0

    def loss_of(chosen: list[int]) -> Tensor:
        with autocast(loaded.device):
            logits = logits_by_length(loaded, [texts[i] for i in chosen])
        return cross_entropy(sharpness * logits + prior, labels[chosen])

    return Seen(texts, loss_of, lambda batch: logits_of(loaded, batch))


def _check_examples(examples: TaskData, plan: Plan) -> None:
    """Raise UserError unless there is something to learn from."""
    if not len(examples):
        raise UserError("data: expected at least one example, found none", hint="check the data set")
    if not isinstance(examples, Examples):
        return
    if plan.training.loss == "logit_adjusted" and len(set(examples.labels)) == 1:
        raise UserError(
            f"data: expected two labels or more, found only {plan.data.labels[examples.labels[0]]!r}",
            hint="with one label the logit-adjusted loss is zero: sit this plan out, or agree on another loss",
        )


def _finite(loss: float, step: int, steps: int) -> float:
    """``loss``, or UserError: a delta that is not finite must not reach the sum."""
    if not np.isfinite(loss):
        raise UserError(
            f"training: expected a finite loss, found {loss} at step {step} of {steps}",
            hint="lower training.learning_rate in the plan",
        )
    return loss


def delta_of(start: Mapping[str, Any], after: Tensors, adapter: Adapter, steps: int) -> Vector:
    """Trained minus start, with the invariants that the sum relies on: A is untouched, B moved, all is finite.

    Behind a head of zeros B has no gradient, so the first step moves the head alone: a site with one batch ends there.
    A fixed head is not zero.
    """
    layout = layout_of(adapter)
    check_tensors(after, layout)
    for name, _ in layout.frozen:
        assert np.array_equal(after[name], start[name]), f"{name} is frozen and moved"
    delta = flatten(trained_part(after, layout), layout) - flatten(trained_part(start, layout), layout)
    in_b = [name for name, _ in layout.trained if name.endswith("lora_B.weight")]
    in_b = in_b if steps > 1 or adapter.train == "lora" else []
    moved = any(np.any(after[name] != start[name]) for name in in_b or trained_part(after, layout))
    assert moved, f"no {'LoRA B' if in_b else 'tensor of the head'} moved: it is not part of the graph"
    return delta
