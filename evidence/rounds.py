"""One aggregation, twice: masked through the real round in this process, and in the clear beside it.

Sites, daemons, engine, store, transcript and certificate are the product's own; only gRPC and TLS are replaced by
direct calls (``tests/on_disk.py``). The release is computed from the verified outcome as any site or auditor would.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from coordinator import config, phases
from coordinator.engine import Engine
from participant.client import seen_hash
from participant.daemon import Daemon
from participant.prepare import rounding_key
from participant.store import Trained
from privacy.adapter import Tensors, Vector, start_digest
from privacy.factors import factors_file
from privacy.job import Job
from privacy.outcome import VerifiedCohort, combine, verify_cohort
from privacy.plan import PlanFile, parse_plan
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.messages import MaskedInput
from privacy.secagg.quantize import Quantizer, weighted_loss
from privacy.secagg.signed import Signed
from privacy.wire.convert import to_wire
from privacy.wire.transport import CHUNK_HEADER, chunk_bytes
from tests.on_disk import Direct, OnDisk

SITE = """keep_plain_vector = true
[models]
"{base}" = "base"
[datasets.{dataset}]
path = "data.jsonl"
format = "jsonl"
[policy]
plans = ["{plan}"]
min_cohort = 2
min_class_count = 1
min_texts = 1
"""


@dataclass(frozen=True)
class Contribution:
    """What one site's training leaves: its vector, its weight, and its loss."""

    delta: Vector
    examples: int
    loss: float


@dataclass(frozen=True)
class Aggregated:
    """The result of one round.

    Attributes:
        tensors: the release.
        facts: what its manifest says of the method.
        plain: the weighted mean of the float deltas, nothing masked or quantised, (d,) float64.
        difference: the largest difference, of one coordinate, of the mean in the unmasked total from ``plain``.
        tolerance: what stochastic rounding can make of it at most.
        clipped: share of all coordinates beyond the plan's clipping range.
        sent: bytes of protobuf messages and chunks that a site sends, mean over the sites.
        received: the same of what it receives, the total included.
    """

    tensors: Tensors
    facts: dict[str, Any]
    plain: NDArray[np.float64]
    difference: float
    tolerance: float
    clipped: float
    coordinates: int
    sent: float
    received: float


class Counting(Direct):
    """A site's client that also counts the bytes a network would carry."""

    def __init__(self, world: World, me: int) -> None:
        super().__init__(world, me)
        self.bytes_sent = self.bytes_received = 0

    def taken(self) -> tuple[int, int]:
        """(sent, received) since this was last asked."""
        found = self.bytes_sent, self.bytes_received
        self.bytes_sent = self.bytes_received = 0
        return found

    def send(self, round_id: bytes, message: FromMember) -> None:
        self.bytes_sent += _bytes(message, FromMember)
        super().send(round_id, message)

    def upload(self, round_id: bytes, message: Signed[MaskedInput], spool: Path, bits: int) -> None:
        length = spool.stat().st_size
        self.bytes_sent += _bytes(message, FromMember) + length + -(-length // chunk_bytes(bits)) * CHUNK_HEADER
        super().upload(round_id, message, spool, bits)

    def fetch_total(self, round_id: bytes, length: int, target: Path) -> None:
        super().fetch_total(round_id, length, target)
        self.bytes_received += target.stat().st_size

    def fetch_blocks(self, round_id: bytes, wanted: Sequence[tuple[int, int]]) -> Any:
        for content, path in super().fetch_blocks(round_id, wanted):
            self.bytes_received += len(content) + sum(map(len, path))
            yield content, path


def _bytes(message: Any, union: Any) -> int:
    found: int = to_wire(message, union).ByteSize()
    return found


#: Stage, and where it starts -> what the training of each site gives.
Gives = Callable[[int, Tensors], Sequence[Contribution]]


class World(OnDisk):
    """A coordinator and the sites of one plan, with what training gave."""

    def __init__(self, directory: Path, plan: PlanFile, contributions: Sequence[Contribution], factors: Path) -> None:
        self.contributions, self.factors = {1: contributions}, factors
        self.vectors: dict[tuple[int, int], NDArray[np.int32]] = {}
        p, r = plan.plan, plan.plan.round
        policy: dict[str, object] = {
            "max_colluders": r.max_colluders,
            "min_cohort": r.min_cohort,
            "min_survivors": r.min_survivors,
        }
        toml = SITE.format(base=p.base.name, dataset=p.data.dataset, plan=p.name)
        super().__init__(directory, len(contributions), plan.raw, policy, toml)
        self.job = replace(self.job, factors_directory=factors)

    def open(self) -> Engine:
        self._give_factors(config.load_home(self.federation.coordinator).factors)
        return super().open()

    def _give_factors(self, place: Path) -> None:
        """Everybody has the factors of a core: sites would compute them, the operator gives them to the coordinator."""
        core = parse_plan(self.plan).plan.aggregation.core
        if core is not None:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(factors_file(self.factors, core.factors), place)

    def restart(self, member: int) -> None:
        super().restart(member)
        self._give_factors(self.site(member).home.factors)
        self.daemons[member] = Daemon(self.site(member), Counting(self, member))

    def go_on(self, stage: int, contributions: Sequence[Contribution]) -> None:
        """Everybody comes to a later stage, and has trained for it."""
        self.contributions[stage] = contributions
        self.begin(stage)
        self.train()

    def weight_of(self, member: int, stage: int = 1) -> int:
        return 1 if self.job.plan.aggregation.weights == "uniform" else self.contributions[stage][member].examples

    def vector_of(self, member: int, stage: int = 1) -> NDArray[np.int32]:
        """As the product rounds: the same cell gives the same release."""
        if (member, stage) not in self.vectors:
            one, weight = self.contributions[stage][member], self.weight_of(member, stage)
            extras = {"weight": weight, "loss": weighted_loss(one.loss, weight)}
            self.vectors[member, stage] = self.job.at(stage).quantizer.quantize(
                one.delta, weight, extras, lambda size: rounding_key(self.job, stage, member)[:size]
            )
        return self.vectors[member, stage]

    def put_vector(self, member: int, vector: NDArray[np.int32], job: Job | None = None, stage: int = 1) -> None:
        job, one = job or self.job, self.contributions[stage][member]
        start = self.site(member).start_digest(job, stage).hex()
        weight = self.weight_of(member, stage)
        trained = Trained(job.plan_file.digest.hex(), weight, one.loss, 1.0, one.examples, start)
        self.site(member).store.keep_trained(job.plan.name, stage, vector, trained)

    def tell(self, member: int) -> bool:
        found = self.engine.message_for(self.digest, self.stage, member)
        if found is not None and self.seen.get(member) != seen_hash(found[1]):
            self.client(member).bytes_received += _bytes(found[1], ToMember)
        return super().tell(member)

    def client(self, member: int) -> Counting:
        client = self.daemons[member].client
        assert isinstance(client, Counting)
        return client

    def cohorts(self, start: bytes) -> list[VerifiedCohort]:
        """The released rounds of the stage, verified as a site or an auditor verifies them.

        Args:
            start: digest of where the stage starts.
        """
        found = self.engine.released(self.digest, self.stage)
        return [verify_cohort(self.job, self.stage, start, cohort.evidence, cohort.total) for cohort in found]


def plain_mean(contributions: Sequence[Contribution], weights: Sequence[int], clip: float) -> NDArray[np.float64]:
    """The weighted mean of the clipped float deltas, (d,) float64: nothing quantised, nothing masked."""
    total = np.zeros(len(contributions[0].delta), np.float64)
    for one, weight in zip(contributions, weights, strict=True):
        total += weight * np.clip(one.delta, -clip, clip).astype(np.float64)
    return total / sum(weights)


def rounding_bound(quantizer: Quantizer, members: int, weight: int) -> float:
    """How far the decoded mean can be from the mean of the floats: less than one unit from each member."""
    unit = quantizer.clip * quantizer.max_weight / (quantizer.qmax * weight)
    return members * unit + quantizer.clip * 2.0**-23  # the mean is rounded to float32 at the end


def secure_round(
    plan: PlanFile, contributions: Sequence[Contribution], start: Tensors, scratch: Path, factors: Path
) -> Aggregated:
    """:func:`secure_stages` of a plan with one stage."""
    (found,) = secure_stages(plan, lambda _stage, _start: contributions, start, scratch, factors)
    return found


def secure_stages(plan: PlanFile, gives: Gives, start: Tensors, scratch: Path, factors: Path) -> list[Aggregated]:
    """Stage by stage: mask, sum, unmask, certify and verify one cohort of all sites; and the same sum in the clear.

    Args:
        gives: what the sites train in a stage.
        start: the adapter that the deltas of stage 1 are relative to; a later stage starts from the release before.
        scratch: where the directories of the federation go; they are deleted.
        factors: directory with the factors of the method "core".

    Raises:
        AssertionError: no release, or a total that is not the plain sum. How far a mean is from that in the clear, and
            how far rounding explains it, is told: the report judges it.
    """
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    scratch.mkdir(parents=True, exist_ok=True)
    results: list[Aggregated] = []
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        world = World(Path(place) / "federation", plan, gives(1, start), factors)
        header = start_digest(world.job.start_tensors())
        for stage in range(1, plan.plan.stages + 1):
            if stage > 1:
                start = results[-1].tensors
                header = start_digest(start)
                world.go_on(stage, gives(stage, start))
            world.ready()
            world.run()
            assert isinstance(world.phase, phases.Released), world.phase
            results.append(_result(world, start, header))
        world.assert_exact()  # bit for bit the plain integer sums
        world.engine.store.close()
    return results


def _result(world: World, start: Tensors, header: bytes) -> Aggregated:
    stage = world.stage
    job, contributions = world.job.at(stage), world.contributions[stage]
    members = range(len(contributions))
    cohorts = world.cohorts(header)
    assert [c.survivors for c in cohorts] == [tuple(members)], "a site is missing in the total"
    assert all(c.certified for c in cohorts), "the sites did not recompute the total"
    weights = [world.weight_of(i, stage) for i in members]
    decoded = job.quantizer.decode_sum(world.totals(stage)[0][1], len(contributions))
    plain = plain_mean(contributions, weights, job.quantizer.clip)
    sent, received = zip(*(world.client(i).taken() for i in members), strict=True)
    found = combine(job, cohorts, start)
    return Aggregated(
        tensors=found.tensors,
        facts=found.facts,
        plain=plain,
        difference=float(np.abs(decoded.mean - plain).max()),
        tolerance=rounding_bound(job.quantizer, len(contributions), decoded.weight),
        clipped=float(np.mean([np.mean(np.abs(c.delta) > job.quantizer.clip) for c in contributions])),
        coordinates=job.quantizer.size,
        sent=float(np.mean(sent)),
        received=float(np.mean(received)),
    )
