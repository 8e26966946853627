"""A site's numbers for Prometheus, read from its state when they are asked for; docs/metrics.md lists them.

They are for the site's own administrator. No number is about a record, a vector or how many records there are; what is
said of a data set is what its ledger says.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from prometheus_client import ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from participant.charging import Charges
from participant.config import DataSet
from participant.enrol import TLS_CERTIFICATE
from participant.phases import ACCEPTS
from participant.site import Site
from privacy import __version__
from privacy.budget.book import Book
from privacy.budget.ledger import verify_lines
from privacy.errors import VeilsumError
from privacy.exposition import Family

PREFIX = "veilsum_participant"
PLAN_STATES = ("waiting", "ready", "released", "refused", "failed", "aborted", "cancelled")
PHASES = tuple(phase.__name__.lower() for phase in ACCEPTS)
JOB_STATES = ("reserved", "started", "released", "committed", "aborted")
#: Plans that are shown, the latest: their names come from the coordinator.
MOST_PLANS = 200

INFO = Family(f"{PREFIX}_info", "gauge", "Always 1; says version and the site's name.", ("version", "member"))
FREE = Family(f"{PREFIX}_disk_free_bytes", "gauge", "Bytes free where vectors and ledgers go.")
EXPIRY = Family(f"{PREFIX}_certificate_expiry_timestamp_seconds", "gauge", "When the site's TLS certificate expires.")
ANSWERED = Family(
    f"{PREFIX}_last_answer_timestamp_seconds", "gauge", "When the coordinator last answered; 0 before its first answer."
)
PLAN_STATE = Family(
    f"{PREFIX}_plan_state", "gauge", "1 for the state of a plan at this site, else 0.", ("plan", "state")
)
SINCE = Family(f"{PREFIX}_plan_state_since_timestamp_seconds", "gauge", "When a plan came to its state.", ("plan",))
TRAINING = Family(f"{PREFIX}_training_progress_ratio", "gauge", "Share of a training's steps that are done.", ("plan",))
ROUND = Family(f"{PREFIX}_round_number", "gauge", "Number of the round that this site is in.", ("plan",))
ROUND_PHASE = Family(
    f"{PREFIX}_round_phase", "gauge", "1 for the phase of that round at this site, else 0.", ("plan", "phase")
)
JOINED = Family(f"{PREFIX}_rounds_joined_total", "counter", "Rounds that this identity ever joined.")
BUDGET = Family(f"{PREFIX}_epsilon_budget", "gauge", "Budget of a data set; missing without one.", ("dataset", "unit"))
SPENT = Family(
    f"{PREFIX}_epsilon_spent", "gauge", "Epsilon of all started jobs by the ledger; may be +Inf.", ("dataset", "unit")
)
RESERVED = Family(
    f"{PREFIX}_epsilon_reserved",
    "gauge",
    "The same with every open reservation, as the budget is enforced.",
    ("dataset", "unit"),
)
LEFT = Family(
    f"{PREFIX}_epsilon_left", "gauge", "What is left of the budget; missing without one.", ("dataset", "unit")
)
READABLE = Family(
    f"{PREFIX}_ledger_readable",
    "gauge",
    "0 where a ledger does not verify; then it has no other numbers.",
    ("dataset",),
)
JOBS = Family(f"{PREFIX}_jobs", "gauge", "Jobs in the ledger of a data set by their state.", ("dataset", "state"))
FAMILIES = (
    *(INFO, FREE, EXPIRY, ANSWERED, PLAN_STATE, SINCE, TRAINING, ROUND, ROUND_PHASE, JOINED),
    *(BUDGET, SPENT, RESERVED, LEFT, READABLE, JOBS),
)


@dataclass(frozen=True)
class Account:
    """A data set's ledger as it was when its file looked like ``stamp``."""

    stamp: tuple[int, ...]
    book: Book
    charges: Charges


class SiteCollector(Collector):
    """Reads a site. The daemon works in another thread: ledgers are read here from their files, and never written."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._accounts: dict[str, Account] = {}

    def describe(self) -> Iterator[Metric]:
        """The families without numbers."""
        for family in FAMILIES:
            yield family.total() if family.kind == "counter" else family.gauge()

    def collect(self) -> Iterator[Metric]:
        """All numbers."""
        home = self._site.home
        yield INFO.gauge(((__version__, home.settings.member), 1))
        yield FREE.gauge(((), shutil.disk_usage(home.directory).free))
        certificate = x509.load_pem_x509_certificate((home.directory / TLS_CERTIFICATE).read_bytes())
        yield EXPIRY.gauge(((), certificate.not_valid_after_utc.timestamp()))
        yield ANSWERED.gauge(((), self._site.counts.answered))
        yield from self._plans()
        yield from self._rounds()
        yield from self._data_sets()

    def _plans(self) -> Iterator[Metric]:
        notes = sorted(self._site.notes().items(), key=lambda item: item[1]["since"])[-MOST_PLANS:]
        yield PLAN_STATE.gauge(*(((p, state), note["state"] == state) for p, note in notes for state in PLAN_STATES))
        yield SINCE.gauge(*(((p,), note["since"]) for p, note in notes))

    def _rounds(self) -> Iterator[Metric]:
        counts = self._site.counts
        yield TRAINING.gauge(*(((plan,), share) for plan, share in counts.training.copy().items()))
        rounds = counts.rounds.copy().items()
        yield ROUND.gauge(*(((plan,), number) for plan, (number, _) in rounds))
        yield ROUND_PHASE.gauge(*(((plan, phase), phase == now) for plan, (_, now) in rounds for phase in PHASES))
        yield JOINED.total(((), self._site.store.rounds_joined()))

    def _data_sets(self) -> Iterator[Metric]:
        names = sorted(self._site.home.settings.datasets.items())
        found = {name: self._account(name, data) for name, data in names}
        read = {name: account for name, account in found.items() if account is not None}
        units = {name: (name, account.charges.policy.unit) for name, account in read.items()}
        charges = {name: account.charges for name, account in read.items()}
        yield BUDGET.gauge(*((units[n], float(c.policy.epsilon)) for n, c in charges.items() if c.policy.epsilon))
        yield SPENT.gauge(*((units[n], c.spent) for n, c in charges.items()))
        yield RESERVED.gauge(*((units[n], c.reserved) for n, c in charges.items()))
        yield LEFT.gauge(*((units[n], c.left) for n, c in charges.items() if c.left is not None))
        yield READABLE.gauge(*(((name,), name in read) for name in found))
        states = {name: [job.state for job in account.book.jobs.values()] for name, account in read.items()}
        yield JOBS.gauge(*(((n, state), jobs.count(state)) for n, jobs in states.items() for state in JOB_STATES))

    def _account(self, name: str, data: DataSet) -> Account | None:
        """The account of a data set, computed again only when its file has changed; ``None`` if it does not verify."""
        path = self._site.home.ledgers / f"{name}.jsonl"
        stamp = _stamp(path)
        known = self._accounts.get(name)
        if known is None or known.stamp != stamp:
            try:
                book = Book(verify_lines(_whole_lines(path), self._site.roster.roster.keys()[self._site.me]))
                charges = Charges.of(book.policy if book.size else data.policy(), book)
            except VeilsumError:
                return None
            known = self._accounts[name] = Account(stamp, book, charges)
        return known


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes with the file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def _whole_lines(path: Path) -> bytes:
    """A line that is being written has no end yet."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return b""
    return raw[: raw.rfind(b"\n") + 1]


def register(site: Site) -> None:
    """Show the site's numbers beside what is counted, and those of the process."""
    site.counts.registry.register(SiteCollector(site))
    ProcessCollector(registry=site.counts.registry)
