"""The commands about consent: what is offered, and approving one plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from privacy.errors import shown

#: A reason may quote the plan.
MAX_REASON = 500
Directory = Annotated[
    Path, typer.Option("--dir", envvar="VEILSUM_PARTICIPANT", help="Directory of this site.", show_default=True)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
HERE = Path()


def plans(directory: Directory = HERE, as_json: AsJson = False) -> None:
    """List the plans that are offered, and what becomes of each here: admitted, waiting for approval, or refused.

    Example: veilsum-participant plans --dir SITE
    """
    from participant.approvals import consider
    from participant.site import Site

    site = Site.open(directory)
    client = site.client()
    client.hello()
    found = [_described(consider(site, offered), site.roster.roster.name) for offered in client.plans()]
    if as_json:
        typer.echo(json.dumps(found))
        return
    if not found:
        typer.echo("no plans are offered")
    for plan in found:
        typer.echo(f"{plan['plan']}: {plan['state']}: {plan['reason']}")
        if plan["todo"]:
            typer.echo(f"  what to do: {plan['todo']}")
        typer.echo(
            f"  trains {plan['train']} of {plan['base']} on {plan['dataset']}, {plan['privacy']}; {plan['digest']}"
        )
        if plan["upload"] is not None:
            typer.echo(f"  {plan['upload']['text']}")


def _described(found: Any, names: Callable[[int], str]) -> dict[str, Any]:
    from privacy.endings import told_at_site

    plan = found.file.plan
    privacy = "without differential privacy"
    if plan.privacy is not None:
        noise = f"epsilon {plan.privacy.epsilon}" if plan.privacy.epsilon else f"sigma {plan.privacy.sigma}"
        privacy = f"{noise}, delta {plan.privacy.delta}, unit {plan.privacy.unit}"
    return {
        "plan": plan.name,
        "state": found.state,
        **told_at_site(found.state, shown(found.reason, MAX_REASON), names).facts("site"),
        "task": plan.task,
        "base": shown(plan.base.name),
        "dataset": plan.data.dataset,
        "train": plan.adapter.train,
        "stages": plan.stages,
        "min_cohort": plan.round.min_cohort,
        "privacy": privacy,
        "digest": found.file.digest.hex(),
        "upload": None if found.upload is None else _upload(found.upload),
    }


def _upload(found: Any) -> dict[str, Any]:
    tight = f"; that is tight: {found.todo}" if found.state == "tight" else ""
    facts = {"bytes": found.bytes, "seconds": found.seconds, "deadline_s": found.deadline_s, "state": found.state}
    return facts | {"text": f"{found}{tight}"}


def approve(
    plan: Annotated[str, typer.Argument(help="Name of a plan that veilsum-participant plans has shown.")],
    directory: Directory = HERE,
    digest: Annotated[str, typer.Option(help="Approve only a plan with this digest.")] = "",
) -> None:
    """Agree to one plan as it was shown; what changes afterwards needs another approval.

    Example: veilsum-participant approve newsrooms --dir SITE
    """
    from participant.approvals import approve as keep
    from participant.config import load_home

    found = keep(load_home(directory), plan, digest)
    typer.echo(f"approved: plan '{found.plan.name}', digest {found.digest.hex()}")
