"""The coordinator's machine step by step: what it takes once, whom it waits for, what it tells whom, what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from coordinator import phases
from privacy import merkle
from privacy.encoding import encode
from privacy.errors import ProtocolError
from privacy.secagg.dealing import leaf_hashes
from privacy.secagg.dialogue import FromMember
from privacy.secagg.messages import (
    AbortProof,
    Advertise,
    Complaint,
    KeyList,
    MaskedInput,
    Offer,
    OutcomeVote,
    ProjectionShare,
    RetryProof,
    SelfMaskShare,
    Shares,
    SurvivorVote,
    UnmaskShares,
)
from privacy.secagg.naming import BadShare
from privacy.secagg.signed import Signed, sign
from tests.simulation import Simulation, context_for, identity

N, C = 5, 1
#: Message a member sends -> phase in which the coordinator waits for it.
PHASES: dict[type, type] = {
    Advertise: phases.Joining,
    Shares: phases.Sharing,
    MaskedInput: phases.Uploading,
    SurvivorVote: phases.Signing,
    OutcomeVote: phases.Confirming,
    ProjectionShare: phases.Projecting,
}


def body_of(message: FromMember) -> object:
    return message if isinstance(message, Shares) else message.body


class Paused(Exception):
    """The round stands still here."""


def paused_at(kind: type, taken: int) -> tuple[Simulation, dict[int, Any]]:
    """A round in which ``taken`` members have sent a message of this kind, and what all others would say next."""
    said: dict[int, Any] = {}

    def from_member(member: int, message: FromMember) -> FromMember | None:
        if not isinstance(body_of(message), kind):
            return message
        said[member] = message
        return message if member < taken else None

    def close() -> None:
        raise Paused

    simulation = Simulation(N, C, from_member=from_member)
    simulation._close = close  # type: ignore[method-assign]
    with pytest.raises(Paused):
        simulation.run()
    return simulation, said


@pytest.mark.parametrize("kind", PHASES, ids=lambda kind: kind.__name__)
def test_every_phase_waits_for_exactly_those_that_have_not_answered(kind: type) -> None:
    simulation, said = paused_at(kind, 2)
    assert type(simulation.phase) is PHASES[kind]
    assert simulation.coordinator.missing() == (2, 3, 4)
    for member in (3, 2):
        assert simulation.coordinator.receive(said[member])
    assert simulation.coordinator.missing() == (4,)
    assert simulation.coordinator.receive(said[4])
    assert type(simulation.phase) is not PHASES[kind]


@pytest.mark.parametrize("kind", PHASES, ids=lambda kind: kind.__name__)
def test_a_repeat_changes_nothing_and_another_message_in_its_place_is_refused(kind: type) -> None:
    simulation, said = paused_at(kind, 1)
    before = encode(said[0])
    phase = simulation.phase
    for _ in range(2):
        assert simulation.coordinator.receive(said[0]) is False
    assert simulation.phase is phase
    other = said[0]
    signed = other.root if isinstance(other, Shares) else other
    changed: Any = replace(signed, signature=bytes(64))
    message: Any = replace(other, root=changed) if isinstance(other, Shares) else changed
    assert encode(message) != before
    with pytest.raises(ProtocolError, match=r"a second, different .* of member 0"):
        simulation.coordinator.receive(message)
    assert simulation.phase is phase
    assert simulation.coordinator.missing() == (1, 2, 3, 4)


def test_a_complaint_is_an_answer_too() -> None:
    simulation, _ = paused_at(MaskedInput, 2)
    phase = simulation.phase
    assert isinstance(phase, phases.Uploading)
    body = Complaint(phase.cohort.t1, 1, "no leaf")
    assert simulation.coordinator.receive(sign(identity(3), 3, body, simulation.context.header_hash))
    assert simulation.coordinator.missing() == (2, 4)


def test_t_releases_are_enough_and_one_less_is_not() -> None:
    simulation, said = paused_at(UnmaskShares, 3)
    phase = simulation.phase
    assert isinstance(phase, phases.Unmasking)
    assert phase.closed.cohort.threshold == 4
    assert simulation.coordinator.missing() == (3, 4)
    simulation.coordinator.receive(said[4])
    assert isinstance(simulation.phase, phases.Publishing)


# --- keys and shares --------------------------------------------------------------------------------------------------


def test_a_key_that_is_not_a_members_own_is_refused() -> None:
    simulation, said = paused_at(Advertise, 2)
    first, mine = said[0], said[3]
    assert isinstance(first, Signed)
    assert isinstance(mine, Signed)
    cases = [
        {"share_key": first.body.share_key},
        {"mask_key": first.body.mask_key},
        {"share_key": first.body.mask_key},
        {"share_key": mine.body.mask_key},
    ]
    for case in cases:
        body = replace(mine.body, **case)
        message = sign(identity(3), 3, body, simulation.context.header_hash)
        with pytest.raises(ProtocolError, match="a key of member 3 is not its own") as caught:
            simulation.coordinator.receive(message)
        assert caught.value.culprit == 3
    assert simulation.coordinator.receive(mine)


Change = Callable[[Shares], Shares]


def _with_leaf(shares: Shares, holder: int, **changes: Any) -> Shares:
    leaves = tuple(replace(leaf, **changes) if leaf.holder == holder else leaf for leaf in shares.leaves)
    return replace(shares, leaves=leaves)


MISPLACED: dict[str, Change] = {
    "no shares for a holder": lambda s: _with_leaf(s, 4, sealed_shares=b""),
    "shares for the owner": lambda s: _with_leaf(s, 2, sealed_shares=s.leaves[0].sealed_shares),
    "no seed for a higher member": lambda s: _with_leaf(s, 3, sealed_seed=b"", seed_hash=b""),
    "a seed for a lower member": lambda s: _with_leaf(
        s, 1, sealed_seed=s.leaves[3].sealed_seed, seed_hash=s.leaves[3].seed_hash
    ),
}


@pytest.mark.parametrize("what", MISPLACED)
def test_a_box_that_is_missing_or_misplaced_is_refused(what: str) -> None:
    simulation, said = paused_at(Shares, 2)
    mine = said[2]
    assert isinstance(mine, Shares)
    changed = MISPLACED[what](mine)
    body = replace(mine.root.body, root=merkle.root(leaf_hashes(changed.leaves)))
    message = replace(changed, root=sign(identity(2), 2, body, simulation.context.header_hash))
    with pytest.raises(ProtocolError, match="misplaced boxes") as caught:
        simulation.coordinator.receive(message)
    assert caught.value.culprit == 2
    assert simulation.coordinator.receive(mine)


# --- evidence ---------------------------------------------------------------------------------------------------------


def test_the_evidence_of_a_bad_share_is_the_message_with_the_leaf_and_root_it_breaks() -> None:
    simulation, said = paused_at(UnmaskShares, 2)
    phase, mine = simulation.phase, said[3]
    assert isinstance(phase, phases.Unmasking)
    assert isinstance(mine, Signed)
    assert isinstance(mine.body, UnmaskShares)
    lies = []
    for owner in (1, 2):
        shares = tuple(SelfMaskShare(s.owner, bytes(33)) if s.owner == owner else s for s in mine.body.shares)
        lies.append(sign(identity(3), 3, replace(mine.body, shares=shares), simulation.context.header_hash))
    for lie in lies:
        with pytest.raises(ProtocolError, match="does not match its hash") as caught:
            simulation.coordinator.receive(lie)
        assert caught.value.culprit == 3
    (accusation,) = simulation.coordinator.accusations  # one proof against a cheat is kept
    assert accusation.header == simulation.context.header
    assert (accusation.keys, accusation.roots) == (phase.closed.cohort.keys, phase.closed.roots)
    evidence = accusation.evidence
    assert isinstance(evidence, BadShare)
    assert evidence.release == lies[0]
    assert evidence.root == phase.closed.shares[1].root
    assert (evidence.leaf.owner, evidence.leaf.leaf) == (1, phase.closed.shares[1].leaves[3])
    other = said[4]
    assert isinstance(other, Signed)
    assert isinstance(other.body, UnmaskShares)
    shares = tuple(SelfMaskShare(s.owner, bytes(33)) if s.owner == 0 else s for s in other.body.shares)
    lie = sign(identity(4), 4, replace(other.body, shares=shares), simulation.context.header_hash)
    with pytest.raises(ProtocolError, match="does not match its hash"):
        simulation.coordinator.receive(lie)
    assert len(simulation.coordinator.accusations) == 2


# --- the end ----------------------------------------------------------------------------------------------------------


def test_a_silent_survivor_ends_the_round_with_the_votes_there_are_and_no_projection() -> None:
    simulation, said = paused_at(OutcomeVote, 3)
    simulation.coordinator.close_phase()
    phase = simulation.phase
    assert isinstance(phase, phases.Released)
    assert phase.votes == {i: said[i] for i in range(3)}
    assert phase.shares == {}


def test_a_silent_projection_ends_the_round_with_what_is_there() -> None:
    simulation, said = paused_at(ProjectionShare, 3)
    before = simulation.phase
    assert isinstance(before, phases.Projecting)
    simulation.coordinator.close_phase()
    phase = simulation.phase
    assert isinstance(phase, phases.Released)
    assert phase.votes == before.votes
    assert sorted(phase.votes) == [0, 1, 2, 3, 4]
    assert phase.shares == {i: said[i] for i in range(3)}


# --- what whom is told ------------------------------------------------------------------------------------------------


def test_an_offer_goes_to_the_invited_with_their_own_proofs() -> None:
    proofs: dict[int, tuple[RetryProof, ...]] = {2: (AbortProof(context_for(N, C).header, ()),)}
    simulation = Simulation(N, C, invited=(0, 1, 2, 4), proofs=proofs)
    header = simulation.context.header
    assert simulation.coordinator.message_for(2) == Offer(header, proofs[2])
    assert simulation.coordinator.message_for(0) == Offer(header, ())
    assert simulation.coordinator.message_for(3) is None
    assert Simulation(N, C).coordinator.message_for(3) == Offer(header, ())


def test_a_key_list_goes_to_its_members_only() -> None:
    simulation, _ = paused_at(Advertise, 4)
    simulation.coordinator.close_phase()
    phase = simulation.phase
    assert isinstance(phase, phases.Sharing)
    assert simulation.coordinator.message_for(0) == KeyList(phase.cohort.keys)
    assert simulation.coordinator.message_for(4) is None


def test_nothing_is_told_while_the_sum_is_made() -> None:
    simulation, said = paused_at(MaskedInput, 4)
    simulation.coordinator.receive(said[4])
    assert isinstance(simulation.phase, phases.Folding)
    assert [simulation.coordinator.message_for(i) for i in range(N)] == [None] * N
