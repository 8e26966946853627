"""Who aggregates with whom on a real engine: disjoint cohorts, retries with their proofs, and sums of two."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from coordinator import phases
from coordinator.engine import ATTEMPTS
from participant.config import Settings
from participant.policy import admit
from participant.records import Aborted, Joined, Spent
from privacy.adapter import flatten, load_peft, start_adapter, trained_part
from privacy.audit import audit_release
from privacy.errors import Refusal, UserError
from privacy.job import Job
from privacy.plan import parse_plan
from privacy.roster import parse_roster
from privacy.secagg.messages import AbortProof, ListProof, Offer
from privacy.settings import parse_toml
from tests.on_disk import OnDisk
from tests.test_end_to_end import SITE, toy_plan


@pytest.fixture
def world(tmp_path: Path) -> Iterator[OnDisk]:
    found = OnDisk(tmp_path)
    found.ready()
    yield found
    found.engine.store.close()


# --- cohorts and retries ----------------------------------------------------------------------------------------------


def next_round(world: OnDisk) -> OnDisk:
    """Wait until another round is open."""
    before = len(world.rounds)
    for _ in range(10):
        for i in range(world.n):
            if i not in world.away:
                world.tell(i)
        if len(world.rounds) == before:
            world.wait(10)
        if len(world.rounds) > before:
            return world
    raise AssertionError("expected another round")


def test_the_cohorts_of_a_stage_are_disjoint(tmp_path: Path) -> None:
    world = OnDisk(tmp_path, 8)
    world.ready()
    world.run()
    next_round(world).run()
    invited = [set(r.row.invited) for r in world.rounds]
    assert len(invited) == 2
    assert not invited[0] & invited[1]
    assert invited[0] | invited[1] == set(range(8))
    world.assert_exact()
    with pytest.raises(Refusal, match="'site-0' is in a release of this stage already"):
        world.engine.ready(world.digest, 1, 0)
    world.wait(1e6)
    assert len(world.rounds) == 2


def test_a_retry_round_carries_the_abort_certificate_of_the_one_before(world: OnDisk) -> None:
    world.run(phases.Uploading)
    world.away = {3, 4}
    world.run()
    assert isinstance(world.phase, phases.Aborted)
    world.away = set()
    next_round(world)
    for i in range(5):
        _, offer = world.message_for(i)
        assert isinstance(offer, Offer)
        (proof,) = offer.proofs
        assert isinstance(proof, AbortProof)
        assert proof.header == world.rounds[0].machine.context.header
        assert i in [s.sender for s in proof.statements]
    assert all(any(isinstance(r, Aborted) for r in world.records(i)) for i in range(5))
    proofs = world.rounds[-1].machine.proofs
    world.open()
    assert world.rounds[-1].machine.proofs == proofs
    world.run()
    assert world.totals()[0][0] == (0, 1, 2, 3, 4)
    world.assert_exact()


def test_no_retry_is_offered_to_a_member_that_made_no_statement(world: OnDisk) -> None:
    world.run(phases.Uploading)
    world.away = {3, 4}
    world.run()
    world.away = {4}
    for _ in range(5):
        for i in range(4):
            world.tell(i)
        world.wait(1000)
    assert 4 not in world.rounds[-1].row.invited
    world.run()
    assert world.totals()[0][0] == (0, 1, 2, 3)
    world.assert_exact()


def test_a_late_member_joins_the_next_cohort_with_the_certified_list(tmp_path: Path) -> None:
    world = OnDisk(tmp_path, 8)
    world.ready(0, 1, 2, 3, 4)
    world.wait(10)
    world.run(phases.Uploading)
    round_id, inbox = world.message_for(4)
    world.away = {4}
    world.run(phases.Signing)
    world.say(4, round_id, inbox)
    assert len([r for r in world.records(4) if isinstance(r, Spent)]) == 1
    world.run()
    world.away = set()
    world.ready(4, 5, 6, 7)
    next_round(world)
    assert world.rounds[-1].row.invited == (4, 5, 6, 7)
    (proof,) = world.rounds[-1].machine.proofs[4]
    assert isinstance(proof, ListProof)
    assert [entry.member for entry in proof.listed] == [0, 1, 2, 3]
    assert world.rounds[-1].machine.proofs[5] == ()
    world.run()
    assert [survivors for survivors, _ in world.totals()] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    world.assert_exact()


# --- what a release over several cohorts is ---------------------------------------------------------------------------


def weighted_mean(world: OnDisk, members: tuple[int, ...]) -> tuple[int, NDArray[np.float64]]:
    """(total weight, mean delta) of these members' vectors, by the formula of the specification and plain numpy.

    A vector holds q = qmax / clip * w / W_max * delta, and behind the delta the weight in limbs of 22 bits.
    """
    policy = world.job.plan.round
    vectors = [world.vector_of(m).astype(np.int64) for m in members]
    weight = sum(100 + m for m in members)
    size, qmax = world.job.quantizer.size, world.job.quantizer.qmax
    mean = np.sum(vectors, axis=0)[:size] * (policy.clip * policy.max_weight) / (qmax * weight)
    return weight, mean


def released(world: OnDisk) -> dict[str, Any]:
    """The manifest of the release, after an audit has accepted what lies beside it."""
    directory = world.engine.home.releases / "toy" / "stage-1"
    audit_release(directory, world.job.roster_file.hash)
    found: dict[str, Any] = json.loads((directory / "manifest.json").read_bytes())
    return found


def assert_is_mean_of(world: OnDisk, members: tuple[int, ...]) -> None:
    """The published adapter is start + server_lr * weighted mean over these members."""
    weight, mean = weighted_mean(world, members)
    assert released(world)["total_weight"] == weight
    adapter, layout = world.job.plan.adapter, world.job.layout
    found = load_peft(world.engine.home.releases / "toy" / "stage-1" / "adapter")
    start = flatten(trained_part(start_adapter(adapter), layout), layout)
    moved = flatten(trained_part(found, layout), layout) - start
    assert np.abs(moved - world.job.plan.aggregation.server_lr * mean).max() < 1e-6
    assert np.abs(mean).max() > 0.01


def test_each_cohort_publishes_the_release_again_as_the_weighted_mean_over_all_so_far(tmp_path: Path) -> None:
    world = OnDisk(tmp_path, 8)
    world.ready()
    world.run()
    first = world.totals()[0][0]
    assert_is_mean_of(world, first)
    assert len(released(world)["cohorts"]) == 1
    next_round(world).run()
    second = world.totals()[1][0]
    assert len(first + second) == 8
    assert_is_mean_of(world, first + second)
    manifest, names = released(world), world.job.roster.name
    for cohort, members, number in zip(manifest["cohorts"], (first, second), (1, 2), strict=True):
        assert cohort["round"] == number
        assert cohort["survivors"] == [names(m) for m in members]
        assert cohort["total_weight"] == sum(100 + m for m in members)
        evidence = world.engine.home.releases / "toy" / "stage-1" / "rounds" / str(number) / "evidence.bin"
        assert hashlib.sha256(evidence.read_bytes()).hexdigest() == cohort["evidence_sha256"]


def test_a_cohort_that_fails_before_any_upload_spends_nothing_at_any_site(world: OnDisk) -> None:
    world.run(phases.Sharing)
    world.away = {2, 3, 4}
    world.run()
    assert isinstance(world.phase, phases.Aborted)
    assert any(isinstance(r, Joined) for r in world.records(0))
    assert not any(isinstance(r, Spent) for i in range(5) for r in world.records(i))
    world.away = set()
    next_round(world)
    assert all(proofs == () for proofs in world.rounds[-1].machine.proofs.values())
    world.run()
    assert world.totals()[0][0] == (0, 1, 2, 3, 4)
    world.assert_exact()


# --- rounds that fail again and again ---------------------------------------------------------------------------------


def fail(world: OnDisk, members: tuple[int, ...]) -> None:
    """Another round of these members, who all but one fall silent in it."""
    world.away = set(range(world.n)) - set(members)
    if not isinstance(world.phase, phases.Joining):
        next_round(world)
    world.run(phases.Sharing)
    world.away = set(range(world.n)) - {members[0]}
    world.run()
    assert isinstance(world.phase, phases.Aborted)
    world.away = set()


def test_a_stage_whose_first_rounds_all_fail_is_given_up(world: OnDisk) -> None:
    for _ in range(ATTEMPTS):
        fail(world, (0, 1, 2, 3, 4))
    world.wait(1)
    (plan,) = world.engine.store.plans()
    assert (plan.state, plan.reason[:15]) == ("aborted", "6 rounds failed")
    with pytest.raises(Refusal, match="plan 'toy' is aborted: 6 rounds failed, the last: expected at least"):
        world.engine.ready(world.digest, 1, 0)


def test_late_sites_whose_rounds_fail_take_no_release_back(tmp_path: Path) -> None:
    """However often that is: others come later, and these may try again, only less often."""
    world = OnDisk(tmp_path, 8, toy_plan().replace(b"join_s = 2", b"join_s = 100000"))
    world.ready(0, 1, 2, 3)
    world.wait(100000)
    world.run()
    world.ready(4, 5, 6, 7)
    for _ in range(ATTEMPTS):
        fail(world, (4, 5, 6, 7))
    (plan,) = world.engine.store.plans()
    assert plan.state == "released"
    opened = len(world.rounds)
    for i in range(4, 8):
        world.tell(i)
    assert len(world.rounds) == opened
    assert "6 rounds failed since the last release, the last: expected" in world.engine.held[world.digest]
    world.wait(100000)
    assert len(world.rounds) == opened + 1
    world.run()
    assert world.engine.held[world.digest] == ""
    assert [survivors for survivors, _ in world.totals()] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    world.assert_exact()


def test_failures_before_a_release_count_for_nothing_after_it(tmp_path: Path) -> None:
    world = OnDisk(tmp_path, 8)
    world.ready(0, 1, 2, 3)
    world.wait(10)
    world.run(phases.Joining)
    for _ in range(ATTEMPTS - 1):
        fail(world, (0, 1, 2, 3))
    next_round(world).run()
    world.ready(4, 5, 6, 7)
    for _ in range(ATTEMPTS - 1):
        fail(world, (4, 5, 6, 7))
    for i in range(4, 8):
        world.tell(i)
    assert isinstance(world.phase, phases.Joining)
    assert world.engine.held[world.digest] == ""


# --- sums of two ------------------------------------------------------------------------------------------------------

PAIR_POLICY = {"max_colluders": 0, "min_cohort": 2, "min_survivors": 2, "allow_two_members": True}
PAIR_SITE = SITE.replace("min_cohort = 3", "min_cohort = 2\nallow_two_members = true")
PAIR_PLAN = toy_plan().replace(b"max_cohort = 5\nmin_cohort = 4\nmin_survivors = 3\nmax_colluders = 1", b"PAIR")
PAIR_PLAN = PAIR_PLAN.replace(b"PAIR", b"max_cohort = 2\nmin_cohort = 2\nmin_survivors = 2\nmax_colluders = 0")


def test_two_members_aggregate_where_policy_and_both_sites_opted_in(tmp_path: Path) -> None:
    world = OnDisk(tmp_path, 2, PAIR_PLAN, dict(PAIR_POLICY), PAIR_SITE)
    for i in range(2):
        admit(world.job, world.site(i).home.settings)
    world.ready()
    world.run()
    assert world.totals()[0][0] == (0, 1)
    world.assert_exact()


def test_without_the_opt_in_of_a_site_it_takes_no_part_in_a_sum_of_two(tmp_path: Path) -> None:
    world = OnDisk(tmp_path, 2, PAIR_PLAN, dict(PAIR_POLICY), PAIR_SITE)
    toml = (world.federation.site("site-0") / "participant.toml").read_bytes()
    settings = parse_toml(Settings, toml.replace(b"allow_two_members = true", b""), "participant.toml")
    with pytest.raises(Refusal, match="allows sums of two members; this site has not opted in"):
        admit(world.job, settings)


def test_without_the_opt_in_of_the_policy_a_plan_for_two_is_refused_by_everybody(world: OnDisk) -> None:
    with pytest.raises(Refusal, match="allows cohorts of 2, but policy and 1 colluders need at least 4"):
        world.engine.submit_plan(PAIR_PLAN.replace(b'"toy"\ntask', b'"pair"\ntask'))
    raw = world.engine.roster.raw.replace(b"max_colluders = 1", b"max_colluders = 0")
    roster = parse_roster(raw.replace(b"min_cohort = 4", b"min_cohort = 3"))
    with pytest.raises(Refusal, match="allows cohorts of 2, but policy and 0 colluders need at least 3"):
        Job.of(parse_plan(PAIR_PLAN), roster)
    assert len(world.engine.store.plans()) == 1


def test_a_plan_for_more_members_than_the_roster_has_is_refused_when_it_is_offered(world: OnDisk) -> None:
    members = len(world.engine.roster.roster.members)
    many = toy_plan().replace(b'"toy"\ntask', b'"many"\ntask').replace(b"max_cohort = 5", b"max_cohort = 9")
    wanted = f"min_cohort is {members + 1}, and the roster has {members} members"
    with pytest.raises(UserError, match=wanted) as caught:
        world.engine.submit_plan(many.replace(b"min_cohort = 4", f"min_cohort = {members + 1}".encode()))
    assert "no round of it could ever open" in caught.value.hint
    assert len(world.engine.store.plans()) == 1
    world.engine.submit_plan(many.replace(b"min_cohort = 4", f"min_cohort = {members}".encode()))
