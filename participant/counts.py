"""What a site's daemon counts while it runs, and where it is in rounds and trainings; lost when it stops.

Steps of a training are told as a share: without privacy their number says how many records there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from prometheus_client import CollectorRegistry

from participant.live import GOES_ON, NAMES, Live, seconds_of
from participant.phases import Phase
from privacy.errors import ProtocolError, Refusal, UserError, VeilsumError
from privacy.exposition import Family
from privacy.job import Job

REFUSALS = Family(
    "veilsum_participant_refusals_total",
    "counter",
    "Plans, offers and messages refused since the start, by class of reason: protocol, policy, user (a file here).",
    ("reason",),
)
CALL = Family(
    "veilsum_participant_call_seconds",
    "histogram",
    "How long calls to the coordinator take; Next waits up to 20 s for news.",
    ("method",),
)
FAILED = Family(
    "veilsum_participant_calls_failed_total", "counter", "Calls that the coordinator did not answer or refused."
)
SENT = Family("veilsum_participant_sent_bytes_total", "counter", "Bytes sent to the coordinator, repeats among them.")
RECEIVED = Family("veilsum_participant_received_bytes_total", "counter", "Bytes received from the coordinator.")
FAMILIES = (REFUSALS, CALL, FAILED, SENT, RECEIVED)
REASONS: dict[type[VeilsumError], str] = {ProtocolError: "protocol", Refusal: "policy", UserError: "user"}

Report = Callable[[int, int, float], None]


class Counts:
    """The counters, and the registry that they and other numbers are shown from."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._refusals = REFUSALS.counter(self.registry)
        self._calls = CALL.histogram(self.registry)
        self._failed = FAILED.counter(self.registry)
        self._sent = SENT.counter(self.registry)
        self._received = RECEIVED.counter(self.registry)
        #: When the coordinator last answered, Unix time; 0 before that.
        self.answered = 0.0
        #: Plan -> share of its training's steps that are done.
        self.training: dict[str, float] = {}
        #: Plan -> number and phase of the round that this process lives through.
        self.rounds: dict[str, tuple[int, str]] = {}
        #: Where the daemon is in a round now; replaced as a whole, since the page reads it from another thread.
        self.live: Live | None = None

    def refused(self, error: VeilsumError) -> None:
        """Something was refused here with this error."""
        self._refusals.labels(next(reason for kind, reason in REASONS.items() if isinstance(error, kind))).inc()

    def in_round(self, job: Job, stage: int, number: int, phase: Phase) -> None:
        """The daemon is in this phase of a round."""
        self.rounds[job.plan.name] = (number, type(phase).__name__.lower())
        name, before = NAMES.get(type(phase)), self.live
        if name is None:
            self.live = None
            return
        at, upload = time.time(), None
        if before is not None and (before.plan, before.stage, before.round) == (job.plan.name, stage, number):
            at = before.since if before.phase in (name, GOES_ON.get(name)) else at
            upload = before.upload
        deadline = at + seconds_of(name, job.plan.deadlines)
        self.live = Live(job.plan.name, stage, job.plan.last, number, name, at, deadline, upload)

    def resuming(self, job: Job, stage: int, number: int) -> None:
        """The daemon goes on with an upload of a round whose phases it did not live through."""
        self.live = Live(job.plan.name, stage, job.plan.last, number, "uploading", time.time(), None)

    def uploaded(self, here: int, of: int) -> None:
        """So much of this site's upload is at the coordinator."""
        if self.live is not None:
            self.live = replace(self.live, upload=(here, of))

    def no_round(self) -> None:
        """The daemon is in no round any more."""
        self.live = None

    @contextmanager
    def call(self, method: str) -> Iterator[None]:
        """A call to the coordinator."""
        with self._failed.count_exceptions(), self._calls.labels(method).time():
            yield
        self.answered = time.time()

    def moved(self, *, sent: int = 0, received: int = 0) -> None:
        """Bytes went out or came in."""
        self._sent.inc(sent)
        self._received.inc(received)

    def watching(self, progress: Callable[[Job, int], Report]) -> Callable[[Job, int], Report]:
        """The same progress, noted here too."""

        def start(job: Job, stage: int) -> Report:
            shown = progress(job, stage)

            def report(step: int, steps: int, loss: float) -> None:
                self.training[job.plan.name] = step / steps if steps else 0.0
                shown(step, steps, loss)

            return report

        return start
