"""Auditing one ledger from its bytes and the site's public key: nothing else of the site is believed.

The lines are verified, the states of jobs followed, every number recomputed, and the head compared with what others
remember. What is found goes into one report; an unreadable rest of a file does not hide what stands before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from privacy.budget import recompute
from privacy.budget.anchors import Anchor
from privacy.budget.book import Book, Job, LedgerError
from privacy.budget.checkpoint import verify_checkpoint
from privacy.budget.entries import Commit, Entry, Policy, Reserve, Start
from privacy.budget.events import DpSgd, Mechanism, Unprotected, mechanism_from_json
from privacy.budget.filter import enforced_epsilon, mismatch
from privacy.budget.findings import Code, Found, worst
from privacy.budget.ledger import check_against, head_of, verify_lines
from privacy.budget.rdp import rdp
from privacy.budget.self_tests import lack_of
from privacy.errors import ProtocolError

#: A claim may be this far below what is recomputed, and this far above in absolute and relative terms.
BELOW, ABOVE = 1e-3, 0.01
#: Renyi divergences are computed by the same formula on both sides.
SAME = 1e-6
#: Clocks of two machines may be this far apart.
SKEW = timedelta(minutes=5)


@dataclass(frozen=True)
class Terms:
    """How an audit is done.

    Attributes:
        seconds, mib: limits of each accountant's process.
        open_days: a reservation that is open for longer is a finding.
        now: the auditor's clock, UTC.
    """

    seconds: float = 300
    mib: int = 4096
    open_days: float = 30
    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    with_opacus: bool = True


@dataclass(frozen=True)
class JobReport:
    """One job, in numbers; the epsilons ``after`` it are those of all charged jobs up to it."""

    job: str
    plan: str
    stage: int
    time: str
    state: str
    charged: bool
    is_open: bool
    mechanism: Mechanism | None  # None: not supported
    claimed: str
    pld: float = math.inf
    rdp: float = math.inf
    opacus: float | None = None
    enforced_after: float = math.inf
    pld_after: float = math.inf
    naive_after: float = math.inf


@dataclass
class LedgerReport:
    """What an audit of one ledger found."""

    source: str
    site: str  # identity key, hex
    owner: str = ""  # the member's name, where a roster tells it
    dataset: str = ""
    name: str = ""
    policy: Policy | None = None
    changes: list[tuple[str, str]] = field(default_factory=list)  # (epsilon from then on, reason)
    jobs: list[JobReport] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    root: str = ""
    whole: bool = True  # every line of the file holds
    anchored: int | None = None  # lines that an anchor vouches for; None where none does
    compared: bool = False  # there were anchors; they may have contradicted
    rdp_after: float = 0.0
    found: list[Found] = field(default_factory=list)

    def add(self, code: Code, text: str) -> None:
        """One more finding."""
        self.found.append(Found(code, f"{self.title}: {text}"))

    @property
    def title(self) -> str:
        """How people name this ledger."""
        return f"{self.owner}/{self.name or self.source}" if self.owner else self.name or self.source

    @property
    def charged(self) -> list[JobReport]:
        return [job for job in self.jobs if job.charged]

    @property
    def code(self) -> Code:
        return worst(self.found)


def audit_ledger(
    raw: bytes,
    site_key: bytes,
    *,
    source: str,
    anchors: Sequence[Anchor] = (),
    own: bytes = b"",
    terms: Terms,
    owner: str = "",
) -> LedgerReport:
    """Audit the bytes of one ledger; everything that does not hold is in the report, nothing is raised.

    Args:
        site_key: the site's Ed25519 public key, 32 bytes.
        anchors: what others remember of this data set's ledger.
        own: the checkpoint that the site keeps beside the ledger; it can convict the site and vouches for nothing.
    """
    report = LedgerReport(source, site_key.hex(), owner)
    report.entries = _verified(raw, site_key, report)
    if not report.entries:
        if report.whole:
            report.add(Code.BROKEN, "expected a ledger that begins with REGISTER, found an empty one")
        return report
    book = Book(report.entries)
    report.dataset, report.name, report.policy = book.dataset, book.name, book.policy
    report.root = head_of(report.entries)[1].hex()
    report.changes = [(change.policy.epsilon or "no budget", change.reason) for change in book.changes]
    _check_anchors(report, anchors)
    _check_own(report, own, site_key)
    _check_clocks(report, anchors, terms)
    _check_self_tests(report, book)
    _account(report, book, terms)
    _check_budget(report)
    _check_open(report, terms)
    return report


def _verified(raw: bytes, site_key: bytes, report: LedgerReport) -> list[Entry]:
    """The lines that hold, up to the first that does not."""
    try:
        return verify_lines(raw, site_key)
    except LedgerError as error:
        report.whole = False
        found = Found.of(error)
        report.add(found.code, found.text)
        good = raw.split(b"\n")[: max(0, error.line - 1)]
        return verify_lines(b"".join(line + b"\n" for line in good), site_key)


def _check_anchors(report: LedgerReport, anchors: Sequence[Anchor]) -> None:
    if not anchors:
        report.add(Code.NO_ANCHOR, "nobody else's memory was compared: lines may be missing at the end")
        return
    report.compared = True
    sources: dict[tuple[int, bytes], str] = {}
    for anchor in anchors:  # many remember the same, and each comparison takes the whole file
        sources.setdefault((anchor.size, anchor.root), anchor.source)
    for (size, root), source in sources.items():
        if not report.whole and size > len(report.entries):
            continue  # the first broken line is a finding already
        try:
            check_against(report.entries, size, root)
            report.anchored = max(report.anchored or 0, size)
        except LedgerError as error:
            found = Found.of(error)
            report.add(found.code, f"{source}: {found.text}")


def _check_own(report: LedgerReport, note: bytes, site_key: bytes) -> None:
    """Is the site's own checkpoint about these lines? A crash may leave it behind them, never ahead."""
    if not note or not report.whole:
        return
    try:
        found = verify_checkpoint(note, site_key, report.dataset)
        check_against(report.entries, found.size, found.root)
    except ProtocolError as error:
        report.add(Code.BROKEN, f"the checkpoint beside it: {error}")
    except LedgerError as error:
        report.add(Found.of(error).code, f"the checkpoint beside it: {error}")


def _moment(text: str) -> datetime | None:
    """A date of this millennium with its offset from UTC, ``None`` for anything else."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo is not None and 2000 <= found.year < 9000 else None


def _check_clocks(report: LedgerReport, anchors: Iterable[Anchor], terms: Terms) -> None:
    """Time runs forward, within one boot by both clocks, and no line is older than a witness of the lines before."""
    last: tuple[Entry, datetime] | None = None
    latest = terms.now + timedelta(days=1)
    # A witness's date is not signed by the site: one from the future is its keeper's fault and convicts nobody.
    dated = [(a.size, moment, a.source) for a in anchors if (moment := _moment(a.time))]
    witnessed = [(size, moment - SKEW, source) for size, moment, source in dated if moment <= latest]
    for entry in report.entries:
        now, line = _moment(entry.time), f"line {entry.seq + 1}"
        if now is None:
            report.add(Code.BROKEN, f"{line}: '{entry.time}' is no time")
            continue
        if last is not None and now < last[1]:
            report.add(Code.CLOCK, f"{line} is dated {entry.time}, the line before {last[0].time}")
        if last is not None and entry.boot == last[0].boot and entry.monotonic < last[0].monotonic:
            report.add(Code.CLOCK, f"{line}: the clock that only runs forward ran back, within one boot")
        if now > latest:
            report.add(Code.CLOCK, f"{line} is dated {entry.time}, in the future")
        for size, moment, source in witnessed:
            if entry.seq >= size and now < moment:
                report.add(Code.CLOCK, f"{line} is dated {entry.time}, but {source} knew {size} lines before it later")
        last = (entry, now)


def _check_self_tests(report: LedgerReport, book: Book) -> None:
    for entry in report.entries:
        if isinstance(entry.facts, Start):
            job = book.jobs[entry.facts.job]
            if _kind(job) != "unprotected" and (lack := lack_of(entry.facts.selftest)):
                report.add(Code.SELF_TEST, f"line {entry.seq + 1}: job {_name(job)} started {lack}")


def _kind(job: Job) -> object:
    return job.reserve.mechanism.get("kind")


def _name(job: Job) -> str:
    return f"{job.reserve.job[:8]} (plan '{job.reserve.plan}', stage {job.reserve.stage})"


def _mechanism(report: LedgerReport, job: Job) -> Mechanism | None:
    """The mechanism of a job, ``None`` with a finding if it is none that means anything here."""
    try:
        found = mechanism_from_json(job.reserve.mechanism)
    except ProtocolError as error:
        report.add(Code.UNSUPPORTED, f"job {_name(job)}: {error}")
        return None
    assert report.policy is not None
    if isinstance(found, DpSgd) and report.policy.epsilon is not None and (lack := mismatch(report.policy, found)):
        report.add(Code.UNSUPPORTED, f"job {_name(job)} has {lack}")
    return found


def _account(report: LedgerReport, book: Book, terms: Terms) -> None:
    """Recompute every job and the composition, and compare with what the site claims."""
    policy = book.policy
    mechanisms = {job.reserve.job: _mechanism(report, job) for job in book.jobs.values()}
    charged = tuple(mechanisms[job.reserve.job] or Unprotected() for job in book.charged())
    sums = recompute.recompute(charged, float(policy.delta), terms.seconds, terms.mib, with_opacus=terms.with_opacus)
    if sums.limit:
        report.add(Code.UNSUPPORTED, sums.limit)
    report.rdp_after = sums.rdp.after[-1] if charged else 0.0
    opacus = iter(sums.opacus)
    count, naive, still_open = 0, 0.0, {job.reserve.job for job in book.open()}
    for job in book.jobs.values():
        entry, mechanism = report.entries[job.seq], mechanisms[job.reserve.job]
        facts = (job.reserve.job, job.reserve.plan, job.reserve.stage, entry.time, job.state, job.charged)
        claimed = job.reserve.claim.pld
        if not job.charged:
            report.jobs.append(JobReport(*facts, False, mechanism, claimed))
            continue
        pld, bound = sums.pld.each[count], sums.rdp.each[count]
        third = next(opacus, None) if isinstance(mechanism, DpSgd) else None
        naive += pld
        enforced = enforced_epsilon(policy, charged[: count + 1])
        after = (enforced, sums.pld.after[count], naive)
        report.jobs.append(
            JobReport(*facts, job.reserve.job in still_open, mechanism, claimed, pld, bound, third, *after)
        )
        if mechanism is not None and not sums.limit:
            _compare(report, job, mechanism, pld, bound, third)
        count += 1
    _check_steps(report, mechanisms)


def _compare(
    report: LedgerReport, job: Job, mechanism: Mechanism, pld: float, bound: float, opacus: float | None
) -> None:
    claim = job.reserve.claim
    for what, said, found in (("PLD", claim.pld, pld), ("RDP", claim.rdp, bound)):
        if not _agree(float(said), found):
            report.add(Code.DIFFERS, f"job {_name(job)} claims epsilon {said} by {what}, recomputed {found:.4f}")
    for text in _divergence(report, job, mechanism):
        report.add(Code.DIFFERS, text)
    if pld > bound + BELOW:
        report.add(Code.DIFFERS, f"job {_name(job)}: PLD {pld:.4f} is above RDP {bound:.4f}: an accountant is wrong")
    if opacus is not None and opacus >= 0 and abs(opacus - bound) > BELOW * max(1.0, bound):
        report.add(Code.DIFFERS, f"job {_name(job)}: RDP is {bound:.4f} here and {opacus:.4f} by Opacus")


def _agree(claimed: float, found: float) -> bool:
    if math.isinf(claimed) or math.isinf(found):
        return claimed == found
    return -BELOW <= claimed - found <= max(ABOVE, ABOVE * found)


def _divergence(report: LedgerReport, job: Job, mechanism: Mechanism) -> Iterator[str]:
    """The divergence that the filter was charged with, at its one order."""
    assert report.policy is not None
    order = report.policy.order
    expected = {} if isinstance(mechanism, Unprotected) else {str(order): rdp(mechanism, order)}
    if job.reserve.rdp.keys() != expected.keys():
        yield f"job {_name(job)}: expected a divergence at order {order}, found {', '.join(job.reserve.rdp) or 'none'}"
        return
    for key, value in expected.items():
        if not math.isclose(float(job.reserve.rdp[key]), value, rel_tol=SAME, abs_tol=1e-12):
            said = job.reserve.rdp[key][:20]
            yield f"job {_name(job)} charges a divergence of {said} at order {key}, recomputed {value:.9g}"


def _check_steps(report: LedgerReport, mechanisms: dict[str, Mechanism | None]) -> None:
    for entry in report.entries:
        if isinstance(entry.facts, Commit):
            mechanism = mechanisms[entry.facts.job]
            if isinstance(mechanism, DpSgd) and entry.facts.steps > mechanism.steps:
                text = f"line {entry.seq + 1}: {entry.facts.steps} steps were run, {mechanism.steps} are charged"
                report.add(Code.DIFFERS, text)


def _check_budget(report: LedgerReport) -> None:
    """Was any reservation above the budget of its time, and is the sum above the present one?"""
    book, known = Book(), {job.job: job.mechanism or Unprotected() for job in report.jobs}
    for entry in report.entries:
        book.take(entry)
        if isinstance(entry.facts, Reserve) and (text := _excess(book, known)):
            report.add(Code.OVER_BUDGET, f"line {entry.seq + 1}: with this reservation {text}")
    if not isinstance(report.entries[-1].facts, Reserve) and (text := _excess(book, known)):
        report.add(Code.OVER_BUDGET, f"at the end {text}")


def _excess(book: Book, known: dict[str, Mechanism]) -> str:
    policy = book.policy
    if policy.epsilon is None:
        return ""
    spent = enforced_epsilon(policy, [known[job.reserve.job] for job in book.charged()])
    if spent <= float(policy.epsilon):
        return ""
    return f"{spent:.4f} is charged of a budget of {policy.epsilon} (order {policy.order}, delta {policy.delta})"


def _check_open(report: LedgerReport, terms: Terms) -> None:
    for job in report.jobs:
        since = _moment(job.time)
        if job.is_open and since is not None and terms.now - since > timedelta(days=terms.open_days):
            text = f"job {job.job[:8]} (plan '{job.plan}') is {job.state} since {job.time}"
            report.add(Code.OPEN_TOO_LONG, f"{text}, longer than {terms.open_days:g} days; it counts in full")
