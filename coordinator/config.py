"""Settings of the coordinator: one TOML file in its directory, and where its files lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from privacy.errors import UserError
from privacy.files import as_its_owner
from privacy.roster import RosterFile
from privacy.secagg.keys import identity_public
from privacy.settings import Listen, Name, Section, load_toml
from privacy.web.settings import Web

CONFIG_FILE = "coordinator.toml"


class Settings(Section):
    """``coordinator.toml``."""

    #: Address that participants dial, host:port.
    listen: Annotated[str, Field(pattern=r"^.+:\d{1,5}$")] = "127.0.0.1:7443"
    #: Address on which sites with an invitation join, host:port; empty: nobody can.
    join_listen: Annotated[str, Field(pattern=r"^(.+:\d{1,5})?$")] = ""
    #: Address by which sites reach ``listen``, host:port; told to sites that join, and invitations need it.
    address: Annotated[str, Field(pattern=r"^(.+:\d{1,5})?$")] = ""
    #: Name of the federation in rosters drafted here.
    federation: Name = "federation"
    #: Uploads taken at the same time; others are told to come back.
    max_uploads: Annotated[int, Field(ge=1, le=1024)] = 10
    #: Keep masked uploads after a release, for ``veilsum-audit transcript --uploads``, which cannot run without them.
    keep_uploads: bool = False
    #: Where metrics are shown: a port of this machine, or host:port; empty: nowhere.
    metrics_listen: Listen = ""
    web: Web = Web()


@dataclass(frozen=True)
class Home:
    """The coordinator's directory; everything in it is private."""

    directory: Path
    settings: Settings

    @property
    def roster(self) -> Path:
        return self.directory / "roster.toml"

    @property
    def roster_draft(self) -> Path:
        return self.directory / "roster.draft.toml"

    @property
    def members(self) -> Path:
        """Who was invited, joined and removed."""
        return self.directory / "members.jsonl"

    @property
    def authority(self) -> Path:
        return self.directory / "ca.crt"

    @property
    def tls_key(self) -> Path:
        return self.directory / "tls.key"

    @property
    def tls_certificate(self) -> Path:
        return self.directory / "tls.crt"

    @property
    def database(self) -> Path:
        return self.directory / "state.db"

    @property
    def rounds(self) -> Path:
        return self.directory / "rounds"

    @property
    def releases(self) -> Path:
        return self.directory / "releases"

    @property
    def factors(self) -> Path:
        """Factors of base models for plans with the method "core", by their digest."""
        return self.directory / "factors"

    @property
    def witnesses(self) -> Path:
        """Checkpoints of the members' ledgers."""
        return self.directory / "witnesses.jsonl"

    @property
    def socket(self) -> Path:
        return self.directory / "operator.sock"


def check_identity(home: Home, roster: RosterFile, identity: Ed25519PrivateKey) -> None:
    """Is this the coordinator that the roster names? Raises UserError."""
    if roster.roster.coordinator != identity_public(identity).hex():
        raise UserError(
            f"{home.roster}: expected this coordinator's key {identity_public(identity).hex()[:16]}…, "
            f"found {roster.roster.coordinator[:16]}…",
            hint="use the roster that was made for this coordinator",
        )


def load_home(directory: Path) -> Home:
    """Read the settings of a coordinator directory.

    Raises:
        UserError: they are none, or root asks for what is another account's.
    """
    directory = directory.resolve()
    as_its_owner(directory)
    return Home(directory, load_toml(Settings, directory / CONFIG_FILE))
