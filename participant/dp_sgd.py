"""Private fine-tuning at one site: DP-SGD from the start adapter and a data set to a delta that is private as a whole.

The mechanism comes from the plan (``privacy/budget/terms.py``); the site's ledger reserved it before this is called.
The noise that protects a record is added here in full: masking and the other sites' noise count for nothing in the
accounting (docs/privacy.md says why). Steps are counted, never epochs, and what a step saw (its batch's size, its loss,
the share that was clipped) is told to nobody.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog
import torch
from opacus.grad_sample import GradSampleHooks

from participant import dp_step, generation, regression
from participant.device import Device
from participant.features import Standard, enter, leave, standard_of
from participant.measured import Measured
from participant.noise import SecretRandom
from participant.self_test import SelfTest, run_self_test
from participant.task_data import TaskData
from participant.text_data import Records
from participant.training import (
    Loaded,
    Progress,
    TrainingResult,
    delta_of,
    load_model,
    make_optimizer,
    read_adapter,
    set_rates,
    tokenise,
    trained_weights,
)
from privacy.budget.events import DpSgd
from privacy.budget.terms import mechanism, noise_warning
from privacy.plan import Plan

log = structlog.get_logger()


def train_private(
    *,
    plan: Plan,
    base: Path,
    start: Mapping[str, Any],
    examples: TaskData,
    device: Device = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    on_selftest: Callable[[SelfTest], None],
) -> TrainingResult:
    """Train the plan's trained part with DP-SGD and return the delta; its epsilon is that of ``mechanism(plan)``.

    Args:
        plan: with a section ``[privacy]``.
        base: directory of the base model.
        start: the whole start adapter of this stage, under PEFT's names.
        examples: the site's records; for users already cut to ``max_records_per_unit`` each by the loader.
        device: ``auto`` is CUDA, then CPU; float32 on either.
        threads: CPU threads for torch in this process; None leaves torch's own choice.
        progress: called after each step; its loss is always NaN, which is all that it is told.
        on_selftest: called with the result once it passed and before the first record is tokenised; what it raises
            ends the job.

    Returns:
        ``loss`` is 0 and ``examples`` the true count, which stays at the site.

    Raises:
        SelfTestFailed: this model or machine does not do what the accounting assumes.
        Refusal: the model has a part that cannot be trained privately.
        UserError: another base model than the plan's.
    """
    began = time.monotonic()
    terms = mechanism(plan)
    assert isinstance(terms, DpSgd), "a plan without [privacy] is trained by participant.training.train"
    if warning := noise_warning(plan):
        log.warning("much noise", plan=plan.name, reason=warning)
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_model(plan, base, start, device)
    dp_step.make_private(loaded.model)
    random = SecretRandom()
    hooks = GradSampleHooks(loaded.model, loss_reduction="sum")
    # The first trained layer's input needs no gradient; what the hook wants, its output's, is there all the same.
    warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
    try:
        standard = standard_of(loaded, plan)
        on_selftest(run_self_test(loaded, plan, terms, random, standard))
        losses = _losses(loaded, plan, examples, standard)
        enter(standard)
        optimizer = make_optimizer(plan, *trained_weights(loaded.model))
        step = dp_step.make_step(loaded, terms, losses, optimizer, random, dp_step.most_at_a_time(plan))
        for number in range(terms.steps):
            set_rates(optimizer, number, terms.steps)
            dp_step.take_step(step, random.subset(len(examples), float(terms.rate)))
            if progress is not None:
                progress(number + 1, terms.steps, math.nan)
        leave(standard)
    finally:
        hooks.cleanup()
    delta = delta_of(start, read_adapter(loaded.model), plan.adapter, terms.steps)
    return TrainingResult(delta, len(examples), 0.0, time.monotonic() - began)


def _losses(loaded: Loaded, plan: Plan, examples: TaskData, standard: Standard | None) -> dp_step.Losses:
    if isinstance(examples, Records):
        return generation.private_losses(loaded, generation.private_tokens(loaded, plan, examples))
    texts = tokenise(loaded.tokenizer, examples.texts, plan.data.max_length)
    if isinstance(examples, Measured):
        targets = regression.targets_of(plan, examples, loaded.device)
        return regression.private_losses(loaded, texts, targets, standard)
    labels = torch.tensor(examples.labels, device=loaded.device)
    return dp_step.losses_on(loaded, texts, labels, dp_step.log_prior_of(plan).to(loaded.device), standard)
