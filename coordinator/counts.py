"""What the coordinator counts while it runs: refusals, and how long calls and phases take; lost when it stops.

Labels are bounded by what the operator and the roster name: a caller of another name is counted as "other".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry

from coordinator import phases
from privacy.errors import ProtocolError, Refusal, UserError, VeilsumError
from privacy.exposition import Family

REFUSALS = Family(
    "veilsum_coordinator_refusals_total",
    "counter",
    "Calls refused since the start, by the caller's name in its certificate and by class of reason: protocol, policy, "
    "busy (come back later), slow, malformed, stranger, expired.",
    ("member", "reason"),
)
CALL = Family(
    "veilsum_coordinator_call_seconds",
    "histogram",
    "How long calls of members take; Next waits up to 20 s for news.",
    ("method",),
)
PHASE = Family(
    "veilsum_coordinator_phase_seconds",
    "histogram",
    "How long phases of rounds took; one that a restart interrupted counts from the restart.",
    ("phase",),
)
FAMILIES = (REFUSALS, CALL, PHASE)
REASONS: dict[type[VeilsumError], str] = {ProtocolError: "protocol", Refusal: "policy", UserError: "busy"}


def phase_name(phase: type) -> str:
    """A phase as labels and ``show`` have it."""
    return phase.__name__.lower()


PHASES = tuple(phase_name(phase) for phase in phases.ACCEPTS)


class Counts:
    """The counters, and the registry that they and other numbers are shown from."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        #: May this name be a label?
        self.is_member: Callable[[str], bool] = lambda _name: False
        self._refusals = REFUSALS.counter(self.registry)
        self._calls = CALL.histogram(self.registry)
        self._phases = PHASE.histogram(self.registry)

    def refused(self, caller: str, reason: str) -> None:
        """A call was refused."""
        self._refusals.labels(caller if self.is_member(caller) else "other", reason).inc()

    def refused_for(self, caller: str, error: VeilsumError) -> None:
        """A call was refused with this error."""
        self.refused(caller, next(reason for kind, reason in REASONS.items() if isinstance(error, kind)))

    @contextmanager
    def call(self, method: str) -> Iterator[None]:
        """A call of a method that exists."""
        with self._calls.labels(method.rpartition("/")[2]).time():
            yield

    def phase_ended(self, phase: type, seconds: float) -> None:
        """A phase of a round is over."""
        self._phases.labels(phase_name(phase)).observe(max(0.0, seconds))
