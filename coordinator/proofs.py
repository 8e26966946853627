"""Who may join the next round of a stage, and with which retry proofs (protocol section 6); pure.

The coordinator does not know who spent its delta: everybody of U2 may have, once M4 was out. A member that may have is
eligible when there is a proof about each such round; members of a certified list may from then on only be in that very
list.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from coordinator import phases
from coordinator.round import CoordinatorRound
from privacy.secagg.messages import AbortProof, ListedInput, ListProof, RetryProof, SurvivorVote
from privacy.secagg.signed import Signed
from privacy.secagg.threshold import abort_quorum


@dataclass(frozen=True)
class OfferEntry:
    """The proofs in one member's offer."""

    member: int
    proofs: tuple[RetryProof, ...]


@dataclass(frozen=True)
class OfferTable:
    """The proofs of all offers of a round, as its first event keeps them."""

    entries: tuple[OfferEntry, ...]


def sharers_of(machine: CoordinatorRound) -> tuple[int, ...]:
    """Members that may have spent their delta in a round: U2 once M4 was out."""
    phase = machine.phase
    if isinstance(phase, phases.Aborted | phases.Uploading):
        return phase.sharers
    if isinstance(phase, phases.Joining | phases.Sharing):
        return ()
    return phase.closed.sharers


def _list_proof(machine: CoordinatorRound, closed: phases.Closed, votes: tuple[Signed[SurvivorVote], ...]) -> ListProof:
    listed = tuple(ListedInput(i.sender, i.body.root) for i in closed.inputs)
    return ListProof(machine.context.header, listed, votes)


def certified_list(machine: CoordinatorRound) -> ListProof | None:
    """The certified survivor list of a round that is over, if there is one."""
    phase = machine.phase
    if isinstance(phase, phases.HasTotal):
        return _list_proof(machine, phase.closed, phase.outcome.transcript.votes)
    closed = phase.closed if isinstance(phase, phases.Aborted) else None
    if closed is None or len(phase.votes) < closed.cohort.threshold:  # type: ignore[union-attr]
        return None
    return _list_proof(machine, closed, phase.votes)  # type: ignore[union-attr, arg-type]


def retry_proof(machine: CoordinatorRound, member: int) -> RetryProof | None:
    """What lets ``member`` mask the same delta again after this round, ``None`` for nothing yet."""
    listed, phase = certified_list(machine), machine.phase
    if listed is not None:
        return listed
    if not isinstance(phase, phases.Aborted) or phase.cohort is None:
        return None
    needed = abort_quorum(len(phase.cohort.members), machine.context.rules.colluders)
    if len(phase.statements) < needed or member not in phase.statements:
        return None
    return AbortProof(machine.context.header, tuple(phase.statements[i] for i in sorted(phase.statements)))


def proofs_for(earlier: Sequence[CoordinatorRound], member: int) -> tuple[RetryProof, ...] | None:
    """Proofs about every round in which ``member`` may have spent its delta; ``None`` while one is missing."""
    found = []
    for machine in earlier:
        if member in sharers_of(machine):
            proof = retry_proof(machine, member)
            if proof is None:
                return None
            found.append(proof)
    return tuple(found)


def open_bonds(earlier: Sequence[CoordinatorRound], done: Collection[int]) -> list[tuple[int, ...]]:
    """Members of each certified list whose total was never released: together again, or not at all. Oldest first."""
    found: dict[tuple[int, ...], None] = {}
    for machine in earlier:
        listed = certified_list(machine) if isinstance(machine.phase, phases.Aborted) else None
        if listed is not None and not any(entry.member in done for entry in listed.listed):
            found[tuple(entry.member for entry in listed.listed)] = None
    return list(found)
