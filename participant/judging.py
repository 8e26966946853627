"""The evaluation at one site: its held-out records under every candidate, as counts in the one vector of the stage."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import structlog

from participant.base_model import find_base
from participant.patience import patiently
from participant.site import Site
from participant.store import Trained
from participant.task_data import TaskData
from privacy.errors import UserError
from privacy.evaluation import Counts, candidates_of, encode_counts
from privacy.job import Job
from privacy.stages import Start, each_candidate

log = structlog.get_logger()


def judge(
    site: Site,
    job: Job,
    stage: int,
    start: Start,
    held_out: TaskData,
    progress: Callable[[int, int, float], None] | None = None,
) -> Trained:
    """See the held-out records with each candidate and keep the counts as the vector of the stage.

    Raises:
        UserError: another base model than the plan's, or more records than may be counted.
    """
    from participant.evaluation import accuracy  # torch takes seconds to import

    begun, plan, settings, found = time.monotonic(), job.plan, site.home.settings, []
    base = find_base(site.home, plan.base.name)
    total = len(candidates_of(plan))
    for number, (name, tensors) in enumerate(each_candidate(job, start)):
        one = accuracy(
            plan=plan,
            base=base,
            adapter=tensors,
            examples=held_out,
            device=settings.device,
            threads=settings.threads,
        )
        found.append(one)
        log.info("evaluated", plan=plan.name, candidate=name, correct=one.correct, of=one.total)
        if progress is not None:
            progress(number + 1, total, one.loss)
    counted = found[0].total  # texts, numbers, or the tokens of a language model that count
    trained = Trained(
        *(job.plan_file.digest.hex(), counted, 0.0, time.monotonic() - begun, len(held_out)),
        start.digest.hex(),
    )
    try:
        extras = encode_counts(counted, [Counts(one.correct, one.loss * one.total) for one in found])
    except ValueError as error:
        raise UserError(f"plan '{plan.name}': {error}", hint="register a part of the data set") from error
    quantizer = job.at(stage).quantizer

    def keep() -> None:
        vector = quantizer.tiles(np.empty(0, np.float32), counted, extras)
        site.store.keep_trained(plan.name, stage, vector, trained)

    patiently(keep)  # and nothing before it: a full disk must not classify every record again
    return trained
