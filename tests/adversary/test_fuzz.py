"""Messages changed at random, in structure and in value, at every step: refused in words, never a crash.

Each change is made on the message as a tree of names, numbers and hex, so that most of them still decode; what then
arrives is well-formed and wrong. Nothing of it is acceptable, since everything a member acts on is signed or hashed.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from coordinator import phases
from privacy.errors import ProtocolError, VeilsumError
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.messages import Outcome, Shares
from tests.adversary.world import World
from tests.simulation import Simulation
from tests.vector_codec import from_json, to_json

CHANGES = 120


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    found: list[tuple[Any, Any]] = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found.append((tree, key))
        found += places(value)
    return found


def change(tree: Any, dice: random.Random) -> None:
    """One random change somewhere in the tree."""
    container, key = dice.choice(places(tree))
    value = container[key]
    if isinstance(value, int):
        container[key] = dice.choice([0, 1, 2, 3, 7, value + 1, 2**64 - 1])
    elif isinstance(value, str):
        raw = bytearray.fromhex(value) if all(c in "0123456789abcdef" for c in value) else bytearray()
        if raw:
            raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
        container[key] = dice.choice([raw.hex(), "00" * len(raw), "ff" * len(raw), ""])
    elif isinstance(value, list) and value:
        at = dice.randrange(len(value))
        dice.choice([lambda: value.pop(at), lambda: value.insert(at, value[at]), value.reverse, value.clear])()
    elif isinstance(value, dict):
        other = dice.choice([v for c, k in places(tree) if isinstance(v := c[k], dict)])
        container[key] = copy.deepcopy(other)


def changed_at_random(message: Any, union: Any, dice: random.Random) -> Any:
    """Another well-formed message, or None where the change cannot be said."""
    tree = to_json(message, union)
    for _ in range(dice.choice([1, 1, 2])):
        change(tree, dice)
    try:
        found = from_json(tree, union)
    except (ProtocolError, KeyError, TypeError, ValueError, AttributeError):
        return None  # not even a value of the type: the decoder's business, tested in test_messages
    return None if found == message else found


#: Message -> the world in which member 0 waits for it, and the message.
STEPS: dict[str, Callable[[], tuple[World, ToMember]]] = {
    "KeyList": lambda: (w := World(4, corrupt=[3]), w.key_list()),
    "Inbox": lambda: (w := World(4, corrupt=[3]).dealt(), w.inbox(0)),
    "SurvivorList": lambda: (w := World(4, corrupt=[3]).dealt().uploaded(), w.survivor_list()),
    "Certificate": lambda: (w := World(4, corrupt=[3]).dealt().uploaded().voted(), w.certificate(0, 1, 2)),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_a_member_refuses_every_changed_message(step: Callable[[], tuple[World, ToMember]]) -> None:
    world, message = step()
    dice, tried = random.Random(7), 0
    while tried < CHANGES:
        attack = changed_at_random(message, ToMember, dice)
        if attack is not None and type(attack) is type(message):
            world.refused(0, attack, "M[1-8]|^(key|inbox|survivor) list|inbox|certificate")
            tried += 1
    world.tell(0, message)  # and the state is good for the true one


def in_order(outcome: Outcome) -> Outcome:
    """The order of pair leaves says nothing, so it is left to the coordinator."""
    leaves = sorted(outcome.transcript.pair_leaves, key=lambda leaf: (leaf.owner, leaf.leaf.holder))
    return replace(outcome, transcript=replace(outcome.transcript, pair_leaves=tuple(leaves)))


def test_a_member_refuses_every_changed_outcome() -> None:
    def withhold(_member: int, message: ToMember) -> ToMember | None:
        return None if isinstance(message, Outcome) else message

    simulation = Simulation(4, 0, silent={3: "M5"}, to_member=withhold).run()
    assert isinstance(simulation.phase, phases.Released)
    outcome, machine = simulation.phase.outcome, simulation.members[0].machine
    dice, before, tried = random.Random(11), machine.phase, 0
    while tried < CHANGES:
        attack = changed_at_random(outcome, ToMember, dice)
        if isinstance(attack, Outcome) and in_order(attack) != outcome:
            with pytest.raises(ProtocolError):
                machine.handle(attack)
            assert machine.phase is before
            tried += 1
    machine.handle(outcome)


@pytest.mark.parametrize(
    "name", ["Advertise", "ShareRoot", "MaskedInput", "SurvivorVote", "UnmaskShares", "OutcomeVote"]
)
def test_the_coordinator_refuses_every_changed_message(name: str) -> None:
    """Of each message of member 1 twenty changed copies arrive first, then the true one: the total is exact."""
    dice = random.Random(13)
    accepted: list[FromMember] = []

    def hook(member: int, message: FromMember) -> FromMember:
        body = message.root.body if isinstance(message, Shares) else message.body
        tried = 0
        while member == 1 and type(body).__name__ == name and tried < 20:
            attack = changed_at_random(message, FromMember, dice)
            if attack is None or type(attack) is not type(message):
                continue
            tried += 1
            try:
                if simulation.coordinator.receive(attack):
                    accepted.append(attack)
            except VeilsumError:
                continue
        return message

    simulation = Simulation(4, 0, from_member=hook)
    simulation.run()
    assert not accepted
    assert isinstance(simulation.phase, phases.Released)
    assert simulation.is_exact()
