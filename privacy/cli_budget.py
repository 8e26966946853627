"""``veilsum-audit ledger`` and ``federation``: what sites' ledgers add up to, from files alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from privacy.budget.entries import parse_line
from privacy.budget.findings import Code, Found, worst
from privacy.errors import ProtocolError, UserError
from privacy.files import read_file, write_durably
from privacy.roster import Roster, load_roster

BROKEN = "the lower bound is above what is promised: this training is not what its mechanism says; do not release it"
UNRELATED = "note: the anchors given are about other data sets than that of {}"
NOT_PINNED = "note: the roster was taken from the directory: give --pin to compare it with the pinned one"

if TYPE_CHECKING:  # accountants take a second to import, which other commands need not wait for
    from privacy.budget.anchors import Anchor
    from privacy.budget.audit import LedgerReport, Terms

Html = Annotated[Path | None, typer.Option("--html", help="Write the report as one HTML file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
OpenDays = Annotated[float, typer.Option(min=0, help="Days after which an open reservation is a finding.")]
Seconds = Annotated[float, typer.Option(min=1, help="Seconds each accountant may take, for one ledger or scores file.")]
Memory = Annotated[int, typer.Option("--mib", min=512, help="MiB of memory each accountant may take.")]
Pin = Annotated[str, typer.Option(help="The pinned roster hash, in hex (roster.pin at a site).")]


def ledger_command(
    files: Annotated[list[Path], typer.Argument(help="Ledgers of a site: ledger/NAME.jsonl.")],
    roster: Annotated[
        Path | None, typer.Option(help="The federation's roster file, which has the sites' keys.")
    ] = None,
    pin: Pin = "",
    key: Annotated[str, typer.Option(help="The site's identity key in hex, instead of a roster.")] = "",
    anchor: Annotated[
        list[Path] | None, typer.Option(help="Signed checkpoints kept by somebody else; may be given several times.")
    ] = None,
    html: Html = None,
    as_json: AsJson = False,
    open_days: OpenDays = 30,
    seconds: Seconds = 300,
    mib: Memory = 4096,
) -> None:
    """Audit ledgers: chain, signatures, states of jobs, and every epsilon computed anew.

    Exit codes: 0 nothing found, 1 a file is missing, 2 usage, 10 over budget, 11 open reservation too old, 20 bad
    line, signature or chain, 21 truncated, 22 fork, 23 replay, 24 clock, 30 recomputation differs, 31 unsupported
    mechanism, 32 self-test missing, 40 no anchor. Of several the most serious; all are printed.

    Example: veilsum-audit ledger ledger/news.jsonl --roster roster.toml --anchor north.anchor --html audit.html
    """
    from privacy.budget.audit import Terms
    from privacy.budget.federation import twins

    if (roster is None) == (not key):
        raise typer.BadParameter("give exactly one of --roster and --key", param_hint="--roster/--key")
    members = load_roster(roster, _hex(pin, "--pin", 32) if pin else None).roster if roster else None
    terms = Terms(seconds=seconds, mib=mib, open_days=open_days)
    single = _hex(key, "--key", 32) if key else None
    notes = [(path, read_file(path, "an anchor file")) for path in anchor or []]
    reports = [_audit(path, members, single, notes, terms) for path in dict.fromkeys(files)]
    unrelated = [UNRELATED.format(report.title) for report in reports if notes and report.code is Code.NO_ANCHOR]
    finish(reports, twins(reports), html, as_json, unrelated)


def federation_command(
    directory: Annotated[
        Path, typer.Argument(help="roster.toml, ledgers/MEMBER/NAME.jsonl, witnesses.jsonl, releases/.")
    ],
    pin: Pin = "",
    html: Html = None,
    as_json: AsJson = False,
    open_days: OpenDays = 30,
    seconds: Seconds = 300,
    mib: Memory = 4096,
) -> None:
    """Audit all ledgers of a federation with its witnesses and released rounds. Exit codes as of the command ledger.

    Example: veilsum-audit federation audit-2026/ --pin $(cat roster.pin) --html audit.html
    """
    from privacy.budget.audit import Terms
    from privacy.budget.federation import audit_federation

    terms = Terms(seconds=seconds, mib=mib, open_days=open_days)
    report = audit_federation(directory, _hex(pin, "--pin", 32) if pin else None, terms)
    rounds = report.rounds if pin else [*report.rounds, NOT_PINNED]
    finish(report.ledgers, report.found, html, as_json, rounds)


def _hex(text: str, option: str, length: int) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != length:
        raise typer.BadParameter(f"expected {2 * length} hexadecimal digits", param_hint=option)
    return found


def _audit(
    path: Path, members: Roster | None, key: bytes | None, notes: Sequence[tuple[Path, bytes]], terms: Terms
) -> LedgerReport:
    from privacy.budget.anchors import claimed_site, read_anchors
    from privacy.budget.audit import audit_ledger
    from privacy.budget.federation import own_checkpoint
    from privacy.budget.ledger import read_ledger

    raw, owner = read_ledger(path), ""
    if members is not None:
        claimed = claimed_site(raw)
        key = claimed or bytes(32)  # a first line that cannot be read is found below
        owner = next((m.name for m in members.members if m.key == key.hex()), "")
        if claimed and not owner:
            raise UserError(
                f"{path}: expected a ledger of a member of the roster, found one of {key.hex()[:16]}…",
                hint="give the roster that the site belongs to, or its key with --key",
            )
    assert key is not None
    anchors: list[Anchor] = []
    found = []
    for source, note in notes:
        try:
            anchors += read_anchors(note, key, _dataset(raw), str(source))
        except ProtocolError as error:
            found.append(Found(Code.BROKEN, f"{source}: {error}"))
    own = own_checkpoint(path)
    report = audit_ledger(raw, key, source=str(path), anchors=anchors, own=own, terms=terms, owner=owner)
    report.found += found
    return report


def _dataset(raw: bytes) -> str:
    """The identity that the first line names, unverified: only to choose anchors by."""
    try:
        return parse_line(raw.partition(b"\n")[0]).dataset
    except ProtocolError:
        return ""


def finish(
    reports: Sequence[LedgerReport],
    found: Sequence[Found],
    html: Path | None,
    as_json: bool,
    rounds: Sequence[str] = (),
    **more: Any,
) -> None:
    """Print a report, then write its page, and leave with the code of the most serious finding."""
    from privacy.budget.report import findings_text, ledger_text, to_html, to_json

    every = [*found, *(one for report in reports for one in report.found)]
    code = worst(every)
    if as_json:
        typer.echo(json.dumps(to_json(reports, found, rounds=list(rounds), **more), allow_nan=False))
    else:
        lines = [line for report in reports for line in ledger_text(report)]
        for line in (*lines, *rounds, *findings_text(every)):
            typer.echo(line)
        typer.echo(f"result: {'nothing found' if not code else code.name.lower().replace('_', ' ')} (exit {int(code)})")
    if html is not None:  # last: a path that cannot be written must not cost what took minutes to compute
        when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        page = to_html(reports, found, when, rounds).encode(errors="replace")  # a file's name need not be UTF-8
        write_durably(html, page, private=False)
    raise typer.Exit(int(code))


def empirical_command(
    scores: Annotated[Path, typer.Argument(help="What veilsum-participant audit-training wrote.")],
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999, help="Of each lower bound.")] = 0.95,
    as_json: AsJson = False,
    seconds: Seconds = 300,
    mib: Memory = 4096,
) -> None:
    """Compare what canaries show of a training with what its mechanism promises: a lower bound beside the upper one.

    Exit codes: 0 the lower bound is below the promise, which proves nothing; 30 it is above: the training is broken.

    Example: veilsum-audit empirical scores.json
    """
    from privacy.budget.accounting import bounded_pld_epsilon
    from privacy.budget.empirical import bounds, read_scores
    from privacy.budget.ledger import read_ledger

    found = read_scores(read_ledger(scores, "a scores file"))
    m, delta = len(found.scores), found.mechanism.delta
    upper = bounded_pld_epsilon([found.mechanism], float(delta), seconds, mib, interval=1e-3)
    b = bounds(found, confidence)
    broken = b.general > upper
    facts = {
        "canaries": m,
        "guesses": b.guesses,
        "right": b.right,
        "delta": delta,
        "confidence": confidence,
        "lower": b.general,
        "lower_gaussian": b.gaussian,
        "ceiling": b.ceiling,
        "upper": "inf" if math.isinf(upper) else upper,
        "broken": broken,
    }
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        promised = "no finite epsilon" if math.isinf(upper) else f"epsilon <= {upper:.2f}"
        typer.echo(f"{m} canaries; {b.right} of {b.guesses} guesses right; delta {delta}, confidence {confidence:g}")
        typer.echo(f"lower bound: epsilon >= {b.general:.2f} for any mechanism (Steinke et al. 2023)")
        typer.echo(f"             epsilon >= {b.gaussian:.2f} if its trade-off curve is a Gaussian's (f-DP, 2024)")
        typer.echo(f"upper bound: {promised} by PLD, what the mechanism promises")
        typer.echo(f"ceiling:     {b.ceiling:.2f} is the most that so many canaries could show, every guess right")
        typer.echo(BROKEN if broken else "a small lower bound proves nothing")
    raise typer.Exit(int(Code.DIFFERS) if broken else 0)
