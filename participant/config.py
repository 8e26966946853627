"""A site's own file: where its models and data lie, and what it agrees to. No plan can set any of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from participant.rows import Format
from privacy.budget import entries
from privacy.errors import UserError
from privacy.files import as_its_owner, write_durably
from privacy.guarantee import Number
from privacy.settings import Listen, Name, Positive, Section, load_toml
from privacy.web.settings import Web

CONFIG_FILE = "participant.toml"
#: What the ledger says where the site's file has no budget; a budget set later, after a first job, has to agree.
DEFAULT_DELTA, DEFAULT_ORDER = "0.00001", 6


class Budget(Section):
    """How much may ever be learnt about one record, or one person, of a data set, over all plans together."""

    #: How much may ever be learnt about one unit, over all plans together.
    epsilon: Number
    #: The delta of that epsilon.
    delta: Number
    #: The one order of the RDP filter, by epsilon where it is missing. It never changes after the first job.
    order: Annotated[int, Field(ge=2, le=256)] | None = None
    #: Whom the budget is about: a record, or a user with at most so many of them.
    unit: entries.Unit = "record"
    #: Most records that a user has.
    max_records_per_unit: Annotated[int, Field(ge=1, le=64)] = 1
    #: Neighbouring data sets: a unit is added or removed, or its records are replaced by nothing of the same number.
    adjacency: entries.Adjacency = "add-remove"


def default_order(epsilon: float) -> int:
    """The order at which a budget of this size buys most; measured over mixed series of jobs at delta 1e-5."""
    return next((order for least, order in ((5.0, 3), (2.0, 6), (0.75, 16)) if epsilon >= least), 32)


def _plain(number: str) -> str:
    """A decimal number without an exponent and without zeros that say nothing, as ledgers have it."""
    return f"{Decimal(number).normalize():f}"


class DataSet(Section):
    """Where a data set lies, how to read it, and what may be learnt from it."""

    #: The file; for ``folder`` and ``arrow`` the directory.
    path: str
    #: ``arrow`` is a directory that ``Dataset.save_to_disk`` of Hugging Face datasets wrote.
    format: Format
    #: Column of the text.
    text: str = "text"
    #: Column of the label.
    label: str = "label"
    #: Column of the number that a plan for regression learns.
    target: str = "target"
    #: Column of a conversation, for text generation.
    messages: str = "messages"
    #: Column of a prompt, for text generation; a record with neither of the two is a plain text.
    prompt: str = "prompt"
    #: Column of the response to it.
    response: str = "response"
    #: Column that says whose record it is; needed where a plan or the budget protects users.
    unit: str | None = None
    #: Without it every plan is recorded and none is refused for what it reveals.
    budget: Budget | None = None
    #: ``false`` declares that these records need no protection.
    protected: bool = True

    @model_validator(mode="after")
    def _policy_is_possible(self) -> DataSet:
        self.policy()
        return self

    def policy(self) -> entries.Policy:
        """What the ledger must say about this data set."""
        if self.budget is None:
            return entries.Policy(delta=DEFAULT_DELTA, epsilon=None, order=DEFAULT_ORDER, protected=self.protected)
        own = self.budget
        return entries.Policy(
            unit=own.unit,
            max_records_per_unit=own.max_records_per_unit,
            adjacency=own.adjacency,
            delta=_plain(own.delta),
            epsilon=_plain(own.epsilon),
            order=own.order or default_order(float(own.epsilon)),
            protected=self.protected,
        )


class Admits(Section):
    """Plans that run here without an approval of their own: all of this must hold."""

    #: Names of base models that such a plan may have.
    bases: tuple[str, ...] = ()
    #: Names of data sets that such a plan may have.
    datasets: tuple[Name, ...] = ()
    #: Data set = most epsilon that such a plan may cost, all its stages together, by the order and delta of the data
    #: set's ledger; a plan without ``[privacy]`` is beyond any limit. A data set that is not named has none.
    max_epsilon: dict[Name, Number] = Field(default_factory=dict)
    #: Least size of its cohorts.
    min_cohort: Annotated[int, Field(ge=2)] = 2


class SitePolicy(Section):
    """What this site demands beyond the pinned policy; of roster, plan and this file the strictest wins."""

    #: Names of the plans with consent; ``"*"`` for whatever else is allowed. One plan alone: ``veilsum-participant
    #: approve``. Nothing runs without consent.
    plans: tuple[str, ...] = ()
    #: Without it none do.
    admits: Admits | None = None
    #: When training may begin, local time, for example ``"20:00-06:00"``; one that runs goes on.
    hours: Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")] | None = None
    #: Fewer members that begin a round are refused, but for a certified list that comes again without its lost ones.
    min_cohort: Annotated[int, Field(ge=2)] = 2
    #: Fewer members in a sum are refused.
    min_survivors: Annotated[int, Field(ge=2)] = 2
    #: The plan must withstand at least so many colluders.
    max_colluders: Annotated[int, Field(ge=0)] = 0
    #: Allow sums of two members, which tell each the other's update.
    allow_two_members: bool = False
    #: Least check of its sum that the coordinator must promise.
    audit: Literal["none", "spot", "divided"] = "none"
    #: Consent to plans with an analytic head, which sum statistics of the records, or a counted one, which sum their
    #: numbers, for classification: a class with fewer different texts here is left out (the larger of this and the
    #: plan's minimum holds). Without it such plans are refused.
    min_class_count: Positive | None = None
    #: Consent to plans with the methods "regmean" and "fisher", and with an analytic head for regression, which sum
    #: statistics of the records: with fewer different texts here (the larger of this and the plan's minimum holds) the
    #: site sits out. Without it such plans are refused.
    min_texts: Positive | None = None


class Settings(Section):
    """``participant.toml``."""

    #: The coordinator's address, host:port.
    coordinator: Annotated[str, Field(pattern=r"^.+:\d{1,5}$")]
    #: This site's name in the roster.
    member: Name
    #: Where training runs.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    #: CPU threads for training; without it all. Another number may give other last digits.
    threads: Positive | None = None
    #: Largest rank of an adapter that this site trains. Plans with the method "dense" take any; others of a larger rank
    #: are refused.
    max_rank: Positive | None = None
    #: For tests and demonstrations: keep the quantised vector in the clear beside the spool. It never leaves the site.
    keep_plain_vector: bool = False
    #: Most bytes a second that the daemon sends; a chunk of an upload, 1 MiB, is never cut. Without it no limit.
    max_upload_rate: Annotated[int, Field(ge=20_000)] | None = None
    #: Where metrics are shown: a port of this machine, or host:port; empty: nowhere.
    metrics_listen: Listen = ""
    #: Base model's name in plans = its directory, in full or in 4 bits, its GGUF file, or ``hub:OWNER/NAME@REVISION``
    #: to fetch it.
    models: dict[str, str] = Field(default_factory=dict)
    #: Data set's name in plans, and a table as below: ``[datasets.NAME]``.
    datasets: dict[Name, DataSet] = Field(default_factory=dict)
    policy: SitePolicy = SitePolicy()
    web: Web = Web()


#: Version of what a site keeps (records, ledgers, registry, work): one more where an older veilsum could not go on.
STATE_VERSION, STATE_FILE = 1, "state.version"


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
    def factors(self) -> Path:
        """Factors of base models for plans with the method "core", by their digest."""
        return self.directory / "factors"

    @property
    def releases(self) -> Path:
        return self.directory / "releases"

    @property
    def records(self) -> Path:
        """Once-only records of protocol section 6."""
        return self.directory / "records.jsonl"

    @property
    def witnesses(self) -> Path:
        """What M2 of each round showed of the other members' ledgers."""
        return self.directory / "witnesses.jsonl"

    @property
    def ledgers(self) -> Path:
        """One ledger for each data set, its checkpoint beside it."""
        return self.directory / "ledger"

    @property
    def registry(self) -> Path:
        """Which records the site has registered under which name; none of it ever leaves."""
        return self.directory / "registry"


def load_home(directory: Path) -> Home:
    """Read a site's settings.

    Raises:
        UserError: they are none, a newer veilsum has run here, or root asks for what is another account's.
    """
    directory = directory.resolve()
    as_its_owner(directory)
    check_state(directory / STATE_FILE)
    return Home(directory, load_toml(Settings, directory / CONFIG_FILE))


def check_state(path: Path) -> None:
    """May this veilsum go on with what a site keeps? Without the file nothing of another version was ever kept.

    Raises:
        UserError: a newer version has run here, or the file is none.
    """
    text = path.read_text() if path.exists() else f"{STATE_VERSION}\n"
    if not re.fullmatch(r"[1-9][0-9]{0,8}\n", text):
        raise UserError(
            f"{path}: expected the version of what a site keeps, found something else",
            hint="restore the file from your backup",
        )
    if int(text) > STATE_VERSION:
        raise UserError(
            f"{path}: expected what a site keeps in version {STATE_VERSION} or older, found {int(text)}",
            hint="run the version of veilsum that wrote it; an older one would not see all that is charged and spent",
        )


def keep_state(path: Path) -> None:
    """Note that this veilsum has run here; durable before it writes anything else."""
    if not path.exists() or path.read_text() != f"{STATE_VERSION}\n":
        write_durably(path, f"{STATE_VERSION}\n".encode())
