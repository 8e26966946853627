"""A coordinator killed at any step goes on from its stored events; late members come back (protocol section 8)."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from coordinator import phases
from coordinator.proofs import proofs_for
from coordinator.round import CoordinatorRound
from coordinator.running import replay
from coordinator.store import Event
from privacy.encoding import encode
from privacy.secagg.dialogue import FromMember
from tests.simulation import Simulation


@dataclass
class Restarting(Simulation):
    """The coordinator's machine is thrown away after every event and built again from what was stored."""

    events: list[Event] = field(default_factory=list)
    restarts: int = 0

    def _restart(self) -> None:
        fresh = CoordinatorRound(self.context, self.coordinator.invited, self.proofs)
        for event in self.events:
            replay(fresh, event)
        for member in range(self.n):
            told, again = self.coordinator.message_for(member), fresh.message_for(member)
            assert type(told) is type(again)
            assert told is None or encode(told) == encode(again)
        self.coordinator = fresh
        self.restarts += 1

    def _deliver(self, index: int, reply: FromMember) -> bool:
        before = len(self.coordinator_refusals)
        moved = super()._deliver(index, reply)
        if moved and len(self.coordinator_refusals) == before:
            self.events.append(Event("message", encode(reply, FromMember)))
            self._restart()
        return moved

    def _close(self) -> None:
        self.events.append(Event("close", b""))
        super()._close()
        self._restart()

    def _shell(self) -> None:
        before = type(self.coordinator.phase)
        super()._shell()
        if before is phases.Folding:
            self.events.append(Event("sum", b""))
        elif before is phases.Publishing:
            phase = self.coordinator.phase
            assert isinstance(phase, phases.Confirming)
            self.events.append(Event("publish", phase.outcome.root))
        if before in (phases.Folding, phases.Publishing):
            self._restart()


@pytest.mark.parametrize("silent", [{}, {1: "M3"}, {1: "M5"}, {1: "M7"}, {1: "M9"}], ids=str)
def test_a_coordinator_killed_after_every_event_completes_the_round(silent: dict[int, str]) -> None:
    simulation = Restarting(5, 1, silent=silent)
    simulation.run()
    assert isinstance(simulation.phase, phases.Released)
    assert simulation.is_exact()
    assert simulation.restarts > 20


def test_a_late_member_and_new_ones_make_the_next_cohort() -> None:
    """Eight members, five at first; one of them uploads too late and joins the other three, by proof (b)."""
    first = Simulation(8, 1, invited=(0, 1, 2, 3, 4), silent={4: "M5"}).run()
    assert isinstance(first.phase, phases.Released)
    assert first.survivors == (0, 1, 2, 3)
    later = (4, 5, 6, 7)
    proofs = {m: proofs_for([first.coordinator], m) or () for m in later}
    assert len(proofs[4]) == 1
    assert proofs[5] == ()
    second = Simulation(8, 1, round_number=2, invited=later, proofs=proofs, disks=first.disks).run()
    assert isinstance(second.phase, phases.Released)
    assert second.survivors == later
    assert second.is_exact()
    assert not set(first.survivors) & set(second.survivors)
