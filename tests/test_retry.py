"""Once only, and the three proofs that let a spent delta be masked again (protocol section 6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from coordinator import phases
from coordinator.proofs import open_bonds, proofs_for, sharers_of
from coordinator.round import CoordinatorRound
from participant.records import Aborted, Joined, Record, Released, SignedSurvivors, Spent
from participant.retry import check_proofs, may_state_abort
from participant.round import abort_step
from privacy.errors import ProtocolError, Refusal
from privacy.secagg.dialogue import ToMember
from privacy.secagg.messages import (
    AbortProof,
    AbortStatement,
    Certificate,
    ListedInput,
    ListProof,
    RetryProof,
)
from privacy.secagg.signed import sign
from privacy.secagg.transcript import verify_transcript
from tests.simulation import Simulation, context_for, identity

N, C = 5, 1


def retry(before: list[Simulation], invited: tuple[int, ...], **changes: object) -> Simulation:
    """The next round of the stage, as an honest coordinator would offer it to these members."""
    machines = [s.coordinator for s in before]
    proofs = {m: proofs_for(machines, m) or () for m in invited}
    settings = {"proofs": proofs, "disks": before[-1].disks, "minimum": 3} | changes
    simulation = Simulation(N, C, round_number=len(before) + 1, invited=invited, **settings)  # type: ignore[arg-type]
    return simulation.run()


def aborted_after_uploads() -> Simulation:
    """Members 3 and 4 upload nothing: three uploads of four needed, and everybody alive states the abort."""
    return Simulation(N, C, silent={3: "M5", 4: "M5"}, minimum=3).run()


def aborted_after_release() -> Simulation:
    """The certificate does not reach members 3 and 4: the list is certified, one of four shares is missing."""

    def lose_certificate(member: int, message: ToMember) -> ToMember | None:
        return None if member in (3, 4) and isinstance(message, Certificate) else message

    return Simulation(N, C, minimum=3, to_member=lose_certificate).run()


def released_without_4() -> Simulation:
    """Member 4 was late: its upload did not arrive in time."""
    return Simulation(N, C, silent={4: "M5"}, minimum=3).run()


def state_abort(simulation: Simulation, member: int) -> None:
    """A member that lost its memory states the abort from its records, as after a restart."""
    site, header = simulation.members[member].machine.site, simulation.context.header
    assert may_state_abort(simulation.disks[member], header.hash())
    step = abort_step(site, header, "restarted")
    simulation.disks[member].extend(step.records)
    assert step.reply is not None
    simulation.coordinator.receive(step.reply)


def test_proof_a_lets_an_aborted_round_be_repeated() -> None:
    first = aborted_after_uploads()
    for member in (3, 4):
        state_abort(first, member)
    second = retry([first], tuple(range(N)))
    assert isinstance(second.phase, phases.Released)
    assert second.survivors == (0, 1, 2, 3, 4)
    assert second.is_exact()


def test_proof_b_lets_a_late_member_join_the_next_cohort() -> None:
    first = released_without_4()
    assert isinstance(first.phase, phases.Released)
    assert any(isinstance(r, Spent) for r in first.disks[4])
    assert open_bonds([first.coordinator], ()) == []  # its total is out
    proofs = proofs_for([first.coordinator], 4)
    assert proofs is not None
    assert isinstance(proofs[0], ListProof)
    context = context_for(N, C, round_number=2)
    spent = [r for r in first.disks[4] if isinstance(r, Spent)]
    assert check_proofs(spent, first.disks[4], 4, proofs, context) is None


def test_proof_c_binds_the_next_round_to_the_very_list() -> None:
    first = aborted_after_release()
    assert isinstance(first.phase, phases.Aborted)
    assert sum(isinstance(r, Released) for disk in first.disks.values() for r in disk) == 3
    assert open_bonds([first.coordinator], ()) == [(0, 1, 2, 3, 4)]
    assert open_bonds([first.coordinator], (4,)) == []  # one of them is in a total since
    second = retry([first], tuple(range(N)))
    assert isinstance(second.phase, phases.Released)
    assert second.survivors == (0, 1, 2, 3, 4)
    assert second.is_exact()


def small_list() -> Simulation:
    """Five join, as they must; member 4 uploads nothing, and the certificate reaches two of the other four."""

    def lose_certificate(member: int, message: ToMember) -> ToMember | None:
        return None if member in (2, 3) and isinstance(message, Certificate) else message

    return Simulation(N, C, minimum=3, joiners=5, silent={4: "M5"}, to_member=lose_certificate).run()


def test_a_certified_list_comes_again_though_it_is_smaller_than_a_cohort() -> None:
    first = small_list()
    assert isinstance(first.phase, phases.Aborted)
    assert open_bonds([first.coordinator], ()) == [(0, 1, 2, 3)]
    second = retry([first], (0, 1, 2, 3), joiners=5)
    assert isinstance(second.phase, phases.Released)
    assert second.survivors == (0, 1, 2, 3)
    assert second.is_exact()
    transcript = second.phase.outcome.transcript
    assert verify_transcript(second.context, transcript).survivors == (0, 1, 2, 3)


@pytest.fixture
def reckless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that goes on with fewer than a cohort, and with a part of a list."""
    monkeypatch.setattr(CoordinatorRound, "_least", lambda machine, usual: min(usual, len(machine.invited)))


@pytest.mark.usefixtures("reckless")
def test_nobody_else_begins_with_fewer_than_a_cohort() -> None:
    """The attack: a coordinator invites four where five were promised, or leaves out one of a list that binds."""
    alone = Simulation(N, C, minimum=3, joiners=5, invited=(0, 1, 2, 3)).run()
    assert not any(isinstance(r, Spent) for disk in alone.disks.values() for r in disk)
    for member in range(4):
        assert "M2: expected 5 to 5 members, found 4" in str(alone.members[member].refusals[0])
    bound = retry([small_list()], (0, 1, 2), joiners=5)
    for member in range(3):
        assert "M2: expected 4 to 5 members, found 3" in str(bound.members[member].refusals[0])


@pytest.mark.parametrize(("step", "reason"), [("M1", "to join"), ("M3", "with shares"), ("M5", "with an upload")])
def test_a_list_that_is_not_whole_ends_at_once_and_names_who_is_missing(step: str, reason: str) -> None:
    """Its members would refuse what comes next, and would be named silent for it."""
    second = retry([small_list()], (0, 1, 2, 3), joiners=5, silent={3: step})
    assert isinstance(second.phase, phases.Aborted)
    assert second.phase.reason == f"expected at least 4 members {reason}, found 3; silent: 3"


def test_nobody_is_made_to_believe_in_a_cohort_smaller_than_any_list() -> None:
    """The attack: three who collude make up a round of their own under a plan of at least five."""
    alone = Simulation(N, C, minimum=3, joiners=3, invited=(0, 1, 2)).run()
    assert isinstance(alone.phase, phases.Released)
    promised = context_for(N, C, minimum=3, joiners=5)
    assert promised.header == alone.context.header
    with pytest.raises(ProtocolError, match="M2: expected 4 to 5 members, found 3"):
        verify_transcript(promised, alone.phase.outcome.transcript)


@pytest.mark.usefixtures("reckless")
def test_under_proof_c_nothing_is_uploaded_among_other_sharers() -> None:
    """The attack: the same five vectors, once with member 4 and once without, would give member 4's by difference."""
    first = aborted_after_release()
    second = retry([first], tuple(range(N)), silent={4: "M3"})
    assert isinstance(second.phase, phases.Aborted)
    for member in (0, 1, 2, 3):
        assert "may only be in a sum over members [0, 1, 2, 3, 4]" in str(second.members[member].refusals[0])
        assert not any(isinstance(r, Spent) and r.header.round == 2 for r in second.disks[member])


@pytest.mark.usefixtures("reckless")
def test_under_proof_c_no_other_list_is_signed() -> None:
    first = aborted_after_release()
    second = retry([first], tuple(range(N)), silent={4: "M5"})
    assert isinstance(second.phase, phases.Aborted)
    for member in (0, 1, 2, 3):
        assert "M6: this delta may only be in a sum over" in str(second.members[member].refusals[0])
        assert not any(isinstance(r, SignedSurvivors) and r.header.round == 2 for r in second.disks[member])


def test_a_bound_member_is_not_opened_by_a_list_that_others_certify() -> None:
    """Refusing M7 would not be enough: four strangers are t of five, and could certify and open its upload."""
    first = Simulation(10, 1, invited=(0, 1, 2, 3, 4), minimum=3).run()
    assert isinstance(first.phase, phases.Released)
    proofs = {0: proofs_for([first.coordinator], 0) or ()}
    strangers = (0, 5, 6, 7, 8)
    second = Simulation(10, 1, round_number=2, invited=strangers, proofs=proofs, disks=first.disks, minimum=3).run()
    assert "M4: this delta may only be in a sum over members [0, 1, 2, 3, 4]" in str(second.members[0].refusals[0])
    assert isinstance(second.phase, phases.Released)
    assert second.survivors == (5, 6, 7, 8)
    assert len([r for r in second.disks[0] if isinstance(r, Spent)]) == 1


def spent_of(simulation: Simulation, member: int) -> list[Spent]:
    return [r for r in simulation.disks[member] if isinstance(r, Spent)]


def check(simulation: Simulation, member: int, proofs: tuple[RetryProof, ...]) -> tuple[int, ...] | None:
    context = context_for(N, C, round_number=2)
    return check_proofs(spent_of(simulation, member), simulation.disks[member], member, proofs, context)


def abort_proof(simulation: Simulation, member: int = 0) -> AbortProof:
    found = proofs_for([simulation.coordinator], member)
    assert found is not None
    assert isinstance(found[0], AbortProof)
    return found[0]


def list_proof(simulation: Simulation, member: int = 0) -> ListProof:
    found = proofs_for([simulation.coordinator], member)
    assert found is not None
    assert isinstance(found[0], ListProof)
    return found[0]


def test_a_spent_delta_is_not_masked_again_without_a_proof() -> None:
    first = aborted_after_uploads()
    second = retry([first], tuple(range(N)), proofs={})
    for member in (0, 1, 2):
        assert isinstance(second.offer_refusals[member], Refusal)
        assert "expected a proof about that round, found none" in str(second.offer_refusals[member])
        assert not any(isinstance(r, Joined) and r.header.round == 2 for r in second.disks[member])


def without_own(proof: AbortProof) -> AbortProof:
    return replace(proof, statements=tuple(s for s in proof.statements if s.sender != 0))


def one_short(proof: AbortProof) -> AbortProof:
    return replace(proof, statements=proof.statements[:2])


def of_another_round(proof: AbortProof) -> AbortProof:
    header = replace(proof.header, round=9)
    signed = tuple(sign(identity(i), i, AbortStatement("x"), header.hash()) for i in (0, 1, 2))
    return replace(proof, statements=signed)


def of_a_stranger(proof: AbortProof) -> AbortProof:
    signed = sign(identity(7), 7, AbortStatement("x"), proof.header.hash())
    return replace(proof, statements=(*proof.statements[:2], signed))


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (without_own, "lacks this site's own statement"),
        (one_short, "expected 3 statements"),
        (of_another_round, "does not verify in this round"),
        (of_a_stranger, "held no shares"),
    ],
)
def test_a_bad_abort_certificate_is_refused(forge: Callable[[AbortProof], AbortProof], reason: str) -> None:
    first = aborted_after_uploads()
    assert check(first, 0, (abort_proof(first),)) is None
    with pytest.raises(ProtocolError, match=reason):
        check(first, 0, (forge(abort_proof(first)),))


def test_an_abort_certificate_needs_this_sites_own_record() -> None:
    first = aborted_after_uploads()
    proof = abort_proof(first)
    first.disks[0][:] = [r for r in first.disks[0] if not isinstance(r, Aborted)]
    with pytest.raises(Refusal, match="has not aborted round 1 itself"):
        check(first, 0, (proof,))


def under_another_t2(proof: ListProof) -> ListProof:
    """Votes of the right members on the right list, under a T2 that is not this member's."""
    body = replace(proof.votes[0].body, t2=bytes(32))
    votes = tuple(sign(identity(v.sender), v.sender, body, proof.header.hash()) for v in proof.votes)
    return replace(proof, votes=votes)


def too_few_votes(proof: ListProof) -> ListProof:
    return replace(proof, votes=proof.votes[:3])


def another_list(proof: ListProof) -> ListProof:
    return replace(proof, listed=proof.listed[:-1])


def another_root(proof: ListProof) -> ListProof:
    return replace(proof, listed=(replace(proof.listed[0], root=bytes(32)), *proof.listed[1:]))


def strange_member(proof: ListProof) -> ListProof:
    return replace(proof, listed=(*proof.listed, ListedInput(7, bytes(32))))


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (under_another_t2, "signed another survivor list"),
        (too_few_votes, "expected 4 signatures on the list of round 1"),
        (another_list, "is not a survivor|signed another survivor list"),
        (another_root, "signed another survivor list"),
        (strange_member, "the list of round 1 names members who were not in it"),
    ],
)
def test_a_bad_certified_list_is_refused(forge: Callable[[ListProof], ListProof], reason: str) -> None:
    first = aborted_after_release()
    assert check(first, 0, (list_proof(first),)) == (0, 1, 2, 3, 4)
    with pytest.raises(ProtocolError, match=reason):
        check(first, 0, (forge(list_proof(first)),))


def test_a_certified_list_with_another_upload_of_mine_is_refused() -> None:
    """All other members collude to sign a list in which my upload is another one than I committed to."""
    first = aborted_after_release()
    proof = list_proof(first)
    forged = another_root(proof)
    from privacy.secagg import transcript

    t2 = spent_of(first, 0)[0].t2
    survivors_l = transcript.list_hash(t2, [(e.member, e.root) for e in forged.listed])
    body = replace(proof.votes[0].body, survivors=survivors_l)
    votes = tuple(sign(identity(v.sender), v.sender, body, proof.header.hash()) for v in proof.votes)
    with pytest.raises(ProtocolError, match="another upload of this site than its own"):
        check(first, 0, (replace(forged, votes=votes),))


def test_released_and_aborted_exclude_each_other() -> None:
    first = aborted_after_release()
    header_hash = first.context.header_hash
    for member, released in ((0, True), (1, True), (2, True), (3, False), (4, False)):
        assert may_state_abort(first.disks[member], header_hash) is not released
        assert any(isinstance(r, Aborted) for r in first.disks[member]) is not released


def test_a_member_that_released_makes_no_statement_when_asked() -> None:
    first = aborted_after_release()
    assert isinstance(first.phase, phases.Aborted)
    assert not set(first.phase.statements) & {0, 1, 2}


def test_another_roster_ends_the_stage_for_a_site_that_spent() -> None:
    first = aborted_after_uploads()
    context = context_for(N, C, round_number=2)
    moved = replace(context, header=replace(context.header, roster=bytes(32)))
    with pytest.raises(Refusal, match="under another roster"):
        check_proofs(spent_of(first, 0), first.disks[0], 0, (abort_proof(first),), moved)


def test_two_different_bonds_end_the_stage() -> None:
    first = aborted_after_release()
    record = spent_of(first, 0)[0]
    other = replace(record, header=replace(record.header, round=3))
    listed = list_proof(first)
    fewer = listed.listed[:4]
    from privacy.secagg import transcript

    body = replace(
        listed.votes[0].body,
        survivors=transcript.list_hash(record.t2, [(e.member, e.root) for e in fewer]),
    )
    votes = tuple(sign(identity(i), i, body, other.header.hash()) for i in range(4))
    second = ListProof(other.header, fewer, votes)
    with pytest.raises(Refusal, match="bound to two different survivor lists"):
        check_proofs([record, other], first.disks[0], 0, (listed, second), context_for(N, C, round_number=4))


@pytest.mark.parametrize("second", [(0, 1, 2), (0, 1)])
def test_the_lists_of_all_rounds_must_agree(monkeypatch: pytest.MonkeyPatch, second: tuple[int, ...]) -> None:
    lists = {1: (0, 1, 2), 2: second}
    monkeypatch.setattr("participant.retry._check_list", lambda record, *_: {lists[record.header.round]})
    headers = [context_for(3, round_number=number).header for number in lists]
    spent = [Spent(h, "plan", "data", b"", b"", (0, 1, 2), 0, 2, b"", b"") for h in headers]
    proofs = [ListProof(header, (), ()) for header in headers]
    context = context_for(3, round_number=3)
    if second == lists[1]:
        assert check_proofs(spent, [], 0, proofs, context) == second
        return
    with pytest.raises(Refusal, match="bound to two different survivor lists"):
        check_proofs(spent, [], 0, proofs, context)


def test_an_honest_coordinator_offers_nothing_before_it_has_the_proofs() -> None:
    first = Simulation(N, C, silent={2: "M5", 3: "M5", 4: "M5"}, minimum=3).run()
    assert isinstance(first.phase, phases.Aborted)
    assert len(first.phase.statements) == 2
    assert proofs_for([first.coordinator], 0) is None
    assert sharers_of(first.coordinator) == (0, 1, 2, 3, 4)


def records_of(disks: Mapping[int, list[Record]], kind: type[Record]) -> int:
    return sum(isinstance(r, kind) for disk in disks.values() for r in disk)


def test_records_stand_once_a_round() -> None:
    done = Simulation(N, C).run()
    for kind in (Joined, Spent, SignedSurvivors, Released):
        assert records_of(done.disks, kind) == N - (kind is Released)  # t = 4 releases are enough
