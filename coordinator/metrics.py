"""The coordinator's numbers for Prometheus, read from its state when they are asked for; docs/metrics.md lists them.

Nothing here changes anything, and no number is about a vector: bytes, phases, names of plans and of members.
"""

from __future__ import annotations

from collections.abc import Iterator

from cryptography import x509
from prometheus_client import ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from coordinator import phases
from coordinator.counts import PHASES, Counts, phase_name
from coordinator.engine import Engine
from coordinator.pulse import Wellbeing
from coordinator.running import Running
from coordinator.store import PlanRow
from privacy import __version__
from privacy.exposition import Family

PREFIX = "veilsum_coordinator"
PLAN_STATES = ("open", "released", "aborted", "cancelled")
ROUND_STATES = ("running", "released", "aborted")

INFO = Family(f"{PREFIX}_info", "gauge", "Always 1; says version and federation.", ("version", "federation"))
HEALTHY = Family(f"{PREFIX}_healthy", "gauge", "1 while the health service says SERVING, else 0.")
FREE = Family(f"{PREFIX}_disk_free_bytes", "gauge", "Bytes free where uploads go.")
EXPIRY = Family(
    f"{PREFIX}_certificate_expiry_timestamp_seconds", "gauge", "When the coordinator's TLS certificate expires."
)
MEMBERS = Family(f"{PREFIX}_members", "gauge", "Members of the roster.")
PLAN_STATE = Family(f"{PREFIX}_plan_state", "gauge", "1 for the state that a plan is in, else 0.", ("plan", "state"))
HELD = Family(
    f"{PREFIX}_plan_held", "gauge", "1 while no round of the plan can open: disk, or too many failures.", ("plan",)
)
STAGE = Family(f"{PREFIX}_plan_stage", "gauge", "Stage that members work on.", ("plan",))
READY = Family(f"{PREFIX}_members_ready", "gauge", "Members that say they are ready for the stage.", ("plan",))
RELEASED = Family(f"{PREFIX}_members_released", "gauge", "Members in a release of the stage.", ("plan",))
ROUNDS = Family(f"{PREFIX}_rounds", "gauge", "Rounds of all stages, by how they ended.", ("plan", "state"))
ROUND_PHASE = Family(
    f"{PREFIX}_round_phase", "gauge", "1 for the phase of the stage's last round, else 0.", ("plan", "phase")
)
ROUND_NUMBER = Family(f"{PREFIX}_round_number", "gauge", "Number of the stage's last round.", ("plan",))
DEADLINE = Family(
    f"{PREFIX}_phase_deadline_timestamp_seconds", "gauge", "When the phase of a running round closes.", ("plan",)
)
AWAITED = Family(
    f"{PREFIX}_member_awaited", "gauge", "1 for a member that a running round waits for.", ("plan", "member")
)
SENT = Family(
    f"{PREFIX}_member_sent_bytes_total", "counter", "Bytes that members sent about rounds.", ("plan", "member")
)
RECEIVED = Family(
    f"{PREFIX}_member_received_bytes_total", "counter", "Bytes that members received about rounds.", ("plan", "member")
)
UPLOADED = Family(
    f"{PREFIX}_member_upload_bytes_total", "counter", "Bytes of upload chunks, repeats among them.", ("plan", "member")
)
FAMILIES = (
    *(INFO, HEALTHY, FREE, EXPIRY, MEMBERS, PLAN_STATE, HELD, STAGE, READY, RELEASED, ROUNDS, ROUND_PHASE),
    *(ROUND_NUMBER, DEADLINE, AWAITED, SENT, RECEIVED, UPLOADED),
)


class EngineCollector(Collector):
    """Reads the engine."""

    def __init__(self, engine: Engine, wellbeing: Wellbeing) -> None:
        self._engine, self._wellbeing = engine, wellbeing

    def describe(self) -> Iterator[Metric]:
        """The families without numbers; the engine is not asked."""
        for family in FAMILIES:
            yield family.total() if family.kind == "counter" else family.gauge()

    def collect(self) -> Iterator[Metric]:
        """All numbers, of one moment."""
        roster = self._engine.roster.roster
        yield INFO.gauge(((__version__, roster.federation), 1))
        yield HEALTHY.gauge(((), not self._wellbeing.fault()))
        yield FREE.gauge(((), self._wellbeing.free()))
        yield EXPIRY.gauge(((), self._expiry()))
        yield MEMBERS.gauge(((), len(roster.members)))
        with self._engine.lock:
            plans = self._engine.store.plans()
            found = [*self._plans(plans), *self._rounds(plans)]
        yield from found
        yield from self._traffic(plans)

    def _expiry(self) -> float:
        raw = self._engine.home.tls_certificate.read_bytes()
        return x509.load_pem_x509_certificate(raw).not_valid_after_utc.timestamp()

    def _plans(self, plans: list[PlanRow]) -> Iterator[Metric]:
        engine, store = self._engine, self._engine.store
        stages = {plan.digest: engine.stage(plan.digest) for plan in plans}
        yield PLAN_STATE.gauge(*(((p.name, state), p.state == state) for p in plans for state in PLAN_STATES))
        yield HELD.gauge(*(((p.name,), bool(engine.held.get(p.digest))) for p in plans))
        yield STAGE.gauge(*(((p.name,), stages[p.digest]) for p in plans))
        yield READY.gauge(*(((p.name,), len(store.ready(p.digest, stages[p.digest]))) for p in plans))
        yield RELEASED.gauge(*(((p.name,), len(engine.done(p.digest, stages[p.digest]))) for p in plans))

    def _rounds(self, plans: list[PlanRow]) -> Iterator[Metric]:
        engine = self._engine
        every = {p.name: [r for r in engine.rounds.values() if r.row.plan == p.digest] for p in plans}
        yield ROUNDS.gauge(
            *(
                ((name, state), sum(r.row.state == state for r in rounds))
                for name, rounds in every.items()
                for state in ROUND_STATES
            )
        )
        last = {p.name: engine.stage_rounds(p.digest, engine.stage(p.digest))[-1:] for p in plans}
        now = [(name, running) for name, found in last.items() for running in found]
        yield ROUND_NUMBER.gauge(*(((name,), r.row.number) for name, r in now))
        yield ROUND_PHASE.gauge(
            *(((name, phase), phase_name(type(r.machine.phase)) == phase) for name, r in now for phase in PHASES)
        )
        going_on = [(name, r) for name, r in now if not _is_over(r)]
        yield DEADLINE.gauge(*(((name,), r.deadline) for name, r in going_on))
        names = engine.roster.roster.name
        yield AWAITED.gauge(*(((name, names(m)), 1) for name, r in going_on for m in r.machine.missing()))

    def _traffic(self, plans: list[PlanRow]) -> Iterator[Metric]:
        names, roster = {p.digest: p.name for p in plans}, self._engine.roster.roster
        found = [((names[plan], roster.name(member)), n) for plan, member, *n in self._engine.store.traffic_of_plans()]
        for place, family in enumerate((SENT, RECEIVED, UPLOADED)):
            yield family.total(*((labels, numbers[place]) for labels, numbers in found))


def _is_over(running: Running) -> bool:
    return isinstance(running.machine.phase, phases.Released | phases.Aborted)


def register(counts: Counts, engine: Engine, wellbeing: Wellbeing) -> None:
    """Show the engine's numbers beside what is counted, and those of the process."""
    counts.is_member = lambda name: any(name == member.name for member in engine.roster.roster.members)
    engine.phase_ended = counts.phase_ended
    counts.registry.register(EngineCollector(engine, wellbeing))
    ProcessCollector(registry=counts.registry)
