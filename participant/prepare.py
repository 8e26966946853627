"""Train first, join second: from records to the one quantised vector of a stage, all of it before any round."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
from numpy.typing import NDArray

from participant import charging
from participant.base_model import find_base
from participant.data import Examples
from participant.different import seen_of
from participant.factors import ensure_factors
from participant.holdout import split
from participant.judging import judge
from participant.patience import patiently
from participant.registry import Registry
from participant.site import Site
from participant.store import Quantised, Trained
from participant.task_data import TaskData, load_for
from participant.text_data import Records
from privacy.adapter import Tensors, check_start, save_peft
from privacy.errors import Refusal, UserError
from privacy.job import Job
from privacy.methods import merged
from privacy.secagg.masking import tiles_of
from privacy.secagg.quantize import weighted_loss
from privacy.stages import Start

if TYPE_CHECKING:
    from participant.training import TrainingResult

log = structlog.get_logger()

Progress = Callable[[int, int, float], None]
PLAIN_VECTOR = "plain-vector.npy"
ROUNDING_LABEL = b"veilsum/1/rounding\0"


def prepare(site: Site, job: Job, stage: int, progress: Progress | None = None, later: Start | None = None) -> Trained:
    """Train the stage's delta, unless an earlier run did, and keep it quantised; returns what training left.

    The stage of the evaluation trains nothing: its vector is the counts of ``participant/judging.py``.

    Args:
        later: where a stage after the first starts, as ``participant/fetch.py`` computed it here.

    Raises:
        UserError: data set, base model or start adapter are not what the plan says, or training diverged.
        Refusal: this stage's delta is spent, and was trained under another plan file of the same name, or from
            another start adapter.
    """
    job = job.at(stage)
    name, digest = job.plan.name, job.plan_file.digest.hex()
    ensure_factors(site, job)
    start, origin = _start(site, job, stage, later)
    kept = site.store.trained(name, stage)
    if kept is not None and kept.plan == digest and (kept.start or job.plan.adapter.digest) == origin:
        charging.charged(site, job, stage)
        return kept
    if site.spent(job, stage):
        raise Refusal(
            f"the delta of plan '{name}' {_whose(kept, digest)}; it takes a plan of another name to train again"
        )
    data = site.home.settings.datasets[job.plan.data.dataset]
    everything = load_for(job.plan, site.home.path(data.path), data, to_train=True)
    examples, held_out = split(everything, job.plan)
    weight = 0  # whoever judges sends counts, however many records it may train on
    if not job.plan.judges(stage):
        examples = _used(site, job, examples)
        weight = _weight(job, len(examples))
    patiently(lambda: Registry(site.home).take(job.plan.data.dataset, everything.texts))
    identity = charging.reserve(site, job, stage)
    if job.plan.judges(stage):
        assert later is not None
        charging.start(site, job, identity, None)
        return judge(site, job, stage, later, held_out, progress)
    log.info("training", plan=name)
    result = _train(site, job, identity, start, examples, progress)
    local = _local(job, start, result.delta)
    place, base_name = site.local_directory(name, stage), job.plan.base.name
    patiently(lambda: save_peft(place, local, adapter=job.plan.adapter, base_name=base_name))
    loss = result.loss if job.plan.privacy is None else 0.0  # an un-noised mean over the records
    trained = Trained(digest, weight, loss, result.seconds, result.examples, origin)
    patiently(lambda: _keep(site, job, stage, result.delta, trained))
    said = {"loss": round(loss, 4)} if job.plan.privacy is None else {}
    log.info("trained", plan=name, **said, seconds=round(result.seconds, 1))
    return trained


def _start(site: Site, job: Job, stage: int, later: Start | None) -> tuple[Tensors, str]:
    """The adapter that a stage starts from, and its digest in hex."""
    if stage == 1:
        tensors = job.start_tensors()
        check_start(tensors, job.plan.adapter)
        return tensors, job.plan.adapter.digest
    if later is None or later.digest != site.start_digest(job, stage):
        raise RuntimeError(f"stage {stage} needs the start that this site computed and kept")
    return later.tensors, later.digest.hex()


def _whose(kept: Trained | None, digest: str) -> str:
    """What became of a spent delta that is not the one this plan and start give."""
    if kept is None:
        return "is spent and was deleted"
    return f"is spent under another {'plan file' if kept.plan != digest else 'start adapter'}"


def _local(job: Job, start: Tensors, vector: NDArray[np.float32]) -> Tensors:
    """What this site's vector gives alone, at a server rate of 1."""
    return merged(start, vector.copy(), job.plan.with_server_lr(1.0), factors=job.factors()).tensors


def _used(site: Site, job: Job, examples: TaskData) -> TaskData:
    """What of the records that are not held out has a part in the vector of the stage.

    Raises:
        UserError: these are too few, for this stage or for a later one: then the site does not begin; or which of them
            are different cannot be said, as of :func:`participant.different.seen_of`.
    """

    def seen() -> Iterator[bytes]:
        return seen_of(job.plan, find_base(site.home, job.plan.base.name), examples)

    aggregation, own = job.plan_file.plan.aggregation, site.home.settings.policy
    least = max(aggregation.min_texts or 1, own.min_texts or 1)
    if aggregation.min_texts is not None:
        _enough_texts(seen(), least)
    if job.plan.aggregation.analytic is None or isinstance(examples, Records):
        return examples
    from participant.analytic import check_spread, frequent

    if isinstance(examples, Examples):
        return frequent(examples, job.plan, own.min_class_count or 1, seen())
    check_spread(examples, least, seen())
    return examples


def _enough_texts(seen: Iterable[Hashable], least: int) -> None:
    """Raise UserError unless the site has as many different texts as the plan and its own file ask for.

    Args:
        seen: what the model sees of each; no more of it is asked for than it takes.
        least: the larger of the two minima.
    """
    found: set[Hashable] = set()
    for one in seen:
        found.add(one)
        if len(found) >= least:
            return
    raise UserError(
        f"data: expected at least {least} different texts (min_texts), found {len(found)}",
        hint="sit this plan out, or agree on a smaller minimum",
    )


def _train(
    site: Site, job: Job, identity: str, start: Tensors, examples: TaskData, progress: Progress | None
) -> TrainingResult:
    """Train the charged job: START is durable before the first batch, after the self-test of a private one."""
    # torch takes seconds to import, and only this needs it.
    settings = site.home.settings
    about: dict[str, Any] = {
        "plan": job.plan,
        "base": find_base(site.home, job.plan.base.name),
        "start": start,
        "examples": examples,
        "device": settings.device,
        "threads": settings.threads,
        "progress": progress,
    }
    if job.plan.privacy is None:
        charging.start(site, job, identity, None)
        if job.plan.aggregation.analytic is not None:
            from participant.analytic import collect

            return collect(**about)
        from participant.training import train

        least = settings.policy.min_class_count or 1
        return train(**about, factors=job.factors(), rank=settings.max_rank, min_class_count=least)
    from participant.dp_sgd import train_private

    return train_private(**about, on_selftest=lambda found: charging.start(site, job, identity, found.to_json()))


def _weight(job: Job, examples: int) -> int:
    """What this site counts for; of a private data set the number of records is nobody's to know."""
    if job.plan.aggregation.weights == "uniform":
        return 1
    if job.plan.privacy is not None:
        return job.plan.privacy.nominal_size
    if examples > job.plan.round.max_weight:
        raise UserError(
            f"data set '{job.plan.data.dataset}': expected at most {job.plan.round.max_weight} examples "
            f"(round.max_weight of plan '{job.plan.name}'), found {examples}",
            hint="ask for a plan with a larger max_weight, or register a part of the data set",
        )
    return examples


def _keep(site: Site, job: Job, stage: int, delta: NDArray[np.float32], trained: Trained) -> None:
    clip = job.quantizer.clip
    clipped = sum(int(np.count_nonzero(np.abs(tile) > clip)) for tile in tiles_of(delta)) / len(delta)
    if clipped > 0.001:
        log.warning("clipping", plan=job.plan.name, share=round(clipped, 4), clip=clip)
    extras = {"weight": trained.weight, "loss": weighted_loss(trained.loss, trained.weight)}
    key, analytic = rounding_key(job, stage, site.me), job.plan.aggregation.analytic is not None
    try:
        tiles = job.quantizer.tiles(delta, trained.weight, extras, lambda size: key[:size])
    except ValueError as error:
        hint = "look at the base model and the records" if analytic else "a lower learning rate may help"
        raise UserError(f"plan '{job.plan.name}': {error}", hint=hint) from error
    site.store.keep_trained(job.plan.name, stage, tiles, trained)
    if site.home.settings.keep_plain_vector:
        kept = site.store.quantised(job.plan.name, stage)
        np.save(kept.path.with_name(PLAIN_VECTOR), np.memmap(kept.path, "<i4", "r"))


def rounding_key(job: Job, stage: int, member: int) -> bytes:
    """Key of the numbers that round a member's vector up or down: the same update gives the same release.

    It may be public, since it hides nothing: what is rounded is either not private, or has its noise already. Each
    member has its own, so that rounding errors of members do not add up.
    """
    about = stage.to_bytes(2, "big") + member.to_bytes(2, "big")
    return hashlib.sha256(ROUNDING_LABEL + job.plan_file.digest + about).digest()


def kept_vector(site: Site, job: Job, stage: int) -> Quantised:
    """The quantised vector that training kept, (d + extras,) int32 in a file, checked tile by tile.

    Raises:
        UserError: the file was damaged.
    """
    vector, wanted, qmax = site.store.quantised(job.plan.name, stage), job.quantizer.total_size, job.quantizer.qmax
    found = vector.path.stat().st_size if vector.path.exists() else 0
    if found != 4 * wanted or any(tile.max() > qmax or tile.min() < -qmax for tile in vector):
        raise UserError(
            f"{vector.path}: expected {wanted} quantised coordinates, found others",
            hint="the file is damaged: restore it, or sit out this stage",
        )
    return vector
