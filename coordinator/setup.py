"""A new coordinator: its directory with identity, authority, TLS certificate and a file that explains itself.

Each step is skipped where a run before did it, and the configuration comes last: a set-up that was cut short is run
again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from coordinator import pki
from coordinator.config import CONFIG_FILE
from privacy.errors import UserError
from privacy.files import as_its_owner, make_private_directory, write_durably
from privacy.identity import IDENTITY_FILE, create_identity, load_identity
from privacy.secagg.keys import identity_public

CONFIG = """\
# The coordinator of a federation. Every key: docs/configuration.md.

# Name of the federation in its rosters.
federation = "{federation}"

# Where members connect (mutual TLS), and where sites with an invitation join. All interfaces; a firewall has to let
# both ports through. join_listen = "" closes the door once everybody is in.
listen = "{bind}:{port}"
join_listen = "{bind}:{join_port}"

# How sites reach `listen`. The certificate in tls.crt is for this host.
address = "{host}:{port}"

# Uploads taken at the same time; others are told to come back.
#max_uploads = 10

# Keep the masked uploads after a release, for an auditor who recomputes sums.
#keep_uploads = false

# Numbers for Prometheus, on a port of this machine; docs/metrics.md. They begin with the first roster.
#metrics_listen = "9464"

# The status page, for a browser on this machine; docs/status-page.md. It begins with the first roster.
#[web]
#listen = "8080"
"""


@dataclass(frozen=True)
class Ports:
    """Where a new coordinator listens."""

    bind: str
    members: int
    joining: int


def create_coordinator(directory: Path, federation: str, host: str, ports: Ports) -> tuple[bytes, bytes]:
    """Make everything a coordinator starts from: its identity key and the certificate of its authority, DER.

    Raises:
        UserError: there is a coordinator in this directory already, no host name, or root asks for what is another
            account's.
    """
    for name in (host, ports.bind):
        if not re.fullmatch(r"[A-Za-z0-9.:_-]+", name):
            raise UserError(f"expected a host name or an address, found '{name}'")
    config = directory / CONFIG_FILE
    if config.exists():
        raise UserError(f"{config}: expected no coordinator here yet, found one", hint="choose another directory")
    as_its_owner(directory)
    make_private_directory(directory)
    identity = load_identity(directory) if (directory / IDENTITY_FILE).exists() else create_identity(directory)
    if not (directory / pki.AUTHORITY_CERTIFICATE).exists():
        (directory / pki.AUTHORITY_KEY).unlink(missing_ok=True)  # cut short before it signed anything
        pki.create_authority(directory, federation)
    pki.issue_server(directory, [host, *(name for name in ("localhost", "127.0.0.1") if name != host)])
    reached, bind = (f"[{name}]" if ":" in name else name for name in (host, ports.bind))
    text = CONFIG.format(federation=federation, host=reached, bind=bind, port=ports.members, join_port=ports.joining)
    write_durably(config, text.encode())
    return identity_public(identity), pki.authority_certificate(directory)
