"""What the lines of a ledger add up to: the policy in force and the state of each job; which line may follow which.

An open reservation counts in full. What was started is never given back, whatever happened to it: that nothing was
sent is something no auditor could check.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum

from privacy.budget.entries import (
    Abort,
    Commit,
    Entry,
    Facts,
    Policy,
    PolicyChange,
    Register,
    Release,
    Reserve,
    Start,
)
from privacy.errors import UserError

RESTORE = "restore the ledger from your backup and tell the other members: their witnesses know its length"


class Finding(StrEnum):
    """The class of what is wrong with a ledger."""

    FORMAT = "format"  # a line that no ledger of this version writes
    PARTIAL = "partial"  # the last line has no end
    CHAIN = "chain"  # sequence or hash of the line before
    SIGNATURE = "signature"
    REPLAY = "replay"  # a line of another ledger or site, or a job or round a second time
    ORDER = "order"  # a line that may not follow those before
    TRUNCATED = "truncated"  # fewer lines than a checkpoint says
    FORK = "fork"  # as many lines as a checkpoint says, and other ones


class LedgerError(UserError):
    """A ledger that is not what its site wrote: which class of finding, in which line."""

    def __init__(self, finding: Finding, text: str, line: int = 0) -> None:
        super().__init__(text, hint=RESTORE)
        self.finding = finding
        #: 1 is the first; 0 where no line is meant.
        self.line = line


@dataclass
class Job:
    """One reservation and what became of it."""

    reserve: Reserve
    seq: int
    started: bool = False
    aborted: bool = False
    released: list[int] = field(default_factory=list)  # rounds
    committed: list[int] = field(default_factory=list)

    @property
    def charged(self) -> bool:
        """Does it count against the budget? Only an abort before the start gives it back."""
        return self.started or not self.aborted

    @property
    def state(self) -> str:
        """In one word."""
        if self.aborted:
            return "aborted"
        if self.committed:
            return "committed"
        if self.released:
            return "released"
        return "started" if self.started else "reserved"


def weakened(old: Policy, new: Policy) -> list[str]:
    """In what the new policy protects less than the old one."""
    found = []
    if old.protected and not new.protected:
        found.append("protected: true -> false")
    if old.epsilon is not None and (new.epsilon is None or Decimal(new.epsilon) > Decimal(old.epsilon)):
        found.append(f"epsilon: {old.epsilon} -> {new.epsilon or 'no budget'}")
    return found


def fixed_terms(policy: Policy) -> tuple[object, ...]:
    """What never changes after the first job."""
    return (policy.unit, policy.max_records_per_unit, policy.adjacency, policy.delta, policy.order)


class Book:
    """The state that the lines so far add up to."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        """Follow the entries.

        Raises:
            LedgerError: a line that may not stand where it stands.
        """
        self.dataset = self.name = ""
        self._policy: Policy | None = None
        self.changes: list[PolicyChange] = []
        self.jobs: dict[str, Job] = {}
        self.size = 0
        for entry in entries:
            self.take(entry)

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        if self._policy is None:
            raise LedgerError(Finding.ORDER, "expected a ledger that begins with REGISTER, found an empty one")
        return self._policy

    def take(self, entry: Entry) -> None:
        """One more line; raises :class:`LedgerError`, and then nothing has changed."""
        if self.size and entry.dataset != self.dataset:
            self._refuse(Finding.REPLAY, f"a line of data set {entry.dataset[:16]}… in that of {self.dataset[:16]}…")
        self._follow(entry.facts)
        if not self.size:
            self.dataset = entry.dataset
        self.size += 1

    def _refuse(self, finding: Finding, found: str) -> None:
        raise LedgerError(finding, f"line {self.size + 1}: {found}", self.size + 1)

    def _follow(self, facts: Facts) -> None:
        if isinstance(facts, Register) != (self.size == 0):
            self._refuse(Finding.ORDER, "expected REGISTER as the first line, and nowhere else")
        if isinstance(facts, Register):
            self.name, self._policy = facts.name, facts.policy
        elif isinstance(facts, PolicyChange):
            self._change(facts)
        elif isinstance(facts, Reserve):
            if facts.job in self.jobs:
                self._refuse(Finding.REPLAY, f"job {facts.job} is reserved a second time")
            self.jobs[facts.job] = Job(facts, self.size)
        else:
            self._advance(facts)

    def _change(self, change: PolicyChange) -> None:
        if self.jobs and fixed_terms(change.policy) != fixed_terms(self.policy):
            self._refuse(Finding.ORDER, "unit, adjacency, delta and order stay what they were at the first job")
        if weakened(self.policy, change.policy) and not change.reason.strip():
            self._refuse(Finding.ORDER, "a weaker policy carries a reason")
        self.changes.append(change)
        self._policy = change.policy

    def _advance(self, facts: Start | Release | Commit | Abort) -> None:
        job = self.jobs.get(facts.job)
        if job is None:
            raise LedgerError(Finding.ORDER, f"line {self.size + 1}: job {facts.job} was never reserved", self.size + 1)
        if job.aborted:
            self._refuse(Finding.ORDER, f"job {facts.job} was aborted before")
        if isinstance(facts, Start):
            if job.started:
                self._refuse(Finding.REPLAY, f"job {facts.job} starts a second time")
            job.started = True
        elif isinstance(facts, Release):
            if not job.started:
                self._refuse(Finding.ORDER, f"job {facts.job} is released before it started")
            if facts.round in job.released:
                self._refuse(Finding.REPLAY, f"job {facts.job} is released in round {facts.round} a second time")
            job.released.append(facts.round)
        elif isinstance(facts, Commit):
            if facts.round not in job.released or facts.round in job.committed:
                self._refuse(Finding.ORDER, f"round {facts.round} of job {facts.job} is committed without a release")
            job.committed.append(facts.round)
        else:
            if job.committed:
                self._refuse(Finding.ORDER, f"job {facts.job} is aborted after its upload was committed")
            job.aborted = True

    def charged(self) -> list[Job]:
        """The jobs that count, oldest first: all but those aborted before they started."""
        return [job for job in self.jobs.values() if job.charged]

    def open(self) -> list[Job]:
        """Reservations that may still go on, oldest first."""
        return [job for job in self.jobs.values() if job.state in ("reserved", "started", "released")]

    def _of(self, plan_digest: str, stage: int) -> list[Job]:
        return [j for j in self.jobs.values() if (j.reserve.plan_digest, j.reserve.stage) == (plan_digest, stage)]

    def find(self, plan_digest: str, stage: int) -> Job | None:
        """The last job of a plan file and stage that was not aborted."""
        return next((job for job in reversed(self._of(plan_digest, stage)) if not job.aborted), None)

    def trained(self, plan_digest: str, stage: int) -> list[Job]:
        """All jobs of a plan file and stage that started, oldest first."""
        return [job for job in self._of(plan_digest, stage) if job.started]

    def released_in(self, plan_digest: str, stage: int, round_number: int) -> Job | None:
        """The job whose vector was masked for this round."""
        return next((job for job in self._of(plan_digest, stage) if round_number in job.released), None)
