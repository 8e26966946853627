"""``veilsum-audit``: checks what was published and logged, from files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from privacy import __version__, cli_budget, console
from privacy.errors import UserError

app = typer.Typer(
    name="veilsum-audit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Verify rounds, releases and privacy ledgers from files alone, trusting nobody.",
)


@app.command("transcript")
def transcript_command(
    directory: Annotated[Path, typer.Argument(help="releases/PLAN/stage-K of the coordinator, or a copy of it.")],
    roster: Annotated[str, typer.Option(help="The pinned roster hash, in hex (roster.pin at a site).")] = "",
    uploads: Annotated[
        Path | None, typer.Option(help="The coordinator's rounds directory: recompute every sum from the uploads.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Verify a release: every signature, list and opened seed, the totals, and the adapter they give.

    Exit codes: 0 it holds, 1 a file is missing or the roster is not the pinned one, 2 usage, 4 something does not hold.

    Example: veilsum-audit transcript releases/bbc-news/stage-1 --roster $(cat roster.pin)
    """
    from privacy.audit import audit_release

    try:
        pin = bytes.fromhex(roster) if roster else None
    except ValueError:
        pin = b""
    if pin is not None and len(pin) != 32:
        raise UserError(
            f"--roster: expected 64 hexadecimal digits, found '{roster}'",
            hint="the pinned hash is in roster.pin at a site",
        )
    report = audit_release(directory, pin, uploads)
    not_shown = []
    if uploads is None:
        not_shown.append("the sum was not recomputed here: the uploads are not part of a release, see --uploads")
    if pin is None:
        not_shown.append("the roster was taken from the release: give --roster to compare it with the pinned one")
    if report.card != "holds":
        not_shown.append(f"the model card was not compared: {_uncompared(report.card)}")
    if as_json:
        more = {"confirmed": report.confirmed, "named": report.named, "card": report.card, "not_shown": not_shown}
        typer.echo(json.dumps(report.facts | more))
        return
    if before := report.facts["start"]["cohorts"]:
        rounds, stage = ", ".join(str(cohort["round"]) for cohort in before), report.facts["stage"]
        digest = report.facts["start"]["digest"][:16]
        typer.echo(f"stage {stage} starts from what the totals of stage {stage - 1} give: {digest}…, round {rounds}")
    for cohort in report.facts["cohorts"]:
        names = ", ".join(cohort["survivors"])
        typer.echo(f"round {cohort['round']}: transcript and total hold; in the sum: {names}")
        typer.echo(f"  confirmed by: {', '.join(report.confirmed[cohort['round']]) or 'nobody'}")
        certified = (
            "every block was recomputed by enough members" if cohort["certified"] else "NOT certified by members"
        )
        typer.echo(f"  the sum: {certified}; random projection: {cohort['projection']}")
    for entry in report.named:
        typer.echo(f"proven cheat in round {entry['round']}: {entry['member']} ({entry['kind']})")
    card = ", and so is its model card" if report.card == "holds" else ""
    typer.echo(f"adapter {report.facts['adapter_digest'][:16]}… is what these totals give{card}")
    for line in not_shown:
        typer.echo(f"note: {line}")


def _uncompared(card: str) -> str:
    return "the release has none" if card == "none" else f"it says it is of {card}, which this version does not write"


app.command("ledger")(cli_budget.ledger_command)
app.command("federation")(cli_budget.federation_command)
app.command("empirical")(cli_budget.empirical_command)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point."""
    console.run(app)
