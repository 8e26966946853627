"""One round at a site, from offer to outcome: what is saved before what is sent.

The order of writes in :meth:`RoundRun.answer` is the security argument of this file: the records of a step are on disk
before its reply is sent, the spool and the ledger line before the first byte of an upload. A crash between any two
lines leaves a delta that is unspent, or spent and said so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import structlog
from structlog.contextvars import bound_contextvars

from participant import charging
from participant.client import Client
from participant.fetch import audit_blocks, fetched_total
from participant.patience import patiently
from participant.phases import Checking, Masking, Projecting, Stopped
from participant.prepare import kept_vector
from participant.records import Aborted, Joined, Record, Spent, Step
from participant.retry import check_proofs, may_state_abort
from participant.round import ParticipantRound, abort_step, accept_offer
from participant.site import Site
from privacy import endings, faults
from privacy.errors import ProtocolError, Refusal
from privacy.job import Job
from privacy.secagg.dialogue import FromMember, ToMember, message_name
from privacy.secagg.messages import Header, KeyList, MaskedInput, Offer, RoundAborted
from privacy.secagg.projection import project
from privacy.secagg.signed import Signed, sign
from privacy.vectors import file_root

log = structlog.get_logger()


def send(client: Client, job: Job, round_id: bytes, reply: FromMember) -> None:
    """Send one message for as long as it takes; one that comes too late is not taken, and the round says so itself."""
    try:
        patiently(lambda: client.send(round_id, reply))
    except (ProtocolError, Refusal) as error:
        log.warning("not taken", plan=job.plan.name, message=message_name(reply), reason=str(error))


def keep(site: Site, record: Record) -> None:
    """Make a record durable, for as long as the disk takes: the message it allows waits."""
    patiently(lambda: site.store.keep(record))


def upload(site: Site, client: Client, job: Job, header: Header, message: Signed[MaskedInput]) -> None:
    """The spool of a round, the only bytes of it that ever leave, until they are there or come too late."""
    spool, bits = site.store.spool(job.plan.name, header), job.rules.bits
    length, rate = message.body.length, site.home.settings.max_upload_rate
    paced = {} if rate is None else {"expected_s": round(length / rate)}
    log.info("uploading", plan=job.plan.name, bytes=length, upload_s=job.plan.deadlines.upload_s, **paced)
    try:
        patiently(lambda: client.upload(header.hash(), message, spool, bits), lambda: client.progress)
    except (ProtocolError, Refusal) as error:
        log.warning("upload not taken", plan=job.plan.name, reason=str(error))
        site.round_ended(job.plan.name, endings.not_uploaded(header.round, error))
        return
    charging.commit(site, job, header.stage, header.round, message.body.root)
    log.info("uploaded", plan=job.plan.name, bytes=message.body.length)


def _is_whole(spool: Path, job: Job, root: bytes) -> bool:
    """Is this file still the one that was spent?"""
    try:
        return file_root(spool, job.quantizer.total_size, job.rules.bits) == root
    except (ProtocolError, FileNotFoundError):
        return False


def resume_upload(site: Site, client: Client, job: Job, stage: int, round_id: bytes) -> None:
    """Go on with an upload that a crash cut short: the delta is spent, the spool is what may be sent, and nothing else.

    The same M5 is signed again, byte for byte. The round's secrets are gone, so this site signs no list in it and
    releases nothing; its input counts all the same, since t others can open its self mask.
    """
    records = site.store.records(job.plan_file.digest, stage)  # of another plan it would be that plan's spool
    spent = next((r for r in records if isinstance(r, Spent) and r.header.hash() == round_id), None)
    if spent is None or any(isinstance(r, Aborted) and r.header == spent.header for r in records):
        return
    if not _is_whole(site.store.spool(job.plan.name, spent.header), job, spent.root):
        log.error("upload cannot go on: its spool is gone or another", plan=job.plan.name, round=spent.header.round)
        site.round_ended(job.plan.name, endings.upload_lost(spent.header.round))
        return
    length = job.context(spent.header).upload_length
    message = sign(site.identity, site.me, MaskedInput(spent.t2, spent.root, length), round_id)
    site.counts.resuming(job, stage, spent.header.round)
    with bound_contextvars(round=spent.header.round):
        log.info("upload goes on", plan=job.plan.name)
        upload(site, client, job, spent.header, message)


def join(site: Site, client: Client, job: Job, stage: int, round_id: bytes, offer: Offer) -> RoundRun:
    """M0 -> M1, if the offer is one this site may take.

    Raises:
        Refusal: another plan, roster or start adapter, an old round, or a spent delta without its proofs.
        ProtocolError: a proof that does not hold.
    """
    if stage < (begun := site.stage_begun(job)):
        raise Refusal(f"M0: stage {begun} of plan '{job.plan.name}' has begun here: stage {stage} is over")
    expected = job.context(job.header(stage, 0, site.start_digest(job, stage)))
    context = accept_offer(offer, expected, site.store.highest_round(job.plan_file.digest, stage))
    spent, vector = site.spent(job, stage), kept_vector(site, job, stage)
    digest = vector.digest()
    if any(record.vector != digest for record in spent):
        raise Refusal("the quantised vector is not the one that was spent: a retrained delta is never masked")
    bond = check_proofs(spent, site.store.all_records(), site.me, offer.proofs, context)
    kept = site.store.trained(job.plan.name, stage)
    if kept is None or kept.plan != job.plan_file.digest.hex():
        raise Refusal(f"the delta that lies here was not trained under this file of plan '{job.plan.name}'")
    if kept.start != expected.header.start.hex() and (kept.start or stage > 1):
        raise Refusal(f"the delta of stage {stage} that lies here was trained from another start adapter")
    charging.charged(site, job, stage)
    run = RoundRun(site, client, job, stage, round_id, ParticipantRound(context, site.round_site(job, digest, bond)))
    step = run.machine.join()
    run.tell()
    run.answer(step)
    return run


def abort_unknown(site: Site, client: Client, job: Job, round_id: bytes, message: RoundAborted) -> None:
    """State the abort of a round whose secrets a crash took, unless this site released in it."""
    records, header = site.store.all_records(), message.header
    joined = any(isinstance(r, Joined) and r.header == header for r in records)
    if not joined or not may_state_abort(records, header.hash()):
        return
    step = abort_step(site.round_site(job, b"", None), header, message.reason)
    for record in step.records:
        keep(site, record)
    if step.reply is not None:
        send(client, job, round_id, step.reply)


@dataclass
class RoundRun:
    """A round that this process lives through."""

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
            keep(self.site, record)
        faults.point(f"saved-{name}")
        if reply is None:
            return
        if isinstance(reply, Signed) and isinstance(reply.body, MaskedInput):
            self._upload(reply)
        else:
            send(self.client, self.job, self.round_id, reply)
        faults.point(f"after-{name}")

    def handle(self, message: ToMember) -> None:
        """One message of the coordinator; a refusal is logged, and nothing is sent."""
        try:
            step = self.machine.handle(message)
        except ProtocolError as error:
            self.site.counts.refused(error)
            log.warning("refused", plan=self.job.plan.name, message=type(message).__name__, reason=str(error))
            return
        self.tell()
        if isinstance(message, KeyList) and step.records:
            store, header = self.site.store, self.machine.context.header
            patiently(lambda: store.keep_witnesses(header, message.members))
        self.answer(step)
        phase = self.machine.phase
        if isinstance(phase, Stopped) and not isinstance(message, RoundAborted):
            number = self.machine.context.header.round
            log.warning("complained", plan=self.job.plan.name, reason=phase.reason)
            self.site.round_ended(self.job.plan.name, endings.complained(number, phase.reason))
        elif isinstance(phase, Masking):
            self._mask(phase)
        elif isinstance(phase, Checking):
            self._confirm(phase)
        elif isinstance(phase, Projecting):
            vector = kept_vector(self.site, self.job, self.stage)
            self._move(self.machine.project(project(phase.key, vector)))

    def tell(self) -> None:
        """Metrics and page hear which phase this is."""
        self.site.counts.in_round(self.job, self.stage, self.machine.context.header.round, self.machine.phase)

    def _move(self, step: Step) -> None:
        """The answer to what the shell had to work for: the machine is in its next phase already."""
        self.tell()
        self.answer(step)

    def _mask(self, phase: Masking) -> None:
        """Ledger line and spool on disk, then the record that the delta is spent, then the upload."""
        store, header = self.site.store, self.machine.context.header
        vector = kept_vector(self.site, self.job, self.stage)
        charging.release(self.site, self.job, self.stage, header.round, phase.t2, self.machine.site.vector)
        spool, bits = store.spool(self.job.plan.name, header), self.job.rules.bits
        root = patiently(lambda: store.write_spool(spool, vector, phase.streams, bits))
        self._move(self.machine.commit(root))

    def _upload(self, message: Signed[MaskedInput]) -> None:
        upload(self.site, self.client, self.job, self.machine.context.header, message)

    def _confirm(self, phase: Checking) -> None:
        """The total has the promised root and decodes, this site's blocks of it hold; then M11."""
        try:
            blocks = self._audit(phase)
        except (ProtocolError, Refusal) as error:
            log.error("the total does not hold", plan=self.job.plan.name, reason=str(error))
            number = self.machine.context.header.round
            self.site.round_ended(self.job.plan.name, endings.total_wrong(number, error))
            self.machine.phase = Stopped(str(error))
            self.tell()
            return
        self._move(self.machine.confirm(blocks))

    def _audit(self, phase: Checking) -> tuple[int, ...]:
        site, job, survivors = self.site, self.job, len(phase.verified.survivors)
        with fetched_total(site, self.client, job, self.round_id, phase.outcome, survivors) as total:
            return audit_blocks(self.client, job, self.round_id, phase, site.me, total)
