"""The coordinator's work on one plan after another: opens rounds, feeds the pure machines, keeps everything first.

No gRPC here and no clock of its own: the service calls in, ``tick`` is called with the time. Everything is serialised
by one lock; what takes long (folding, unmasking, publishing) is in ``coordinator/work.py``, outside of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator import phases
from coordinator.config import Home
from coordinator.proofs import OfferEntry, OfferTable, open_bonds, proofs_for
from coordinator.publish import CohortTotal
from coordinator.round import CoordinatorRound
from coordinator.running import Running, keep_accusations, replay
from coordinator.space import missing_space
from coordinator.stage import check_enough, is_over, last_round, next_cohort
from coordinator.store import Event, PlanRow, RoundRow, StageRow, Store
from privacy import endings
from privacy.encoding import decode, encode
from privacy.errors import Refusal, UserError, VeilsumError
from privacy.job import Job
from privacy.outcome import is_certified
from privacy.plan import parse_plan
from privacy.roster import RosterFile, load_roster
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.messages import Evidence, Header, RetryProof
from privacy.vectors import read_block

log = structlog.get_logger()

#: A stage whose rounds failed this often is given up, if it has no release; else its rounds become rare.
ATTEMPTS = 6


class Engine:
    """All plans and rounds of one coordinator."""

    def __init__(self, home: Home, store: Store, identity: Ed25519PrivateKey, clock: Callable[[], float]) -> None:
        self.home, self.store, self.identity, self.clock = home, store, identity, clock
        self.roster: RosterFile = load_roster(home.roster)
        self.lock = threading.RLock()
        self.jobs: dict[bytes, Job] = {}
        self.rounds: dict[bytes, Running] = {}
        #: Why no round of a plan can open for now: bytes missing on the disk, or too many failures.
        self.held: dict[bytes, endings.Reason] = {}
        #: (plan, member) -> why it takes no part, or not yet; in memory only, members say it again.
        self.declined: dict[tuple[bytes, int], str] = {}
        #: Called whenever a member may have something new to hear.
        self.changed: Callable[[], None] = lambda: None
        #: Called when a phase of a round is over, with its seconds.
        self.phase_ended: Callable[[type, float], None] = lambda _phase, _seconds: None
        store.use_roster(self.roster.hash)
        for plan in store.plans():
            self.jobs[plan.digest] = Job.of(parse_plan(plan.toml, plan.name), self.roster, home.factors)
        for row in store.rounds():
            if row.plan not in self.jobs:
                continue  # of an earlier roster
            if row.state == "running":
                store.recover(row.id)
            self._restore(row)

    # --- plans -------------------------------------------------------------------------------------------------------

    def submit_plan(self, toml: bytes) -> bytes:
        """Offer a plan to the members; its digest. Raises UserError or Refusal."""
        plan_file = parse_plan(toml)
        job = Job.of(plan_file, self.roster, self.home.factors)
        check_enough(plan_file.plan.name, job.rules, len(self.roster.roster.members))
        job.factors()  # or no release could be made
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
                self.abort(running, endings.plan_cancelled(reason))
            if plan.state in ("open", "released"):
                self.store.set_plan_state(plan.digest, "cancelled", endings.cancelled(reason))
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
        with self.lock:
            now = self.stage(digest)
            if stage != now or stage + 1 in self.store.stages(digest):
                closed = ", which is closed" if stage <= now else ""
                raise Refusal(f"expected stage {now} of plan '{job.plan.name}', found {stage}{closed}")
            if member in self.done(digest, stage):
                raise Refusal(f"'{job.roster.name(member)}' is in a release of this stage already")
            self.store.set_ready(digest, stage, member, self.clock())
            self.declined.pop((digest, member), None)
            self._go_on(digest)
            return len(self.store.ready(digest, stage)), len(job.roster.members)

    def decline(self, digest: bytes, member: int, reason: str, *, waiting: bool) -> None:
        """A member takes no part for this reason, and waits for no round; without one, nothing keeps it any more."""
        self.open_plan(digest)
        with self.lock:
            self.declined.pop((digest, member), None)
            if reason:
                self.declined[digest, member] = f"{'waiting' if waiting else 'refused'}: {reason}"
                self.store.set_unready(digest, member)

    def done(self, digest: bytes, stage: int) -> set[int]:
        """Members that a released round of this stage contains."""
        found = (r.machine.phase for r in self.stage_rounds(digest, stage))
        return {m for phase in found if isinstance(phase, phases.HasTotal) for m in phase.closed.survivors}

    def released(self, digest: bytes, stage: int) -> list[CohortTotal]:
        """The released rounds of a stage, in order; of a closed one those that the next stage starts from."""
        found, following = [], self.store.stages(digest).get(stage + 1)
        fixed = {round_id for round_id, _ in following.cohorts} if following else None
        for running in self.stage_rounds(digest, stage):
            phase = running.machine.phase
            if isinstance(phase, phases.HasTotal) and (fixed is None or running.row.id in fixed):
                row = running.row
                shares = phase.shares if not isinstance(phase, phases.Confirming) else {}
                usable = len(shares) == len(phase.closed.survivors) and not running.refuted
                projection = tuple(shares[i] for i in sorted(shares)) if usable else ()
                evidence = Evidence(phase.outcome, tuple(phase.votes[i] for i in sorted(phase.votes)), projection)
                found.append(CohortTotal(row.number, row.id, evidence, self.store.total(row.id)))
        return found

    def stage_rounds(self, digest: bytes, stage: int) -> list[Running]:
        """All rounds of a stage, oldest first."""
        return [self.rounds[r.id] for r in self.store.rounds(digest) if r.stage == stage and r.id in self.rounds]

    def upload_block(self, round_id: bytes, member: int, block: int) -> tuple[bytes, tuple[bytes, ...]]:
        """One block of a survivor's upload and its Merkle path, for the divided audit; late uploads are never shown.

        Raises:
            Refusal: no released round, no such survivor, or no such block.
        """
        running = self.running(round_id)
        phase, quantizer = running.machine.phase, running.job.quantizer
        released = isinstance(phase, phases.HasTotal)
        if not released or member not in phase.closed.survivors:  # type: ignore[union-attr]
            raise Refusal(f"round {running.row.number} shows no upload of member {member}")
        try:
            return read_block(self.store.upload(round_id, member), quantizer.total_size, quantizer.bits, block)
        except FileNotFoundError as error:
            raise Refusal(f"round {running.row.number} is certified: its uploads were deleted") from error

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
            try:
                fresh = running.machine.receive(message)
            finally:
                self._keep_accusations(running)
            if fresh:
                self._keep(running, Event("message", encode(message, FromMember)))
                self.after_change(running)
        self.changed()
        return fresh

    def running(self, round_id: bytes) -> Running:
        """A round known here; raises Refusal for any other."""
        if round_id not in self.rounds:
            raise Refusal(f"no round {round_id.hex()[:16]}… is known here")
        return self.rounds[round_id]

    def _keep_accusations(self, running: Running) -> None:
        """As :meth:`_keep` for evidence: without it a repeat of the message would pass for one that is stored."""
        try:
            keep_accusations(running, self.store.round_directory(running.row.id))
        except VeilsumError:
            self._restore(running.row)
            raise

    def _keep(self, running: Running, event: Event) -> None:
        """Make an event durable that memory has seen already; if the disk fails, memory goes back to the disk."""
        try:
            self.store.add_event(running.row.id, event, self.clock())
        except VeilsumError:
            self._restore(running.row)
            raise

    # --- stages ------------------------------------------------------------------------------------------------------

    def stage(self, digest: bytes) -> int:
        """The stage that members work on: the last one whose start is computed."""
        return max((n for n, row in self.store.stages(digest).items() if row.start is not None), default=1)

    def start(self, digest: bytes, stage: int) -> bytes:
        """Digest of the adapter that a stage starts from, one that :meth:`stage` has reached."""
        row = self.store.stages(digest).get(stage)
        return bytes.fromhex(self.jobs[digest].plan.adapter.digest) if row is None or row.start is None else row.start

    def beginning(self, but: Collection[bytes] = ()) -> tuple[bytes, StageRow] | None:
        """A stage whose start is still to be computed, with the digest of its plan, which is none of ``but``."""
        with self.lock:
            for plan in self.store.plans():
                if plan.digest in but:
                    continue
                for row in self.store.stages(plan.digest).values():
                    if row.start is None and plan.state in ("open", "released"):
                        return plan.digest, row
        return None

    def begin_stage(self, digest: bytes, stage: int, start: bytes) -> None:
        """The start of a stage is computed, and the release before it is final: members may hear of it."""
        with self.lock:
            self.store.set_start(digest, stage, start)
            self.held[digest] = endings.NONE
        log.info("stage begun", plan=self.jobs[digest].plan.name, stage=stage, start=start.hex()[:16])
        self.changed()

    def _go_on(self, digest: bytes) -> None:
        """Close the stage that is over, or open its next round."""
        stage = self.stage(digest)
        if stage + 1 not in self.store.stages(digest) and not self._close_stage(digest, stage):
            self._open_round(digest, stage)

    def _close_stage(self, digest: bytes, stage: int) -> bool:
        """Close a stage for good if another follows, it is over and none of its rounds is; fixes what that starts from.

        A total without an outcome certificate is left out, here and in the release: no site would start from it.
        """
        job, rounds = self.jobs[digest], self.stage_rounds(digest, stage)
        if stage == job.plan.last or any(
            not isinstance(r.machine.phase, phases.Released | phases.Aborted) for r in rounds
        ):
            return False
        now, done, first = self.clock(), self.done(digest, stage), self.store.first_release(digest, stage)
        if not is_over(len(done), len(job.roster.members), first, now, job.plan.deadlines.stage_s):
            return False
        certified = [c for c in self.released(digest, stage) if is_certified(job.at(stage), c.evidence.votes)]
        self.held[digest] = endings.NONE if certified else endings.uncertified(stage)
        if certified:
            cohorts = tuple((c.round_id, c.outcome.total) for c in certified)
            self.store.open_stage(digest, StageRow(stage + 1, now, cohorts))
            log.info("stage closed", plan=job.plan.name, stage=stage, rounds=[c.number for c in certified])
        return bool(certified)

    # --- rounds ------------------------------------------------------------------------------------------------------

    def _open_round(self, digest: bytes, stage: int) -> None:
        """Open the next round of a stage, if there is a cohort for it."""
        job, rounds = self.jobs[digest], self.stage_rounds(digest, stage)
        if any(r.row.state == "running" for r in rounds):
            return
        if self._has_failed_too_often(digest, rounds):
            return
        proofs = self._eligible(digest, stage, [r.machine for r in rounds])
        cohort = self._cohort(digest, stage, rounds, proofs)
        if cohort is None:
            return
        self.held[digest] = missing_space(job.at(stage), len(cohort), self.store.directory)
        if self.held[digest]:
            return
        number = max((r.row.number for r in rounds), default=0) + 1
        header = job.header(stage, number, self.start(digest, stage))
        row = RoundRow(header.hash(), digest, stage, number, encode(header), cohort, self.clock(), "running", "", None)
        table = OfferTable(tuple(OfferEntry(m, proofs[m]) for m in cohort))
        self.store.add_round(row, Event("proofs", encode(table)))
        self._restore(row)
        self.rounds[row.id].log.info("round opened", members=[job.roster.name(m) for m in cohort])
        self.changed()

    def _has_failed_too_often(self, digest: bytes, rounds: list[Running]) -> bool:
        """Give a plan up that has no release; one that has stays released, and its next round waits as long as a join.

        Late sites may go on failing for as long as they like: that takes nothing from who is in the release, and
        closes no door to who comes later.
        """
        last = max((r.row.number for r in rounds if r.row.state == "released"), default=0)
        failed = [r.row for r in rounds if r.row.state == "aborted" and r.row.number > last]
        if len(failed) < ATTEMPTS:
            return False
        if any(p.state == "open" for p in self.store.plans() if p.digest == digest):
            reason = endings.gave_up(len(failed), failed[-1].reason)
            self.store.set_plan_state(digest, "aborted", reason)
            seen = endings.told("plan", reason, self.roster.roster.name)
            log.error("plan given up", plan=self.jobs[digest].plan.name, **seen.logged("operator"))
            return True
        waits = self.clock() < failed[-1].opened + self.jobs[digest].plan.deadlines.join_s
        self.held[digest] = endings.pause(len(failed), failed[-1].reason) if waits else endings.NONE
        return waits

    def _eligible(
        self, digest: bytes, stage: int, earlier: list[CoordinatorRound]
    ) -> dict[int, tuple[RetryProof, ...]]:
        """Members that are ready, with the proofs they need about earlier rounds."""
        ready, done = self.store.ready(digest, stage), self.done(digest, stage)
        found = {m: proofs_for(earlier, m) for m in ready if m not in done}
        return {m: proofs for m, proofs in found.items() if proofs is not None}

    def _cohort(
        self, digest: bytes, stage: int, rounds: list[Running], eligible: Collection[int]
    ) -> tuple[int, ...] | None:
        """Who aggregates next: a certified list whose total is missing, whole; or whoever is free."""
        job, done = self.jobs[digest], self.done(digest, stage)
        bonds = open_bonds([r.machine for r in rounds], done)
        out = done.union(*bonds)
        free = {m: since for m, since in self.store.ready(digest, stage).items() if m in eligible and m not in out}
        rest = next_cohort(
            free, (), len(job.roster.members) - len(out), job.rules, self.clock(), job.plan.deadlines.join_s
        )
        found = [bond for bond in bonds if set(bond) <= set(eligible)] + ([rest] if rest is not None else [])
        # Whose last round is longest ago goes first: silent members of lists do not keep all the rest out.
        return min(found, key=lambda cohort: last_round([r.row.invited for r in rounds], cohort), default=None)

    def _restore(self, row: RoundRow) -> None:
        """Build a round's machine from its stored events."""
        job = self.jobs[row.plan].at(row.stage)
        events = list(self.store.events(row.id))
        tables = [decode(OfferTable, e.payload) for e in events if e.kind == "proofs"]
        proofs = {entry.member: entry.proofs for table in tables for entry in table.entries}
        machine = CoordinatorRound(job.context(decode(Header, row.header)), row.invited, proofs)
        for event in events:
            replay(machine, event)
        running = Running(row, job, machine, 0.0)
        running.begin_phase(self.clock())
        self.rounds[row.id] = running
        self._settle(running)
        running.unfinished = isinstance(machine.phase, phases.Released | phases.Aborted)

    def _settle(self, running: Running) -> None:
        """The events say how a round ended; a power cut may have come before its row and its plan said so too."""
        phase, row = running.machine.phase, running.row
        if row.state != "running":
            return
        if isinstance(phase, phases.Aborted):
            # Its members say again that they are ready, those of U2 with a statement that the round stays shut.
            running.row = self.store.end_round(row, "aborted", phase.reason, phase.culprit, row.invited)
        elif isinstance(phase, phases.HasTotal):
            running.row = self.store.end_round(row, "released", "", None, phase.closed.survivors)

    def abort(self, running: Running, reason: endings.Reason) -> None:
        """End a round without a total; a released one stays released."""
        if isinstance(running.machine.phase, phases.Released | phases.Aborted):
            return
        self.store.add_event(running.row.id, Event("abort", reason.encode()), self.clock())
        running.machine.abort(reason)
        self.after_change(running)

    def after_change(self, running: Running) -> None:
        """Bookkeeping when a phase may have ended."""
        phase = running.machine.phase
        if type(phase) is not running.timed:
            if running.timed is not None:
                self.phase_ended(running.timed, self.clock() - running.since)
            running.begin_phase(self.clock())
        if isinstance(phase, phases.Aborted) and running.row.state != "aborted":
            running.log.warning("round aborted", **running.told().logged("operator"))
            keep_accusations(running, self.store.round_directory(running.row.id))
        self._settle(running)
        running.unfinished = isinstance(phase, phases.Released | phases.Aborted)

    def tick(self) -> bool:
        """Let deadlines pass: phases close, cohorts that waited long enough open. Never has more to do at once."""
        with self.lock:
            now = self.clock()
            for running in list(self.rounds.values()):
                phase = running.machine.phase
                self._settle(running)  # a full disk may have come between an event and its row
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
                    self.after_change(running)
                    self.changed()
            for plan in self.store.plans():
                if plan.state in ("open", "released"):
                    self._go_on(plan.digest)
        self.store.flush_traffic()
        return False
