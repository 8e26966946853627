"""Accuracy of adapters on records of this machine: base, this site's own, the release, or any directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from participant.base_model import find_base
from participant.site import Site
from participant.task_data import load_for
from privacy.adapter import load_peft
from privacy.errors import UserError
from privacy.plan import Plan

if TYPE_CHECKING:
    from participant.evaluation import Evaluation


def compare(
    site: Site, plan: Plan, data: Path, adapters: Sequence[str], stage: int | None = None
) -> dict[str, dict[str, Any]]:
    """Name -> accuracy, correct, total and loss on the records in ``data``, and whether texts or tokens were counted;
    of a regression its errors, in the target's own unit.

    Args:
        stage: that ``local`` and ``release`` are of; the last one of each that lies here if left out.

    Raises:
        UserError: an adapter or the records are missing, or the base model is another one.
    """
    from participant.evaluation import accuracy

    settings = site.home.settings
    if plan.data.dataset not in settings.datasets or plan.base.name not in settings.models:
        raise UserError(
            f"expected data set '{plan.data.dataset}' and base model '{plan.base.name}' in participant.toml",
            hint="name them under [datasets] and [models]",
        )
    examples = load_for(plan, data, settings.datasets[plan.data.dataset])
    base = find_base(site.home, plan.base.name)
    found = {}
    for name in adapters:
        result = accuracy(
            plan=plan,
            base=base,
            adapter=None if name == "base" else load_peft(_directory(site, plan, name, stage)),
            examples=examples,
            device=settings.device,
            threads=settings.threads,
        )
        found[name] = _shown(result, plan)
    return found


def _shown(result: Evaluation, plan: Plan) -> dict[str, Any]:
    from participant.evaluation import Fit

    if isinstance(result, Fit):
        return {
            "mean_squared_error": result.mean_squared,
            "mean_absolute_error": result.mean_absolute,
            "r2": result.r2,
            "total": result.total,
            **({} if plan.evaluation is None else {"within_tolerance": result.correct}),
            "of": "numbers",
        }
    return {
        "accuracy": result.accuracy,
        "correct": result.correct,
        "total": result.total,
        "loss": result.loss,
        "of": "tokens" if plan.task == "generation" else "texts",
    }


def _directory(site: Site, plan: Plan, name: str, stage: int | None) -> Path:
    if name not in ("local", "release"):
        return Path(name)
    stages = range(plan.last, 0, -1) if stage is None else (stage,)
    work, releases = site.home.work / plan.name, site.home.releases / plan.name
    places = [work / f"stage-{k}" / "local" if name == "local" else releases / f"stage-{k}" / "adapter" for k in stages]
    return next((place for place in places if place.exists()), places[-1])
