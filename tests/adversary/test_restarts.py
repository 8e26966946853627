"""A site that was restarted, rolled back or given a second plan: what is once on its disk is said once.

The sites here are real daemons on real directories; the coordinator's messages are replayed to them by an attacker.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator import phases
from coordinator.proofs import proofs_for
from participant.config import load_home
from participant.prepare import prepare
from participant.records import Aborted, Joined, Record, Released, SignedSurvivors, Spent
from participant.running import join
from participant.store import Store
from privacy.encoding import encode
from privacy.errors import Refusal, UserError
from privacy.job import Job
from privacy.plan import parse_plan
from privacy.secagg.messages import (
    AbortStatement,
    Certificate,
    Header,
    MaskedInput,
    NonceList,
    Offer,
    Outcome,
    RoundAborted,
    SurvivorList,
    UnmaskShares,
)
from privacy.secagg.signed import Signed
from privacy.secagg.transcript import check_signed
from tests.on_disk import Direct, OnDisk
from tests.simulation import Simulation, make_member
from tests.test_end_to_end import toy_plan


@pytest.fixture
def world(tmp_path: Path) -> Iterator[OnDisk]:
    found = OnDisk(tmp_path)
    found.ready()
    yield found
    found.engine.store.close()


def records_of(world: OnDisk, member: int, kind: type[Record]) -> list[Any]:
    return [r for r in Store(load_home(world.federation.site(world.names[member]))).all_records() if type(r) is kind]


def bodies(world: OnDisk, member: int) -> list[Any]:
    return [getattr(m, "body", None) for m in world.sent(member)]


def header(world: OnDisk) -> Header:
    return world.rounds[-1].machine.context.header


def heard_in_order(world: OnDisk) -> dict[type, tuple[bytes, Any]]:
    """Play a whole round; what member 0 was told in it, by type."""
    found: dict[type, tuple[bytes, Any]] = {}
    for phase in (phases.Joining, phases.Sharing, phases.Uploading, phases.Signing, phases.Unmasking):
        world.run(phase)
        found[type(world.message_for(0)[1])] = world.message_for(0)
    return found


# --- replays after a restart ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("last", "replayed"), [(phases.Signing, SurvivorList), (phases.Unmasking, Certificate)])
def test_a_replay_after_a_restart_gets_no_signature_and_no_share(
    world: OnDisk, last: type, replayed: type[SurvivorList] | type[Certificate]
) -> None:
    world.run(last)
    round_id, message = world.message_for(0)
    assert isinstance(message, replayed)
    world.restart(0)
    before = world.records(0)
    for _ in range(2):
        world.say(0, round_id, message)
    assert world.sent(0) == []
    assert world.records(0) == before
    assert len(records_of(world, 0, SignedSurvivors)) == (1 if last is phases.Unmasking else 0)
    assert records_of(world, 0, Released) == []


def test_no_message_of_a_round_before_the_restart_is_answered_under_the_name_of_another_round(world: OnDisk) -> None:
    """The attacker chooses round ids: it sends the old messages as if they belonged to the round that is running."""
    old = heard_in_order(world)
    world.restart(0)
    world.away = {0}
    world.run()
    member = world.daemons[0]
    later = replace(header(world), round=2)
    spent = [r for r in world.records(0) if isinstance(r, Spent)]
    assert len(spent) == 1
    proofs = proofs_for([world.rounds[0].machine], 0)
    assert proofs is not None
    world.runs[0] = join(member.site, member.client, world.job, 1, b"2" * 32, Offer(later, proofs))
    said, kept = len(world.sent(0)), world.records(0)
    for _, message in old.values():
        if not isinstance(message, Offer):
            world.say(0, b"2" * 32, message)
    assert len(world.sent(0)) == said
    assert world.records(0) == kept


def test_the_offer_of_a_round_joined_before_the_restart_is_refused(world: OnDisk) -> None:
    world.run(phases.Joining)
    round_id, offer = world.message_for(0)
    assert isinstance(offer, Offer)
    world.run(phases.Sharing)
    world.restart(0)
    with pytest.raises(Refusal, match="expected a round above 1, the highest joined here, found 1"):
        join(world.site(0), world.daemons[0].client, world.job, 1, round_id, offer)
    assert world.sent(0) == []
    assert len(records_of(world, 0, Joined)) == 1


def test_a_new_offer_after_the_restart_of_a_spent_site_needs_a_proof(world: OnDisk) -> None:
    world.run(phases.Signing)
    world.restart(0)
    offer = Offer(replace(header(world), round=2))
    with pytest.raises(Refusal, match="the delta was spent in round 1; expected a proof about that round, found none"):
        join(world.site(0), world.daemons[0].client, world.job, 1, b"2" * 32, offer)
    assert world.sent(0) == []


def test_an_outcome_after_the_restart_gets_no_nonce(world: OnDisk) -> None:
    """The nonce was only in memory; a site that lost it signs no outcome and makes no projection."""
    world.run(phases.Confirming)
    world.restart(0)
    outcome = world.message_for(0)
    assert isinstance(outcome[1], Outcome)
    world.say(0, *outcome)
    world.say(0, outcome[0], NonceList(()))
    assert world.sent(0) == []


# --- ABORTED and RELEASED exclude each other, across restarts ---------------------------------------------------------


def aborted(world: OnDisk) -> RoundAborted:
    return RoundAborted(header(world), "the attacker asks")


def test_a_site_that_released_states_no_abort_after_a_restart(world: OnDisk) -> None:
    world.run(phases.Unmasking)
    world.tell(0)
    assert len(records_of(world, 0, Released)) == 1
    world.restart(0)
    before = world.records(0)
    world.say(0, header(world).hash(), aborted(world))
    assert world.sent(0) == []
    assert world.records(0) == before


def test_a_site_that_stated_the_abort_after_a_restart_releases_nothing(world: OnDisk) -> None:
    world.run(phases.Unmasking)
    certificate = world.message_for(0)
    world.restart(0)
    world.say(0, certificate[0], aborted(world))
    (statement,) = world.sent(0)
    assert isinstance(statement, Signed)
    signed: Signed[Any] = statement
    check_signed(world.rounds[-1].machine.context, signed, "abort statement")
    world.say(0, *certificate)
    assert len(world.sent(0)) == 1
    assert records_of(world, 0, Released) == []
    assert len(records_of(world, 0, Aborted)) == 1


def test_an_abort_of_the_running_round_under_another_round_id_ends_it_here(world: OnDisk) -> None:
    """The attacker hopes for a statement beside a machine that still releases."""
    world.run(phases.Unmasking)
    certificate = world.message_for(0)
    machine = world.runs[0]
    assert machine is not None
    world.say(0, b"x" * 32, aborted(world))
    assert [type(b) for b in bodies(world, 0)].count(AbortStatement) == 1
    world.say(0, *certificate)
    assert not any(isinstance(b, UnmaskShares) for b in bodies(world, 0))
    assert records_of(world, 0, Released) == []


def test_an_abort_statement_after_a_crash_is_of_that_very_round_only(world: OnDisk) -> None:
    world.run(phases.Signing)
    world.restart(0)
    before = world.records(0)
    fields: dict[str, Any] = {"round": 2, "stage": 2} | dict.fromkeys(("plan", "start", "coordinator"), bytes(32))
    for name, value in fields.items():
        other = replace(header(world), **{name: value})
        world.say(0, other.hash(), RoundAborted(other, "never joined"))
    assert world.sent(0) == []
    assert world.records(0) == before
    world.say(0, header(world).hash(), aborted(world))
    assert [type(b) for b in bodies(world, 0)] == [AbortStatement]
    assert [r.header for r in records_of(world, 0, Aborted)] == [header(world)]


def test_the_record_of_an_abort_is_on_disk_before_the_statement_leaves(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run(phases.Signing)
    world.restart(0)
    seen: list[int] = []
    monkeypatch.setattr(Direct, "send", lambda *_: seen.append(len(records_of(world, 0, Aborted))))
    world.say(0, header(world).hash(), aborted(world))
    assert seen == [1]


@pytest.mark.parametrize("before", [phases.Sharing, phases.Uploading, phases.Signing])
def test_a_running_site_that_aborted_and_restarted_stays_out_of_the_round(world: OnDisk, before: type) -> None:
    world.run(before)
    message = world.message_for(0)
    world.say(0, header(world).hash(), aborted(world))
    said = list(world.sent(0))
    world.say(0, *message)
    assert world.sent(0) == said
    world.restart(0)
    world.say(0, *message)
    assert world.sent(0) == []
    assert records_of(world, 0, Released) == records_of(world, 0, SignedSurvivors) == []


# --- a spent delta under other names ----------------------------------------------------------------------------------


def other_job(world: OnDisk, raw: bytes) -> Job:
    return Job.of(parse_plan(raw), world.engine.roster)


def offer_of(job: Job, number: int = 1, stage: int = 1, proofs: Any = ()) -> Offer:
    return Offer(job.header(stage, number, bytes.fromhex(job.plan.adapter.digest)), proofs)


def spent_world(world: OnDisk) -> OnDisk:
    """Member 0 has spent its delta in round 1, which aborted; it was restarted since."""
    world.run(phases.Signing)
    world.restart(0)
    return world


COSMETIC = toy_plan() + b"\n# a comment\n"
OTHER_DATA_SET = toy_plan().replace(b'dataset = "toy"', b'dataset = "other"')


def test_a_cosmetic_edit_of_the_plan_does_not_free_a_spent_delta(world: OnDisk) -> None:
    spent_world(world)
    job = other_job(world, COSMETIC)
    assert job.plan_file.digest != world.job.plan_file.digest
    world.put_vector(0, world.vector_of(0), job)  # as if it had been trained under that one
    with pytest.raises(Refusal, match="the delta was spent in round 1"):
        join(world.site(0), world.daemons[0].client, job, 1, b"2" * 32, offer_of(job))
    assert world.sent(0) == []


def test_a_cosmetic_edit_of_the_plan_trains_no_second_delta(world: OnDisk) -> None:
    spent_world(world)
    with pytest.raises(Refusal, match="spent under another plan file; it takes a plan of another name to train again"):
        prepare(world.site(0), other_job(world, COSMETIC), 1)


def test_a_retrained_delta_is_refused_even_with_every_proof(world: OnDisk) -> None:
    world.away = {0}
    world.ready()
    world.away = set()
    world.run(phases.Uploading)
    world.tell(0)
    world.away = {0}
    world.run()
    proofs = proofs_for([world.rounds[0].machine], 0)
    assert proofs is not None
    world.restart(0)
    assert [r for r in world.records(0) if isinstance(r, Spent)]
    vector = world.vector_of(0)
    vector[3] += 1
    world.put_vector(0, vector)
    client = world.daemons[0].client
    with pytest.raises(Refusal, match="a retrained delta is never masked"):
        join(world.site(0), client, world.job, 1, b"2" * 32, offer_of(world.job, 2, 1, proofs))
    assert world.sent(0) == []
    world.put_vector(0, world.vector_of(0))  # the spent one is taken
    join(world.site(0), client, world.job, 1, b"2" * 32, offer_of(world.job, 2, 1, proofs))
    assert len(world.sent(0)) == 1


def test_another_stage_and_another_data_set_have_records_of_their_own(world: OnDisk) -> None:
    spent_world(world)
    store = world.site(0).store
    assert len(store.spent("toy", "toy", 1)) == 1
    assert store.spent("toy", "toy", 2) == store.spent("toy", "other", 1) == store.spent("other", "toy", 1) == []


def test_a_plan_for_another_data_set_does_not_find_the_delta_of_this_one(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the same vector goes into two sums without a proof: deltas lie by plan name, records count by data set."""
    spent_world(world)
    monkeypatch.setitem(sys.modules, "participant.training", SimpleNamespace(train=None))  # torch takes seconds
    job = other_job(world, OTHER_DATA_SET)
    with pytest.raises(UserError, match=r"other\.jsonl"):  # it wants to train on the other data
        prepare(world.site(0), job, 1)
    assert world.sent(0) == []


def test_a_round_for_another_data_set_does_not_mask_the_delta_of_this_one(world: OnDisk) -> None:
    """Records count by data set, the vector lies by plan name: without this check it is masked again, unproven."""
    spent_world(world)
    job = other_job(world, OTHER_DATA_SET)
    assert world.site(0).spent(job, 1) == []
    with pytest.raises(Refusal, match="was not trained under this file of plan 'toy'"):
        join(world.site(0), world.daemons[0].client, job, 1, b"2" * 32, offer_of(job))
    assert world.sent(0) == []


# --- a disk that was restored to an earlier state ---------------------------------------------------------------------


def rolled_back(*invited: int) -> Simulation:
    """Members 0 to 4 release; member 4 is restored to before that, and joins with others without any proof."""
    first = Simulation(8, 1, invited=(0, 1, 2, 3, 4)).run()
    assert isinstance(first.phase, phases.Released)
    first.disks[4].clear()
    proofs = {m: proofs_for([first.coordinator], m) or () for m in invited if m != 4}
    second = Simulation(8, 1, round_number=2, invited=invited, proofs=proofs, disks=first.disks)
    return second.run()


@pytest.mark.parametrize("invited", [(0, 1, 2, 3, 4), (0, 4, 5, 6, 7), (1, 2, 3, 4, 6), (2, 3, 4, 5, 6, 7)])
def test_every_peer_that_saw_a_restored_site_refuses_to_deal_with_it(invited: tuple[int, ...]) -> None:
    second = rolled_back(*invited)
    assert 4 in second.members  # its own disk knows nothing: it would mask again
    for member in set(invited) & {0, 1, 2, 3}:
        (refusal,) = second.members[member].refusals
        assert "M2: member 4 counts 1 rounds, 1 were seen before" in str(refusal)
        assert not any(isinstance(r, Spent) and r.header.round == 2 for r in second.disks[member])


def test_a_sum_with_a_restored_site_again_has_no_honest_peer_of_the_first_in_it() -> None:
    """The attacker avoids the peers that saw it; no two sums then differ by this member alone."""
    second = rolled_back(4, 5, 6, 7)
    assert isinstance(second.phase, phases.Released)
    assert second.survivors == (4, 5, 6, 7)
    assert not {0, 1, 2, 3} & set(second.survivors)
    third = rolled_back(3, 4, 5, 6, 7)
    assert isinstance(third.phase, phases.Released)
    assert third.survivors == (4, 5, 6, 7)  # member 3 said nothing after M1


def test_offers_raise_the_count_of_a_restored_site_and_its_old_peers_are_held_by_their_bond() -> None:
    """The count alone can be pumped up; what then protects is that honest peers sign the first list only."""
    first = Simulation(8, 1, invited=(0, 1, 2, 3, 4)).run()
    disks = first.disks
    disks[4].clear()
    for number in (2, 3):  # nothing ever comes of these
        context = replace(first.context, header=replace(first.context.header, round=number))
        pumped = make_member(4, Offer(context.header), context, first.size, disks[4])
        pumped.keep(pumped.machine.join())
    proofs = {m: proofs_for([first.coordinator], m) or () for m in (1, 2, 3)}
    second = Simulation(8, 1, round_number=4, invited=(1, 2, 3, 4, 5), proofs=proofs, disks=disks).run()
    for member in (1, 2, 3):
        (refusal,) = second.members[member].refusals
        assert "may only be in a sum over members [0, 1, 2, 3, 4]" in str(refusal)
    assert isinstance(second.phase, phases.Aborted)


def test_a_site_masks_nothing_that_is_not_in_its_spool_and_its_record(world: OnDisk) -> None:
    """M5 as sent, the record, and the file agree; what is on disk is byte for byte what was uploaded."""
    world.run(phases.Signing)
    for i in range(world.n):
        (spent,) = records_of(world, i, Spent)
        (body,) = [b for b in bodies(world, i) if isinstance(b, MaskedInput)]
        assert (spent.root, spent.t2) == (body.root, body.t2)
        spool = world.site(i).store.spool("toy", header(world))
        assert spool.read_bytes() == world.engine.store.upload(world.rounds[-1].row.id, i).read_bytes()
        assert encode(spent.header) == encode(header(world))
