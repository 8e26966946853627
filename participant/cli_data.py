"""``veilsum-participant dataset`` and ``budget``: what a site has registered, and what its ledgers say is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from privacy.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Register data sets and look at what was done with them.")

Directory = Annotated[
    Path, typer.Option("--dir", envvar="VEILSUM_PARTICIPANT", help="Directory of this site.", show_default=True)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Name = Annotated[str, typer.Argument(help="Name of the data set in participant.toml.")]
HERE = Path()


def _site(directory: Path, name: str = "") -> Any:
    from participant.site import Site

    site = Site.open(directory)
    known = site.home.settings.datasets
    if name and name not in known:
        raise UserError(
            f"expected a data set of participant.toml, found '{name}'; there: {', '.join(sorted(known)) or 'none'}",
            hint=f"add [datasets.{name}] with its path and format",
        )
    return site


def _shown(found: dict[str, Any]) -> str:
    if not found["registered"]:
        return f"{found['dataset']}: not registered; the first job does it, or: dataset register {found['dataset']}"
    lines = [f"{found['dataset']}: {found['policy']}", f"  identity {found['identity']}"]
    lines.append(f"  {found['records']} records registered, {found['lines']} lines in its ledger")
    spent = f"  epsilon {found['spent']} spent, {found['reserved']} with open reservations"
    lines.append(spent + (f", {found['left']} left" if found["left"] is not None else ""))
    lines += [f"  {job['job'][:8]} {job['state']}: plan '{job['plan']}', stage {job['stage']}" for job in found["jobs"]]
    return "\n".join(lines)


@app.command("list")
def list_all(directory: Directory = HERE, as_json: AsJson = False) -> None:
    """List the data sets of participant.toml, with what is charged to each. Needs no network.

    Example: veilsum-participant dataset list
    """
    from participant.charging import account

    site = _site(directory)
    found = [account(site, name) for name in sorted(site.home.settings.datasets)]
    typer.echo(json.dumps(found) if as_json else "\n".join(map(_shown, found)) or "no data sets in participant.toml")


@app.command()
def show(name: Name, directory: Directory = HERE, as_json: AsJson = False) -> None:
    """Show one data set: its policy, its identity, what is spent, and every job.

    Example: veilsum-participant dataset show news
    """
    from participant.charging import account

    found = account(_site(directory, name), name)
    typer.echo(json.dumps(found) if as_json else _shown(found))


@app.command()
def register(name: Name, directory: Directory = HERE, as_json: AsJson = False) -> None:
    """Register a data set, or its new records. The first job does the same; the records stay here.

    Example: veilsum-participant dataset register news
    """
    from participant.charging import ledger_of
    from participant.registry import Registry
    from participant.text_data import load_records

    site = _site(directory, name)
    data = site.home.settings.datasets[name]
    texts = load_records(site.home.path(data.path), data).texts
    growth = Registry(site.home).take(name, texts)
    identity = ledger_of(site, name).book.dataset
    found = {"dataset": name, "identity": identity, "records": growth.records, "added": growth.added}
    if as_json:
        typer.echo(json.dumps(found))
    else:
        typer.echo(f"{name}: {growth.records} records registered, {growth.added} of them new; identity {identity}")


@app.command()
def check(
    name: Name,
    plan: Annotated[Path | None, typer.Option(help="Read the records as this plan file would.")] = None,
    directory: Directory = HERE,
    as_json: AsJson = False,
) -> None:
    """Read every record and say what is there, or which record is wrong; nothing is registered, nothing leaves.

    Without a plan records are taken as for text generation, where a text needs no label.

    Example: veilsum-participant dataset check talks --plan plan.toml
    """
    from participant.checking import check_data
    from privacy.plan import load_plan

    found = check_data(_site(directory, name), name, load_plan(plan).plan if plan else None)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        typer.echo(f"{name}: " + ", ".join(f"{key.replace('_', ' ')}: {count}" for key, count in found.items()))


@app.command()
def policy(
    name: Name,
    directory: Directory = HERE,
    reason: Annotated[str, typer.Option(help="Why; a weaker policy needs one, and auditors see it.")] = "",
) -> None:
    """Enter the budget that participant.toml has now into the data set's ledger.

    Example: veilsum-participant dataset policy news --reason "consent renewed in 2027"
    """
    from participant.charging import change_policy, described

    site = _site(directory, name)
    changed = change_policy(site, name, reason)
    text = described(site.ledger(name).book.policy)
    typer.echo(f"{name}: {'entered' if changed else 'nothing to enter'}: {text}")


@app.command()
def close(
    name: Name,
    job: Annotated[str, typer.Argument(help="First digits of the job's id, as `dataset show` prints it.")],
    directory: Directory = HERE,
    reason: Annotated[str, typer.Option(help="Why; auditors see it.")] = "",
) -> None:
    """End an open job that nobody will ask for any more; its trained vector is deleted. The daemon must be stopped.

    Without this an audit finds a reservation that is open for too long. The charge is given back only if the job had
    not started.

    Example: veilsum-participant dataset close news 3f9a2c10 --reason "the coordinator was shut down"
    """
    from participant.charging import close as close_job
    from participant.config import load_home
    from privacy.files import only_one

    with only_one(load_home(directory).directory, "daemon of this site"):
        identity = close_job(_site(directory, name), name, job, reason)
    typer.echo(f"{name}: job {identity[:8]} is closed")


def budget(directory: Directory = HERE, as_json: AsJson = False) -> None:
    """Show what is spent, reserved and left of each data set's budget. Needs no network.

    Example: veilsum-participant budget --json
    """
    from participant.charging import account

    site = _site(directory)
    found = [account(site, name) for name in sorted(site.home.settings.datasets)]
    if as_json:
        typer.echo(json.dumps(found))
        return
    for row in found:
        left = "no budget" if row["left"] is None else f"{row['left']} of {row['budget']} left"
        typer.echo(f"{row['dataset']}: epsilon {row['spent']} spent, {row['reserved']} with open reservations; {left}")


def witnesses(directory: Directory = HERE, as_json: AsJson = False) -> None:
    """Print what M2 of each round showed of the other members' ledgers, one JSON object a line, for an auditor.

    With --json it is one list.

    Example: veilsum-participant witnesses > seen-by-north.jsonl
    """
    site = _site(directory)
    found = [line | {"member": site.roster.roster.name(line["member"])} for line in site.store.witnesses()]
    if as_json:
        typer.echo(json.dumps(found, sort_keys=True))
        return
    for line in found:
        typer.echo(json.dumps(line, sort_keys=True))
