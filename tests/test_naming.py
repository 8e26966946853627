"""Accusations are read against the very round: its header, its key list and the share roots that T2 binds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from coordinator import phases
from privacy.encoding import decode, encode
from privacy.errors import ProtocolError
from privacy.secagg.dialogue import FromMember
from privacy.secagg.messages import AbortStatement, SelfMaskShare, UnmaskShares
from privacy.secagg.naming import Accusation, BadShare, accused, named
from privacy.secagg.signed import Signed, sign
from privacy.secagg.transcript import Cohort
from tests.simulation import Simulation, identity

CHEAT = 1


@cache
def cheated() -> Simulation:
    """Five members; one releases a share that nobody dealt to it."""

    def alter(member: int, message: FromMember) -> FromMember:
        body = getattr(message, "body", None)
        if member != CHEAT or not isinstance(body, UnmaskShares):
            return message
        shares = (SelfMaskShare(body.shares[0].owner, bytes(33)), *body.shares[1:])
        return sign(identity(member), member, replace(body, shares=shares), simulation.context.header_hash)

    simulation = Simulation(5, 1, from_member=alter)
    return simulation.run()


def accusation() -> Accusation:
    (found,) = cheated().coordinator.accusations
    return found


def test_a_bad_share_is_named_and_the_others_suffice() -> None:
    assert isinstance(cheated().phase, phases.Released)
    assert isinstance(accusation().evidence, BadShare)
    assert accused(cheated().context, accusation()) == CHEAT
    assert decode(Accusation, encode(accusation())) == accusation()


def test_an_accusation_of_another_round_is_refused() -> None:
    context = cheated().context
    other = replace(accusation(), header=replace(context.header, round=2))
    with pytest.raises(ProtocolError, match="it is of another round"):
        accused(context, other)


def test_a_share_released_under_other_share_roots_names_nobody() -> None:
    """The sender signed for another T2: what it released then says nothing about these leaves."""
    found = accusation()
    assert isinstance(found.evidence, BadShare)
    release: Signed[UnmaskShares] = found.evidence.release
    elsewhere = sign(identity(CHEAT), CHEAT, replace(release.body, t2=bytes(32)), cheated().context.header_hash)
    cohort = Cohort(cheated().context, found.keys)
    with pytest.raises(ProtocolError, match="released under other share roots"):
        named(cohort, found.roots, replace(found.evidence, release=elsewhere))


def test_an_abort_statement_of_somebody_who_holds_no_shares_is_not_counted() -> None:
    simulation = Simulation(5, 1, silent={3: "M1", 2: "M5", 4: "M5"}).run()
    assert isinstance(simulation.phase, phases.Aborted)
    before = dict(simulation.phase.statements)
    statement = sign(identity(3), 3, AbortStatement("x"), simulation.context.header_hash)
    with pytest.raises(ProtocolError, match="abort statement of member 3: it holds no shares of this round"):
        simulation.coordinator.receive(statement)
    assert simulation.phase.statements == before


def test_a_round_without_a_key_list_takes_no_abort_statements() -> None:
    simulation = Simulation(5, 1, silent=dict.fromkeys(range(3), "M1")).run()
    assert isinstance(simulation.phase, phases.Aborted)
    statement = sign(identity(4), 4, AbortStatement("x"), simulation.context.header_hash)
    with pytest.raises(ProtocolError, match="holds no shares of this round"):
        simulation.coordinator.receive(statement)
