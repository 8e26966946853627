"""Accuracy of adapters on records of this machine: base, this site's own, the release, or any directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from participant.site import Site
from privacy.adapter import load_peft
from privacy.errors import UserError
from privacy.plan import Plan


def compare(site: Site, plan: Plan, data: Path, adapters: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name -> accuracy, correct, total and loss on the records in ``data``.

    Raises:
        UserError: an adapter or the records are missing, or the base model is another one.
    """
    from participant.data import load_examples
    from participant.evaluation import accuracy

    settings = site.home.settings
    if plan.data.dataset not in settings.datasets or plan.base.name not in settings.models:
        raise UserError(
            f"expected data set '{plan.data.dataset}' and base model '{plan.base.name}' in participant.toml",
            hint="name them under [datasets] and [models]",
        )
    columns = settings.datasets[plan.data.dataset]
    examples = load_examples(data, columns.format, columns.text, columns.label, plan.data.labels)
    found = {}
    for name in adapters:
        result = accuracy(
            plan=plan,
            base=site.home.path(settings.models[plan.base.name]),
            adapter=None if name == "base" else load_peft(_directory(site, plan, name)),
            examples=examples,
            device=settings.device,
            threads=settings.threads,
        )
        found[name] = {
            "accuracy": result.accuracy,
            "correct": result.correct,
            "total": result.total,
            "loss": result.loss,
        }
    return found


def _directory(site: Site, plan: Plan, name: str) -> Path:
    if name == "local":
        return site.local_directory(plan.name, 1)
    if name == "release":
        return site.release_directory(plan.name, 1) / "adapter"
    return Path(name)
