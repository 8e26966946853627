"""``veilsum-participant``: the daemon of one site, and what its administrator asks."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from participant import cli_audit, cli_data, cli_doctor, cli_join, cli_plans
from privacy import __version__, console
from privacy.errors import UserError

app = typer.Typer(
    name="veilsum-participant",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune on this site's data, mask the update, upload it once. "
    "What works on a site takes its directory by --dir (or VEILSUM_PARTICIPANT).",
)
for command in (cli_join.join, cli_join.identity, cli_join.renew, cli_plans.plans, cli_plans.approve):
    app.command()(command)
app.add_typer(cli_join.roster_app, name="roster")
app.add_typer(cli_data.app, name="dataset")
app.command()(cli_data.budget)
app.command()(cli_data.witnesses)
app.command()(cli_audit.audit_training)
app.command()(cli_doctor.doctor)

Directory = Annotated[
    Path, typer.Option("--dir", envvar="VEILSUM_PARTICIPANT", help="Directory of this site.", show_default=True)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
HERE = Path()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@app.command()
def run(
    directory: Directory = HERE,
    once: Annotated[bool, typer.Option("--once", help="Leave when a release is here.")] = False,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="Log one JSON object a line.")] = False,
) -> None:
    """Run the daemon until Ctrl-C: train plans this site agreed to, join rounds, fetch releases.

    Example: veilsum-participant run --dir /var/lib/veilsum-site
    """
    console.set_up_logs(as_json=json_logs)
    signal.signal(signal.SIGTERM, _interrupt)
    from participant import metrics
    from participant.client import OtherRoster
    from participant.config import STATE_FILE, keep_state, load_home
    from participant.daemon import Daemon
    from participant.progress import training_progress
    from participant.rosters import wait_for_approval
    from participant.site import Site
    from participant.web import status_page
    from privacy.exposition import metrics_page
    from privacy.files import only_one
    from privacy.notify import notify

    # The lock comes before the records are read: a second daemon would not see what the first one spends.
    with (
        only_one(load_home(directory).directory, "daemon of this site"),
        training_progress(show=not json_logs) as progress,
    ):
        keep_state(directory / STATE_FILE)
        try:
            while True:
                site = Site.open(directory)
                metrics.register(site)
                try:
                    page = metrics_page(site.home.settings.metrics_listen, site.counts.registry)
                    with page, status_page(site) as curves:
                        notify(READY=1)
                        Daemon(site, site.client(), site.counts.watching(curves.watching(progress))).run(once=once)
                    return
                except OtherRoster as error:
                    if once:
                        raise
                    notify(STATUS=f"waiting for an approval: {error}")
                    wait_for_approval(directory, site.roster.hash, str(error))
        finally:
            notify(STOPPING=1)


@app.command()
def status(directory: Directory = HERE, as_json: AsJson = False) -> None:
    """Say what became of each plan here. Needs no network.

    Example: veilsum-participant status --json
    """
    from participant.site import Site

    site = Site.open(directory)
    plans = [{"plan": name, **note} for name, note in sorted(site.notes().items())]
    found = {"member": site.home.settings.member, "rounds_joined": site.store.rounds_joined(), "plans": plans}
    if as_json:
        typer.echo(json.dumps(found))
        return
    if not plans:
        typer.echo("no plans seen yet; start the daemon: veilsum-participant run")
    for plan in plans:
        reason = f": {plan['reason']}" if plan["reason"] else ""
        typer.echo(f"{plan['plan']}: {plan['state']}{reason}")
        if plan["todo"]:
            typer.echo(f"  what to do: {plan['todo']}")


@app.command()
def fetch(
    plan: Annotated[str, typer.Argument(help="Name of the plan.")],
    directory: Directory = HERE,
    stage: Annotated[
        int | None, typer.Option(min=1, help="Stage of the plan; the last released one if left out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a plan's release, verify it and compute the adapter here.

    Example: veilsum-participant fetch bbc-news
    """
    from participant.fetch import fetch_release
    from participant.site import Site
    from privacy.job import Job

    site = Site.open(directory)
    client = site.client()
    client.hello()
    plan_file, now = _find_plan(client, plan)
    job = Job.of(plan_file, site.roster, site.home.factors)
    wanted = [stage] if stage is not None else range(min(now, job.plan.last), 0, -1)
    found = next((number for number in wanted if fetch_release(site, client, job, number)), None)
    if found is None:
        of = f"stage {stage} of " if stage is not None else ""
        raise UserError(f"expected a release of {of}plan '{plan}', found none yet", hint="veilsum-participant status")
    adapter = site.release_directory(plan, found) / "adapter"
    typer.echo(json.dumps({"plan": plan, "stage": found, "adapter": str(adapter)}) if as_json else str(adapter))


def _find_plan(client: Any, name: str) -> Any:
    from privacy.plan import parse_plan

    offered = [(parse_plan(p.toml), p.stage) for p in client.plans()]
    for plan_file, stage in offered:
        if plan_file.plan.name == name:
            return plan_file, stage
    known = ", ".join(p.plan.name for p, _ in offered) or "none"
    raise UserError(f"expected a plan the coordinator offers, found '{name}'; offered: {known}")


@app.command()
def evaluate(
    plan: Annotated[Path, typer.Argument(help="The plan file.")],
    data: Annotated[
        Path, typer.Option(help="Records nobody trained on; format and columns as in the site's data set.")
    ],
    directory: Directory = HERE,
    adapter: Annotated[
        list[str] | None, typer.Option(help="base, local, release, or an adapter directory; may be repeated.")
    ] = None,
    stage: Annotated[
        int | None, typer.Option(min=1, help="Stage that local and release are of; the last one here if left out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure accuracy, of a language model the loss, of a regression the errors, on this machine; nothing leaves it.

    Example: veilsum-participant evaluate plan.toml --data test.jsonl --adapter local --adapter release
    """
    from participant.compare import compare
    from participant.site import Site
    from privacy.plan import load_plan

    found = compare(Site.open(directory), load_plan(plan).plan, data, adapter or ["base", "local", "release"], stage)
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, result in found.items():
        if result["of"] == "numbers":
            within = f", {result['within_tolerance']} within the tolerance" if "within_tolerance" in result else ""
            r2 = "undefined" if result["r2"] is None else f"{result['r2']:.4f}"
            typer.echo(
                f"{name}: mean squared error {result['mean_squared_error']:.6g}, "
                f"mean absolute error {result['mean_absolute_error']:.6g}, R2 {r2} ({result['total']} numbers{within})"
            )
            continue
        counts = f"accuracy {result['accuracy']:.4f} ({result['correct']} of {result['total']}"
        if result["of"] == "tokens":
            typer.echo(f"{name}: loss {result['loss']:.4f} nats a token, {counts} tokens)")
        else:
            typer.echo(f"{name}: {counts})")


@app.command()
def draft(
    base: Annotated[
        Path, typer.Argument(help="Directory of the base model (safetensors, config, tokenizer), or a GGUF file.")
    ],
    name: Annotated[str, typer.Option(help="Name of the plan.")],
    base_name: Annotated[str, typer.Option(help="Name of the base model, as sites list it.")],
    dataset: Annotated[str, typer.Option(help="Name of the data set, as sites list it.")],
    task: Annotated[
        str, typer.Option(help="What is learnt: classification, regression (a number), or generation of text.")
    ] = "classification",
    label: Annotated[list[str] | None, typer.Option(help="A label; repeat for each, in order.")] = None,
    number: Annotated[
        tuple[float, float] | None,
        typer.Option("--range", metavar="LOW HIGH", help="Public range of the number. For regression."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="How far off a right answer may be. For regression, with --holdout.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="A linear module to adapt, by the last part of its name; may be repeated.")
    ] = None,
    template: Annotated[
        str, typer.Option(help="How a conversation becomes text: model, chatml or none. For generation.")
    ] = "model",
    packing: Annotated[bool, typer.Option(help="Several records in one row of tokens. For generation.")] = False,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA adapter.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens of a record that are read.")] = 128,
    train: Annotated[
        str, typer.Option(help="What is trained: the LoRA adapter and the head (all), or the head alone (head).")
    ] = "all",
    head: Annotated[
        str,
        typer.Option(
            help="How the head comes about: trained, counted (rows by records of their class), or analytic, from sums."
        ),
    ] = "trained",
    method: Annotated[
        str,
        typer.Option(help="What is summed of LoRA's factors: freeze_a, both, regmean, fisher, core or dense."),
    ] = "freeze_a",
    factors: Annotated[
        Path, typer.Option(help='Directory for the factors file of the method "core"; the coordinator needs it.')
    ] = HERE,
    epsilon: Annotated[
        str | None, typer.Option(help="Train with differential privacy of this epsilon; needs --size.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(help="About how many records a site has; chooses batch, steps and delta. With --epsilon."),
    ] = None,
    max_records_per_user: Annotated[
        int | None, typer.Option(help="Protect users with at most so many records, instead of single records.")
    ] = None,
    stages: Annotated[int, typer.Option(min=1, max=16, help="Trainings, each from the release of the one before.")] = 1,
    holdout: Annotated[
        float | None, typer.Option(help="Share of each site's records that judge the release, in total only.")
    ] = None,
    server_lr: Annotated[
        list[float] | None, typer.Option(help="A rate to vote on by these records; repeat for each. With --holdout.")
    ] = None,
    min_cohort: Annotated[int, typer.Option(help="Members that must be ready for a round to open.")] = 4,
    max_cohort: Annotated[int, typer.Option(help="Most members of a round.")] = 8,
    min_survivors: Annotated[int, typer.Option(help="Members whose updates a sum has at least.")] = 3,
) -> None:
    """Write a complete plan for a base model to standard output, with every digest filled in.

    Example: veilsum-participant draft ./MiniLM --name news --base-name MiniLM --dataset news --label a --label b
    """
    from participant.drafting import draft_plan
    from privacy.aggregation import HEADS, METHODS, Head, Method
    from privacy.budget.presets import draft_privacy
    from privacy.budget.terms import noise_warning
    from privacy.plan import parse_plan
    from privacy.sections import TASKS, Task

    if (epsilon is None) != (size is None):
        raise UserError("draft: expected --epsilon and --size together, or neither")
    if max_records_per_user is not None and epsilon is None:
        raise UserError("draft: expected --max-records-per-user with --epsilon and --size, found it alone")
    if server_lr and holdout is None:
        raise UserError("draft: expected --server-lr with --holdout, found it alone")
    if train not in ("all", "head"):
        raise UserError(f"draft: expected --train all or head, found '{train}'")
    if head not in HEADS:
        raise UserError(f"draft: expected --head trained, counted or analytic, found '{head}'")
    if method not in METHODS:
        raise UserError(f"draft: expected --method {', '.join(METHODS[:-1])} or {METHODS[-1]}, found '{method}'")
    if task not in TASKS:
        raise UserError(f"draft: expected --task {', '.join(TASKS[:-1])} or {TASKS[-1]}, found '{task}'")
    if template not in ("model", "chatml", "none"):
        raise UserError(f"draft: expected --template model, chatml or none, found '{template}'")
    if task != "classification" and label:
        raise UserError(f"draft: expected no --label with --task {task}, which has no labels")
    if (task == "regression") != (number is not None):
        raise UserError("draft: expected --range LOW HIGH with --task regression, and only with it")
    if (task == "regression" and holdout is not None) != (tolerance is not None):
        raise UserError("draft: expected --tolerance with --task regression and --holdout, and only with both")
    if task != "generation" and (packing or template != "model"):
        raise UserError("draft: expected --template and --packing with --task generation only")
    section = ""
    if epsilon is not None and size is not None:
        users = max_records_per_user is not None
        section = draft_privacy(
            size, epsilon, unit="user" if users else "record", max_records_per_unit=max_records_per_user or 1
        )
    text = draft_plan(
        base=base,
        base_name=base_name,
        name=name,
        dataset=dataset,
        labels=label or (),
        target=number,
        task=cast(Task, task),
        template="chatml" if template == "chatml" else "none" if template == "none" else "model",
        packing=packing,
        targets=target,
        rank=rank,
        max_length=max_length,
        train="head" if train == "head" else "all",
        head=cast(Head, head),
        method=cast(Method, method),
        factors_to=factors,
        privacy=section,
        stages=stages,
        holdout=holdout,
        rates=server_lr or (),
        tolerance=tolerance,
        min_cohort=min_cohort,
        max_cohort=max_cohort,
        min_survivors=min_survivors,
        # Under [privacy] each site counts nominal_size, the same everywhere: uniform weights say so, and round finer.
        weights="uniform" if section else "examples",
        max_weight=1 if section else 65536,
        # A private head is trained on centred features; taken back to the model's own, its weights are far larger.
        clip=64.0 if section and train == "head" else None,
    )
    if warning := noise_warning(parse_plan(text.encode()).plan):
        typer.echo(f"note: {warning}", err=True)
    typer.echo(text, nl=False)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point."""
    console.run(app)
