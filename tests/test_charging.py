"""What a site's jobs are charged with: before training, in full, once; and what is refused before anything is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from participant import charging, prepare
from participant.daemon import Daemon
from participant.store import StartNote
from participant.training import TrainingResult
from privacy.adapter import start_digest
from privacy.budget import filter as budget_filter
from privacy.budget import terms
from privacy.budget.accounting import bounded_pld_epsilon
from privacy.budget.checkpoint import verify_checkpoint
from privacy.budget.events import DpSgd
from privacy.errors import Refusal, UserError
from privacy.job import Job
from privacy.plan import Plan, parse_plan
from privacy.secagg.keys import identity_public
from privacy.stages import Start, first_start
from tests.charging import BUDGET, PRIVACY, SelfTest, Silent, World, admit, offered, plan, spend


def test_a_job_is_charged_and_started_before_it_trains(world: World) -> None:
    prepare.prepare(world.site, world.job(), 1)
    assert world.trained == [("toy", "started")]
    assert world.kinds() == ["REGISTER", "RESERVE", "START"]
    register, reserve, start = (entry.facts.model_dump() for entry in world.site.ledger("toy").entries)
    assert register["policy"]["epsilon"] is None
    assert (reserve["plan"], reserve["rdp"], reserve["claim"]["pld"], start["selftest"]) == ("toy", {}, "inf", None)
    assert reserve["plan_digest"] == world.job().plan_file.digest.hex()
    prepare.prepare(world.site, world.job(), 1)  # what is kept is not charged again
    assert (len(world.trained), world.kinds()) == (1, ["REGISTER", "RESERVE", "START"])


def test_a_private_job_starts_with_its_self_test(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charging, "bounded_pld_epsilon", bounded_pld_epsilon)
    world.configure(BUDGET.format(8))
    prepare.prepare(world.site, world.job("quiet", PRIVACY), 1)
    assert world.trained == [("quiet", "started")]
    reserve, start = world.site.ledger("toy").entries[1:]
    assert start.facts.model_dump()["selftest"] == SelfTest().to_json()
    facts = reserve.facts.model_dump()
    assert facts["mechanism"] == terms.mechanism(world.job("quiet", PRIVACY).plan).to_json()
    assert list(facts["rdp"]) == ["3"]
    assert 0 < float(facts["claim"]["pld"]) < float(facts["claim"]["rdp"])
    assert facts["code"]["rng"] == "aes256ctr-urandom"


def test_a_self_test_that_fails_never_starts_the_job(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from participant import dp_sgd

    def fails(**_: Any) -> TrainingResult:
        raise UserError("self-test: expected sensitivity of at most C, found 9 C")

    monkeypatch.setattr(dp_sgd, "train_private", fails)
    for _ in range(3):
        with pytest.raises(UserError, match="self-test"):
            prepare.prepare(world.site, world.job("quiet", PRIVACY), 1)
    assert world.kinds() == ["REGISTER", "RESERVE"]
    charging.give_up(world.site, world.job("quiet", PRIVACY), 1, "the plan is cancelled")
    assert world.kinds() == ["REGISTER", "RESERVE", "ABORT"]
    assert world.site.ledger("toy").book.charged() == []
    charging.give_up(world.site, world.job("quiet", PRIVACY), 1, "the plan is cancelled")
    assert world.kinds() == ["REGISTER", "RESERVE", "ABORT"]


def test_a_plan_that_would_pass_the_budget_is_refused_before_training(world: World) -> None:
    mechanism = terms.mechanism(world.job("quiet", PRIVACY).plan)
    assert isinstance(mechanism, DpSgd)
    world.configure(BUDGET.format(8))
    policy = world.site.home.settings.datasets["toy"].policy()
    one, two = (budget_filter.enforced_epsilon(policy, (mechanism,) * count) for count in (1, 2))
    budget = f"{(one + two) / 2:.4f}".rstrip("0")
    world.configure(BUDGET.format(budget) + "order = 3\n")
    spend(world)
    admit(world, world.job("quiet-0", PRIVACY))  # its own charge does not stand against it
    second = world.job("quiet-1", PRIVACY)
    after = f"bring the data set to {two:.3f} of {budget}; {one:.3f} is spent"
    said = f"would cost epsilon {one:.3f} alone and {after}"
    with pytest.raises(Refusal) as raised:
        admit(world, second)
    assert said in str(raised.value)
    assert f"{float(budget) - one:.3f} is left (order 3, delta 0.00001)" in str(raised.value)
    with pytest.raises(Refusal) as raised:
        prepare.prepare(world.site, second, 1)  # and again under the lock
    assert said in str(raised.value)
    assert world.kinds() == ["REGISTER", "RESERVE", "START"]
    assert len(world.trained) == 1


def test_a_job_without_privacy_is_refused_where_there_is_a_budget(world: World) -> None:
    world.configure(BUDGET.format(8))
    for refused in (lambda: admit(world, world.job()), lambda: prepare.prepare(world.site, world.job(), 1)):
        with pytest.raises(Refusal, match=r"plan 'toy' has no \[privacy\], and the data set has a budget of epsilon 8"):
            refused()
    assert world.trained == []


def test_a_job_without_privacy_spends_everything_for_good(world: World) -> None:
    prepare.prepare(world.site, world.job(), 1)
    assert charging.account(world.site, "toy")["spent"] == "inf"
    world.configure(BUDGET.format(8) + "order = 6\n")
    with pytest.raises(Refusal, match="veilsum-participant dataset policy toy --reason TEXT"):
        admit(world, world.job("quiet", PRIVACY))
    assert charging.change_policy(world.site, "toy", "")  # a first budget is no weaker policy
    with pytest.raises(Refusal, match="a job without privacy ran on this data set before"):
        admit(world, world.job("quiet", PRIVACY))


def test_what_is_declared_not_protected_is_recorded_all_the_same(world: World) -> None:
    world.configure("protected = false\n")
    prepare.prepare(world.site, world.job(), 1)
    prepare.prepare(world.site, world.job("quiet", PRIVACY), 1)
    assert world.kinds() == ["REGISTER", "RESERVE", "START", "RESERVE", "START"]
    assert charging.account(world.site, "toy")["policy"] == "not protected"


def changed(old: str, new: str) -> str:
    assert old in PRIVACY
    return PRIVACY.replace(old, new)


@pytest.mark.parametrize(
    ("budget", "privacy", "reason"),
    [
        ("", changed("1e-5", "2e-5"), "delta 0.00002, the budget allows 0.00001"),
        ('adjacency = "zero-out"\n', PRIVACY, "adjacency 'add-remove', the budget is for 'zero-out'"),
        ('unit = "user"\nmax_records_per_unit = 2\n', PRIVACY, "unit 'record', the budget is for users"),
        (
            'unit = "user"\nmax_records_per_unit = 3\n',
            changed('"record"', '"user"\nmax_records_per_unit = 2'),
            "max_records_per_unit 2, users of this data set have up to 3",
        ),
    ],
)
def test_terms_that_promise_less_than_the_budget_are_refused(
    world: World, budget: str, privacy: str, reason: str
) -> None:
    world.configure('unit = "who"\n' + BUDGET.format(8) + budget)
    with pytest.raises(Refusal, match=f"plan 'quiet' has {reason}$"):
        admit(world, world.job("quiet", privacy))


def test_a_plan_whose_epsilon_no_noise_can_keep_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Plan) -> None:
        raise UserError("expected an epsilon that noise in range can keep, found 0.001")

    job = world.job("quiet", PRIVACY)
    monkeypatch.setattr(terms, "mechanism", fails)
    with pytest.raises(Refusal, match="plan 'quiet': expected an epsilon that noise in range can keep"):
        admit(world, job)


def test_stricter_terms_are_admitted(world: World) -> None:
    world.configure('unit = "who"\n' + BUDGET.format(20))
    admit(world, world.job("quiet", changed("1e-5", "1e-6")))
    admit(world, world.job("quiet", changed('"record"', '"user"\nmax_records_per_unit = 2')))


def test_a_plan_for_users_needs_to_know_whose_a_record_is(world: World) -> None:
    world.configure(BUDGET.format(20))
    with pytest.raises(Refusal, match="does not say whose a record is"):
        admit(world, world.job("quiet", changed('"record"', '"user"\nmax_records_per_unit = 2')))


@pytest.mark.parametrize(
    ("now", "text"),
    [
        (BUDGET.format(9), r"\(epsilon 8 .* found another in participant.toml \(epsilon 9"),
        (BUDGET.format(8) + "order = 4\n", r"order 3.*order 4"),
        ("", r"epsilon 8 .* found another in participant.toml \(no budget"),
        ("protected = false\n", r"found another in participant.toml \(not protected"),
    ],
)
def test_a_file_that_says_otherwise_than_the_ledger_is_refused(world: World, now: str, text: str) -> None:
    world.configure(BUDGET.format(8))
    spend(world)
    world.configure(now)
    for refused in (
        lambda: admit(world, world.job("other", PRIVACY)),
        lambda: prepare.prepare(world.site, world.job("other", PRIVACY), 1),
        lambda: prepare.prepare(world.site, world.job("quiet-0", PRIVACY), 1),
    ):
        with pytest.raises(Refusal, match=text):
            refused()


def test_a_change_of_the_budget_is_entered_by_command_and_a_weaker_one_with_its_reason(world: World) -> None:
    world.configure(BUDGET.format(8))
    spend(world)
    world.configure(BUDGET.format(9))
    for reason, text in (("", "for epsilon: 8 -> 9, found none"), ("x" * 401, "found 401 characters")):
        with pytest.raises(UserError, match=text):
            charging.change_policy(world.site, "toy", reason)
    assert charging.change_policy(world.site, "toy", "the patients agreed")
    assert not charging.change_policy(world.site, "toy", "again")
    admit(world, world.job("quiet-9", PRIVACY))
    world.configure(BUDGET.format(9) + "order = 4\n")
    with pytest.raises(Refusal, match="unit, adjacency, delta and order stay"):
        charging.change_policy(world.site, "toy", "we like it better")
    assert world.kinds()[-1] == "POLICY"


# --- what is left by a crash or a failure ----------------------------------------------------------------------------


def test_a_reservation_that_never_started_is_taken_up_again(world: World) -> None:
    first = charging.reserve(world.site, world.job("quiet", PRIVACY), 1)
    prepare.prepare(world.site, world.job("quiet", PRIVACY), 1)
    assert world.kinds() == ["REGISTER", "RESERVE", "START"]
    assert list(world.site.ledger("toy").book.jobs) == [first]


def test_a_training_that_was_cut_short_is_charged_and_so_is_the_next(world: World) -> None:
    world.fails = [UserError("out of memory"), UserError("out of memory")]
    job = world.job("quiet", PRIVACY)
    for _ in range(2):
        with pytest.raises(UserError, match="out of memory"):
            prepare.prepare(world.site, job, 1)
    assert world.kinds() == ["REGISTER", "RESERVE", "START", "ABORT", "RESERVE", "START"]
    assert len(world.site.ledger("toy").book.charged()) == 2
    with pytest.raises(Refusal, match="was trained 2 times here, each time charged"):
        prepare.prepare(world.site, job, 1)
    assert len(world.trained) == 2


def test_a_training_without_privacy_that_fails_again_and_again_fills_no_ledger(world: World) -> None:
    world.fails = [UserError("out of memory") for _ in range(4)]
    for _ in range(4):
        with pytest.raises(UserError, match="out of memory"):
            prepare.prepare(world.site, world.job(), 1)
    assert world.kinds() == ["REGISTER", "RESERVE", "START"]


def test_a_vector_that_no_ledger_knows_is_charged_before_it_leaves(world: World) -> None:
    prepare.prepare(world.site, world.job(), 1)
    for path in (world.directory / "ledger").iterdir():
        path.unlink()
    assert world.kinds() == []
    prepare.prepare(world.site, world.job(), 1)
    assert (world.kinds(), len(world.trained)) == (["REGISTER", "RESERVE", "START"], 1)


def test_a_second_round_is_no_second_charge_and_a_commit_is_said_once(world: World) -> None:
    site, job = world.site, world.job()
    prepare.prepare(site, job, 1)
    charging.release(site, job, 1, 1, b"t" * 32, b"v" * 32)
    charging.release(site, job, 1, 2, b"u" * 32, b"v" * 32)
    for _ in range(2):
        charging.commit(site, job, 1, 2, b"r" * 32)
    charging.commit(site, job, 1, 7, b"r" * 32)  # of a round this ledger knows nothing of
    assert world.kinds()[3:] == ["RELEASE", "RELEASE", "COMMIT"]
    assert len(site.ledger("toy").book.charged()) == 1


def test_the_same_records_under_another_name_are_never_trained(world: World) -> None:
    prepare.prepare(world.site, world.job(), 1)
    world.configure('[datasets.fresh]\npath = "data.jsonl"\nformat = "jsonl"\n')
    raw = plan("other").replace(b'dataset = "toy"', b'dataset = "fresh"')
    with pytest.raises(Refusal, match="of its 20 records these are registered already: 20 under 'toy'"):
        prepare.prepare(world.site, Job.of(parse_plan(raw), world.site.roster), 1)
    assert len(world.trained) == 1
    assert not (world.directory / "ledger" / "fresh.jsonl").exists()


def test_ledger_and_registry_of_different_backups_are_refused(world: World) -> None:
    prepare.prepare(world.site, world.job(), 1)
    manifest = world.directory / "registry" / "toy.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"records":20', b'"records":21'))
    with pytest.raises(Refusal, match="restore both from the same backup"):
        prepare.prepare(world.site, world.job(), 1)


# --- the daemon -------------------------------------------------------------------------------------------------------


def test_a_private_job_is_never_started_twice(world: World) -> None:
    job = world.job("quiet", PRIVACY)
    identity = charging.reserve(world.site, job, 1)
    charging.start(world.site, job, identity, {})
    with pytest.raises(Refusal, match="plan 'quiet': its training began before"):
        charging.start(world.site, job, identity, {})
    free = charging.reserve(world.site, world.job(), 1)
    for _ in range(2):  # its charge is infinite already: after a crash it goes on
        charging.start(world.site, world.job(), free, None)
    assert world.kinds() == ["REGISTER", "RESERVE", "START", "RESERVE", "START"]


def test_a_training_that_failed_is_left_alone_for_a_while(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.fails = [UserError("out of memory"), UserError("out of memory")]
    now = [1000.0]
    monkeypatch.setattr("participant.daemon.time.monotonic", lambda: now[0])
    found = Daemon(world.site, Silent())
    for seconds, trained in ((0, 1), (2, 1), (50, 1), (10, 2)):
        now[0] += seconds
        assert found._consider(offered("quiet")) == "failed"
        assert len(world.trained) == trained
    assert world.site.notes()["quiet"]["reason"] == "out of memory"


def test_a_plan_beyond_the_budget_is_refused_by_the_daemon_before_anything_is_read(world: World) -> None:
    world.configure(BUDGET.format("4") + "order = 3\n")
    (world.directory / "data.jsonl").unlink()
    assert Daemon(world.site, Silent())._consider(offered("quiet")) == "refused"
    assert "would cost epsilon 4." in world.site.notes()["quiet"]["reason"]
    assert world.kinds() == []


def test_a_checkpoint_goes_with_every_message_about_the_plan(world: World) -> None:
    found = Daemon(world.site, Silent())
    spend(world)
    found._consider(offered("quiet-0", "cancelled"))
    ledger = world.site.ledger("toy")
    noted = verify_checkpoint(found.client.checkpoint(), identity_public(world.site.identity))
    assert (noted.dataset, noted.size, noted.root) == (ledger.book.dataset, *ledger.head())
    charging.reserve(world.site, world.job("next", PRIVACY), 1)
    assert verify_checkpoint(found.client.checkpoint(), identity_public(world.site.identity)).size == noted.size + 1


# --- several stages ---------------------------------------------------------------------------------------------------


def staged_job(world: World, stages: int) -> Job:
    raw = plan("quiet", PRIVACY).replace(b'task = "classification"', b'task = "classification"\nstages = %d' % stages)
    return Job.of(parse_plan(raw), world.site.roster)


def test_the_cost_of_all_stages_must_be_left_before_the_first_trains(world: World) -> None:
    mechanism = terms.mechanism(world.job("quiet", PRIVACY).plan)
    assert isinstance(mechanism, DpSgd)
    world.configure(BUDGET.format(8))
    policy = world.site.home.settings.datasets["toy"].policy()
    two, three = (budget_filter.enforced_epsilon(policy, (mechanism,) * count) for count in (2, 3))
    budget = f"{(two + three) / 2:.4f}".rstrip("0")
    world.configure(BUDGET.format(budget) + "order = 3\n")
    said = f"would cost epsilon {three:.3f} in 3 stages and bring the data set to {three:.3f} of {budget}; 0.000 is"
    job = staged_job(world, 3)
    for refused in (lambda: admit(world, job), lambda: prepare.prepare(world.site, job, 1)):
        with pytest.raises(Refusal) as raised:
            refused()
        assert said in str(raised.value)
        assert f"{float(budget):.3f} is left" in str(raised.value)
    assert world.trained == []
    assert world.kinds() == ["REGISTER"]
    admit(world, staged_job(world, 2))
    prepare.prepare(world.site, staged_job(world, 2), 1)
    assert world.kinds() == ["REGISTER", "RESERVE", "START"]


def test_each_stage_is_a_job_of_its_own_from_its_own_start(world: World) -> None:
    job, site = staged_job(world, 2), world.site
    prepare.prepare(site, job, 1)
    tensors = {name: tensor + np.float32(0.25) for name, tensor in first_start(job).tensors.items()}
    start = Start(tensors, start_digest(tensors))
    with pytest.raises(Refusal, match="has not computed where stage 2 of plan 'quiet' starts"):
        prepare.prepare(site, job, 2, None, start)
    site.store.keep_start("quiet", 2, StartNote(job.plan_file.digest.hex(), start.digest.hex(), []))
    with pytest.raises(RuntimeError, match="needs the start that this site computed"):
        prepare.prepare(site, job, 2, None, first_start(job))
    trained = prepare.prepare(site, job, 2, None, start)
    assert world.started[-1] is start.tensors
    assert trained.start == start.digest.hex()
    reserved = [e.facts.model_dump() for e in world.site.ledger("toy").entries if e.kind == "RESERVE"]
    assert [r["stage"] for r in reserved] == [1, 2]
    assert [r["model"]["start"] for r in reserved] == [job.plan.adapter.digest, start.digest.hex()]
    assert prepare.prepare(site, job, 2, None, start) == trained  # what is kept is not trained again
    assert len(world.trained) == 2
