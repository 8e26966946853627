"""Is this coordinator fit to serve? Looks at everything that stops one, running or not, and changes nothing."""

from __future__ import annotations

import datetime
import socket
import sqlite3
import ssl
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cryptography import x509

from coordinator.config import Home, check_identity, load_home
from coordinator.operator import Operator
from coordinator.publish import has_adapter
from coordinator.schema import SCHEMA
from coordinator.space import space_needed
from privacy.checks import (
    Check,
    certificate,
    clock,
    disk,
    fail,
    failed,
    is_issued_by,
    looked_at,
    ok,
    read_certificate,
    versions,
    warn,
)
from privacy.console import Unreachable
from privacy.errors import UserError, VeilsumError
from privacy.exposition import split_address
from privacy.identity import load_identity
from privacy.job import Job
from privacy.plan import parse_plan
from privacy.roster import RosterFile, load_roster

#: Bytes for messages, logs and the database, beside what rounds take.
LEAST_FREE = 256 << 20
START = "start it: veilsum-coordinator serve"
FIRST_ROSTER = "once everybody has joined: veilsum-coordinator roster draft, then roster publish"


def examine(directory: Path) -> list[Check]:
    """All checks; where the configuration cannot be read, few."""
    now = datetime.datetime.now(datetime.UTC)
    try:
        home = load_home(directory)
    except VeilsumError as error:
        return [failed("configuration", error), *versions()]
    looks = {
        "roster": _roster(home),
        "certificates": _certificates(home, now),
        "database": _database(home),
        "disk": _disk(home),
        "process": _process(home),
        "versions": versions(),
    }
    first = ok("configuration", f"listens on {home.settings.listen}")
    return [first, *(check for name, look in looks.items() for check in looked_at(name, look))]


def _roster(home: Home) -> Iterator[Check]:
    if _is_joining(home):
        yield warn("roster", "none yet", FIRST_ROSTER)
        return
    roster = load_roster(home.roster)
    check_identity(home, roster, load_identity(home.directory))
    policy = roster.roster.policy
    text = f"{len(roster.roster.members)} members of '{roster.roster.federation}', hash {roster.hash.hex()[:16]}…"
    yield ok("roster", text)
    least = f"at least {policy.min_survivors} in a sum, {policy.max_colluders} may collude"
    if len(roster.roster.members) < policy.min_cohort:
        yield fail("policy", f"{least}; a round takes {policy.min_cohort} members", "let more members join")
    else:
        yield ok("policy", least)


def _is_joining(home: Home) -> bool:
    """Does it, or would it, take sites in until there is a first roster? Without a port for that it cannot start."""
    return bool(home.settings.join_listen) and not home.roster.exists()


def _certificates(home: Home, now: datetime.datetime) -> Iterator[Check]:
    own = read_certificate(home.tls_certificate, "the coordinator's TLS certificate")
    authority = read_certificate(home.authority, "the authority's certificate")
    yield clock([home.database, *home.directory.glob("*.toml")], [own, authority], now)
    yield certificate("certificate", own, now)
    yield certificate("authority", authority, now)
    if not is_issued_by(own, authority):
        yield fail(
            "certificate", "tls.crt is not of the authority in ca.crt", "issue the coordinator's certificate again"
        )
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(home.tls_certificate, home.tls_key)
    except (ssl.SSLError, OSError) as error:
        text = f"tls.key is not the key of tls.crt: {error.strerror or error}"
        yield fail("certificate", text, "issue the coordinator's certificate again")
    yield ok("names", f"members may dial: {', '.join(_names(own)) or 'nothing'}")


def _names(found: x509.Certificate) -> list[str]:
    """The hosts that a certificate is for."""
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]


def _read(database: Path, statement: str) -> list[Any]:
    """Ask the database, which a running coordinator may be writing; nothing is changed or checkpointed."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10)
    try:
        connection.execute("pragma query_only=1")
        return connection.execute(statement).fetchall()
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"{database}: expected the coordinator's database, found: {error}",
            hint="restore it from your backup; members whose upload was confirmed have its receipt",
        ) from error
    finally:
        connection.close()


def _database(home: Home) -> Iterator[Check]:
    if not home.database.exists():
        yield ok("database", "none yet; the first start makes it")
        return
    (version,) = _read(home.database, "pragma user_version")[0]
    if version > len(SCHEMA):
        yield fail("database", f"version {version}, this veilsum knows {len(SCHEMA)}", "run the veilsum that wrote it")
        return
    faults = [line for (line,) in _read(home.database, "pragma quick_check") if line != "ok"]
    if faults:
        yield fail("database", f"damaged: {faults[0]}", "restore it from your backup")
        return
    plans = _read(home.database, "select name, state, reason from plans")
    yield ok("database", f"whole, {len(plans)} plans")
    yield from _releases(home, plans)


def _releases(home: Home, plans: Iterable[tuple[str, str, str]]) -> Iterator[Check]:
    """A plan that says "released" has an adapter."""
    for name, state, _ in plans:
        if state == "released" and not has_adapter(name, home.releases):
            yield fail(
                "releases",
                f"plan '{name}' is released and its adapter is not there",
                "start the coordinator: it writes releases again",
            )


def _open_plans(home: Home, roster: RosterFile) -> Iterator[Job]:
    rows = (
        _read(home.database, "select toml from plans where state in ('open', 'released')")
        if home.database.exists()
        else []
    )
    for (toml,) in rows:
        yield Job.of(parse_plan(toml), roster, home.factors)


def _disk(home: Home) -> Iterator[Check]:
    plans = () if _is_joining(home) else _open_plans(home, load_roster(home.roster))
    needed = [space_needed(job, job.rules.cohort) for job in plans]
    yield disk(home.directory, LEAST_FREE + sum(needed), f"one round of each of {len(needed)} plans")


def _process(home: Home) -> Iterator[Check]:
    """Is one running and well, or could one start?"""
    operator = Operator(home)
    try:
        found = operator.report()
    except Unreachable:
        yield _port(home)
        return
    if "waiting_for" in found:
        yield ok("process", f"a coordinator runs here and waits for {found['waiting_for']}")
    elif found["fault"]:
        yield fail(
            "process", f"a coordinator runs here and does not serve: {found['fault']}", "see its log; restart it"
        )
    else:
        yield ok("process", f"a coordinator serves {len(found['plans'])} plans here")
    for plan in found["plans"]:
        if plan["reason"] and plan["state"] != "cancelled":
            todo = plan["todo"] or f"veilsum-coordinator show {plan['plan']}"
            yield warn("plans", f"'{plan['plan']}' is {plan['state']}: {plan['reason']}", todo)


def _port(home: Home) -> Check:
    host, port = split_address(home.settings.listen)
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return warn("process", f"no coordinator runs here; {home.settings.listen} is free", START)
    except OSError as error:
        text = f"no coordinator runs here, and {home.settings.listen} is taken: {error.strerror or error}"
        return fail("process", text, "stop what listens there, or choose another address under 'listen'")
