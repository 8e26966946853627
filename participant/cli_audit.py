"""``veilsum-participant audit-training``: a private training on synthetic canaries, for ``veilsum-audit empirical``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from privacy.errors import UserError


def audit_training(
    plan: Annotated[Path, typer.Option(help="A private plan: one with a section privacy.")],
    base: Annotated[Path, typer.Option(help="Directory of the plan's base model.")],
    out: Annotated[Path, typer.Option(help="File to write the scores to.")],
    canaries: Annotated[
        int, typer.Option(min=20, max=100_000, help="Synthetic records; about half are trained on.")
    ] = 400,
) -> None:
    """Train once on random texts as a plan says, to see whether they can be told from texts that were left out.

    No record of this site is read, no ledger written, nothing released. It takes as long as the plan's training.

    Example: veilsum-participant audit-training --plan plan.toml --base models/minilm --out scores.json
    """
    from participant.canaries import audit_training as train
    from privacy.budget.empirical import as_bytes
    from privacy.files import write_durably
    from privacy.plan import load_plan

    if not base.is_dir():
        raise UserError(f"{base}: expected the directory of a base model", hint="give --base the plan's base model")
    found = train(plan=load_plan(plan).plan, base=base, count=canaries)
    write_durably(out, as_bytes(found))
    typer.echo(f"{out}: scores of {canaries} canaries, {sum(found.included)} of them trained on")
    typer.echo(f"next: veilsum-audit empirical {out}")
