"""A site's factors of the method "core": computed here from its own base model, and kept under their digest."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from participant.base_model import check_base, find_base
from participant.patience import patiently
from participant.site import Site
from privacy.adapter import Tensors, start_digest
from privacy.errors import UserError
from privacy.factors import factored, factors_file, keep_factors, load_factors
from privacy.job import Job

log = structlog.get_logger()


def ensure_factors(site: Site, job: Job) -> None:
    """Compute the factors that a plan pins, unless they are here, or the method has none.

    Raises:
        UserError: the base model gives other factors than the plan's.
    """
    settings, directory = job.plan.aggregation.core, site.home.factors
    if settings is None:
        return
    if factors_file(directory, settings.factors).exists():
        load_factors(directory, job.plan)
        return
    log.info("factoring the base model", plan=job.plan.name)
    base = find_base(site.home, job.plan.base.name)
    check_base(job.plan, base)
    adapter = job.plan.adapter
    found = of_base(base, job.plan.outputs, tuple(adapter.modules), adapter.rank, adapter.seed)
    digest = start_digest(found).hex()
    if digest != settings.factors:
        raise UserError(
            f"plan: expected factors {settings.factors}, found {digest} from the base model",
            hint="take the plan file as it was agreed, or draft it anew with this version",
        )
    patiently(lambda: keep_factors(directory, found))


def of_base(base: Path, labels: int, modules: Iterable[str], rank: int, seed: str) -> Tensors:
    """U and V of modules of a base model; one without labels is a causal language model.

    Raises:
        UserError: it cannot be loaded, or has a weight of a smaller rank.
    """
    from participant.loading import load_base  # imports torch

    model, _, _ = load_base(base, labels)
    try:
        return factored(((name, _weight(model, name)) for name in sorted(modules)), rank, bytes.fromhex(seed))
    except ValueError as error:
        raise UserError(f"{base}: {error}", hint="choose a smaller rank or other modules") from error


def _weight(model: Any, module: str) -> NDArray[np.float32]:
    from participant.four_bit import weight_of  # imports torch

    weight: NDArray[np.float32] = weight_of(model.get_submodule(module)).float().cpu().numpy()
    return weight
