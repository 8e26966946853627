"""The operator's commands about members: a new coordinator, invitations, and rosters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from privacy.errors import UserError

roster_app = typer.Typer(no_args_is_help=True, help="Draft a roster from who has joined, and put it in force.")

Directory = Annotated[
    Path, typer.Option("--dir", envvar="VEILSUM_COORDINATOR", help="Directory of the coordinator.", show_default=True)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
HERE = Path()


def _home(directory: Path) -> Any:
    from coordinator.config import load_home

    return load_home(directory)


def _members(home: Any) -> Any:
    import time

    from coordinator.members import Members

    return Members(home.members, time.time)


def _name(name: str) -> str:
    """A name that a roster may have."""
    import re

    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
        raise UserError(f"expected a name of lower-case letters, digits, '.', '_' and '-', found '{name}'")
    return name


def init(
    directory: Annotated[Path, typer.Argument(help="Directory to make.")],
    host: Annotated[str, typer.Option(help="Host name or address by which sites reach this machine.")] = "localhost",
    federation: Annotated[str, typer.Option(help="Name of the federation.")] = "federation",
    bind: Annotated[str, typer.Option(help="Address to listen on; default: all interfaces.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the members.")] = 7443,
    join_port: Annotated[int, typer.Option(min=1, max=65535, help="Port on which invited sites join.")] = 7444,
    as_json: AsJson = False,
) -> None:
    """Make a coordinator: its keys, its authority for certificates, and a configuration with comments.

    Example: veilsum-coordinator init /var/lib/veilsum --host coordinator.example.org --federation newsrooms
    """
    import hashlib

    from coordinator.setup import Ports, create_coordinator
    from privacy.words import fingerprint

    ports = Ports(bind, port, join_port)
    key, authority = create_coordinator(directory, _name(federation), host, ports)
    found = {
        "directory": str(directory),
        "coordinator": key.hex(),
        "authority_sha256": hashlib.sha256(authority).hexdigest(),
        "authority_words": fingerprint(authority),
    }
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(f"coordinator of '{federation}' in {directory}, for {host}:{port}; its settings: coordinator.toml")
    typer.echo(f"identity key: {found['coordinator']}")
    typer.echo(f"authority, SHA-256: {found['authority_sha256']}")
    typer.echo(f"authority in words: {found['authority_words']}")
    typer.echo(
        f"next: veilsum-coordinator serve --dir {directory}; then, for each site: veilsum-coordinator invite NAME"
    )


def invite(
    name: Annotated[str, typer.Argument(help="Name of the member, as rosters will have it.")],
    directory: Directory = HERE,
    hours: Annotated[float, typer.Option(min=0.01, max=24 * 90, help="How long the invitation is good.")] = 72,
    as_json: AsJson = False,
) -> None:
    """Print an invitation for one site: good once, and not for long. Hand it over as you would a password.

    Example: veilsum-coordinator invite north
    """
    import secrets
    import time

    from coordinator.pki import authority_certificate
    from privacy.invitation import SECRET_BYTES, Invitation, moment

    home = _home(directory)
    settings = home.settings
    if not settings.join_listen or not settings.address:
        raise UserError(
            "coordinator.toml: expected join_listen and address, found none",
            hint="without them nobody can join; veilsum-coordinator init writes both",
        )
    expires = int(time.time() + hours * 3600)
    secret, authority = secrets.token_bytes(SECRET_BYTES), authority_certificate(home.directory)
    invitation = Invitation(settings.federation, _name(name), expires, authority, secret)
    _members(home).invite(name, secret, expires)
    host, port = settings.address.rpartition(":")[0], settings.join_listen.rpartition(":")[2]
    found = {"member": name, "url": f"{host}:{port}", "token": invitation.token(), "expires": expires}
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(f"for '{name}', good once, until {moment(expires)}. On the site's machine:", err=True)
    typer.echo(f"veilsum-participant join {found['url']} {found['token']}")


def members(directory: Directory = HERE, as_json: AsJson = False) -> None:
    """List who has joined, with fingerprints, and who is invited. Needs no running coordinator.

    Example: veilsum-coordinator members --json
    """
    from privacy.invitation import moment
    from privacy.words import fingerprint

    state = _members(_home(directory)).read()
    joined = [
        {"member": m.name, "key": m.key, "words": fingerprint(bytes.fromhex(m.key)), "removed": m.removed}
        for m in state.members.values()
    ]
    invited = [{"member": i.member, "expires": int(i.expires)} for i in state.invited.values() if not i.key]
    if as_json:
        typer.echo(json.dumps({"members": joined, "invited": invited}))
        return
    if not joined and not invited:
        typer.echo("nobody yet; invite a site: veilsum-coordinator invite NAME")
    for member in joined:
        typer.echo(f"{member['member']}: {'removed' if member['removed'] else member['words']}")
    for one in invited:
        typer.echo(f"{one['member']}: invited until {moment(float(str(one['expires'])))}")


def add(
    name: Annotated[str, typer.Argument(help="Name of the member; its certificate must have it as common name.")],
    key: Annotated[str, typer.Argument(help="Its identity key in hex: veilsum-participant identity prints it.")],
    directory: Directory = HERE,
) -> None:
    """Add a member that brings its own certificate, of an authority that you put into ca.crt.

    Example: veilsum-coordinator add north 5f0c…
    """
    import re

    from privacy.words import fingerprint

    if not re.fullmatch(r"[0-9a-f]{64}", key):
        raise UserError(f"expected an identity key of 64 hex digits, found {len(key)} characters")
    _members(_home(directory)).add(_name(name), key)
    typer.echo(f"{name}: {fingerprint(bytes.fromhex(key))}")


def remove(name: Annotated[str, typer.Argument(help="Name of the member.")], directory: Directory = HERE) -> None:
    """Take a member out: it is refused from now on; then publish a roster without it. Also withdraws an invitation.

    Example: veilsum-coordinator remove north
    """
    members = _members(_home(directory))
    joined = name in members.read().members
    members.remove(name)
    if joined:
        typer.echo(f"'{name}' is removed; now draft and publish a roster without it, which each site approves")
    else:
        typer.echo(f"the invitation of '{name}' is withdrawn")


@roster_app.command("draft")
def draft(directory: Directory = HERE) -> None:
    """Write roster.draft.toml: everybody who has joined, and the policy in force or a first one.

    Example: veilsum-coordinator roster draft
    """
    from coordinator.rosters import draft as drafted
    from privacy.files import write_durably

    home = _home(directory)
    write_durably(home.roster_draft, drafted(home).encode())
    typer.echo(f"{home.roster_draft}: read it, change the policy as agreed, then: veilsum-coordinator roster publish")


@roster_app.command("publish")
def publish(
    file: Annotated[Path | None, typer.Argument(help="The roster; default: roster.draft.toml.")] = None,
    directory: Directory = HERE,
    as_json: AsJson = False,
) -> None:
    """Put a roster in force: members see it and approve it; open plans of the one before end.

    Example: veilsum-coordinator roster publish
    """
    from coordinator.rosters import publish as put_in_force
    from privacy.words import in_words

    home = _home(directory)
    found, running = put_in_force(home, file or home.roster_draft)
    told = {"roster": found.hash.hex(), "words": in_words(found.hash), "running": running}
    if as_json:
        typer.echo(json.dumps(told))
        return
    typer.echo(f"published, with {len(found.roster.members)} members; hash {told['roster']}")
    typer.echo(f"in words: {told['words']}")
    least = found.roster.policy.min_cohort
    if len(found.roster.members) < least:
        typer.echo(f"note: a round takes {least} members, so no plan can run until more have joined", err=True)
    if not running:
        typer.echo("no coordinator is running here; the next one starts with it")
