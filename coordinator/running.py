"""A round that the engine runs: its machine, its clock, the replay of its events, and the evidence it gave."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from coordinator import phases
from coordinator.round import CoordinatorRound
from coordinator.store import Event, RoundRow
from privacy import endings
from privacy.encoding import decode, encode
from privacy.files import write_durably
from privacy.job import Job
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.naming import Accusation, accused
from privacy.sections import Deadlines

log = structlog.get_logger()


@dataclass
class Running:
    """A round that is not over, with the time by which its phase ends."""

    row: RoundRow
    job: Job
    machine: CoordinatorRound
    deadline: float
    #: Phase that the deadline belongs to.
    timed: type | None = None
    #: When that phase began.
    since: float = 0.0
    #: The round is over, and signatures may be missing in its release, or files lie there that nobody needs.
    unfinished: bool = False
    #: All M13 are there and their sum is wrong, although the total is right: a member lied, and nobody can say which.
    refuted: bool = False
    #: Work on it failed for want of space; tried again then.
    try_again: float = 0.0
    #: Shards of the total that are done, of how many; while it is unmasked.
    shards: tuple[int, int] = (0, 0)
    cache: dict[int, tuple[object, ToMember | None]] = field(default_factory=dict)

    @property
    def about(self) -> dict[str, Any]:
        """What lines of the log say they are about."""
        return {"plan": self.job.plan.name, "stage": self.row.stage, "round": self.row.number}

    @property
    def log(self) -> structlog.BoundLogger:
        bound: structlog.BoundLogger = log.bind(**self.about)
        return bound

    def asks_to_join(self, member: int) -> bool:
        """Does the round wait for this member to take or refuse its offer?"""
        return isinstance(self.machine.phase, phases.Joining) and member in self.machine.missing()

    def told(self) -> endings.Told:
        """Why the round is over without a total, or by whom its total is not confirmed, for people."""
        phase, name = self.machine.phase, self.job.roster.name
        if isinstance(phase, phases.Aborted):
            concerns = () if phase.culprit is None else (name(phase.culprit),)
            return endings.told("round", phase.reason, name, concerns)
        if isinstance(phase, phases.Released) and (silent := set(phase.closed.survivors) - set(phase.votes)):
            return endings.told("held", endings.unconfirmed(sorted(silent)), name)
        return endings.Told()

    def begin_phase(self, now: float) -> None:
        """The phase that the machine is in begins now, and with it its time."""
        phase = self.machine.phase
        self.timed, self.since = type(phase), now
        self.deadline = now + phase_seconds(phase, self.job.plan.deadlines)


def phase_seconds(phase: phases.Phase, deadlines: Deadlines) -> float:
    """How long a phase stays open for silent members."""
    return {
        phases.Joining: deadlines.join_s,
        phases.Sharing: deadlines.share_s,
        phases.Uploading: deadlines.upload_s,
        phases.Signing: deadlines.sign_s,
        phases.Unmasking: deadlines.unmask_s,
        phases.Confirming: deadlines.outcome_s,
        phases.Projecting: deadlines.outcome_s,
    }.get(type(phase), 86400.0)


def replay(machine: CoordinatorRound, event: Event) -> None:
    """Apply one stored event to a machine."""
    if event.kind == "message":
        machine.receive(decode(FromMember, event.payload))  # type: ignore[arg-type]
    elif event.kind == "close":
        machine.close_phase()
    elif event.kind == "sum":
        machine.sum_saved()
    elif event.kind == "publish":
        machine.publish(event.payload)
    elif event.kind == "abort":
        machine.abort(endings.stored(event.payload.decode()))


def keep_accusations(running: Running, directory: Path) -> None:
    """Evidence against a member goes to disk at once: the message that gave it is not an accepted one."""
    for number, accusation in enumerate(running.machine.accusations):
        path = directory / f"named-{number}.bin"
        if not path.exists():
            write_durably(path, encode(accusation))
            culprit = running.job.roster.name(accused(running.machine.context, accusation))
            running.log.error("cheat named", member=culprit, kind=type(accusation.evidence).__name__)


def names_in(running: Running, directory: Path) -> list[dict[str, Any]]:
    """Whom the evidence of a round names, for people and manifests."""
    found = []
    for path in sorted(directory.glob("named-*.bin")):
        raw = path.read_bytes()
        accusation = decode(Accusation, raw)
        culprit = running.job.roster.name(accused(running.machine.context, accusation))
        kind = type(accusation.evidence).__name__
        found.append({"round": running.row.number, "member": culprit, "kind": kind, "evidence": raw.hex()})
    return found
