"""The commands of a site's administrator about membership: joining, the roster, certificates."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

roster_app = typer.Typer(no_args_is_help=True, help="Look at the federation's roster, and approve it.")

Directory = Annotated[
    Path, typer.Option("--dir", envvar="VEILSUM_PARTICIPANT", help="Directory of this site.", show_default=True)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
HERE = Path()


def _settings(directory: Path) -> Any:
    from participant.config import load_home

    return load_home(directory).settings


def join(
    url: Annotated[str, typer.Argument(help="Where the coordinator takes sites in, host:port.")],
    token: Annotated[str, typer.Argument(help="The invitation; - reads it from standard input.")],
    directory: Directory = HERE,
    as_json: AsJson = False,
) -> None:
    """Join a federation: makes this site's keys, which stay here, and fetches its certificate.

    Example: veilsum-participant join coordinator.example.org:7444 veilsum-join-1-… --dir SITE
    """
    from participant.joining import join as join_federation
    from privacy.words import fingerprint

    found = join_federation(directory, url, sys.stdin.read(1 << 16) if token == "-" else token)
    known = {
        "member": found.member,
        "federation": found.federation,
        "coordinator": found.coordinator,
        "identity": found.identity.hex(),
        "identity_words": fingerprint(found.identity),
        "authority_words": fingerprint(found.authority),
    }
    if as_json:
        typer.echo(json.dumps(known))
        return
    typer.echo(f"'{found.member}' has joined '{found.federation}' at {found.coordinator}")
    typer.echo(f"this site's key in words: {known['identity_words']}")
    typer.echo(f"the authority in words:   {known['authority_words']}")
    typer.echo("next: say in participant.toml where models and data lie; then: veilsum-participant roster show")


def identity(directory: Directory = HERE, as_json: AsJson = False) -> None:
    """Print this site's public identity key; makes the key where there is none. For sites with their own certificates.

    Example: veilsum-participant identity --dir SITE
    """
    from participant.enrol import own_identity
    from privacy.secagg.keys import identity_public
    from privacy.words import fingerprint

    key = identity_public(own_identity(directory))
    found = {"key": key.hex(), "words": fingerprint(key)}
    typer.echo(json.dumps(found) if as_json else f"{found['key']}\n{found['words']}")


def renew(directory: Directory = HERE) -> None:
    """Get a new TLS certificate now, for a new key. The daemon does it when a third of the time is left.

    Example: veilsum-participant renew --dir SITE
    """
    from participant.joining import Membership
    from participant.renewal import valid_until

    settings = _settings(directory)
    Membership(directory, settings.coordinator).renew(settings.member)
    typer.echo(f"valid until {valid_until(directory):%Y-%m-%d}")


@roster_app.command("show")
def show(directory: Directory = HERE, as_json: AsJson = False) -> None:
    """Fetch the roster in force and print it for a telephone call: names, fingerprints, policy, and what changed.

    Example: veilsum-participant roster show --dir SITE
    """
    from participant.joining import Membership
    from participant.rosters import keep_offered

    settings = _settings(directory)
    shown = keep_offered(directory, Membership(directory, settings.coordinator).roster(), settings.member)
    roster = shown.file.roster
    if as_json:
        found = {
            "federation": roster.federation,
            "roster": shown.file.hash.hex(),
            "words": shown.words,
            "approved": shown.pinned,
            "changes": shown.changes,
            "members": shown.members(),
            "policy": roster.policy.model_dump(mode="json"),
        }
        typer.echo(json.dumps(found))
        return
    typer.echo(f"federation '{roster.federation}', roster {shown.file.hash.hex()}")
    for member in shown.members():
        you = " (this site)" if member["member"] == settings.member else ""
        typer.echo(f"  {member['member']}{you}: {member['words']}")
    typer.echo("policy: " + ", ".join(f"{k} {v}" for k, v in roster.policy.model_dump(mode="json").items()))
    for line in shown.changes or ():
        typer.echo(f"  changed: {line}")
    typer.echo(f"the whole roster in words:\n  {shown.words}")
    if shown.pinned:
        typer.echo("this site has approved it")
    else:
        typer.echo("read the words to the other members by telephone; if all have the same: roster approve")


@roster_app.command("approve")
def approve(
    directory: Directory = HERE,
    expected: Annotated[str, typer.Option("--hash", help="Approve only a roster with this hash.")] = "",
) -> None:
    """Pin the roster that was shown last, after people compared it with the other members.

    Example: veilsum-participant roster approve --dir SITE
    """
    from participant.rosters import approve as pin

    found = pin(directory, _settings(directory).member, expected)
    typer.echo(f"approved: {len(found.roster.members)} members, roster {found.hash.hex()}")
