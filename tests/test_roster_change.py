"""Another roster comes into force while a plan is open, or released: what both ends make of what was begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator import phases
from participant.client import OfferedPlan
from participant.enrol import pin_roster
from privacy.errors import Refusal, UserError
from tests.on_disk import OnDisk

REASON = "the roster changed; what is left to do needs a plan of another name"


def another_roster(world: OnDisk, leaves: str = "") -> bytes:
    """A stricter policy, and one member less where it says which; in force at the coordinator from now on."""
    path = world.federation.coordinator / "roster.toml"
    head, *members = path.read_text().split("[[members]]")
    members = [m for m in members if f'"{leaves}"' not in m]
    raw = "[[members]]".join([head.replace("min_cohort = 4", "min_cohort = 3"), *members]).encode()
    assert raw != path.read_bytes()
    path.write_bytes(raw)
    world.open()
    return raw


def test_an_open_plan_ends_with_its_roster_and_its_round_goes_nowhere(tmp_path: Path) -> None:
    world = OnDisk(tmp_path)
    world.ready()
    world.run(until=phases.Uploading)
    (round_id,) = world.engine.rounds
    another_roster(world, "site-4")
    assert world.engine.store.plans() == []
    assert [(p.name, p.state, p.reason) for p in world.engine.store.ended_plans()] == [("toy", "cancelled", REASON)]
    assert world.engine.rounds == {}
    with pytest.raises(Refusal, match="no round"):
        world.engine.running(round_id)
    with pytest.raises(Refusal, match="no plan with digest"):
        world.engine.ready(world.digest, 1, 0)
    with pytest.raises(UserError, match="expected a new plan name, found 'toy' again"):
        world.engine.submit_plan(world.plan)
    world.engine.submit_plan(world.plan.replace(b'name = "toy"', b'name = "toy-2"'))
    world.open()  # nothing of it depends on what is in memory
    assert [p.name for p in world.engine.store.plans()] == ["toy-2"]
    assert [p.name for p in world.engine.store.ended_plans()] == ["toy"]


def test_a_release_stays_with_its_roster_and_is_offered_to_nobody_under_another(tmp_path: Path) -> None:
    world = OnDisk(tmp_path)
    world.ready()
    world.run()
    another_roster(world)
    assert world.engine.store.plans() == world.engine.store.ended_plans() == []
    assert world.engine.rounds == {}
    assert (world.federation.coordinator / "releases" / "toy" / "stage-1" / "manifest.json").exists()


def test_the_same_roster_again_changes_nothing(tmp_path: Path) -> None:
    world = OnDisk(tmp_path)
    world.ready()
    world.run(until=phases.Uploading)
    world.open()
    assert [p.state for p in world.engine.store.plans()] == ["open"]
    world.run()
    world.assert_exact()


def test_a_site_gives_up_what_ended_and_says_so(tmp_path: Path) -> None:
    world = OnDisk(tmp_path)
    raw = another_roster(world)
    for member in range(world.n):
        pin_roster(world.federation.site(world.names[member]), raw)
        world.restart(member)
    (ended,) = world.engine.store.ended_plans()
    found = world.daemons[0]._consider(OfferedPlan(ended.toml, ended.state, ended.reason, 1))
    assert found == "cancelled"
    assert world.daemons[0].site.notes()["toy"]["reason"] == REASON


def test_counts_of_rounds_outlive_a_roster_in_which_their_member_has_another_number(tmp_path: Path) -> None:
    world = OnDisk(tmp_path)
    world.ready()
    world.run()
    site = world.daemons[4].site
    vector = b""
    before = site.round_site(world.job, vector, None).peer_counts
    assert set(before) == {0, 1, 2, 3, 4}
    raw = another_roster(world, "site-0")
    pin_roster(site.home.directory, raw)
    world.restart(4)
    after = world.daemons[4].site.round_site(world.job, vector, None).peer_counts
    assert after == {member - 1: count for member, count in before.items() if member}
