"""A federation on disk without a network: real sites and daemons, a real engine, and a client that calls it directly.

Everything that a site or a coordinator would write is written below one directory; a test restarts either end by
opening it again, and cuts the coordinator's power right after an event was stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from coordinator import config, phases
from coordinator.daemon import open_engine
from coordinator.engine import Engine
from coordinator.running import Running
from coordinator.store import Event, RoundRow
from coordinator.uploads import Uploads
from coordinator.work import Worker
from demo.federation import Federation
from participant.client import Block, Client, OfferedPlan, ReleasedCohort, seen_hash
from participant.daemon import Daemon
from participant.fetch import start_of
from participant.records import Record
from participant.running import RoundRun
from participant.site import Site
from participant.store import Trained
from privacy import faults
from privacy.console import Unreachable
from privacy.errors import Refusal
from privacy.job import Job
from privacy.plan import parse_plan
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.messages import MaskedInput
from privacy.secagg.signed import Signed
from privacy.vectors import read_total
from privacy.wire.transport import chunk_bytes
from tests.test_end_to_end import POLICY, SITE, toy_plan

R = TypeVar("R")
OTHER_DATA = '\n[datasets.other]\npath = "other.jsonl"\nformat = "jsonl"\n'


def full_disk(monkeypatch: pytest.MonkeyPatch, name: str, times: int = 1) -> None:
    """The disk is full the next ``times`` times this process passes a fault point."""
    monkeypatch.setattr(faults, "_on", True)
    monkeypatch.setattr(faults, "_fault", faults.Fault(name, 1, True, times))
    monkeypatch.setattr(faults, "_passed", 0)


class PowerCut(BaseException):
    """The coordinator's process ends here, whatever it was about to do."""


class Direct(Client):
    """A site's client that calls the engine in this process, and remembers what was sent."""

    def __init__(self, world: OnDisk, me: int) -> None:
        self.world, self.me, self.progress = world, me, 0
        self.sent: list[FromMember] = []

    def ready(self, plan: bytes, stage: int) -> tuple[int, int]:
        return self.world.call(lambda: self.world.engine.ready(plan, stage, self.me))

    def plans(self) -> list[OfferedPlan]:
        engine = self.world.engine
        return [OfferedPlan(p.toml, p.state, p.reason, engine.stage(p.digest)) for p in engine.store.plans()]

    def decline(self, plan: bytes, reason: str, *, waiting: bool) -> None:
        self.world.engine.decline(plan, self.me, reason, waiting=waiting)

    def releases(self, plan: bytes, stage: int) -> list[ReleasedCohort]:
        return [ReleasedCohort(c.round_id, stage, c.evidence) for c in self.world.engine.released(plan, stage)]

    def send(self, round_id: bytes, message: FromMember) -> None:
        self.sent.append(message)
        self.world.call(lambda: self.world.engine.receive(round_id, message))

    def upload(self, round_id: bytes, message: Signed[MaskedInput], spool: Path, bits: int) -> None:  # noqa: ARG002
        self.sent.append(message)
        self.world.call(lambda: self.put(round_id, message, spool.read_bytes()))

    def put(self, round_id: bytes, message: Signed[MaskedInput], content: bytes) -> None:
        """M5 with these bytes, whatever its root says."""
        uploads, size = self.world.uploads, chunk_bytes(self.world.job.rules.bits)
        for offset in range(uploads.begin(round_id, message), len(content), size):
            uploads.put(round_id, self.me, offset, memoryview(content)[offset : offset + size])
        uploads.finish(round_id, message)

    def fetch_total(self, round_id: bytes, length: int, target: Path) -> None:  # noqa: ARG002
        store = self.world.engine.store
        if not any(r.id == round_id and r.state == "released" for r in store.rounds()):
            raise Refusal("this round has no total")  # as the service says it
        target.write_bytes(store.total(round_id).read_bytes())

    def fetch_blocks(self, round_id: bytes, wanted: Sequence[tuple[int, int]]) -> Iterator[Block]:
        return (self.world.engine.upload_block(round_id, member, block) for member, block in wanted)


@dataclass
class OnDisk:
    """One coordinator and ``n`` sites, all in this process.

    Attributes:
        away: members that hear and say nothing.
        stage: that everybody here works on.
        cut: asked after every stored event whether the coordinator's power is cut now.
        events: every event ever stored, in order.
    """

    directory: Path
    n: int = 5
    plan: bytes = field(default_factory=toy_plan)
    policy: dict[str, object] = field(default_factory=lambda: dict(POLICY))
    site_toml: str = SITE
    away: set[int] = field(default_factory=set)
    cut: Callable[[Event], bool] = lambda _event: False
    events: list[Event] = field(default_factory=list)
    stage: int = 1
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        self.names = [f"site-{i}" for i in range(self.n)]
        toml = dict.fromkeys(self.names, self.site_toml + OTHER_DATA)
        self.federation = Federation(self.directory, self.names, self.policy, toml)
        self.federation.create()
        self.later = 0.0
        self.open()
        self.job = Job.of(parse_plan(self.plan), self.engine.roster)
        self.daemons: dict[int, Daemon] = {}
        self.runs: dict[int, RoundRun | None] = {}
        self.seen: dict[int, bytes] = {}
        for i in range(self.n):
            self.restart(i)
            self.put_vector(i, self.vector_of(i))
        self.digest = self.engine.submit_plan(self.plan)

    # --- the coordinator ---------------------------------------------------------------------------------------------

    def open(self) -> Engine:
        """Start the coordinator, or start it again from its disk."""
        if hasattr(self, "engine"):
            self.engine.store.close()
        self.engine = open_engine(config.load_home(self.federation.coordinator))
        self.engine.clock = lambda: time.time() + self.later
        self.uploads, self.worker = Uploads(self.engine, 16), Worker(self.engine)
        write, write_first = self.engine.store.add_event, self.engine.store.add_round

        def opened(row: RoundRow, first: Event) -> None:
            write_first(row, first)
            self.events.append(first)
            if self.cut(first):
                raise PowerCut

        def stored(round_id: bytes, event: Event, at: float) -> None:
            write(round_id, event, at)
            self.events.append(event)
            if self.cut(event):
                raise PowerCut

        self.engine.store.add_event = stored  # type: ignore[method-assign]
        self.engine.store.add_round = opened  # type: ignore[method-assign]
        return self.engine

    def call(self, work: Callable[[], R]) -> R:
        """A call of a site; a power cut in it looks like no answer, and the coordinator is started again."""
        try:
            return work()
        except PowerCut as error:
            self.open()
            raise Unreachable("the coordinator lost its power") from error

    @property
    def rounds(self) -> list[Running]:
        """The rounds of the stage, oldest first."""
        return self.engine.stage_rounds(self.digest, self.stage)

    @property
    def phase(self) -> phases.Phase:
        return self.rounds[-1].machine.phase

    def message_for(self, member: int) -> tuple[bytes, ToMember]:
        """What the coordinator has for a member now."""
        found = self.engine.message_for(self.digest, self.stage, member)
        assert found is not None
        return found

    # --- the sites ---------------------------------------------------------------------------------------------------

    def restart(self, member: int) -> None:
        """Start a site's daemon, or start it again from its disk: the machine of its round is gone."""
        site = Site.open(self.federation.site(self.names[member]))
        self.daemons[member] = Daemon(site, Direct(self, member))
        self.runs[member] = None
        self.seen.pop(member, None)

    def site(self, member: int) -> Site:
        return self.daemons[member].site

    def records(self, member: int) -> list[Record]:
        return self.site(member).store.all_records()

    def sent(self, member: int) -> list[FromMember]:
        """What a site sent since it was last started."""
        client = self.daemons[member].client
        assert isinstance(client, Direct)
        return client.sent

    def vector_of(self, member: int, stage: int = 1) -> NDArray[np.int32]:
        """The quantised vector of a member."""
        quantizer = self.job.at(stage).quantizer
        delta = np.linspace(-0.4, 0.4, quantizer.size, dtype=np.float32) * np.float32((member + 1) / 5)
        delta = np.roll(delta, 5 * (stage - 1))
        rand = np.random.default_rng(member + 1000 * (stage - 1))
        return quantizer.quantize(
            delta, 100 + member, {"weight": 100 + member, "loss": 1000}, lambda count: rand.bytes(count)
        )

    def put_vector(self, member: int, vector: NDArray[np.int32], job: Job | None = None, stage: int = 1) -> None:
        """Leave at a site what training would."""
        job = job or self.job
        start = self.site(member).start_digest(job, stage).hex()
        trained = Trained(job.plan_file.digest.hex(), 100 + member, 0.1, 1.0, 100 + member, start)
        self.site(member).store.keep_trained(job.plan.name, stage, vector, trained)

    def say(self, member: int, round_id: bytes, message: ToMember) -> None:
        """A site hears this message, wherever it comes from."""
        found = self.daemons[member]._hear(self.job.at(self.stage), self.stage, self.runs[member], round_id, message)
        self.runs[member] = found

    def tell(self, member: int) -> bool:
        """A site hears what the coordinator has for it; was it news?"""
        found = self.engine.message_for(self.digest, self.stage, member)
        if found is None or self.seen.get(member) == seen_hash(found[1]):
            return False
        self.seen[member] = seen_hash(found[1])
        self.say(member, *found)
        return True

    def ready(self, *members: int) -> None:
        for i in members or range(self.n):
            self.daemons[i]._ready(self.job, self.stage)

    def train(self, *members: int) -> None:
        """As :meth:`put_vector`, for a later stage: each site computes by itself where that starts."""
        for i in members or range(self.n):
            daemon = self.daemons[i]
            start_of(daemon.site, daemon.client, self.job, self.stage)
            self.put_vector(i, self.vector_of(i, self.stage), stage=self.stage)

    def begin(self, stage: int) -> None:
        """The coordinator goes on to this stage by itself; nobody has trained for it yet."""
        for _ in range(20):
            if self.engine.stage(self.digest) == stage:
                break
            if not self.work():
                self.wait(3600.0)
        assert self.engine.stage(self.digest) == stage
        self.stage, self.seen = stage, {}
        self.runs = dict.fromkeys(range(self.n))

    # --- both --------------------------------------------------------------------------------------------------------

    def work(self) -> bool:
        """Fold and unmask what waits for it."""
        try:
            return self.worker.work()
        except PowerCut:
            self.open()
            return True

    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.later += seconds
        try:
            self.engine.tick()
        except PowerCut:
            self.open()

    def run(self, until: type | tuple[type, ...] = (phases.Released, phases.Aborted)) -> OnDisk:
        """Everybody here talks until the last round is in such a phase; deadlines pass when nothing moves."""
        for _ in range(100):
            if self.rounds and isinstance(self.phase, until):
                return self
            moved = [self.tell(i) for i in range(self.n) if i not in self.away]
            moved += [self.work() for _ in range(3)]
            if not any(moved):
                self.wait(3600.0)
        raise AssertionError(f"expected the round to come to {until}, found {self.phase}")

    def plain_sum(self, members: tuple[int, ...], stage: int = 1) -> NDArray[np.int64]:
        plain = np.zeros(self.job.at(stage).quantizer.total_size, np.int64)
        for i in members:
            plain += self.vector_of(i, stage)
        return plain

    def totals(self, stage: int = 1) -> list[tuple[tuple[int, ...], NDArray[np.int64]]]:
        """Members and lifted total of every released round of a stage."""
        quantizer = self.job.at(stage).quantizer
        found = []
        for cohort in self.engine.released(self.digest, stage):
            packed = read_total(cohort.total, quantizer.total_size, quantizer.bits)
            found.append((cohort.survivors, quantizer.lift(packed)))
        return found

    def assert_exact(self) -> None:
        """Every released total is the plain sum, bit for bit, and no member is in two of one stage."""
        for stage in range(1, self.job.plan.stages + 1):
            members = [m for survivors, _ in self.totals(stage) for m in survivors]
            assert len(members) == len(set(members))
            for survivors, total in self.totals(stage):
                assert np.array_equal(total, self.plain_sum(survivors, stage))
