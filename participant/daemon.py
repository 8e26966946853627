"""The participant daemon: train, join, and keep every record before its message leaves.

The order of writes in :meth:`RoundRun.answer` is the security argument of this file: the records of a step are on disk
before its reply is sent, the spool and the ledger line before the first byte of an upload. A crash between any two
lines leaves a delta that is unspent, or spent and said so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import structlog

from participant.client import Client, OfferedPlan, seen_hash
from participant.fetch import fetch_release, fetch_total
from participant.policy import admit
from participant.prepare import Progress, kept_vector, prepare
from participant.records import Step
from participant.round import Checking, Finished, Masking, ParticipantRound, Stopped, Uploading, accept_offer
from participant.site import Site
from privacy import faults
from privacy.console import Unreachable
from privacy.errors import ProtocolError, Refusal, UserError, VeilsumError
from privacy.job import Job
from privacy.plan import parse_plan
from privacy.secagg.messages import (
    FromMember,
    MaskedInput,
    Offer,
    Outcome,
    RoundAborted,
    Signed,
    ToMember,
    message_name,
)

log = structlog.get_logger()

IDLE_S = 2.0
BACKOFF_S = (0.5, 1, 2, 4, 8, 15, 30)

R = TypeVar("R")


def patiently(call: Callable[[], R]) -> R:
    """Repeat a call until the other end answers; a round's secrets live in this process, so nothing is given up."""
    attempt = 0
    while True:
        try:
            return call()
        except Unreachable as error:
            if attempt == 0:
                log.warning("no answer, trying again", reason=str(error))
            time.sleep(BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)])
            attempt += 1


@dataclass
class RoundRun:
    """One round of one plan, from offer to outcome."""

    site: Site
    client: Client
    job: Job
    stage: int
    round_id: bytes
    machine: ParticipantRound

    def answer(self, step: Step) -> None:
        """Save, then send."""
        reply = step.reply
        name = message_name(reply) if reply is not None else "nothing"
        faults.point(f"before-{name}")
        for record in step.records:
            self.site.store.keep(record)
        faults.point(f"saved-{name}")
        if reply is None:
            return
        if isinstance(reply, Signed) and isinstance(reply.body, MaskedInput):
            self._upload(reply)
        else:
            self._send(reply)
        faults.point(f"after-{name}")

    def _send(self, reply: FromMember) -> None:
        try:
            patiently(lambda: self.client.send(self.round_id, reply))
        except (ProtocolError, Refusal) as error:  # too late, most likely: the round says so itself soon
            log.warning("not taken", plan=self.job.plan.name, reason=str(error))

    def handle(self, message: ToMember) -> None:
        """One message of the coordinator; a refusal is logged, and nothing is sent."""
        try:
            step = self.machine.handle(message)
        except ProtocolError as error:
            log.warning("refused", plan=self.job.plan.name, message=type(message).__name__, reason=str(error))
            return
        self.answer(step)
        if isinstance(self.machine.phase, Masking):
            self._mask(self.machine.phase)
        if isinstance(self.machine.phase, Checking):
            self._confirm(self.machine.phase)

    def _mask(self, phase: Masking) -> None:
        """Ledger line and spool on disk, then the record that the delta is spent, then the upload."""
        store, header = self.site.store, self.machine.context.header
        vector = kept_vector(self.site, self.job, self.stage)
        facts = {"plan": self.job.plan.name, "stage": self.stage, "round": header.round, "t2": phase.t2.hex()}
        self.site.ledger(self.job.plan.data.dataset).append("RELEASE", facts)
        spool = store.spool(self.job.plan.name, header)
        root = store.write_spool(spool, vector, phase.streams, self.job.rules.bits)
        self.answer(self.machine.commit(root))

    def _upload(self, message: Signed[MaskedInput]) -> None:
        spool = self.site.store.spool(self.job.plan.name, self.machine.context.header)
        try:
            patiently(lambda: self.client.upload(self.round_id, message, spool))
        except (ProtocolError, Refusal) as error:
            log.warning("upload not taken", plan=self.job.plan.name, reason=str(error))
            return
        facts = {"plan": self.job.plan.name, "stage": self.stage, "round": self.machine.context.header.round}
        self.site.ledger(self.job.plan.data.dataset).append("COMMIT", facts)
        log.info("uploaded", plan=self.job.plan.name, bytes=message.body.length)

    def _confirm(self, phase: Checking) -> None:
        """The total has the promised root and decodes; then M11."""
        try:
            fetch_total(self.site, self.client, self.job, self.round_id, phase.outcome, len(phase.verified.survivors))
        except ProtocolError as error:
            log.error("the total does not hold", plan=self.job.plan.name, reason=str(error))
            self.machine.phase = Stopped(str(error))
            return
        self.answer(self.machine.confirm(()))


@dataclass
class Daemon:
    """All plans of one site, one after another."""

    site: Site
    client: Client
    progress: Callable[[Job], Progress] | None = None
    said: dict[str, str] = field(default_factory=dict)

    def run(self, *, once: bool = False) -> None:
        """Work until interrupted; with ``once``, until a release is here or a plan of this site has failed.

        Raises:
            Refusal: with ``once``, why nothing was released.
        """
        patiently(self.client.hello)
        log.info("connected", coordinator=self.site.home.settings.coordinator, member=self.site.home.settings.member)
        while True:
            for offered in patiently(self.client.plans):
                state = self._consider(offered)
                if once and state == "released":
                    return
                if once and state in ("aborted", "cancelled"):
                    raise Refusal(f"no release: the plan is {state}: {offered.reason}")
            time.sleep(IDLE_S)

    def _consider(self, offered: OfferedPlan) -> str:
        """Work on one plan as far as it goes; its state here."""
        name = "?"
        try:
            plan_file = parse_plan(offered.toml)
            name = plan_file.plan.name
            job = Job.of(plan_file, self.site.roster)
            admit(job, self.site.home.settings)
            state, reason = self._work(job, offered)
        except Unreachable:
            raise
        except (Refusal, UserError, ProtocolError) as error:
            state, reason = ("refused" if isinstance(error, Refusal) else "failed"), str(error)
            if isinstance(error, UserError) and error.hint:
                reason += f" ({error.hint})"
        self.site.note(name, state, reason)
        if self.said.get(name) != state + reason:
            log.info("plan", plan=name, state=state, reason=reason)
            self.said[name] = state + reason
        return state

    def _work(self, job: Job, offered: OfferedPlan) -> tuple[str, str]:
        digest, stage = job.plan_file.digest, 1
        if offered.state in ("cancelled", "aborted"):
            return offered.state, offered.reason
        spent = self.site.store.spent(digest, stage)
        if spent is None or offered.state == "open":
            if spent is None:
                prepare(self.site, job, stage, self.progress(job) if self.progress else None)
            self._take_part(job, stage)
        if fetch_release(self.site, self.client, job, stage):
            return "released", str(self.site.release_directory(job.plan.name, stage) / "adapter")
        return "waiting", "for the release"

    def _take_part(self, job: Job, stage: int) -> None:
        """Join rounds of a stage until one ends with an outcome, or the delta is spent without one."""
        digest, run, seen = job.plan_file.digest, None, b""
        if self.site.store.spent(digest, stage) is None:
            self._ready(job, stage)
        while True:
            found = patiently(lambda: self.client.next(digest, stage, seen))  # noqa: B023
            if found is None:
                if self._is_over(job, stage, run):
                    return
                continue
            round_id, message = found
            seen = seen_hash(message)
            if isinstance(message, Offer):
                run = self._join(job, stage, round_id, message) or run
            elif run is not None and run.round_id == round_id:
                run.handle(message)
                if isinstance(run.machine.phase, Finished):
                    return
            elif isinstance(message, Outcome):
                return  # of a round this process did not live through: the release says it all
            if isinstance(message, RoundAborted) and (run is None or run.round_id == round_id):
                log.warning("round aborted", plan=job.plan.name, reason=message.reason)
                if self.site.store.spent(digest, stage) is not None:
                    return
                run = None
                self._ready(job, stage)

    def _ready(self, job: Job, stage: int) -> None:
        ready, expected = patiently(lambda: self.client.ready(job.plan_file.digest, stage))
        self.site.note(job.plan.name, "ready", f"{ready} of {expected} members are ready")
        log.info("ready", plan=job.plan.name, ready=ready, of=expected)

    def _is_over(self, job: Job, stage: int, run: RoundRun | None) -> bool:
        """Nothing came for a while: is there still something to wait for?"""
        for offered in patiently(self.client.plans):
            if parse_plan(offered.toml).digest == job.plan_file.digest:
                if offered.state in ("cancelled", "aborted"):
                    return True
                if (
                    offered.state == "released"
                    and run is not None
                    and isinstance(run.machine.phase, Uploading | Stopped)
                ):
                    return True  # closed without this site's upload
                if run is None and self.site.store.spent(job.plan_file.digest, stage) is None:
                    self._ready(job, stage)
                return False
        return True

    def _join(self, job: Job, stage: int, round_id: bytes, offer: Offer) -> RoundRun | None:
        """M0 -> M1. A refusal is logged; the site stays out of that round."""
        store, digest = self.site.store, job.plan_file.digest
        start = bytes.fromhex(job.plan.adapter.digest)  # equal to the one computed here: prepare() checked it
        try:
            if store.spent(digest, stage) is not None:
                raise Refusal(f"the delta of plan '{job.plan.name}', stage {stage}, is spent")
            expected = job.context(job.header(stage, 0, start))
            context = accept_offer(offer, expected, store.highest_round(digest, stage))
        except VeilsumError as error:
            log.warning("offer refused", plan=job.plan.name, reason=str(error))
            return None
        machine = ParticipantRound(context, self.site.round_site(job))
        run = RoundRun(self.site, self.client, job, stage, round_id, machine)
        run.answer(machine.join())
        return run
