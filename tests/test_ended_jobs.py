"""How a job ends: with its plan, by an upload that arrived, by hand; and what is left that could be sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from participant import charging, fetch, prepare
from participant.daemon import Daemon
from participant.records import Spent
from participant.site import Site
from privacy.errors import Refusal
from privacy.outcome import Total, VerifiedCohort
from privacy.secagg.quantize import Quantizer
from tests.charging import PRIVACY, Silent, World, offered, spend


def test_a_plan_withdrawn_before_it_started_gives_its_charge_back(world: World) -> None:
    charging.reserve(world.site, world.job("quiet", PRIVACY), 1)
    spend(world)
    for name in ("quiet", "quiet-0"):
        assert Daemon(world.site, Silent())._consider(offered(name, "cancelled")) == "cancelled"
    book = world.site.ledger("toy").book
    assert [job.reserve.plan for job in book.charged()] == ["quiet-0"]
    aborts = [entry.facts.model_dump() for entry in world.site.ledger("toy").entries if entry.kind == "ABORT"]
    assert [abort["reason"] for abort in aborts] == ["the plan is cancelled: wrong labels"] * 2


def test_a_job_that_ended_with_its_plan_left_nothing_that_could_be_sent(world: World) -> None:
    spend(world)
    job, directory = world.job("quiet-0", PRIVACY), world.site.store.directory("quiet-0", 1)
    charging.release(world.site, job, 1, 1, b"t" * 32, b"v" * 32)
    (directory / "spool-1.bin").write_bytes(b"masked")
    for _ in range(2):  # and once is enough
        assert Daemon(world.site, Silent())._consider(offered("quiet-0", "cancelled")) == "cancelled"
    assert world.kinds()[2:] == ["START", "RELEASE", "ABORT"]
    assert world.site.ledger("toy").book.open() == []
    assert sorted(path.name for path in directory.iterdir()) == ["local"]


def test_an_upload_that_arrived_is_no_open_job_when_its_plan_is_cancelled(world: World) -> None:
    spend(world)
    job = world.job("quiet-0", PRIVACY)
    charging.release(world.site, job, 1, 1, b"t" * 32, b"v" * 32)
    charging.commit(world.site, job, 1, 1, b"r" * 32)
    Daemon(world.site, Silent())._consider(offered("quiet-0", "cancelled"))
    assert world.kinds()[2:] == ["START", "RELEASE", "COMMIT"]
    assert world.site.store.trained("quiet-0", 1) is not None


def test_the_vector_is_gone_before_the_job_stands_as_ended(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    spend(world)
    site, job = world.site, world.job("quiet-0", PRIVACY)

    def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(site.ledger("toy")), "append", cut)
    with pytest.raises(KeyboardInterrupt):
        charging.give_up(site, job, 1, "cancelled")
    assert world.site.store.trained("quiet-0", 1) is None


def test_the_vector_of_another_file_of_the_plan_is_not_deleted(world: World) -> None:
    spend(world)
    store = world.site.store
    store.forget_trained("quiet-0", 1, "ab" * 32)
    assert store.trained("quiet-0", 1) is not None


def test_a_spent_delta_that_was_deleted_is_never_trained_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    spend(world)
    job = world.job("quiet-0", PRIVACY)
    monkeypatch.setattr(Site, "spent", lambda *_: ["in some round"])
    charging.give_up(world.site, job, 1, "cancelled")
    with pytest.raises(Refusal, match="'quiet-0' is spent and was deleted; it takes a plan of another name"):
        prepare.prepare(world.site, job, 1)
    assert len(world.trained) == 1


def _cohort(number: int, survivors: tuple[int, ...]) -> VerifiedCohort:
    quantizer = Quantizer(size=8, bits=24, cohort=3, clip=1.0, max_weight=1, extras=())
    return VerifiedCohort(number, survivors, b"t" * 32, bytes(32), Total(Path(), quantizer))


def test_a_total_that_holds_an_upload_commits_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon died after the last byte and before COMMIT, and the round ended without it."""
    site, job = world.site, world.job()
    prepare.prepare(site, job, 1)
    charging.release(site, job, 1, 3, b"t" * 32, b"v" * 32)
    header = job.header(1, 3, bytes(32))
    spent = Spent(header, "toy", "toy", bytes(32), b"t" * 32, (0, 1, 2), 0, 2, b"r" * 32, b"v" * 32)
    monkeypatch.setattr(Site, "spent", lambda *_: [spent])
    for number, survivors in ((2, (0, 1, 2)), (3, (1, 2))):  # another round, or without this site, which is 0
        fetch._settle(site, job, 1, [_cohort(number, survivors)])
    assert world.kinds()[-1] == "RELEASE"
    for _ in range(2):
        fetch._settle(site, job, 1, [_cohort(3, (0, 1))])
    assert world.kinds()[-2:] == ["RELEASE", "COMMIT"]
