"""The release arrives: totals downloaded, verified from plan and pinned roster alone, and the adapter computed here."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import structlog

from participant import charging
from participant.client import Block, Client, ReleasedCohort
from participant.factors import ensure_factors
from participant.patience import patiently
from participant.phases import Checking
from participant.site import Site
from participant.starts import keep_start, kept_start
from privacy.adapter import CARD_FILE, check_start, save_peft
from privacy.card import model_card
from privacy.errors import ProtocolError
from privacy.files import make_private_directory, write_durably
from privacy.job import Job
from privacy.outcome import Total, VerifiedCohort, check_block, manifest, verify_cohort, verify_total
from privacy.secagg.masking import BLOCK, block_sizes, packed_bytes, packed_length
from privacy.secagg.messages import Outcome
from privacy.secagg.projection import dealt_blocks
from privacy.stages import Start, first_start, next_start, release_of

log = structlog.get_logger()

RELEASE_NOTE = "release.json"
#: Blocks that a spot audit looks at.
SPOT_BLOCKS = 3
#: Hashes in a Merkle path at most, and bytes of each.
MOST_PATH, HASH_BYTES = 64, 32


def _download(site: Site, client: Client, job: Job, round_id: bytes) -> Path:
    target = make_private_directory(site.home.work / job.plan.name) / f"total-{round_id.hex()[:16]}.bin"
    target.unlink(missing_ok=True)
    length = packed_length(job.quantizer.total_size, job.rules.bits)
    patiently(lambda: client.fetch_total(round_id, length, target), lambda: client.progress)
    return target


@contextmanager
def fetched_total(
    site: Site, client: Client, job: Job, round_id: bytes, outcome: Outcome, survivors: int
) -> Iterator[Total]:
    """The total of a round this site took part in, here for as long as it is looked at.

    Raises:
        ProtocolError: not what M10 promised, or garbled.
    """
    path = _download(site, client, job, round_id)
    try:
        yield verify_total(job, outcome, survivors, path)
    finally:
        path.unlink()


def fetch_release(site: Site, client: Client, job: Job, stage: int) -> bool:
    """Bring the release of a stage here, or bring it up to date; ``False`` if there is none yet.

    Every cohort's transcript is verified; the adapter is this site's own computation from the totals.

    Raises:
        ProtocolError: a transcript or total does not hold; the release that is here stays.
    """
    offered = client.releases(job.plan_file.digest, stage)
    if not offered:
        return False
    _check_ids(offered)
    if released_rounds(site.release_directory(job.plan.name, stage)) == sorted(_summary(c) for c in offered):
        return True
    ensure_factors(site, job)
    start = start_of(site, client, job, stage)
    with _verified(site, client, job, stage, start, offered) as cohorts:
        _write_release(site, job, stage, start, offered, cohorts)
    return True


@contextmanager
def _verified(
    site: Site, client: Client, job: Job, stage: int, start: Start, offered: Sequence[ReleasedCohort]
) -> Iterator[list[VerifiedCohort]]:
    """The cohorts of a stage, each verified here, with their totals for as long as they are looked at."""
    with ExitStack() as downloads:
        cohorts = []
        for cohort in offered:
            path = _download(site, client, job.at(stage), cohort.round_id)
            downloads.callback(path.unlink)
            cohorts.append(verify_cohort(job, stage, start.digest, cohort.evidence, path))
        yield cohorts


def _write_release(
    site: Site,
    job: Job,
    stage: int,
    start: Start,
    offered: Sequence[ReleasedCohort],
    cohorts: Sequence[VerifiedCohort],
) -> None:
    _settle(site, job, stage, cohorts)
    directory = site.release_directory(job.plan.name, stage)
    adapter, combined = directory / "adapter", release_of(job, stage, cohorts, start)
    facts = manifest(job, stage, cohorts, combined, start.digest, start.cohorts)
    card = model_card(job, facts)
    save_peft(adapter, combined.tensors, adapter=job.plan.adapter, base_name=job.plan.base.name, card=card)
    facts |= {"adapter": str(adapter), "card": str(adapter / CARD_FILE)}
    facts["rounds"] = sorted(_summary(c) for c in offered)
    write_durably(directory / RELEASE_NOTE, json.dumps(facts, indent=2).encode() + b"\n")


def _settle(site: Site, job: Job, stage: int, cohorts: Sequence[VerifiedCohort]) -> None:
    """A crash may have come between an upload and its COMMIT: a total that holds it shows that it arrived."""
    for spent in site.spent(job, stage):
        if any(spent.header.round == c.number and site.me in c.survivors for c in cohorts):
            charging.commit(site, job, stage, spent.header.round, spent.root)


def start_of(site: Site, client: Client, job: Job, stage: int) -> Start:
    """Where a stage starts, computed here from the totals of the stages before, and kept: there is no second answer.

    The release of the stage before is written on the way. Who joins late computes all stages before.

    Raises:
        UserError: the plan pins another start of stage 1 than its seed gives.
        ProtocolError: a transcript or total of a stage before does not hold, or has no outcome certificate.
        Refusal: another start was computed here before, and training may have begun from it.
    """
    if stage == 1:
        ensure_factors(site, job)  # who comes late has not prepared anything
        start = first_start(job)
        check_start(start.tensors, job.plan.adapter)
        return start
    kept = kept_start(site, job, stage)
    if kept is not None:
        return kept
    before = start_of(site, client, job, stage - 1)
    offered = client.releases(job.plan_file.digest, stage - 1)
    _check_ids(offered)
    with _verified(site, client, job, stage - 1, before, offered) as cohorts:
        start = next_start(job, stage, before, cohorts)
        _write_release(site, job, stage - 1, before, offered, cohorts)
        if site.spent(job, stage - 1) and not any(site.me in cohort.survivors for cohort in cohorts):
            log.warning("this site's upload is not in the release that the next stage starts from", stage=stage)
        keep_start(site, job, stage, start)  # while the totals are here that candidates are made of
    return kept_start(site, job, stage) or start


def _check_ids(offered: Sequence[ReleasedCohort]) -> None:
    """A verified total is read again from the file that its round's id names: no two may share one."""
    ids = {c.round_id for c in offered}
    if len(ids) < len(offered) or any(c.evidence.outcome.transcript.header.hash() != c.round_id for c in offered):
        raise ProtocolError("releases: expected each round once, under the hash of its header, found another list")


def _summary(cohort: ReleasedCohort) -> list[int]:
    evidence = cohort.evidence
    return [evidence.outcome.transcript.header.round, len(evidence.votes), len(evidence.projection)]


def released_rounds(directory: Path) -> list[list[int]]:
    """[round, outcome signatures, projections] of each cohort in the release that lies here."""
    note = directory / RELEASE_NOTE
    found: list[list[int]] = json.loads(note.read_bytes())["rounds"] if note.exists() else []
    return found


def _sized(block: Block, bits: int) -> Block:
    """A block of every survivor is held at a time: larger ones than there are could take all memory.

    Raises:
        ProtocolError: more bytes than a block has, or a path that is none.
    """
    data, path = block
    if len(data) > packed_bytes(BLOCK, bits) or len(path) > MOST_PATH or any(len(h) != HASH_BYTES for h in path):
        raise ProtocolError(f"audit: expected a block of at most {packed_bytes(BLOCK, bits)} bytes and its path")
    return block


def audit_blocks(client: Client, job: Job, round_id: bytes, phase: Checking, me: int, total: Total) -> tuple[int, ...]:
    """Recompute this site's blocks of a total, as the plan's audit says; the blocks that hold.

    Raises:
        ProtocolError: the total is not the sum of the uploads that U3 committed to.
    """
    verified, count = phase.verified, len(block_sizes(job.quantizer.total_size))
    if job.plan.round.audit == "none":
        return ()
    blocks = dealt_blocks(count, verified.survivors, me, job.rules.colluders)
    if job.plan.round.audit == "spot":
        blocks = tuple(sorted({secrets.randbelow(count) for _ in range(SPOT_BLOCKS)}))
    roots = {i.sender: i.body.root for i in phase.outcome.transcript.inputs}
    held: list[int] = []

    def go_on() -> None:
        """From the first block that was not looked at: after a broken connection the others stand."""
        rest = blocks[len(held) :]
        found = client.fetch_blocks(round_id, [(member, block) for block in rest for member in verified.survivors])
        for block in rest:
            shown = (_sized(b, job.rules.bits) for b in islice(found, len(verified.survivors)))
            uploads = dict(zip(verified.survivors, shown, strict=True))
            check_block(job, verified, roots, block, uploads, total.block(block))
            held.append(block)

    patiently(go_on, lambda: client.progress)
    return blocks
