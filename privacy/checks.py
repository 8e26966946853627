"""What both ``doctor`` commands share: one line a check, at the end what to do, and checks that any machine needs."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import typer
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from privacy.errors import UserError, VeilsumError, shown
from privacy.files import read_file

DISTRIBUTION = "veilsum"
#: Days before its end from which a certificate is worth a warning.
SOON = datetime.timedelta(days=30)
#: By how much a clock may be behind what this machine itself has written or been issued.
LEEWAY = datetime.timedelta(minutes=15)
RENEW = "renew it before then: its end stops every connection"
CLOCK = "set the clock, and keep it by NTP: deadlines, certificates and ledgers go by it"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    #: What to do where it is not ok.
    todo: str = ""


def ok(name: str, found: str) -> Check:
    """Nothing to do."""
    return Check(name, "ok", found)


def warn(name: str, found: str, todo: str) -> Check:
    """It works, and something should be done."""
    return Check(name, "warn", found, todo)


def fail(name: str, found: str, todo: str) -> Check:
    """Something does not work."""
    return Check(name, "fail", found, todo)


def failed(name: str, error: VeilsumError) -> Check:
    """What an error says, with its hint as what to do."""
    return fail(name, shown(str(error), 500), getattr(error, "hint", "") or "correct it and run doctor again")


def looked_at(name: str, look: Iterable[Check]) -> list[Check]:
    """The checks of one look; an error that is meant for people is a failed check and ends the look, not the doctor."""
    found: list[Check] = []
    try:
        found.extend(look)
    except VeilsumError as error:
        found.append(failed(name, error))
    return found


def finish(checks: list[Check], *, as_json: bool) -> None:
    """Print all checks; exit code 1 if one failed."""
    wrong = [check for check in checks if check.state == "fail"]
    todo = [f"{check.name}: {check.todo}" for check in (*wrong, *(c for c in checks if c.state == "warn"))]
    if as_json:
        typer.echo(json.dumps({"ok": not wrong, "checks": [asdict(check) for check in checks], "todo": todo}))
    else:
        for check in checks:
            typer.echo(f"{check.state:<4}  {check.name}: {check.found}")
        typer.echo("what to do:" if todo else "nothing to do")
        for number, line in enumerate(todo, 1):
            typer.echo(f"  {number}. {line}")
    if wrong:
        raise SystemExit(1)


# --- what any machine needs ------------------------------------------------------------------------------------------


def clock(files: Iterable[Path], certificates: Iterable[x509.Certificate], now: datetime.datetime) -> Check:
    """Is the clock behind what was written or issued before? Ahead of them it may be by any time."""
    known = [(datetime.datetime.fromtimestamp(p.stat().st_mtime, datetime.UTC), p.name) for p in files if p.is_file()]
    known += [(c.not_valid_before_utc, "a certificate") for c in certificates]
    latest, what = max(known, default=(now, "nothing"))
    if latest > now + LEEWAY:
        text = f"says {now:%Y-%m-%d %H:%M} UTC, and {what} is of {latest:%Y-%m-%d %H:%M}"
        return fail("clock", text, CLOCK)
    return ok("clock", f"{now:%Y-%m-%d %H:%M} UTC, not behind {what}")


def read_certificate(path: Path, what: str) -> x509.Certificate:
    """A certificate in PEM.

    Raises:
        UserError: no such file, or something else in it.
    """
    try:
        return x509.load_pem_x509_certificate(read_file(path, what, "ask for it again"))
    except ValueError as error:
        raise UserError(f"{path}: expected {what} in PEM, found something else", hint="ask for it again") from error


def certificate(name: str, found: x509.Certificate, now: datetime.datetime) -> Check:
    """Is it valid, and for how long yet?"""
    until = found.not_valid_after_utc
    if until < now:
        return fail(name, f"expired on {until:%Y-%m-%d %H:%M} UTC", "issue another one")
    if found.not_valid_before_utc > now:
        return fail(name, f"is not valid before {found.not_valid_before_utc:%Y-%m-%d %H:%M} UTC", CLOCK)
    text = f"valid until {until:%Y-%m-%d} ({(until - now).days} days)"
    return ok(name, text) if until - now > SOON else warn(name, text, RENEW)


def is_issued_by(found: x509.Certificate, authority: x509.Certificate) -> bool:
    """Did the authority sign this certificate itself?"""
    try:
        found.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def disk(directory: Path, needed: int, what: str) -> Check:
    """Is there room for ``needed`` bytes?"""
    free = shutil.disk_usage(directory).free
    text = f"{free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB expected for {what}"
    return ok("disk", text) if free >= needed else fail("disk", text, f"free space where {directory} lies")


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, to compare them."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def needs(requirement: str, extras: tuple[str, ...]) -> tuple[str, str, str] | None:
    """(package, least version, version that is too new) of one of our requirements; ``None`` for other extras."""
    spec, _, marker = requirement.partition(";")
    extra = re.search(r"extra == '(\w+)'", marker)
    if extra and extra[1] not in extras:
        return None
    package = re.match(r"[\w.-]+", spec)
    assert package is not None
    least, below = re.search(r">=([\d.]+)", spec), re.search(r"<([\d.]+)", spec)
    return package[0], least[1] if least else "0", below[1] if below else ""


def versions(extras: tuple[str, ...] = (), required: Iterable[str] | None = None) -> Iterator[Check]:
    """Is what this distribution and its extras ask for installed, in a version that will do?"""
    every = importlib.metadata.requires(DISTRIBUTION) if required is None else required
    wanted = [found for line in every or () if (found := needs(line, extras))]
    wrong = []
    for package, least, below in wanted:
        try:
            here = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{package} is missing")
            continue
        if numbers(here) < numbers(least) or (below and numbers(here) >= numbers(below)):
            wrong.append(f"{package} {here}, expected {least} or newer" + (f", below {below}" if below else ""))
    if wrong:
        install = f"{DISTRIBUTION}[{','.join(extras)}]" if extras else DISTRIBUTION
        yield fail(
            "versions", "; ".join(wrong), f"pip install --upgrade '{install}', with the constraints of its release"
        )
    else:
        yield ok("versions", f"{len(wanted)} libraries as asked for")
