"""Attacks on the random projection, M11 to M13 (protocol section 7): nobody chooses r, and no <r, x> is shown alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from coordinator import phases
from participant.phases import Confirmed, Finished, Projecting
from privacy.encoding import encode
from privacy.errors import ProtocolError
from privacy.secagg import projection, transcript
from privacy.secagg.dialogue import ToMember
from privacy.secagg.messages import NonceList, OutcomeVote, ProjectionShare
from privacy.secagg.signed import Signed
from tests.adversary.world import cheating, signed_by
from tests.simulation import Member, Simulation

N, CHEAT, DROPOUT = 5, 4, 3
X = bytes(32)


@dataclass
class Confirmation:
    """A round of five in which member 3 dropped out and every survivor waits for M12; member 4 colludes."""

    simulation: Simulation
    votes: tuple[Signed[OutcomeVote], ...]

    def member(self, i: int) -> Member:
        return self.simulation.members[i]

    def resigned(self, i: int, **changes: Any) -> Signed[OutcomeVote]:
        """An M11 of a colluder with other fields; it signs as many as it likes."""
        (vote,) = [v for v in self.votes if v.sender == i]
        found: Signed[OutcomeVote] = signed_by(i, replace(vote.body, **changes), self.simulation.context)
        return found

    def with_vote(self, vote: Signed[OutcomeVote]) -> NonceList:
        return NonceList(tuple(vote if v.sender == vote.sender else v for v in self.votes))


def confirmed() -> Confirmation:
    def withhold(_member: int, message: ToMember) -> ToMember | None:
        return None if isinstance(message, NonceList) else message

    simulation = Simulation(N, 1, silent={DROPOUT: "M5"}, to_member=withhold).run()
    phase = simulation.phase
    assert isinstance(phase, phases.Released)
    assert all(isinstance(simulation.members[i].machine.phase, Confirmed) for i in (0, 1, 2, 4))
    return Confirmation(simulation, tuple(phase.votes[i] for i in sorted(phase.votes)))


def shares_of(round_: Confirmation, message: Callable[[int], NonceList]) -> dict[int, Signed[ProjectionShare]]:
    """M13 of every survivor that takes its M12."""
    found: dict[int, Signed[ProjectionShare]] = {}
    for i in (0, 1, 2, 4):
        reply = round_.member(i).hear(message(i))
        if isinstance(reply, Signed) and isinstance(reply.body, ProjectionShare):
            found[i] = reply
    return found


# --- M12 that must be refused -----------------------------------------------------------------------------------------

LISTS: dict[str, tuple[Callable[[Confirmation], NonceList], str, int | None]] = {
    "a nonce that its owner did not commit to": (
        lambda c: c.with_vote(c.resigned(CHEAT, nonce=X)),
        "M11: the nonce of member 4 does not match its M1",
        CHEAT,
    ),
    "the nonce of another member": (
        lambda c: c.with_vote(c.resigned(CHEAT, nonce=c.votes[0].body.nonce)),
        "M11: the nonce of member 4 does not match its M1",
        CHEAT,
    ),
    "a nonce opened for another total": (
        lambda c: c.with_vote(c.resigned(CHEAT, total=X)),
        "M11: member 4 signed another total",
        CHEAT,
    ),
    "a vote of another round's T2": (
        lambda c: c.with_vote(c.resigned(CHEAT, t2=X)),
        "M11: member 4 signed another total",
        CHEAT,
    ),
    "a survivor left out": (
        lambda c: NonceList(c.votes[:-1]),
        "M12: expected the nonce of every survivor, found 3 of 4",
        None,
    ),
    "nobody": (lambda _c: NonceList(()), "M12: expected the nonce of every survivor, found 0 of 4", None),
    "a dropout in place of a survivor": (
        lambda c: NonceList(
            (*c.votes[:3], signed_by(DROPOUT, c.votes[0].body, c.simulation.context)),
        ),
        "M12: expected the nonce of every survivor, found 4 of 4",
        None,
    ),
    "a dropout besides": (
        lambda c: NonceList((*c.votes[:3], signed_by(DROPOUT, c.votes[0].body, c.simulation.context), c.votes[3])),
        "M12: expected the nonce of every survivor, found 5 of 4",
        None,
    ),
    "a vote that the coordinator signed itself": (
        lambda c: c.with_vote(replace(c.votes[1], signature=c.votes[0].signature)),
        "M11: the signature of member 1 does not verify in this round",
        None,
    ),
}


@pytest.mark.parametrize(("make", "reason", "culprit"), LISTS.values(), ids=LISTS.keys())
def test_a_bad_nonce_list_is_refused_and_nothing_is_projected(
    make: Callable[[Confirmation], NonceList], reason: str, culprit: int | None
) -> None:
    round_ = confirmed()
    for i in (0, 1, 2):
        machine, before = round_.member(i).machine, round_.member(i).machine.phase
        with pytest.raises(ProtocolError, match=reason) as caught:
            machine.handle(make(round_))
        assert caught.value.culprit == culprit
        assert machine.phase is before
        machine.handle(NonceList(round_.votes))  # the good one is still welcome
        assert isinstance(machine.phase, Projecting)


def test_a_coordinator_that_grinds_totals_finds_no_nonces_for_a_second_one() -> None:
    """r is fixed by H(total) and nonces that are open only then: trying totals until one escapes needs both."""
    round_ = confirmed()
    phase = round_.simulation.phase
    assert isinstance(phase, phases.Released)
    for attempt in range(20):
        ground = transcript.total_hash(phase.closed.t2, bytes([attempt]) * 32)
        votes = NonceList(tuple(replace(v, body=replace(v.body, total=ground)) for v in round_.votes))
        with pytest.raises(ProtocolError, match="signature of member 0 does not verify"):
            round_.member(1).machine.handle(votes)
    assert isinstance(round_.member(1).machine.phase, Confirmed)


def test_two_nonce_lists_to_two_halves_give_one_projection() -> None:
    """The colluder signs M11 twice, with other blocks; the nonce it committed to is the same, and so is r."""
    round_ = confirmed()
    other = round_.with_vote(round_.resigned(CHEAT, blocks=(0,)))
    assert encode(other) != encode(NonceList(round_.votes))
    shares = shares_of(round_, lambda i: other if i in (0, 1) else NonceList(round_.votes))
    total = round_.votes[0].body.total
    key = projection.challenge({v.sender: v.body.nonce for v in round_.votes}, total)
    wanted = projection.project(key, round_.simulation.plain_sum())
    assert sum(s.body.value for s in shares.values()) % projection.WORD == wanted


def test_a_repeated_nonce_list_never_gets_a_second_projection() -> None:
    round_ = confirmed()
    member, message = round_.member(0), NonceList(round_.votes)
    first = member.hear(message)
    assert isinstance(first, Signed)
    assert isinstance(member.machine.phase, Finished)
    step = member.machine.handle(message)
    assert step.records == ()
    assert step.reply is None or encode(step.reply) == encode(first)
    with pytest.raises(RuntimeError, match="belongs to phase Projecting"):
        member.machine.project(1)


def test_a_second_nonce_list_is_refused_after_the_first() -> None:
    round_ = confirmed()
    machine = round_.member(0).machine
    round_.member(0).hear(NonceList(round_.votes))
    with pytest.raises(ProtocolError, match="a second, different NonceList in one round"):
        machine.handle(round_.with_vote(round_.resigned(CHEAT, blocks=(0,))))
    assert isinstance(machine.phase, Finished)


def test_a_member_that_is_not_in_the_sum_projects_nothing() -> None:
    """It uploaded too late: a projection of its vector would belong to no total."""
    round_ = confirmed()
    machine = round_.member(DROPOUT).machine
    before = machine.phase
    with pytest.raises(ProtocolError, match="NonceList from the coordinator in phase Uploading"):
        machine.handle(NonceList(round_.votes))
    assert machine.phase is before


# --- M13 at the coordinator -------------------------------------------------------------------------------------------


def test_a_projection_of_another_total_names_its_sender() -> None:
    simulation = cheating(ProjectionShare, lambda _s, m: replace(m.body, total=X))
    (error,) = simulation.coordinator_refusals
    assert isinstance(error, ProtocolError)
    assert error.culprit == CHEAT
    assert "M13: member 4 projected another total" in str(error)
    assert isinstance(simulation.phase, phases.Released)
    assert simulation.is_exact()


def test_a_projection_of_a_member_that_did_not_survive_is_refused() -> None:
    round_ = confirmed()
    phase = round_.simulation.phase
    assert isinstance(phase, phases.Released)
    closed = phase.closed
    total = round_.votes[0].body.total
    stranger = signed_by(DROPOUT, ProjectionShare(closed.t2, total, 7), round_.simulation.context)
    with pytest.raises(ProtocolError, match="M13: member 3 is not a survivor"):
        transcript.check_projection(round_.simulation.context, closed.survivors, closed.t2, total, stranger)
    simulation = Simulation(N, 1, silent={0: "M13"}).run()  # member 0 does not answer in time
    assert isinstance(simulation.phase, phases.Released)
    with pytest.raises(ProtocolError, match="ProjectionShare of member 0 in phase Released"):
        simulation.coordinator.receive(signed_by(0, ProjectionShare(closed.t2, total, 7), simulation.context))


def test_a_second_different_projection_of_one_member_is_refused() -> None:
    sent: list[Any] = []

    def hook(member: int, message: Any) -> Any:
        if isinstance(getattr(message, "body", None), ProjectionShare):
            sent.append((member, message, type(simulation.phase)))
            if len(sent) == 2:
                first = sent[0][1]
                other = signed_by(sent[0][0], replace(first.body, value=first.body.value ^ 1), simulation.context)
                with pytest.raises(ProtocolError, match="a second, different ProjectionShare of member 0"):
                    simulation.coordinator.receive(other)
        return message

    simulation = Simulation(N, 1, from_member=hook)
    simulation.run()
    assert len(sent) == N
    assert isinstance(simulation.phase, phases.Released)
    assert simulation.phase.shares[0] == sent[0][1]


def test_an_altered_projection_does_not_carry_its_members_signature() -> None:
    simulation = Simulation(
        N,
        1,
        from_member=lambda i, m: (
            replace(m, body=replace(m.body, value=m.body.value ^ 1))
            if i == 0 and isinstance(m, Signed) and isinstance(m.body, ProjectionShare)
            else m
        ),
    ).run()
    assert "M13: the signature of member 0 does not verify in this round" in str(simulation.coordinator_refusals[0])
    assert isinstance(simulation.phase, phases.Released)
    assert 0 not in simulation.phase.shares


# --- what one projection says -----------------------------------------------------------------------------------------


def chi_square(values: list[int], cells: int = 16) -> float:
    counts = np.bincount(np.array([v >> 60 for v in values]), minlength=cells)
    expected = len(values) / cells
    return float(((counts - expected) ** 2 / expected).sum())


def seeds_of(members: int, draw: int) -> dict[tuple[int, int], bytes]:
    """Pair seeds that nobody knows; fixed, so that the result is the same in every run."""
    rand = np.random.default_rng(draw)
    return {(i, j): rand.bytes(32) for i in range(members) for j in range(i + 1, members)}


def values_of(draw: int, known: int | None = None) -> list[int]:
    """M13 of three members with constant vectors and one r, under fresh pair seeds."""
    seeds = seeds_of(3, draw)
    found = []
    for me in range(3):
        mine = {j: seeds[min(me, j), max(me, j)] for j in range(3) if j != me and j != known}
        found.append((1000 * me + projection.zero_sum_term(me, mine, X)) % projection.WORD)
    return found


#: Chi-square with 15 degrees of freedom is beyond these with probability below 1e-6.
LOW, HIGH = 1.2, 56.0


def test_one_projection_is_uniform_given_those_of_the_others_but_one() -> None:
    """The sum of all is <r, total>, which is public; of any two of three, each is uniform beside the other."""
    found = [values_of(draw) for draw in range(2000)]
    assert {sum(values) % projection.WORD for values in found} == {3000}
    for me in range(3):
        assert LOW < chi_square([values[me] for values in found]) < HIGH
    pairs = [(values[0] >> 62) << 62 | (values[1] >> 62) << 60 for values in found]
    assert LOW < chi_square(pairs) < HIGH


def test_one_projection_is_uniform_to_a_colluder_that_knows_its_own_seeds() -> None:
    """Member 2 takes its own terms off: what it gets of 0 and 1 is their sum, and each alone stays uniform."""
    found = [values_of(draw, known=2) for draw in range(2000)]
    assert {(values[0] + values[1]) % projection.WORD for values in found} == {1000}
    assert LOW < chi_square([values[0] for values in found]) < HIGH
    assert LOW < chi_square([values[1] for values in found]) < HIGH


def test_the_terms_of_two_projections_in_one_round_differ_entirely() -> None:
    """Terms are keyed with H(r): a projection for another r tells nothing about this one."""
    seeds = {1: bytes(range(32)), 2: bytes(range(1, 33))}
    terms = [projection.zero_sum_term(0, seeds, number.to_bytes(32, "big")) for number in range(2000)]
    assert LOW < chi_square(terms) < HIGH
    differences = [(a - b) % projection.WORD for a, b in zip(terms[::2], terms[1::2], strict=True)]
    assert LOW < chi_square(differences) < HIGH


def test_in_a_real_round_no_members_projection_is_that_of_its_vector() -> None:
    round_ = confirmed()
    shares = shares_of(round_, lambda _i: NonceList(round_.votes))
    key = projection.challenge({v.sender: v.body.nonce for v in round_.votes}, round_.votes[0].body.total)
    for i, share in shares.items():
        bare = projection.project(key, round_.member(i).vector)
        assert share.body.value != bare
        assert (share.body.value - bare) % projection.WORD > 1 << 32  # by a whole random term
