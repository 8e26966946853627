"""What takes long at the coordinator: folding uploads, unmasking the sum, publishing, and clearing up.

One thread calls :meth:`Worker.work`; the engine's lock is held only to look at a machine and to move it on, so members
go on talking meanwhile. Every step is named in the database when its file is durable, and done again after a crash that
came before that.
"""

from __future__ import annotations

import structlog
from structlog.contextvars import bound_contextvars

from coordinator import phases
from coordinator.engine import Engine
from coordinator.executor import Executor, Threads
from coordinator.publish import CohortTotal, is_published, publish, start_from, verified, withdraw
from coordinator.round import outcome_of
from coordinator.running import Running, names_in
from coordinator.store import Event, StageRow
from coordinator.unmask import fold, shard_count, unmask
from privacy import endings
from privacy.errors import ProtocolError
from privacy.files import DiskError
from privacy.outcome import is_certified
from privacy.secagg.messages import Evidence
from privacy.stages import Start, next_start

log = structlog.get_logger()

#: Uploads that are folded together while others still come: each generation is as long as the vector.
FOLD = 4
#: Seconds until work is tried again that a full disk stopped.
RETRY_S = 10.0


class Worker:
    """Does the long work of one engine."""

    def __init__(self, engine: Engine, executor: Executor | None = None) -> None:
        self._engine, self._store = engine, engine.store
        self._executor: Executor = executor or Threads()
        #: Digest of a plan -> when beginning its stage, which failed, is tried again.
        self._begin_again: dict[bytes, float] = {}

    def work(self) -> bool:
        """One piece of work, for a round or a stage that waits for it; was there any?"""
        return self._work_on_round() or self._work_on_stage()

    def _work_on_round(self) -> bool:
        engine = self._engine
        with engine.lock:
            now = engine.clock()
            waiting = next((r for r in engine.rounds.values() if r.try_again <= now and self._waits(r)), None)
        if waiting is None:
            return False
        with bound_contextvars(**waiting.about):
            self._advanced(waiting)
        engine.changed()
        return True

    def _advanced(self, waiting: Running) -> None:
        """The next piece of a round's work; a disk that is full makes it wait, what a peer did wrong ends it."""
        engine = self._engine
        try:
            self._advance(waiting)
        except DiskError as error:  # shares may be out by now: no reason to give the round up
            waiting.log.error("waiting for the disk", reason=str(error), hint=error.hint)
            waiting.try_again = engine.clock() + RETRY_S
        except ProtocolError as error:
            waiting.log.error("not published", reason=str(error))
            with engine.lock:
                waiting.unfinished = False  # or a released round would come up again at once, for ever
                engine.abort(waiting, endings.not_published(error))

    def _waits(self, running: Running) -> bool:
        phase = running.machine.phase
        if isinstance(phase, phases.Uploading):
            return len(phase.inputs) - len(self._store.sum_row(running.row.id).members) >= FOLD
        return isinstance(phase, phases.Folding | phases.Publishing) or running.unfinished

    def _advance(self, running: Running) -> None:
        with self._engine.lock:  # without it an input may be seen whose event the disk does not take
            running = self._engine.running(running.row.id)
            phase = running.machine.phase
            taken = tuple(phase.inputs) if isinstance(phase, phases.Uploading) else ()
        if isinstance(phase, phases.Uploading):
            self._fold(running, taken)
        elif isinstance(phase, phases.Folding):
            self._fold(running, phase.closed.survivors)
            self._close_sum(running, phase)
        elif isinstance(phase, phases.Publishing):
            self._publish(running, phase)
        elif running.unfinished:
            self._finish(running)

    # --- the next stage ----------------------------------------------------------------------------------------------

    def _work_on_stage(self) -> bool:
        engine = self._engine
        now = engine.clock()
        waiting = engine.beginning([digest for digest, again in self._begin_again.items() if now < again])
        if waiting is None:
            return False
        try:
            self._begin(*waiting)
        except (DiskError, ProtocolError) as error:
            log.error("stage cannot begin", plan=engine.jobs[waiting[0]].plan.name, reason=str(error))
            engine.held[waiting[0]] = endings.stage_blocked(waiting[1].stage, error)
            self._begin_again[waiting[0]] = engine.clock() + RETRY_S
        return True

    def _begin(self, digest: bytes, row: StageRow) -> None:
        """The release before as it stays, over the cohorts that are fixed, then the start that it gives."""
        job, before = self._engine.jobs[digest], row.stage - 1
        cohorts, start = self._released(digest, before), self._start(digest, before)
        if not is_published(job, before, cohorts, self._engine.home.releases):
            self._write_release(digest, before, cohorts)
        found = next_start(job, row.stage, start, verified(job, before, start, cohorts))
        self._engine.begin_stage(digest, row.stage, found.digest)

    def _start(self, digest: bytes, stage: int) -> Start:
        return start_from(self._engine.jobs[digest], stage, lambda number: self._released(digest, number))

    # --- the running sum ---------------------------------------------------------------------------------------------

    def _fold(self, running: Running, members: tuple[int, ...]) -> None:
        """Write the next generation of the running sum; one transaction names it and the members it contains."""
        round_id, quantizer = running.row.id, running.job.quantizer
        before = self._store.sum_row(round_id)
        new = sorted(set(members) - before.members)
        if not new:
            return
        base = self._store.sum_file(round_id, before.generation) if before.members else None
        target = self._store.sum_file(round_id, before.generation + 1)
        fold(base, [self._store.upload(round_id, m) for m in new], target, quantizer.total_size, quantizer.bits)
        self._store.name_sum(round_id, before.generation + 1, before.members | set(new))
        if base:
            base.unlink(missing_ok=True)

    def _close_sum(self, running: Running, phase: phases.Folding) -> None:
        """U3 is fixed and all of it is in the sum: M6 may leave."""
        summed, survivors = self._store.sum_row(running.row.id).members, phase.closed.survivors
        if summed != set(survivors):
            raise RuntimeError(f"the running sum is over members {sorted(summed)}, U3 is {survivors}")
        engine = self._engine
        with engine.lock:
            if running.machine.phase is not phase:
                return  # cancelled meanwhile
            self._store.add_event(running.row.id, Event("sum", b""), engine.clock())
            running.machine.sum_saved()
            engine.after_change(running)
        running.log.info("survivors fixed", survivors=[running.job.roster.name(m) for m in survivors])

    # --- the total ---------------------------------------------------------------------------------------------------

    def _publish(self, running: Running, phase: phases.Publishing) -> None:
        engine, row, root = self._engine, running.row, self._unmask(running, phase)
        with engine.lock:
            earlier = engine.released(row.plan, row.stage)
        evidence = Evidence(outcome_of(phase, root), (), ())
        total = CohortTotal(row.number, row.id, evidence, self._store.total(row.id))
        self._write_release(row.plan, row.stage, [*earlier, total])
        with engine.lock:
            cancelled = running.machine.phase is not phase
            if not cancelled:
                self._store.add_event(row.id, Event("publish", root), engine.clock())
                running.machine.publish(root)
                engine.after_change(running)
        if not cancelled:
            running.log.info("released", survivors=len(phase.closed.survivors))
        elif earlier:
            self._write_release(row.plan, row.stage, earlier)
        else:
            withdraw(running.job, row.stage, engine.home.releases)

    def _unmask(self, running: Running, phase: phases.Publishing) -> bytes:
        """The packed total, shard by shard; what an earlier process finished stays. Its Merkle root."""
        store, round_id, quantizer = self._store, running.row.id, running.job.quantizer
        done, count = store.shards(round_id), shard_count(quantizer.total_size)
        running.shards = (len(done), count)

        def keep(first: int, hashes: bytes) -> None:
            store.add_shard(round_id, first, hashes)
            finished = running.shards[0] + 1
            running.shards = (finished, count)
            if finished * 10 // count > (finished - 1) * 10 // count:
                running.log.info("unmasking", shards=finished, of=count)

        return unmask(
            store.sum_file(round_id, store.sum_row(round_id).generation),
            store.total(round_id),
            phase.streams,
            quantizer.total_size,
            quantizer.bits,
            self._executor,
            done,
            keep,
        )

    # --- the release -------------------------------------------------------------------------------------------------

    def _write_release(self, digest: bytes, stage: int, cohorts: list[CohortTotal]) -> None:
        engine = self._engine
        with engine.lock:
            rounds = engine.stage_rounds(digest, stage)
        names = [e for r in rounds for e in names_in(r, self._store.round_directory(r.row.id))]
        publish(engine.jobs[digest], stage, cohorts, engine.home.releases, names, self._start(digest, stage))

    def _released(self, digest: bytes, stage: int) -> list[CohortTotal]:
        with self._engine.lock:
            return self._engine.released(digest, stage)

    def _write_signed(self, running: Running, cohorts: list[CohortTotal]) -> None:
        """The release with all signatures; a projection that one member made fail is left out, as if it were silent."""
        try:
            self._write_release(running.row.plan, running.row.stage, cohorts)
        except ProtocolError as error:  # totals and signatures held when they came: only the projection is new
            running.log.error("projection left out", reason=str(error))
            running.refuted = True
            plan, stage = running.row.plan, running.row.stage
            self._write_release(plan, stage, self._released(plan, stage))

    def _finish(self, running: Running) -> None:
        """Signatures that came after the release go into it; what nobody needs any more is deleted."""
        engine, phase, row = self._engine, running.machine.phase, running.row
        if isinstance(phase, phases.Released):
            cohorts = self._released(row.plan, row.stage)
            if not is_published(engine.jobs[row.plan], row.stage, cohorts, engine.home.releases):
                self._write_signed(running, cohorts)
            certified = is_certified(running.job, phase.votes.values())
            self._store.sweep(row.id, uploads=certified and not engine.home.settings.keep_uploads)
        else:
            self._store.sweep(row.id, uploads=True)
        running.unfinished = False
