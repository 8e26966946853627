"""Where the stages after the first start at this site, kept on its disk: there is no second answer.

work/PLAN/stage-K/
    start/           the adapter that a training starts from; of an evaluation candidate-0/, candidate-1/ and so on
    start.json       its digest, and the totals that it was computed from; written last, and never changed
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from participant.site import Site
from participant.store import StartNote
from privacy.adapter import Tensors, load_peft, save_peft, start_digest
from privacy.errors import Refusal, UserError
from privacy.job import Job
from privacy.stages import Start, candidates_digest, each_candidate


def _place(site: Site, job: Job, stage: int, candidate: int | None = None) -> Path:
    return site.store.directory(job.plan.name, stage) / ("start" if candidate is None else f"candidate-{candidate}")


def kept_start(site: Site, job: Job, stage: int) -> Start | None:
    """The start that an earlier run computed, if it is whole.

    Raises:
        UserError: the files are damaged.
    """
    note, judging = site.store.start(job.plan.name, stage), job.plan.judges(stage)
    first = _place(site, job, stage, 0 if judging else None)
    if note is None or note.plan != job.plan_file.digest.hex() or not first.exists():
        return None

    def candidate(number: int) -> Tensors:
        return load_peft(_place(site, job, stage, number))

    tensors = load_peft(first)
    found = candidates_digest(job, candidate) if judging else start_digest(tensors)
    if found.hex() != note.digest:
        raise UserError(
            f"{first}: expected the start {note.digest[:16]}…, found another",
            hint="the files are damaged: delete the directory, and it is computed again",
        )
    totals = tuple((number, bytes.fromhex(total)) for number, total in note.cohorts)
    return Start(tensors, found, totals, candidate if judging else None)


def keep_start(site: Site, job: Job, stage: int, start: Start) -> None:
    """The adapters first, then the note that settles it.

    Raises:
        Refusal: another start was computed here before, and training may have begun from it.
    """
    note = site.store.start(job.plan.name, stage)
    digest = job.plan_file.digest.hex()
    if note is not None and note.plan == digest and note.digest != start.digest.hex():
        raise Refusal(
            f"stage {stage} of plan '{job.plan.name}' started here at {note.digest[:16]}…; the coordinator now shows "
            f"totals that give {start.digest.hex()[:16]}…"
        )
    for place, tensors in _adapters(site, job, stage, start):
        save_peft(place, tensors, adapter=job.plan.adapter, base_name=job.plan.base.name)
    totals = [(number, total.hex()) for number, total in start.cohorts]
    site.store.keep_start(job.plan.name, stage, StartNote(digest, start.digest.hex(), totals))


def _adapters(site: Site, job: Job, stage: int, start: Start) -> Iterator[tuple[Path, Tensors]]:
    if not job.plan.judges(stage):
        yield _place(site, job, stage), start.tensors
        return
    for number, (_, tensors) in enumerate(each_candidate(job, start)):
        yield _place(site, job, stage, number), tensors
