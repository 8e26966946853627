"""What a site's jobs are charged with: before training, in full, once; and what is refused before anything is read."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo.federation import Federation
from participant import charging, prepare
from participant.site import Site
from participant.training import TrainingResult
from privacy.budget import filter as budget_filter
from privacy.budget import terms
from privacy.budget.events import DpSgd
from privacy.budget.ledger import LedgerError
from privacy.errors import Refusal, UserError
from privacy.job import Job
from privacy.plan import parse_plan
from tests.test_end_to_end import SITE, toy_plan

PRIVACY = """
[privacy]
unit = "record"
sigma = "1.5"
delta = "1e-5"
clip = "0.5"
rate = "0.04"
steps = 50
nominal_batch = 4
nominal_size = 100
"""
BUDGET = '[datasets.toy.budget]\nepsilon = "{}"\ndelta = "1e-5"\n'
POLICY = {"max_colluders": 0, "min_cohort": 3, "min_survivors": 3}


def plan(name: str = "toy", privacy: str = "") -> bytes:
    text = toy_plan().decode().replace('name = "toy"', f'name = "{name}"', 1)
    if privacy:
        text = text.replace("epochs = 1\n", "").replace("batch_size = 4\n", "") + privacy
    return text.encode()


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    names = ["site-1", "site-2", "site-3"]
    found = Federation(tmp_path_factory.mktemp("f"), names, POLICY, dict.fromkeys(names, SITE))
    found.create()
    return found


class World:
    """One site with a data set, whose training is replaced by one that reads nothing."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.trained: list[tuple[str, str]] = []  # (plan, state of its job when training began)
        self.fails: list[Exception] = []
        lines = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
        (directory / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def configure(self, text: str) -> None:
        path = self.directory / "participant.toml"
        head = path.read_text().split("keep_plain_vector")[0]
        path.write_text(head + SITE.replace("[policy]", text + "[policy]").replace('["toy"]', '["*"]'))

    @property
    def site(self) -> Site:
        return Site.open(self.directory)

    def job(self, name: str = "toy", privacy: str = "") -> Job:
        return Job.of(parse_plan(plan(name, privacy)), self.site.roster)

    def kinds(self) -> list[str]:
        return [entry.kind for entry in self.site.ledger("toy").entries]

    def train(self, **about: Any) -> TrainingResult:
        book, name = self.site.ledger("toy").book, about["plan"].name
        self.trained.append(
            (name, next(j.state for j in book.jobs.values() if j.reserve.plan == name and not j.aborted))
        )
        if self.fails:
            raise self.fails.pop()
        size = self.job(name, PRIVACY if about["plan"].privacy else "").quantizer.size
        return TrainingResult(np.zeros(size, np.float32), len(about["examples"]), 0.0, 1.0)

    def train_private(self, **about: Any) -> TrainingResult:
        about["on_selftest"](SelfTest())
        return self.train(**about)


class SelfTest:
    passed = True

    def to_json(self) -> dict[str, Any]:
        return {"sensitivity_ratio": "0.99", "passed": True}


@pytest.fixture
def world(federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    from participant import dp_sgd, training

    for path in federation.site("site-1").iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
            (tmp_path / path.name).chmod(0o600)
    found = World(tmp_path)
    monkeypatch.setattr(training, "train", found.train)
    monkeypatch.setattr(dp_sgd, "train_private", found.train_private)
    found.configure("")
    return found


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


def test_a_private_job_starts_with_its_self_test(world: World) -> None:
    world.configure(BUDGET.format(8))
    prepare.prepare(world.site, world.job("quiet", PRIVACY), 1)
    assert world.trained == [("quiet", "started")]
    reserve, start = world.site.ledger("toy").entries[1:]
    assert start.facts.model_dump()["selftest"] == SelfTest().to_json()
    facts = reserve.facts.model_dump()
    assert facts["mechanism"] == terms.mechanism(world.job("quiet", PRIVACY).plan).to_json()
    assert list(facts["rdp"]) == ["3"]
    assert 0 < float(facts["claim"]["pld"]) <= float(facts["claim"]["rdp"])
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


def spend(world: World, count: int = 1) -> None:
    for number in range(count):
        prepare.prepare(world.site, world.job(f"quiet-{number}", PRIVACY), 1)


def admit(world: World, job: Job) -> None:
    from participant.policy import admit as admitted

    site = world.site
    admitted(job, site.home.settings, charging.standing(site, job, 1))


def test_a_plan_that_would_pass_the_budget_is_refused_before_training(world: World) -> None:
    mechanism = terms.mechanism(world.job("quiet", PRIVACY).plan)
    assert isinstance(mechanism, DpSgd)
    world.configure(BUDGET.format(8))
    policy = world.site.home.settings.datasets["toy"].policy()
    one, two = (budget_filter.enforced_epsilon(policy, (mechanism,) * count) for count in (1, 2))
    world.configure(BUDGET.format(f"{(one + two) / 2:.4f}") + "order = 3\n")
    spend(world)
    admit(world, world.job("quiet-0", PRIVACY))  # its own charge does not stand against it
    second = world.job("quiet-1", PRIVACY)
    after = f"bring the data set to {two:.3f} of {(one + two) / 2:.4f}; {one:.3f} is spent"
    said = f"would cost epsilon {one:.3f} alone and {after}"
    with pytest.raises(Refusal) as raised:
        admit(world, second)
    assert said in str(raised.value)
    assert f"{(one + two) / 2 - one:.3f} is left (order 3, delta 0.00001)" in str(raised.value)
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
    with pytest.raises(LedgerError, match="a weaker policy carries a reason"):
        charging.change_policy(world.site, "toy", "")
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


# --- what the administrator is shown ---------------------------------------------------------------------------------


def test_the_account_says_what_is_spent_reserved_and_left(world: World) -> None:
    world.configure(BUDGET.format(8))
    assert charging.account(world.site, "toy")["registered"] is False
    spend(world)
    charging.reserve(world.site, world.job("next", PRIVACY), 1)
    found = charging.account(world.site, "toy")
    assert (found["budget"], found["order"], found["delta"]) == ("8", 3, "0.00001")
    assert 0 < float(found["spent"]) < float(found["reserved"]) < 8
    assert float(found["left"]) == pytest.approx(8 - float(found["reserved"]), abs=1e-4)
    assert [job["state"] for job in found["jobs"]] == ["started", "reserved"]
    assert found["records"] == 20


def run(world: World, *arguments: str) -> str:
    from typer.testing import CliRunner

    from participant.cli import app

    done = CliRunner().invoke(app, [*arguments, "--dir", str(world.directory)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_commands_register_show_and_list(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    world.configure(BUDGET.format(8))
    assert "toy: not registered" in run(world, "dataset", "list")
    assert "toy: 20 records registered, 20 of them new" in run(world, "dataset", "register", "toy")
    assert json.loads(run(world, "dataset", "register", "toy", "--json"))["added"] == 0
    assert world.kinds() == ["REGISTER"]
    spend(world)
    shown = run(world, "dataset", "show", "toy")
    assert "toy: epsilon 8 for a record, delta 0.00001, order 3, add-remove" in shown
    assert "started: plan 'quiet-0', stage 1" in shown
    (row,) = json.loads(run(world, "budget", "--json"))
    assert f"epsilon {row['spent']} spent" in run(world, "budget")
    assert f"{row['left']} of 8 left" in run(world, "budget")
    world.configure(BUDGET.format(7))
    assert "toy: entered: epsilon 7" in run(world, "dataset", "policy", "toy")
    assert "toy: nothing to enter" in run(world, "dataset", "policy", "toy")
    with pytest.raises(UserError, match=r"expected a data set of participant\.toml, found 'mail'; there: toy"):
        run(world, "dataset", "show", "mail")


def test_a_crash_at_each_write_leaves_a_charge_or_no_training(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever write a site dies in, records are read only after START is durable, and START only after RESERVE."""
    from privacy import faults

    names: list[str] = []
    monkeypatch.setattr(faults, "_on", True)
    monkeypatch.setattr(faults, "_pass", names.append)
    prepare.prepare(world.site, world.job(), 1)
    assert "after-fsync:toy.jsonl" in names
    for number, _ in enumerate(names):
        check_crash(world, monkeypatch, number, f"again-{number}")


class Dead(BaseException):
    """The process ends here."""


def check_crash(world: World, monkeypatch: pytest.MonkeyPatch, at: int, name: str) -> None:
    from privacy import faults

    passed = [0]

    def die(_: str) -> None:
        passed[0] += 1
        if passed[0] == at + 1:
            raise Dead

    world.trained.clear()
    monkeypatch.setattr(faults, "_pass", die)
    with suppress(Dead):
        prepare.prepare(world.site, world.job(name), 1)
    monkeypatch.setattr(faults, "_pass", lambda _: None)
    assert all(state == "started" for _, state in world.trained)
    before = {j.reserve.job for j in world.site.ledger("toy").book.charged() if j.reserve.plan == name}
    if world.trained:
        assert before
    prepare.prepare(world.site, world.job(name), 1)
    after = {j.reserve.job for j in world.site.ledger("toy").book.charged() if j.reserve.plan == name}
    assert before <= after
    assert len(after) == 1
