"""The participant daemon: consider each plan, train, wait for a cohort, live through its rounds, bring the release."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
from structlog.contextvars import bind_contextvars, bound_contextvars

from participant import charging
from participant.approvals import is_approved
from participant.client import Client, OfferedPlan, seen_hash
from participant.fetch import fetch_release, start_of
from participant.pace import UploadTime
from participant.patience import patiently
from participant.phases import Confirmed, Finished, Stopped, Uploading
from participant.policy import Waits, admit, begin
from participant.prepare import Progress, prepare
from participant.renewal import Renewal
from participant.running import RoundRun, abort_unknown, join, resume_upload
from participant.site import MAX_REASON, Site
from privacy import endings
from privacy.console import Unreachable
from privacy.errors import ProtocolError, Refusal, UserError, VeilsumError, shown
from privacy.job import Job
from privacy.notify import notify
from privacy.plan import parse_plan
from privacy.secagg.dialogue import ToMember
from privacy.secagg.messages import Inbox, Offer, Outcome, RoundAborted

log = structlog.get_logger()

IDLE_S = 2.0
#: Seconds before a training that failed is tried again.
AGAIN_S = 60.0
#: Seconds after which the operator is told again why this site takes no part.
TELL_S = 300.0


@dataclass
class Daemon:
    """All plans of one site, one after another."""

    site: Site
    client: Client
    progress: Callable[[Job, int], Progress] | None = None
    said: dict[str, str] = field(default_factory=dict)
    #: (digest of a plan, stage) whose training failed -> when it is tried again, and why it failed.
    failed: dict[tuple[bytes, int], tuple[float, VeilsumError]] = field(default_factory=dict)
    #: Uploads that were said to be tight.
    warned: set[UploadTime] = field(default_factory=set)
    #: Digest of a plan -> why this site takes no part, as the operator was told, and when.
    declined: dict[bytes, tuple[str, float]] = field(default_factory=dict)
    #: (digest of a plan, stage) in which no round came for a while -> the last message heard there.
    quiet: dict[tuple[bytes, int], bytes] = field(default_factory=dict)
    #: (digest of a plan, stage) in which others count on this site for a round.
    counted_on: set[tuple[bytes, int]] = field(default_factory=set)

    def run(self, *, once: bool = False) -> None:
        """Work until interrupted; with ``once``, until a release is here or a plan of this site has failed.

        Raises:
            Refusal: with ``once``, why nothing was released. OtherRoster: this site has to approve it first.
        """
        settings = self.site.home.settings
        bind_contextvars(member=settings.member)
        renewal = Renewal(self.site.home.directory, settings.coordinator, settings.member)
        patiently(self.client.hello)
        log.info("connected", coordinator=settings.coordinator)
        while True:
            renewal.look(self.client)
            for offered in patiently(self.client.plans):
                state = self._consider(offered)
                if once and state == "released":
                    return
                if once and state in ("aborted", "cancelled"):
                    raise Refusal(f"the plan is {state}: {offered.reason}")
            time.sleep(IDLE_S)
            patiently(self.client.hello)  # another roster may be in force by now

    def _consider(self, offered: OfferedPlan) -> str:
        """Work on one plan as far as it goes; its state here. Lines of the log say which plan and stage."""
        with bound_contextvars(plan="?", stage=offered.stage):
            return self._considered(offered)

    def _considered(self, offered: OfferedPlan) -> str:
        name, digest, refusal = "?", b"", None
        try:
            plan_file = parse_plan(offered.toml)
            name, digest = plan_file.plan.name, plan_file.digest
            bind_contextvars(plan=name)
            job = Job.of(plan_file, self.site.roster, self.site.home.factors)
            standing = charging.standing(self.site, job, offered.stage)
            agreed = is_approved(self.site.home, plan_file)
            admit(job, self.site.home.settings, standing, self._stage(job, offered), approved=agreed)
            state, reason = self._work(job, offered)
        except Unreachable:
            raise
        except (Refusal, UserError, ProtocolError) as error:
            state = "waiting" if isinstance(error, Waits) else "refused" if isinstance(error, Refusal) else "failed"
            refusal, reason = error, str(error)
            if isinstance(error, UserError) and error.hint:
                reason += f" ({error.hint})"
            if digest and offered.state in ("open", "released"):
                # What failed here may quote files and records: nobody else's to know.
                why = reason if isinstance(error, Refusal) else endings.site_failed()
                self._decline(digest, why, waiting=state != "refused")
        told = self.site.note(name, state, reason)
        if self.said.get(name) != state + reason:
            if refusal is not None:
                self.site.counts.refused(refusal)
            log.info("plan", plan=name, state=state, **told.logged("site"))
            notify(STATUS=f"plan '{name}' is {state}: {told.reason}")
            self.said[name] = state + reason
        return state

    def _decline(self, digest: bytes, reason: str, *, waiting: bool) -> None:
        """Tell the operator why this site takes no part; again now and then, since it is kept in memory there."""
        before, at = self.declined.get(digest, ("", float("-inf")))
        if reason == before and time.monotonic() - at < TELL_S:
            return
        self.declined[digest] = (reason, time.monotonic())
        self.counted_on = {key for key in self.counted_on if key[0] != digest}
        self._tell(digest, shown(reason, MAX_REASON), waiting=waiting)

    def _tell(self, digest: bytes, reason: str, *, waiting: bool = True) -> None:
        try:
            self.client.decline(digest, reason, waiting=waiting)
        except VeilsumError as error:  # nobody waits for it
            log.info("the operator was not told", reason=str(error))

    def _withdraw(self, digest: bytes) -> None:
        """Tell the operator that what kept this site from a plan is gone: a training takes long until it is ready."""
        if self.declined.pop(digest, None) is not None:
            self._tell(digest, "")

    def _work(self, job: Job, offered: OfferedPlan) -> tuple[str, str]:
        stage, last = offered.stage, job.plan.last
        self.client.checkpoint = lambda: self.site.ledger(job.plan.data.dataset).checkpoint()
        if offered.state in ("cancelled", "aborted"):
            # A release made before stays a release; and one that holds this site's upload is what its ledger waits for.
            released = next((number for number in range(stage, 0, -1) if self._fetch(job, number)), None)
            charging.give_up(self.site, job, stage, f"the plan is {offered.state}: {offered.reason}")
            if released is None:
                return offered.state, offered.reason
            if released == last:
                return "released", self._adapter(job, released)
            kept = f"the release of stage {released} of {last} stays: {self._adapter(job, released)}"
            return offered.state, f"{offered.reason}; {kept}"
        again = (job.plan_file.digest, stage) in self.quiet  # as it was left a moment ago
        if again or not self._is_released(job, stage):
            if not again:
                self._prepare(job, stage)
            try:
                waits = self._take_part(job.at(stage), stage)
            finally:
                self.site.counts.no_round()
            if waits:
                return "ready", waits
        if not self._fetch(job, stage):
            return "waiting", "for the release" if last == 1 else f"for the release of stage {stage} of {last}"
        if stage == last:
            return "released", self._adapter(job, stage)
        return "waiting", f"for stage {stage + 1} of {last}; the release so far: {self._adapter(job, stage)}"

    def _stage(self, job: Job, offered: OfferedPlan) -> int:
        """The stage that the coordinator is in, if it can be.

        Raises:
            ProtocolError: the plan has no such stage, or a later one has begun here.
        """
        begun = self.site.stage_begun(job)
        if not begun <= offered.stage <= job.plan.last:
            raise ProtocolError(
                f"plan '{job.plan.name}': expected a stage from {begun} to {job.plan.last}, found {offered.stage} "
                "at the coordinator"
            )
        return offered.stage

    def _adapter(self, job: Job, stage: int) -> str:
        return str(self.site.release_directory(job.plan.name, stage) / "adapter")

    def _prepare(self, job: Job, stage: int) -> None:
        """Train, or say again for a while why that failed: a training that fails in a loop would fill the ledger."""
        if self.site.store.trained(job.plan.name, stage) is None:
            now = time.localtime()
            begin(self.site.home.settings.policy.hours, now.tm_hour * 60 + now.tm_min)
            upload = UploadTime.of(job, self.site.home.settings.max_upload_rate, stage)
            if upload.state == "tight" and upload not in self.warned:
                self.warned.add(upload)
                log.warning("upload will be tight", plan=job.plan.name, expected=str(upload), hint=upload.todo)
        key = (job.plan_file.digest, stage)
        until, error = self.failed.get(key, (0.0, None))
        if error is not None and time.monotonic() < until:
            raise error
        self._withdraw(job.plan_file.digest)
        if self.site.store.trained(job.plan.name, stage) is None:
            self._leave_others(job)
        try:
            later = patiently(lambda: start_of(self.site, self.client, job, stage)) if stage > 1 else None
            prepare(self.site, job, stage, self.progress(job, stage) if self.progress else None, later)
        except VeilsumError as error:
            self.failed[key] = (time.monotonic() + AGAIN_S, error)
            raise

    def _fetch(self, job: Job, stage: int) -> bool:
        return patiently(lambda: fetch_release(self.site, self.client, job, stage))

    def _is_released(self, job: Job, stage: int) -> bool:
        """Is this site's delta in a released total already?"""
        cohorts = patiently(lambda: self.client.releases(job.plan_file.digest, stage))
        inputs = [c.evidence.outcome.transcript.inputs for c in cohorts]
        return any(self.site.me == i.sender for listed in inputs for i in listed)

    def _ready(self, job: Job, stage: int) -> str:
        """Say that this site is ready; how many are, as its administrator reads it."""
        ready, expected = patiently(lambda: self.client.ready(job.plan_file.digest, stage))
        self.counted_on.add((job.plan_file.digest, stage))
        text, ended = f"{ready} of {expected} members are ready", self.site.ended.get(job.plan.name)
        text = f"{ended}; {text}" if ended else text
        self.site.note(job.plan.name, "ready", text)
        log.info("ready", plan=job.plan.name, ready=ready, of=expected)
        return text

    def _leave_others(self, job: Job) -> None:
        """This site does one thing at a time: who waited for it in rounds of other plans would wait for hours."""
        for key in [key for key in self.counted_on if key[0] != job.plan_file.digest]:
            self.counted_on.remove(key)
            self._tell(key[0], endings.works_on(job.plan.name))

    def _take_part(self, job: Job, stage: int) -> str:
        """Join rounds of a stage until this site's delta is in an outcome, or nothing can come of it any more.

        Returns:
            What there is to say of the waiting, where no round came for a while: other plans have their turn then, and
            this one again. Empty where there is nothing left to wait for.
        """
        run: RoundRun | None = None
        key = (job.plan_file.digest, stage)
        fresh, seen = key not in self.quiet, self.quiet.pop(key, b"")
        if fresh:
            self.site.ended.pop(job.plan.name, None)
        if fresh or key not in self.counted_on:
            self._ready(job, stage)
        while True:
            found = patiently(lambda: self.client.next(job.plan_file.digest, stage, seen))  # noqa: B023
            if found is None:
                if self._is_over(job, stage, run):
                    return ""
                if run is None:
                    self.quiet[key] = seen
                    return self._ready(job, stage)
                continue
            seen = seen_hash(found[1])
            if not isinstance(found[1], RoundAborted):
                self._leave_others(job)
            run = self._hear(job, stage, run, *found)
            if isinstance(found[1], Outcome) and run is None:
                return ""  # of a round this process did not live through: the release says it all
            if run is not None and isinstance(run.machine.phase, Finished):
                return ""

    def _hear(self, job: Job, stage: int, run: RoundRun | None, round_id: bytes, message: ToMember) -> RoundRun | None:
        """One message; the round this process is in afterwards. Lines of the log say which round it is about."""
        mine = run is not None and run.round_id == round_id
        about = {"round": run.machine.context.header.round} if mine and run is not None else {}
        if isinstance(message, Offer | RoundAborted):
            about = {"round": message.header.round}
        with bound_contextvars(**about):
            return self._heard(job, stage, run, round_id, message)

    def _heard(self, job: Job, stage: int, run: RoundRun | None, round_id: bytes, message: ToMember) -> RoundRun | None:
        if isinstance(message, Offer):
            try:
                return join(self.site, self.client, job, stage, round_id, message)
            except VeilsumError as error:
                self.site.counts.refused(error)
                log.warning("offer refused", plan=job.plan.name, reason=str(error))
                self.site.round_ended(job.plan.name, endings.offer_refused(message.header.round, error))
                return run
        mine = run is not None and run.round_id == round_id
        if isinstance(message, RoundAborted):
            seen = endings.told("round", shown(message.reason, MAX_REASON), self.site.roster.roster.name)
            log.warning("round aborted", plan=job.plan.name, **seen.logged("site"))
            if mine and run is not None:
                run.handle(message)
            else:
                abort_unknown(self.site, self.client, job, round_id, message)
            self.site.counts.no_round()
            self.site.round_ended(job.plan.name, endings.round_aborted(message.header.round, message.reason))
            self._ready(job, stage)
            return None
        if mine and run is not None:
            run.handle(message)
        elif isinstance(message, Inbox) and run is None:
            resume_upload(self.site, self.client, job, stage, round_id)
        return run  # what is about another round changes nothing in this one

    def _is_over(self, job: Job, stage: int, run: RoundRun | None) -> bool:
        """Nothing came for a while: is there still something to wait for?"""
        plans = {parse_plan(p.toml).digest: p for p in patiently(self.client.plans)}
        offered = plans.get(job.plan_file.digest)
        if offered is None or offered.state in ("cancelled", "aborted") or offered.stage != stage:
            return True
        if offered.state == "released":
            self._fetch(job, stage)  # the release of the others, while this site waits for a cohort of its own
            if run is not None and isinstance(run.machine.phase, Confirmed):
                return True  # no projection came: a survivor is silent
        if run is None or isinstance(run.machine.phase, Uploading | Stopped):
            if self._is_released(job, stage):
                return True
            if run is not None:
                self._ready(job, stage)
        return False
