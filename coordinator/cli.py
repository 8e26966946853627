"""``veilsum-coordinator``: set up, serve, and look after members and plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from coordinator import cli_doctor, cli_members
from privacy import __version__, console
from privacy.errors import UserError

app = typer.Typer(
    name="veilsum-coordinator",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Coordinate federated fine-tuning and unmask only the sum. "
    "Every command takes --dir, the coordinator's directory (or VEILSUM_COORDINATOR).",
)
plan_app = typer.Typer(no_args_is_help=True, help="Submit and cancel plans.")
for command in (cli_members.init, cli_members.invite, cli_members.members, cli_members.add, cli_members.remove):
    app.command()(command)
app.add_typer(cli_members.roster_app, name="roster")
app.add_typer(plan_app, name="plan")
app.command()(cli_doctor.doctor)

Directory = Annotated[
    Path, typer.Option("--dir", envvar="VEILSUM_COORDINATOR", help="Directory of the coordinator.", show_default=True)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
HERE = Path()


def _operator(directory: Path) -> Any:
    from coordinator.config import load_home
    from coordinator.operator import Operator

    return Operator(load_home(directory))


@app.command()
def serve(
    directory: Directory = HERE,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="Log one JSON object a line.")] = False,
) -> None:
    """Run the coordinator until Ctrl-C.

    Example: veilsum-coordinator serve --dir /var/lib/veilsum
    """
    import asyncio

    console.set_up_logs(as_json=json_logs)
    from coordinator.config import load_home
    from coordinator.daemon import serve as run_server
    from privacy.files import only_one

    home = load_home(directory)
    with only_one(home.directory, "coordinator"):
        asyncio.run(run_server(home))


@plan_app.command("submit")
def submit(
    file: Annotated[Path, typer.Argument(help="The plan, a TOML file.")],
    directory: Directory = HERE,
    factors: Annotated[
        Path | None,
        typer.Option(help='For the method "core": directory of the factors file. Default: where the plan lies.'),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Offer a plan to all members.

    Example: veilsum-coordinator plan submit plan.toml
    """
    from privacy.plan import load_plan

    plan_file = load_plan(file)
    if plan_file.plan.aggregation.core is not None:
        from coordinator.config import load_home
        from privacy.factors import keep_factors, load_factors

        keep_factors(load_home(directory).factors, load_factors(factors or file.parent, plan_file.plan))
    digest = _operator(directory).submit_plan(plan_file.raw)
    found = {"plan": plan_file.plan.name, "digest": digest.hex()}
    typer.echo(json.dumps(found) if as_json else f"plan '{found['plan']}' is offered, digest {found['digest']}")


@plan_app.command("cancel")
def cancel(
    name: Annotated[str, typer.Argument(help="Name of the plan.")],
    directory: Directory = HERE,
    reason: Annotated[str, typer.Option(help="Shown to the members.")] = "no reason given",
) -> None:
    """Withdraw a plan; its running round aborts, a release stays.

    Example: veilsum-coordinator plan cancel bbc-news --reason "wrong labels"
    """
    _operator(directory).cancel_plan(name, reason)
    typer.echo(f"plan '{name}' is cancelled")


@app.command()
def status(directory: Directory = HERE, as_json: AsJson = False) -> None:
    """List all plans and their state.

    Example: veilsum-coordinator status --json
    """
    found = _operator(directory).report()
    if as_json:
        typer.echo(json.dumps(found))
        return
    if found.get("fault"):
        typer.echo(f"not serving: {found['fault']}")
    if "waiting_for" in found:
        typer.echo("no roster yet; once everybody has joined: veilsum-coordinator roster draft, then roster publish")
    elif not found["plans"]:
        typer.echo("no plans yet; offer one: veilsum-coordinator plan submit FILE")
    for plan in found["plans"]:
        reason = f": {plan['reason']}" if plan["reason"] else ""
        stage = f"stage {plan['stage']} of {plan['stages']}, " if plan["stages"] > 1 else ""
        typer.echo(
            f"{plan['plan']}: {plan['state']}{reason}; {stage}ready {len(plan['ready'])}, "
            f"released {len(plan['released'])} of {plan['members']} members"
            + (f"; not taking part: {', '.join(plan['declined'])}" if plan["declined"] else "")
        )
        _say_what_to_do(plan)


def _say_what_to_do(plan: dict[str, Any]) -> None:
    """One line for the plan, and one for each site that takes no part."""
    if plan["todo"]:
        typer.echo(f"  what to do: {plan['todo']}")
    for member, why in plan["declined"].items():
        typer.echo(f"  {member} {why}")
        typer.echo(f"    what to do: {plan['declined_todo'][member]}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of the plan.")], directory: Directory = HERE, as_json: AsJson = False
) -> None:
    """Show one plan with its rounds and its release.

    Example: veilsum-coordinator show bbc-news
    """
    found = _operator(directory).report(name)
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(f"{found['plan']}: {found['state']}" + (f": {found['reason']}" if found["reason"] else ""))
    _say_what_to_do(found)
    for stage in found["history"] if found["stages"] > 1 else ():
        over = "closed" if stage["closed"] else "open"
        typer.echo(f"  stage {stage['stage']} of {found['stages']}: {over}, starts at {stage['start'][:16]}…")
        typer.echo(f"    in its release: {', '.join(stage['released']) or 'nobody yet'}")
    for row in found["rounds"]:
        stage = f"stage {row['stage']}, " if found["stages"] > 1 else ""
        line = f"  {stage}round {row['round']}: {row['state']}, {row['phase']}, {len(row['receipts'])} uploads"
        if row["state"] == "running" and row["waiting_for"]:
            line += f", waits {row['seconds_left']} s for {', '.join(row['waiting_for'])}"
        if row["phase"] == "publishing":
            line += ", unmasked {} of {} shards".format(*row["shards"])
        typer.echo(line + (f"; {row['reason']}" if row["reason"] else ""))
        if row["state"] == "aborted" and row["todo"]:
            typer.echo(f"    what to do: {row['todo']}")
        for entry in row["named"]:
            typer.echo(f"    proven cheat: {entry['member']} ({entry['kind']})")
    if found["release"]:
        for line in _judged(found["release"].get("evaluation")):
            typer.echo(line)
        typer.echo(f"  adapter: {found['release']['adapter']}")
        if "card" in found["release"]:  # releases of earlier versions have none
            typer.echo(f"  model card: {found['release']['card']}")


def _judged(evaluation: dict[str, Any] | None) -> list[str]:
    """What the held-out records of all sites together say of each candidate."""
    if evaluation is None:
        return []
    lines = []
    for one in evaluation["candidates"]:
        right = f"{one['correct']} of {one['records']} right ({one['accuracy']:.3f})"
        elected = " (elected)" if one["candidate"] == evaluation["elected"] else ""
        lines.append(f"  {one['candidate']}: {right}, loss {one['loss']:.4f}{elected}")
    return lines


@app.command()
def witnesses(
    directory: Directory = HERE,
    member: Annotated[str, typer.Option(help="Only ledgers of this member.")] = "",
    as_json: AsJson = False,
) -> None:
    """Print the last checkpoint witnessed of each ledger, an anchor file for auditors. Needs no running coordinator.

    Example: veilsum-coordinator witnesses --member north > north.anchor
    """
    from coordinator.config import load_home
    from coordinator.witnesses import anchor_file, anchors

    path = load_home(directory).witnesses
    found = anchors(path, member)
    if member and not found:
        known = ", ".join(sorted({entry["member"] for entry in anchors(path)})) or "none"
        raise UserError(f"expected a member whose ledger was witnessed, found '{member}'; witnessed: {known}")
    typer.echo(json.dumps(found) if as_json else anchor_file(found), nl=as_json)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point."""
    console.run(app)
