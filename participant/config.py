"""A site's own file: where its models and data lie, and what it agrees to. No plan can set any of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from privacy.plan import Name, Positive
from privacy.settings import Section, load_toml

CONFIG_FILE = "participant.toml"


class DataSet(Section):
    """Where a registered data set lies and how to read it."""

    path: str
    format: Literal["csv", "jsonl", "parquet", "folder"]
    text: str = "text"
    label: str = "label"


class SitePolicy(Section):
    """What this site demands beyond the pinned policy; of roster, plan and this file the strictest wins."""

    #: Plans this site agrees to, by name; "*" agrees to whatever else is allowed. Nothing runs without consent.
    plans: tuple[str, ...] = ()
    min_cohort: Annotated[int, Field(ge=2)] = 2
    min_survivors: Annotated[int, Field(ge=2)] = 2
    #: The plan must withstand at least so many colluders.
    max_colluders: Annotated[int, Field(ge=0)] = 0
    #: A sum of two tells each the other's delta.
    allow_two_members: bool = False
    #: The coordinator must promise at least this check of its sum.
    audit: Literal["none", "spot", "divided"] = "none"


class Settings(Section):
    """``participant.toml``."""

    #: The coordinator's address, host:port.
    coordinator: Annotated[str, Field(pattern=r"^.+:\d{1,5}$")]
    #: This site's name in the roster.
    member: Name
    device: Literal["auto", "cpu", "cuda"] = "auto"
    #: CPU threads for training, default: all.
    threads: Positive | None = None
    #: For tests and demonstrations: keep the quantised vector in the clear beside the spool. Never leaves the site.
    keep_plain_vector: bool = False
    #: Base model name in plans -> directory.
    models: dict[str, str] = Field(default_factory=dict)
    #: Data set name in plans -> where it lies.
    datasets: dict[Name, DataSet] = Field(default_factory=dict)
    policy: SitePolicy = SitePolicy()


@dataclass(frozen=True)
class Home:
    """A site's directory; everything in it is private."""

    directory: Path
    settings: Settings

    def path(self, name: str) -> Path:
        """A path of the configuration, relative to the site's directory."""
        return self.directory / name

    @property
    def work(self) -> Path:
        """Deltas, quantised vectors and spools, by plan."""
        return self.directory / "work"

    @property
    def releases(self) -> Path:
        return self.directory / "releases"

    @property
    def records(self) -> Path:
        """Once-only records of protocol section 6."""
        return self.directory / "records.jsonl"

    @property
    def ledgers(self) -> Path:
        return self.directory / "ledger"


def load_home(directory: Path) -> Home:
    """Read a site's settings; raises UserError."""
    directory = directory.resolve()
    return Home(directory, load_toml(Settings, directory / CONFIG_FILE))
