"""The coordinator's work on one plan after another: opens rounds, feeds the pure machines, keeps everything first.

No gRPC here and no clock of its own: the service calls in, ``tick`` is called with the time. Everything is serialised
by one lock; what takes long (folding, unmasking) runs in :meth:`work`, outside of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator import phases
from coordinator.config import Home
from coordinator.publish import CohortTotal, publish
from coordinator.round import CoordinatorRound
from coordinator.stage import next_cohort
from coordinator.store import Event, PlanRow, RoundRow, Store
from coordinator.unmask import fold, unmask
from privacy.encoding import decode, encode
from privacy.errors import ProtocolError, Refusal, UserError, VeilsumError
from privacy.job import Job
from privacy.plan import Deadlines, parse_plan
from privacy.roster import RosterFile, load_roster
from privacy.secagg.messages import FromMember, Header, ToMember

log = structlog.get_logger()

#: A round that fails before any upload has spent nothing and is begun anew, this often.
ATTEMPTS = 3


@dataclass
class Running:
    """A round that is not over, with the time by which its phase ends."""

    row: RoundRow
    job: Job
    machine: CoordinatorRound
    deadline: float
    #: The last M11 is in and not yet in the manifest.
    unpublished_votes: bool = False
    cache: dict[int, tuple[object, ToMember | None]] = field(default_factory=dict)

    @property
    def log(self) -> structlog.BoundLogger:
        bound: structlog.BoundLogger = log.bind(plan=self.job.plan.name, stage=self.row.stage, round=self.row.number)
        return bound


def phase_seconds(phase: phases.Phase, deadlines: Deadlines) -> float:
    """How long a phase stays open for silent members."""
    return {
        phases.Joining: deadlines.join_s,
        phases.Sharing: deadlines.share_s,
        phases.Uploading: deadlines.upload_s,
        phases.Signing: deadlines.sign_s,
        phases.Unmasking: deadlines.unmask_s,
        phases.Confirming: deadlines.outcome_s,
    }.get(type(phase), 86400.0)


class Engine:
    """All plans and rounds of one coordinator."""

    def __init__(self, home: Home, store: Store, identity: Ed25519PrivateKey, clock: Callable[[], float]) -> None:
        self.home, self.store, self.identity, self.clock = home, store, identity, clock
        self.roster: RosterFile = load_roster(home.roster)
        self.lock = threading.RLock()
        self.jobs: dict[bytes, Job] = {}
        self.rounds: dict[bytes, Running] = {}
        #: Called whenever a member may have something new to hear.
        self.changed: Callable[[], None] = lambda: None
        for plan in store.plans():
            self.jobs[plan.digest] = Job.of(parse_plan(plan.toml, plan.name), self.roster)
        for row in store.rounds():
            self._restore(row)

    # --- plans -------------------------------------------------------------------------------------------------------

    def submit_plan(self, toml: bytes) -> bytes:
        """Offer a plan to the members; its digest. Raises UserError or Refusal."""
        plan_file = parse_plan(toml)
        job = Job.of(plan_file, self.roster)
        with self.lock:
            self.store.add_plan(plan_file.digest, plan_file.plan.name, toml, self.clock())
            self.jobs[plan_file.digest] = job
        log.info("plan submitted", plan=plan_file.plan.name, digest=plan_file.digest.hex()[:16])
        self.changed()
        return plan_file.digest

    def cancel_plan(self, name: str, reason: str) -> None:
        """Withdraw a plan; its running rounds abort, a release stays."""
        with self.lock:
            plan = next((p for p in self.store.plans() if p.name == name), None)
            if plan is None:
                known = ", ".join(p.name for p in self.store.plans()) or "none"
                raise UserError(f"expected the name of a plan, found '{name}'; known: {known}")
            for running in [r for r in self.rounds.values() if r.row.plan == plan.digest]:
                self._abort(running, f"plan cancelled: {reason}")
            if plan.state == "open":
                self.store.set_plan_state(plan.digest, "cancelled", reason)
        self.changed()

    def open_plan(self, digest: bytes) -> tuple[PlanRow, Job]:
        """A plan members may work on; raises Refusal for any other."""
        for plan in self.store.plans():
            if plan.digest == digest:
                if plan.state in ("open", "released"):
                    return plan, self.jobs[digest]
                raise Refusal(f"plan '{plan.name}' is {plan.state}: {plan.reason}")
        raise Refusal(f"no plan with digest {digest.hex()[:16]}… is known here")

    # --- who is ready, and what each is told -------------------------------------------------------------------------

    def ready(self, digest: bytes, stage: int, member: int) -> tuple[int, int]:
        """A member's delta is trained; (members ready, members of the roster)."""
        _, job = self.open_plan(digest)
        if stage != 1:
            raise Refusal(f"expected stage 1 of plan '{job.plan.name}', found {stage}")
        with self.lock:
            if member in self.done(digest, stage):
                raise Refusal(f"'{job.roster.name(member)}' is in a release of this stage already")
            self.store.set_ready(digest, stage, member, self.clock())
            self._open_round(digest, stage)
            return len(self.store.ready(digest, stage)), len(job.roster.members)

    def done(self, digest: bytes, stage: int) -> set[int]:
        """Members that a released round of this stage contains."""
        return {m for cohort in self.released(digest, stage) for m in cohort.survivors}

    def released(self, digest: bytes, stage: int) -> list[CohortTotal]:
        """The released rounds of a stage, in order."""
        found = []
        for row in self.store.rounds(digest):
            if row.stage == stage and row.state == "released":
                phase = self.rounds[row.id].machine.phase
                assert isinstance(phase, phases.Released | phases.Confirming)
                votes = tuple(phase.votes[i] for i in sorted(phase.votes))
                found.append(CohortTotal(row.number, row.id, phase.outcome, votes, self.store.total(row.id)))
        return found

    def message_for(self, digest: bytes, stage: int, member: int) -> tuple[bytes, ToMember] | None:
        """(round id, message) for a member: of the latest round of the stage that invites it."""
        with self.lock:
            rows = [r for r in self.store.rounds(digest) if r.stage == stage and member in r.invited]
            if not rows or rows[-1].id not in self.rounds:
                return None
            running = self.rounds[rows[-1].id]
            phase, cached = running.cache.get(member, (None, None))
            if phase is not running.machine.phase:
                cached = running.machine.message_for(member)
                running.cache[member] = (running.machine.phase, cached)
            return (running.row.id, cached) if cached is not None else None

    def receive(self, round_id: bytes, message: FromMember) -> bool:
        """Take a message of a member; ``False`` for a repeat. It is durable when this returns.

        Raises:
            ProtocolError: not acceptable; nothing changed.
        """
        with self.lock:
            running = self.running(round_id)
            fresh = running.machine.receive(message)
            if fresh:
                self._keep(running, Event("message", encode(message, FromMember)))
                self._after_change(running)
        self.changed()
        return fresh

    def running(self, round_id: bytes) -> Running:
        """A round known here; raises Refusal for any other."""
        if round_id not in self.rounds:
            raise Refusal(f"no round {round_id.hex()[:16]}… is known here")
        return self.rounds[round_id]

    def _keep(self, running: Running, event: Event) -> None:
        """Make an event durable that memory has seen already; if the disk fails, memory goes back to the disk."""
        try:
            self.store.add_event(running.row.id, event, self.clock())
        except VeilsumError:
            self._restore(running.row)
            raise

    # --- rounds ------------------------------------------------------------------------------------------------------

    def _open_round(self, digest: bytes, stage: int) -> None:
        job, rows = self.jobs[digest], [r for r in self.store.rounds(digest) if r.stage == stage]
        if any(r.state == "running" for r in rows):
            return
        aborted = sum(r.state == "aborted" for r in rows)
        if aborted >= ATTEMPTS:
            self.store.set_plan_state(digest, "aborted", f"{aborted} rounds failed, the last: {rows[-1].reason}")
            return
        ready, now = self.store.ready(digest, stage), self.clock()
        cohort = next_cohort(
            ready, self.done(digest, stage), len(job.roster.members), job.rules, now, job.plan.deadlines.join_s
        )
        if cohort is None:
            return
        number = max((r.number for r in rows), default=0) + 1
        header = job.header(stage, number, bytes.fromhex(job.plan.adapter.digest))
        row = RoundRow(header.hash(), digest, stage, number, encode(header), cohort, now, "running", "", None)
        self.store.add_round(row)
        self._restore(row)
        self.rounds[row.id].log.info("round opened", members=[job.roster.name(m) for m in cohort])

    def _restore(self, row: RoundRow) -> None:
        """Build a round's machine from its stored events."""
        job = self.jobs[row.plan]
        machine = CoordinatorRound(job.context(decode(Header, row.header)), row.invited)
        for event in self.store.events(row.id):
            replay(machine, event)
        running = Running(row, job, machine, 0.0)
        running.deadline = self.clock() + phase_seconds(machine.phase, job.plan.deadlines)
        self.rounds[row.id] = running

    def _abort(self, running: Running, reason: str) -> None:
        if isinstance(running.machine.phase, phases.Released | phases.Aborted):
            return
        self.store.add_event(running.row.id, Event("abort", reason.encode()), self.clock())
        running.machine.abort(reason)
        self._after_change(running)

    def _after_change(self, running: Running) -> None:
        """Bookkeeping when a phase may have ended."""
        phase = running.machine.phase
        running.deadline = self.clock() + phase_seconds(phase, running.job.plan.deadlines)
        if isinstance(phase, phases.Aborted) and running.row.state != "aborted":
            self._finish(running, "aborted", phase.reason, phase.culprit)
            running.log.warning("round aborted", reason=phase.reason)
            self._next_after_abort(running)
        running.unpublished_votes = isinstance(phase, phases.Released)

    def _finish(self, running: Running, state: str, reason: str = "", culprit: int | None = None) -> None:
        self.store.set_round_state(running.row.id, state, reason, culprit)
        running.row = next(r for r in self.store.rounds(running.row.plan) if r.id == running.row.id)

    def _next_after_abort(self, running: Running) -> None:
        """A round that failed before any upload spent nothing: its members say again that they are ready.

        After an upload the delta of a member is spent, and only the proofs of protocol section 6 allow it again.
        """
        row = running.row
        self.store.drop_ready(row.plan, row.stage, row.invited)
        if self.store.receipts(row.id):
            self.store.set_plan_state(row.plan, "aborted", f"round {row.number} failed after uploads: {row.reason}")

    def tick(self) -> None:
        """Let deadlines pass: phases close, cohorts that waited long enough open."""
        with self.lock:
            now = self.clock()
            for running in list(self.rounds.values()):
                phase = running.machine.phase
                if isinstance(phase, phases.Released | phases.Aborted | phases.Folding | phases.Publishing):
                    continue
                if now >= running.deadline:
                    running.log.info(
                        "deadline passed",
                        phase=type(phase).__name__,
                        silent=[running.job.roster.name(m) for m in running.machine.missing()],
                    )
                    self.store.add_event(running.row.id, Event("close", b""), now)
                    running.machine.close_phase()
                    self._after_change(running)
                    self.changed()
            for plan in self.store.plans():
                if plan.state in ("open", "released"):
                    self._open_round(plan.digest, 1)

    # --- what takes long ---------------------------------------------------------------------------------------------

    def work(self) -> bool:
        """Fold or unmask one round that waits for it; was there one? Called from a worker thread."""
        with self.lock:
            waiting = [
                r
                for r in self.rounds.values()
                if isinstance(r.machine.phase, phases.Folding | phases.Publishing) or r.unpublished_votes
            ]
        if not waiting:
            return False
        running = waiting[0]
        phase = running.machine.phase
        try:
            if isinstance(phase, phases.Folding):
                self._fold(running, phase)
            elif isinstance(phase, phases.Publishing):
                self._publish(running, phase)
            else:
                self._publish_votes(running)
        except (ProtocolError, UserError) as error:
            with self.lock:
                self._abort(running, str(error))
        self.changed()
        return True

    def _fold(self, running: Running, phase: phases.Folding) -> None:
        size, bits = running.job.quantizer.total_size, running.job.rules.bits
        uploads = [self.store.upload(running.row.id, m) for m in phase.closed.survivors]
        fold(uploads, self.store.running_sum(running.row.id), size, bits)
        with self.lock:
            self.store.add_event(running.row.id, Event("sum", b""), self.clock())
            running.machine.sum_saved()
            self._after_change(running)
        running.log.info("survivors fixed", survivors=[running.job.roster.name(m) for m in phase.closed.survivors])

    def _publish(self, running: Running, phase: phases.Publishing) -> None:
        size, bits = running.job.quantizer.total_size, running.job.rules.bits
        row, total = running.row, self.store.total(running.row.id)
        root = unmask(self.store.running_sum(row.id), total, phase.streams, size, bits)
        with self.lock:
            trial = CoordinatorRound(running.machine.context, row.invited)
            trial.phase = phase
            trial.publish(root)
            assert isinstance(trial.phase, phases.Confirming)
            cohort = CohortTotal(row.number, row.id, trial.phase.outcome, (), total)
            publish(running.job, row.stage, [*self.released(row.plan, row.stage), cohort], self.home.releases)
            self.store.add_event(row.id, Event("publish", root), self.clock())
            running.machine.publish(root)
            self._finish(running, "released")
            self.store.set_plan_state(row.plan, "released")
            self.store.drop_ready(row.plan, row.stage, cohort.survivors)
            self._after_change(running)
        running.log.info("released", survivors=len(cohort.survivors))

    def _publish_votes(self, running: Running) -> None:
        """Write the manifest again when the members have confirmed the total."""
        with self.lock:
            row = running.row
            publish(running.job, row.stage, self.released(row.plan, row.stage), self.home.releases)
            running.unpublished_votes = False


def replay(machine: CoordinatorRound, event: Event) -> None:
    """Apply one stored event to a machine."""
    if event.kind == "message":
        machine.receive(decode(FromMember, event.payload))  # type: ignore[arg-type]
    elif event.kind == "close":
        machine.close_phase()
    elif event.kind == "sum":
        machine.sum_saved()
    elif event.kind == "publish":
        machine.publish(event.payload)
    elif event.kind == "abort":
        machine.abort(event.payload.decode())
