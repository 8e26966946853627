"""Malicious members against an honest coordinator: they are named, or they spoil nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from coordinator import phases
from coordinator.round import CoordinatorRound
from privacy import merkle
from privacy.endings import stored
from privacy.errors import ProtocolError
from privacy.secagg import dealing
from privacy.secagg.dialogue import FromMember
from privacy.secagg.messages import (
    Advertise,
    Complaint,
    MaskedInput,
    MaskSecretShare,
    OutcomeVote,
    RoundAborted,
    SelfMaskShare,
    ShareRoot,
    Shares,
    SurvivorVote,
    UnmaskShares,
)
from privacy.secagg.quantize import Extra, Quantizer
from privacy.secagg.signed import Signed
from tests.adversary.world import body_of, changed, cheating, signed_by
from tests.simulation import Simulation, context_for, seeded

X = bytes(32)
CHEAT = 4  # who cheats unless a test says otherwise


def only_refusal(simulation: Simulation) -> ProtocolError:
    (error,) = simulation.coordinator_refusals
    assert isinstance(error, ProtocolError)
    return error


# --- M9: bad shares name their sender ---------------------------------------------------------------------------------


def share_list(message: Signed[UnmaskShares], place: int, share: Any) -> UnmaskShares:
    shares = message.body.shares
    return replace(message.body, shares=(*shares[:place], share, *shares[place + 1 :]))


RELEASES: dict[str, tuple[Callable[[Simulation, Any], Any], str]] = {
    "a share of nothing": (
        lambda _s, m: share_list(m, 0, SelfMaskShare(0, bytes(33))),
        "M9 of member 4: the share of member 0 does not match its hash in M3",
    ),
    "a share that is no field element": (
        lambda _s, m: share_list(m, 0, SelfMaskShare(0, b"\xff" * 33)),
        "M9 of member 4: the share of member 0 does not match its hash in M3",
    ),
    "the share of another owner": (
        lambda _s, m: share_list(m, 0, replace(m.body.shares[1], owner=0)),
        "M9 of member 4: the share of member 0 does not match its hash in M3",
    ),
    "a secret share of a survivor": (
        lambda _s, m: share_list(m, 0, MaskSecretShare(0, m.body.shares[0].share)),
        "M9 of member 4: wrong kind of share of 0",
    ),
    "a self share of the dropout": (
        lambda _s, m: share_list(m, 2, SelfMaskShare(2, m.body.shares[2].share)),
        "M9 of member 4: wrong kind of share of 2",
    ),
    "a share too few": (
        lambda _s, m: replace(m.body, shares=m.body.shares[1:]),
        "M9 of member 4: expected one share for each member of U2",
    ),
    "shares for another list": (
        lambda _s, m: replace(m.body, survivors=X),
        "M9: member 4 released for another survivor list",
    ),
    "shares for another T2": (lambda _s, m: replace(m.body, t2=X), "M9: member 4 released for another survivor list"),
}


@pytest.mark.parametrize(("change", "fragment"), RELEASES.values(), ids=RELEASES.keys())
def test_a_bad_share_names_its_sender_and_the_others_suffice(
    change: Callable[[Simulation, Any], Any], fragment: str
) -> None:
    simulation = cheating(UnmaskShares, change, n=7, silent={2: "M5"}, minimum=4)
    error = only_refusal(simulation)
    assert fragment in str(error)
    assert error.culprit == CHEAT
    assert isinstance(simulation.phase, phases.Released)  # t = 5 of the other five
    assert simulation.is_exact()


def test_a_cheat_that_repeats_itself_in_ever_new_words_is_named_once() -> None:
    """Each of its messages is a proof against it: kept all, they would fill memory and disk of the coordinator."""

    def hook(member: int, message: FromMember) -> FromMember:
        if member == CHEAT and isinstance(body_of(message), UnmaskShares):
            for word in range(20):
                bad = share_list(message, 0, SelfMaskShare(0, word.to_bytes(33, "big")))  # type: ignore[arg-type]
                with pytest.raises(ProtocolError, match="does not match its hash"):
                    simulation.coordinator.receive(signed_by(CHEAT, bad, simulation.context))
        return message

    simulation = Simulation(7, 0, silent={2: "M5"}, minimum=4, from_member=hook)
    simulation.run()
    assert len(simulation.coordinator.accusations) == 1
    assert isinstance(simulation.phase, phases.Released)


def test_a_bad_share_that_leaves_too_few_aborts_the_round() -> None:
    simulation = cheating(UnmaskShares, lambda _s, m: share_list(m, 0, SelfMaskShare(0, bytes(33))), silent={2: "M5"})
    assert only_refusal(simulation).culprit == CHEAT
    assert isinstance(simulation.phase, phases.Aborted)
    assert "expected at least 4 members to release shares, found 3; silent: 4" in simulation.phase.reason
    assert simulation.total is None


# --- single messages -------------------------------------------------------------------------------------------------


def leaf_changed(message: Shares, holder: int, **changes: Any) -> Shares:
    """Leaves that do not fit the signed root."""
    return Shares(tuple(changed(m, **changes) if m.holder == holder else m for m in message.leaves), message.root)


SINGLE: dict[str, tuple[type, Callable[[Simulation, Any], Any], str, int | None]] = {
    "keys of low order": (
        Advertise,
        lambda _s, m: changed(m.body, share_key=m.body.share_key[:1184] + X),
        "M1: key c of member 4: .*low-order",
        4,
    ),
    "one key for both uses": (
        Advertise,
        lambda _s, m: changed(m.body, mask_key=m.body.share_key),
        "M1: a key of member 4 is not its own",
        4,
    ),
    "the share key of another member": (
        Advertise,
        lambda s, m: changed(m.body, share_key=s.coordinator.phase.keys[0].body.share_key),  # type: ignore[union-attr]
        "M1: a key of member 4 is not its own",
        4,
    ),
    "leaves that do not have the signed root": (
        ShareRoot,
        lambda _s, m: leaf_changed(m, 1, self_share_hash=X),
        "M3 of member 4: the leaves do not have the signed root",
        4,
    ),
    "a leaf too few": (
        ShareRoot,
        lambda _s, m: Shares(m.leaves[1:], m.root),
        "M3 of member 4: expected one leaf for each member of the key list",
        None,
    ),
    "shares for another key list": (
        ShareRoot,
        lambda s, m: Shares(m.leaves, signed_by(4, replace(m.root.body, t1=X), s.context)),
        "M3: member 4 signed another key list",
        None,
    ),
    "an upload for another set of members": (
        MaskedInput,
        lambda _s, m: replace(m.body, t2=X),
        "M5: member 4 masked for another set of members",
        None,
    ),
    "an upload of another length": (
        MaskedInput,
        lambda _s, m: replace(m.body, length=1),
        "M5 of member 4: expected 72 bytes, found 1",
        None,
    ),
    "a vote for another list": (
        SurvivorVote,
        lambda _s, m: replace(m.body, survivors=X),
        "M7: member 4 signed another survivor list",
        None,
    ),
    "an outcome vote for another total": (
        OutcomeVote,
        lambda _s, m: replace(m.body, total=X),
        "M11: member 4 signed another total",
        4,
    ),
}


@pytest.mark.parametrize(("body", "change", "fragment", "culprit"), SINGLE.values(), ids=SINGLE.keys())
def test_a_bad_message_is_refused_and_the_round_goes_on(
    body: type, change: Callable[[Simulation, Any], Any], fragment: str, culprit: int | None
) -> None:
    simulation = cheating(body, change)
    error = only_refusal(simulation)
    assert re.search(fragment, str(error))
    assert error.culprit == culprit
    assert isinstance(simulation.phase, phases.Released)
    assert simulation.is_exact()


def misplaced(simulation: Simulation, message: Shares) -> Shares:
    own = changed(message.leaves[CHEAT], sealed_shares=bytes(1202))
    leaves = (*message.leaves[:CHEAT], own)
    root = ShareRoot(message.root.body.t1, merkle.root(dealing.leaf_hashes(leaves)))
    return Shares(leaves, signed_by(CHEAT, root, simulation.context))


def test_boxes_in_the_wrong_place_name_their_dealer() -> None:
    error = only_refusal(cheating(ShareRoot, misplaced))
    assert "M3 of member 4: misplaced boxes for member 4" in str(error)
    assert error.culprit == CHEAT


def quantizer() -> Quantizer:
    return Quantizer(22, 24, 5, 1.0, 100, (Extra("weight", 100),))


def test_a_garbled_total_is_refused() -> None:
    """One member adds what no quantiser gives: the sum is lost, but it is not taken for a result."""
    rule = quantizer()

    def vectors(member: int, message: FromMember) -> FromMember:
        if isinstance(body_of(message), Advertise):
            delta = np.full(22, 0.1, np.float32)
            vector = rule.quantize(delta, 10, {"weight": 10}, seeded(f"q {member}"))
            if member == CHEAT:
                vector[3] = 4 * rule.qmax + 7
            simulation.members[member].vector = vector
        return message

    simulation = Simulation(5, 1, size=rule.total_size, from_member=vectors, silent={0: "M5"})
    simulation.run()
    assert simulation.total is not None
    with pytest.raises(ProtocolError, match="garbled total: a coordinate lies beyond"):
        rule.decode(simulation.total, 4)


# --- the honest coordinator's own doors ------------------------------------------------------------------------------


def finished(n: int = 5) -> tuple[Simulation, dict[int, dict[type, FromMember]]]:
    """A good round, and everything that was said in it."""
    said: dict[int, dict[type, FromMember]] = {i: {} for i in range(n)}

    def hook(member: int, message: FromMember) -> FromMember:
        said[member][type(body_of(message))] = message
        return message

    return Simulation(n, 1, from_member=hook).run(), said


def test_a_late_upload_is_discarded() -> None:
    _, said = finished()
    simulation = cheating(MaskedInput, lambda _s, _m: None)
    assert isinstance(simulation.phase, phases.Released)
    late = simulation.members[CHEAT].machine.phase
    with pytest.raises(ProtocolError, match="MaskedInput of member 4 in phase Released"):
        simulation.coordinator.receive(late.own_input)  # type: ignore[union-attr]
    assert CHEAT not in simulation.survivors
    assert simulation.is_exact()
    assert said[CHEAT]


@pytest.mark.parametrize(("complaining", "silent"), [((1, 2), "none"), ((1,), "3"), ((), "3, 4")])
def test_a_round_that_ends_with_too_few_names_those_who_said_nothing(complaining: tuple[int, ...], silent: str) -> None:
    def hook(member: int, message: FromMember) -> FromMember:
        bad = member in complaining and isinstance(body_of(message), MaskedInput)
        return complaint(running, member, 0) if bad else message

    members = silent.split(", ") if silent != "none" else []
    running = Simulation(5, 1, silent={int(i): "M5" for i in members}, from_member=hook)
    running.run()
    assert isinstance(running.phase, phases.Aborted)
    assert running.phase.reason == f"expected at least 4 members with an upload, found 3; silent: {silent}"


def test_a_long_reason_is_cut_to_what_a_message_may_say() -> None:
    coordinator = CoordinatorRound(context_for(5, 1), (0, 1, 2))
    coordinator.abort(stored("x" * 400 + "y" * 101))
    told = coordinator.message_for(0)
    assert isinstance(told, RoundAborted)
    assert told.reason == "x" * 400 + "y" * 100


def test_a_member_that_was_not_invited_is_refused() -> None:
    _, said = finished()
    coordinator = CoordinatorRound(context_for(5, 1), (0, 1, 2))
    with pytest.raises(ProtocolError, match="M1: member 3 was not invited to this round"):
        coordinator.receive(said[3][Advertise])
    assert coordinator.missing() == (0, 1, 2)


def test_a_forged_second_message_names_nobody() -> None:
    """Only the shell's look at the TLS certificate stands between an innocent member and this."""
    simulation = cheating(MaskedInput, lambda s, m: changed(signed_by(4, m.body, s.context), sender=1))
    assert only_refusal(simulation).culprit is None


def complaint(simulation: Simulation, sender: int, accused: int, t1: bytes | None = None) -> Signed[Complaint]:
    phase = simulation.coordinator.phase
    assert isinstance(phase, phases.Uploading)
    made: Signed[Complaint] = signed_by(sender, Complaint(t1 or phase.cohort.t1, accused, "bad"), simulation.context)
    return made


COMPLAINTS: dict[str, tuple[Callable[[Simulation], Any], str]] = {
    "about a member that dealt nothing": (lambda s: complaint(s, 4, 7), "complaint of member 4: expected two members"),
    "about another round": (lambda s: complaint(s, 4, 1, X), "complaint of member 4 is about another round"),
    "with a forged signature": (
        lambda s: changed(complaint(s, 4, 1), signature=bytes(64)),
        "complaint: the signature of member 4 does not verify",
    ),
}


@pytest.mark.parametrize(("make", "fragment"), COMPLAINTS.values(), ids=COMPLAINTS.keys())
def test_a_bad_complaint_is_refused(make: Callable[[Simulation], Any], fragment: str) -> None:
    error = only_refusal(cheating(MaskedInput, lambda s, _m: make(s)))
    assert fragment in str(error)


@pytest.mark.parametrize("order", ["complaint first", "upload first"])
def test_a_member_either_uploads_or_complains(order: str) -> None:
    said: list[Any] = []

    def hook(member: int, message: FromMember) -> FromMember | None:
        if member != 2 or not isinstance(body_of(message), MaskedInput):
            return message
        said[:] = [complaint(running, 2, 1), message]
        first, second = said if order == "complaint first" else reversed(said)
        running.coordinator.receive(first)
        taken = running.coordinator.phase.complaints  # type: ignore[union-attr]
        assert taken == ({2: first} if order == "complaint first" else {})
        return second  # type: ignore[no-any-return]

    running = Simulation(5, 1, from_member=hook)
    running.run()
    expected = {
        "complaint first": ("M5: member 2 has complained instead", (0, 1, 3, 4)),
        "upload first": ("complaint: member 2 has uploaded already", (0, 1, 2, 3, 4)),
    }[order]
    assert (str(only_refusal(running)), running.survivors) == expected
    assert running.is_exact()


@pytest.mark.parametrize(("body", "step"), [(SurvivorVote, "M7"), (UnmaskShares, "M9"), (OutcomeVote, "M11")])
def test_a_dropout_has_no_say_after_the_survivors_are_fixed(body: type, step: str) -> None:
    """Member 2 dealt shares and then fell silent; what it signs later, with a good signature, does not count."""
    refused: list[str] = []

    def hook(member: int, message: FromMember) -> FromMember:
        if member == 0 and isinstance(body_of(message), body):
            with pytest.raises(ProtocolError, match=f"{step}: member 2 is not a survivor") as error:
                running.coordinator.receive(signed_by(2, body_of(message), running.context))
            refused.append(str(error.value))
        return message

    running = Simulation(5, 1, silent={2: "M5"}, from_member=hook)
    running.run()
    assert len(refused) == 1
    assert isinstance(running.phase, phases.Released)
    assert running.is_exact()
