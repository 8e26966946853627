"""How each arm is measured; everything that aggregates goes through :mod:`evidence.rounds`."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from evidence.arms import CLIP
from evidence.bases import base_of
from evidence.bench import Bench, corpus_of
from evidence.cells import Cell, digest_of
from evidence.rounds import Aggregated, Contribution, plain_mean, rounding_bound, secure_round, secure_stages
from evidence.scoring import update_size
from evidence.tls import federate, largest_difference
from participant.analytic import collect, frequent
from participant.data import Examples
from privacy.adapter import Tensors
from privacy.aligned import plan_at
from privacy.methods import vector_size
from privacy.plan import Plan, PlanFile
from privacy.secagg.quantize import quantizer_for


def bench_of(cell: Cell, out: Path) -> Bench:
    """What the cell works with; the language model has its own."""
    corpus = corpus_of(cell.corpus)
    if cell.weights != "smollm2":
        return Bench(cell, corpus, base_of(cell.weights, out), out)
    from evidence.text import TextBench, smollm2

    return TextBench(cell, corpus, smollm2(out), out)


def measure(cell: Cell, out: Path) -> dict[str, Any]:
    """Measure one cell; the result as JSON.

    Raises:
        UserError: a package is missing, or training diverged.
    """
    bench = bench_of(cell, out)
    began, spent = time.monotonic(), time.process_time()
    kinds: dict[str, Callable[[Bench], dict[str, Any]]] = {
        "base": _base,
        "alone": _alone,
        "pooled": _pooled,
        "rounds": _rounds,
        "analytic": _analytic,
        "aligned": _aligned,
        "tls": _tls,
    }
    result = kinds[bench.arm.kind](bench)
    about = {"corpus_digest": bench.corpus.digest, "cpu_s": time.process_time() - spent}
    return result | about | {"wall_s": time.monotonic() - began}


def _base(bench: Bench) -> dict[str, Any]:
    plan = bench.plan().plan
    return bench.judge(plan, bench.start(plan))


def _pooled(bench: Bench) -> dict[str, Any]:
    plan = bench.plan(epochs=bench.cell.epochs).plan
    start = bench.start(plan)
    found = bench.train(plan, start, bench.corpus.train)
    tensors = bench.merge(plan, start, found.delta)
    return bench.judge(plan, tensors) | {"tau": update_size(plan, bench.base, start, tensors)}


def trained_sites(
    bench: Bench, plan: Plan, start: Tensors, parts: Sequence[Examples], later: str = ""
) -> list[Contribution]:
    """Every site's training of one round; what was trained before a kill, or for another arm, is not trained again.

    Args:
        parts: what each site trains on.
        later: names a later round of the cell, which nobody else needs.
    """
    c = bench.cell
    before = hashlib.sha256(b"".join(start[name].tobytes() for name in sorted(start))).hexdigest()
    about = {"split": c.split, "seed": c.seed, "sites": c.sites, "corpus": bench.corpus.digest, "start": before}
    trained = trained_as(plan)
    key = digest_of(about | {"training": training_part(trained)})
    place = bench.out / "local" / (f"later-{c.digest}-{later}-{key}" if later else key)
    place.mkdir(parents=True, exist_ok=True)
    found = []
    for site, examples in enumerate(parts):
        path = place / f"site-{site}.npz"
        if not path.exists():
            result = bench.train(trained, start, examples)
            staging = path.with_suffix(f".{time.time_ns()}.tmp.npz")
            np.savez(staging, delta=result.delta, about=np.array([result.examples, result.loss]))
            staging.replace(path)
        kept = np.load(path)
        vector = bench.vector(plan, start, kept["delta"], examples)
        found.append(Contribution(vector, int(kept["about"][0]), float(kept["about"][1])))
    return found


def trained_as(plan: Plan) -> Plan:
    """The plan that a site trains alike: a counted head and regmean change what is sent, and not what is trained."""
    aggregation = plan.aggregation
    if aggregation.counted is not None:
        aggregation = aggregation.model_copy(update={"head": "trained", "counted": None})
    if aggregation.regmean is not None:
        aggregation = aggregation.model_copy(update={"method": "freeze_a", "regmean": None})
    return plan.model_copy(update={"aggregation": aggregation})


def training_part(plan: Plan) -> dict[str, Any]:
    """What a site's training and its vector depend on in a plan; how the mean is taken and applied is none of it."""
    whole = plan.model_dump(mode="json")
    method = {key: whole["aggregation"][key] for key in ("method", "regmean", "fisher", "core")}
    return {key: whole[key] for key in ("base", "adapter", "data", "training")} | method | {"clip": plan.round.clip}


def _forget_later_rounds(bench: Bench) -> None:
    for place in (bench.out / "local").glob(f"later-{bench.cell.digest}-*"):
        shutil.rmtree(place, ignore_errors=True)


def _alone(bench: Bench) -> dict[str, Any]:
    """Each site with its own records only: the means over the sites."""
    plan = bench.plan(epochs=bench.cell.epochs)
    start = bench.start(plan.plan)
    found = []
    for one in trained_sites(bench, plan.plan, start, bench.parts):
        tensors = bench.alone(plan.plan, start, one.delta)
        found.append(bench.judge(plan.plan, tensors))
    means = {key: np.mean([one[key] for one in found], axis=0).tolist() for key in found[0]}
    return means | {"by_site": [one["accuracy"] for one in found]}


def _rounds(bench: Bench) -> dict[str, Any]:
    arm, cell = bench.arm, bench.cell
    assert cell.epochs % arm.rounds == 0, "the epochs are shared out evenly"
    start = tensors = bench.start(bench.plan().plan)
    rounds: list[dict[str, Any]] = []
    for number in range(1, arm.rounds + 1):
        plan = bench.plan(number, cell.epochs // arm.rounds)
        later = str(number) if number > 1 else ""
        contributions = trained_sites(bench, plan.plan, tensors, bench.parts, later)
        before = tensors
        found = secure_round(plan, contributions, before, bench.out / "scratch", bench.factors_directory)
        tensors = found.tensors
        sites = [bench.alone(plan.plan, before, c.delta) for c in contributions]
        rounds.append(_facts(found) | {"tau_sites": _mean_tau(bench, plan, before, sites)})
    result = _judged(bench, plan.plan, before, found)
    _forget_later_rounds(bench)
    return result | {"rounds": rounds, "tau": update_size(plan.plan, bench.base, start, tensors)}


def _judged(bench: Bench, plan: Plan, before: Tensors, found: Aggregated) -> dict[str, Any]:
    """How good a release is, and beside it what the same mean gives in the clear."""
    clear = bench.merge(plan, before, found.plain.astype(np.float32))
    result, in_clear = bench.judge(plan, found.tensors), bench.judge(plan, clear)
    pairs = zip(in_clear.get("right", ()), result.get("right", ()), strict=True)
    other = {"other_answers": sum(a != b for a, b in pairs)}
    return result | {"clear": {"accuracy": in_clear["accuracy"], "loss": in_clear["loss"]} | other}


def _tls(bench: Bench) -> dict[str, Any]:
    """Daemons over TLS; beside it the mean in the clear of what the same sites trained in this process."""
    plan = bench.plan(epochs=bench.cell.epochs)
    start = bench.start(plan.plan)
    (bench.out / "scratch").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=bench.out / "scratch") as place:
        tensors, facts = federate(Path(place) / "tls", plan, bench.base, bench.parts)
    contributions = trained_sites(bench, plan.plan, start, bench.parts)
    mean = plain_mean(contributions, [c.examples for c in contributions], CLIP)
    clear = bench.merge(plan.plan, start, mean.astype(np.float32))
    quantizer = quantizer_for(plan.plan, vector_size(plan.plan))
    bound = rounding_bound(quantizer, len(contributions), sum(c.examples for c in contributions))
    assert facts["secure_is_plain"], "the unmasked total is not the plain sum"
    difference = largest_difference(tensors, clear)
    clipped = float(np.mean([np.mean(np.abs(c.delta) > CLIP) for c in contributions]))
    one = facts | {"difference": difference, "tolerance": bound, "clipped": clipped}
    sites = [bench.alone(plan.plan, start, c.delta) for c in contributions]
    result = bench.judge(plan.plan, tensors)
    return result | {"rounds": [one | {"tau_sites": _mean_tau(bench, plan, start, sites)}]}


def _mean_tau(bench: Bench, plan: PlanFile, start: Tensors, sites: Sequence[Tensors]) -> dict[str, float]:
    found = [update_size(plan.plan, bench.base, start, tensors) for tensors in sites]
    return {key: float(np.mean([one[key] for one in found])) for key in found[0]}


def _facts(found: Aggregated) -> dict[str, Any]:
    names = ("facts", "difference", "tolerance", "clipped", "coordinates", "sent", "received")
    return {name: value for name, value in asdict(found).items() if name in names}


def _statistics(bench: Bench, plan: Plan, start: Tensors, parts: Sequence[Examples]) -> list[Contribution]:
    """What each site sends for an analytic head."""
    contributions = []
    for examples in parts:
        found = collect(plan=plan, base=bench.base, start=start, examples=examples, device="cpu", threads=1)
        contributions.append(Contribution(found.delta, found.examples, found.loss))
    return contributions


def _analytic(bench: Bench) -> dict[str, Any]:
    plan = bench.plan()
    start, parts = bench.start(plan.plan), [frequent(examples, plan.plan, 1) for examples in bench.parts]
    contributions = _statistics(bench, plan.plan, start, parts)
    aggregated = secure_round(plan, contributions, start, bench.out / "scratch", bench.factors_directory)
    result = bench.judge(plan.plan, aggregated.tensors)
    return result | {"rounds": [_facts(aggregated)]}


def _aligned(bench: Bench) -> dict[str, Any]:
    """One plan of two stages: the analytic head, and then all epochs of the adapter behind it."""
    plan = bench.plan(epochs=bench.cell.epochs)
    start, parts = bench.start(plan.plan), [frequent(examples, plan.plan, 1) for examples in bench.parts]

    def gives(stage: int, before: Tensors) -> list[Contribution]:
        if stage == 1:
            return _statistics(bench, plan_at(plan.plan, 1), before, parts)
        return trained_sites(bench, plan_at(plan.plan, stage), before, bench.parts)

    head, after = secure_stages(plan, gives, start, bench.out / "scratch", bench.factors_directory)
    return _judged(bench, plan_at(plan.plan, 2), head.tensors, after) | {
        "rounds": [_facts(head), _facts(after)],
        "tau": update_size(plan.plan, bench.base, start, after.tensors),
    }
