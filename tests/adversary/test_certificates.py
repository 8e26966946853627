"""Attacks with certificates, and with good messages at the wrong time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from participant.phases import Dealing, Releasing, Uploading, Voting
from privacy.errors import ProtocolError
from privacy.secagg.messages import Certificate, MaskedInput, Offer, RoundAborted, SurvivorList, SurvivorVote
from tests.adversary.world import World, changed, signed_by
from tests.simulation import context_for

X = bytes(32)


def alien_vote(world: World, signer: int, **changes: Any) -> Any:
    return signed_by(signer, changed(world.last(0, SurvivorVote).body, **changes), world.context)


#: Sentence -> (votes beside those of 0, 1 and 2, what the refusal says). Of six members 4 colludes and 3 dropped out;
#: t = 4.
CERTIFICATES: dict[str, tuple[Callable[[World], list[Any]], str]] = {
    "a signature too few": (lambda _w: [], "M8: expected at least 4 signatures, found 3"),
    "a colluder's signature under another T2": (lambda w: [alien_vote(w, 4, t2=X)], "M7: member 4 signed another"),
    "a colluder's signature on another list": (
        lambda w: [alien_vote(w, 4, survivors=X)],
        "M7: member 4 signed another survivor list",
    ),
    "the signature of a dropout": (lambda w: [alien_vote(w, 3)], "M7: member 3 is not a survivor"),
    "a colluder's signature under another name": (
        lambda w: [changed(alien_vote(w, 4), sender=5)],
        "M7: the signature of member 5 does not verify",
    ),
    "a signature of another round": (
        lambda w: [signed_by(4, w.last(0, SurvivorVote).body, context_for(6, 1, round_number=2))],
        "M7: the signature of member 4 does not verify in this round",
    ),
}


@pytest.mark.parametrize(("attack", "fragment"), CERTIFICATES.values(), ids=CERTIFICATES.keys())
def test_a_bad_certificate_is_refused(attack: Callable[[World], list[Any]], fragment: str) -> None:
    world = World(6, corrupt=[4]).dealt().uploaded().voted(0, 1, 2, 4, 5)  # t = 4, member 3 is the dropout
    votes = Certificate((*world.certificate(0, 1, 2).votes, *attack(world)))
    world.refused(0, votes, fragment)


def test_shares_follow_one_certificate_only_and_a_repeat_gets_the_same_bytes() -> None:
    world = World(5, corrupt=[4]).dealt().uploaded().voted()
    first = world.tell(0, world.certificate(0, 1, 2, 3))
    machine = world.members[0].machine
    with pytest.raises(ProtocolError, match="a second, different Certificate in one round"):
        machine.handle(world.certificate(0, 1, 2, 4))
    assert isinstance(machine.phase, Releasing)
    assert world.tell(0, world.certificate(0, 1, 2, 3)) == first
    world.assert_never_both()


# --- messages out of their time -----------------------------------------------------------------------------------


def test_every_message_is_refused_in_every_phase_but_its_own() -> None:
    world = World(3)
    donor = World(3).dealt().uploaded().voted()
    later: dict[str, Any] = {
        "Inbox": donor.inbox(0),
        "SurvivorList": donor.survivor_list(),
        "Certificate": donor.certificate(0, 1, 2),
        "Offer": Offer(world.context.header),
    }
    for name in ("Inbox", "SurvivorList", "Certificate", "Offer"):
        world.refused(0, later[name], f"{name} from the coordinator in phase Advertising")
    world.dealt()
    assert isinstance(world.members[0].machine.phase, Dealing)
    for name in ("SurvivorList", "Certificate", "Offer"):
        world.refused(0, later[name], f"{name} from the coordinator in phase Dealing")
    world.uploaded()
    assert isinstance(world.members[0].machine.phase, Uploading)
    world.refused(0, later["Certificate"], "Certificate from the coordinator in phase Uploading")
    world.voted()
    assert isinstance(world.members[0].machine.phase, Voting)
    world.refused(0, donor.survivor_list(), "a second, different SurvivorList")


def test_an_abort_of_another_round_is_refused() -> None:
    world = World(3).dealt()
    stale = context_for(3, round_number=2).header
    world.refused(0, RoundAborted(stale, "no"), "aborts another round than this one")


def test_after_an_abort_nothing_is_released() -> None:
    world = World(3).dealt().uploaded().voted()
    world.tell(0, RoundAborted(world.context.header, "too few"))
    world.refused(0, world.certificate(0, 1, 2), "Certificate from the coordinator in phase Stopped")


def test_after_a_release_no_abort_is_accepted() -> None:
    world = World(3).dealt().uploaded().voted()
    world.tell(0, world.certificate(0, 1, 2))
    records = list(world.members[0].records)
    with pytest.raises(ProtocolError, match="RoundAborted from the coordinator in phase Releasing"):
        world.members[0].machine.handle(RoundAborted(world.context.header, "please"))
    assert world.members[0].records == records


def test_a_list_of_the_same_members_from_another_round_is_refused() -> None:
    """Replay: every signature is good, but of the round before."""
    world, before = World(3).dealt().uploaded(), context_for(3, round_number=7)
    listed = [signed_by(i, world.last(i, MaskedInput).body, before) for i in (1, 2)]
    attack = SurvivorList((world.last(0, MaskedInput), *listed))
    world.refused(0, attack, "M5: the signature of member 1 does not verify in this round")
