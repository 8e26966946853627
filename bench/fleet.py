"""A real coordinator process and many members that train nothing, over mutual TLS on loopback.

The members are the real ones (``participant/running.py``, ``participant/client.py``), one thread each in this process,
with a quantised vector that lies where training would have left it. Only their pace is set here: how many compute at
the same time, and that all uploads start together.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import structlog

from coordinator.config import load_home as load_coordinator
from demo.federation import Federation
from participant.client import Client, seen_hash
from participant.config import load_home as load_site
from participant.patience import patiently
from participant.phases import Finished, Stopped
from participant.running import RoundRun, join
from participant.site import Site
from participant.store import Store, Trained
from privacy.adapter import start_adapter, start_digest
from privacy.evidence import TOTAL_FILE
from privacy.job import Job
from privacy.plan import parse_plan
from privacy.roster import load_roster
from privacy.secagg.dialogue import ToMember
from privacy.secagg.messages import MaskedInput, Offer, RoundAborted
from privacy.secagg.signed import Signed
from privacy.sections import Adapter
from privacy.vectors import read_total

STAGE = 1
WEIGHT = 100
RANK, INPUTS = 8, 16  # small A matrices: computing them is not what is measured
ROUND_S = 900.0
ZERO = "0" * 64

SITE = """[models]
none = "base"
[datasets.none]
path = "none.jsonl"
format = "jsonl"
[policy]
plans = ["*"]
"""

PLAN = """name = "{name}"
task = "generation"
[base]
name = "none"
digest = "{zero}"
[adapter]
rank = {rank}
alpha = 16.0
seed = "{zero}"
digest = "{digest}"
[adapter.modules]
{modules}
[data]
dataset = "none"
[generation]
template = "none"
[training]
loss = "cross_entropy"
epochs = 1
learning_rate = 0.001
batch_size = 4
[round]
max_cohort = {n}
min_cohort = {n}
min_survivors = {least}
max_colluders = 1
bits = 24
clip = 0.05
max_weight = 1000
[deadlines]
join_s = 600
share_s = 600
upload_s = 900
sign_s = 600
unmask_s = 600
outcome_s = 900
"""


def plan_text(name: str, size: int, n: int) -> bytes:
    """A plan whose adapter trains ``size`` coordinates, a multiple of 8 * RANK, in eight modules."""
    outputs, rest = divmod(size, 8 * RANK)
    if rest:
        raise ValueError(f"expected a multiple of {8 * RANK} coordinates, found {size}")
    modules = {f"layer.{i}": (outputs, INPUTS) for i in range(8)}
    adapter = Adapter(rank=RANK, alpha=16.0, seed=ZERO, digest=ZERO, modules=modules)
    lines = "\n".join(f'"{module}" = [{outputs}, {INPUTS}]' for module in modules)
    digest = start_digest(start_adapter(adapter)).hex()
    text = PLAN.format(name=name, zero=ZERO, rank=RANK, digest=digest, modules=lines, n=n, least=max(3, n - 1))
    return text.encode()


@dataclass
class Pace:
    """What the threads of all members share.

    Attributes:
        computing: how many members mask or check at a time.
        start: where all wait for each other before they upload.
    """

    computing: threading.Semaphore
    start: threading.Barrier
    began: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)

    @property
    def upload_s(self) -> float:
        """From the first byte of the first upload to the last receipt."""
        return max(self.ended) - min(self.began)


@dataclass
class PacedRun(RoundRun):
    """A member's round, with its heavy steps paced."""

    pace: Pace

    def handle(self, message: ToMember) -> None:
        with self.pace.computing:
            super().handle(message)

    def _upload(self, message: Signed[MaskedInput]) -> None:
        self.pace.computing.release()
        try:
            self.pace.start.wait(ROUND_S)
            self.pace.began.append(time.perf_counter())
            super()._upload(message)
            self.pace.ended.append(time.perf_counter())
        finally:
            self.pace.computing.acquire()


@dataclass(frozen=True)
class RoundTimes:
    """Wall seconds of one round: from its plan to the last member's last message, and of its upload phase."""

    round_s: float
    upload_s: float


class Fleet:
    """A federation of ``n`` members with vectors of ``size`` coordinates, under ``directory``."""

    def __init__(self, directory: Path, n: int, size: int) -> None:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
        self.n, self.size = n, size
        names = [f"site-{i}" for i in range(1, n + 1)]
        policy = {"max_colluders": 1, "min_cohort": n, "min_survivors": max(3, n - 1)}
        self.federation = Federation(directory, names, policy, dict.fromkeys(names, SITE), name="bench")
        self.federation.create()
        quantizer = self._job(plan_text("any", size, n)).quantizer
        delta = np.random.default_rng(0).normal(0, 0.01, size).astype(np.float32)
        #: Everybody's: what is in it does not matter here.
        self.vector = quantizer.quantize(delta, WEIGHT, {"weight": WEIGHT, "loss": 1000})

    @contextmanager
    def running(self) -> Iterator[None]:
        """The coordinator's process for as long as the block lasts; the end of its log with whatever goes wrong."""
        self.federation.start_coordinator()
        try:
            yield
        except Exception as error:
            error.add_note(self.federation.log_tail("coordinator"))
            raise
        finally:
            self.federation.stop_all()

    def _job(self, raw: bytes) -> Job:
        return Job.of(parse_plan(raw), load_roster(self.federation.coordinator / "roster.toml"))

    @property
    def port(self) -> int:
        """Where the coordinator listens."""
        return int(load_coordinator(self.federation.coordinator).settings.listen.rpartition(":")[2])

    @property
    def coordinator_pid(self) -> int:
        return self.federation.processes["coordinator"].pid

    @property
    def names(self) -> Sequence[str]:
        return self.federation.names

    def run_round(self, plan: str, pace: Pace, port: int | None = None) -> RoundTimes:
        """One round of all members; every one of them has verified the total when this returns.

        Args:
            port: loopback port to dial instead of the coordinator's own.
        """
        raw = plan_text(plan, self.size, self.n)
        job = self._job(raw)
        self._put_vectors(job)
        path = self.federation.directory / f"{plan}.toml"
        path.write_bytes(raw)
        self.federation.operator("plan", "submit", str(path))
        began = time.perf_counter()
        with ThreadPoolExecutor(self.n) as pool:
            for done in [pool.submit(self._take_part, name, job, pace, port) for name in self.names]:
                done.result()
        return RoundTimes(time.perf_counter() - began, pace.upload_s)

    def _put_vectors(self, job: Job) -> None:
        """The vector where training would have left it: one file, linked to by every site."""
        stores = [Store(load_site(self.federation.site(name))) for name in self.names]
        trained = Trained(job.plan_file.digest.hex(), WEIGHT, 0.1, 1.0, WEIGHT)
        stores[0].keep_trained(job.plan.name, STAGE, self.vector, trained)
        first = stores[0].directory(job.plan.name, STAGE)
        for store in stores[1:]:
            for file in first.iterdir():
                os.link(file, store.directory(job.plan.name, STAGE) / file.name)

    def _take_part(self, name: str, job: Job, pace: Pace, port: int | None) -> None:
        """One member from "ready" to the end of its round, as ``participant/daemon.py`` does it."""
        site = Site.open(self.federation.site(name))
        address = f"localhost:{port}" if port else site.home.settings.coordinator
        client = Client(site.home.directory, address, site.roster, site.me)
        client.checkpoint = lambda: site.ledger(job.plan.data.dataset).checkpoint()
        try:
            patiently(client.hello)
            patiently(lambda: client.ready(job.plan_file.digest, STAGE))
            self._listen(site, client, job, pace)
        finally:
            client.close()

    def _listen(self, site: Site, client: Client, job: Job, pace: Pace) -> None:
        run: PacedRun | None = None
        seen, deadline = b"", time.monotonic() + ROUND_S
        while run is None or not isinstance(run.machine.phase, Finished):
            if time.monotonic() > deadline or (run is not None and isinstance(run.machine.phase, Stopped)):
                raise RuntimeError(f"{site.home.settings.member}: the round came to no end")
            found = patiently(lambda: client.next(job.plan_file.digest, STAGE, seen))  # noqa: B023
            if found is None:
                continue
            round_id, message = found
            seen = seen_hash(message)
            if isinstance(message, RoundAborted):
                raise RuntimeError(f"the round was aborted: {message.reason}")
            if isinstance(message, Offer):
                run = PacedRun(**vars(join(site, client, job, STAGE, round_id, message)), pace=pace)
            elif run is not None:
                run.handle(message)

    def spool(self, plan: str) -> Path:
        """The bytes that the first member uploaded."""
        return next((self.federation.site(self.names[0]) / "work" / plan / f"stage-{STAGE}").glob("spool-*.bin"))

    def check_total(self, plan: str) -> None:
        """Raise RuntimeError unless the released total is n times the one vector, coordinate for coordinate."""
        job = self._job(plan_text(plan, self.size, self.n))
        stage = self.federation.coordinator / "releases" / plan / f"stage-{STAGE}" / "rounds"
        path = next(stage.glob(f"*/{TOTAL_FILE}"))
        total = job.quantizer.lift(read_total(path, job.quantizer.total_size, job.rules.bits))
        if not np.array_equal(total, self.n * self.vector.astype(np.int64)):
            raise RuntimeError(f"plan {plan}: the released total is not the sum over all {self.n} members")
