"""What the administrator of a site is shown of data sets and budgets; and a site that dies in any of its writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest

from participant import charging, prepare
from privacy.errors import UserError
from privacy.files import only_one
from tests.charging import BUDGET, PRIVACY, World, plan, spend

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


def test_an_open_job_is_closed_by_hand(world: World) -> None:
    spend(world, 2)
    first, second = world.site.ledger("toy").book.jobs
    assert f"  {first[:8]} started: plan 'quiet-0', stage 1" in run(world, "dataset", "show", "toy")
    with pytest.raises(UserError, match="expected a reason, found none"):
        run(world, "dataset", "close", "toy", first[:8])
    for found in ("", "z"):
        with pytest.raises(UserError, match=f"id of one open job, found '{found}'; open: {first[:8]} .plan 'quiet-0'"):
            run(world, "dataset", "close", "toy", found, "--reason", "gone")
    with only_one(world.directory, "daemon"), pytest.raises(UserError, match="daemon of this site here, found one"):
        run(world, "dataset", "close", "toy", first[:8], "--reason", "gone")
    said = run(world, "dataset", "close", "toy", first[:8], "--reason", "the coordinator is gone")
    assert said == f"toy: job {first[:8]} is closed\n"
    book = world.site.ledger("toy").book
    assert ([job.reserve.job for job in book.open()], len(book.charged())) == ([second], 2)
    assert world.site.store.trained("quiet-0", 1) is None


def test_the_commands_register_show_and_list(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    world.configure(BUDGET.format(8))
    assert "toy: not registered" in run(world, "dataset", "list")
    assert "toy: 20 records registered, 20 of them new" in run(world, "dataset", "register", "toy")
    assert json.loads(run(world, "dataset", "register", "toy", "--json"))["added"] == 0
    assert world.kinds() == ["REGISTER"]
    spend(world)
    assert json.loads(run(world, "dataset", "show", "toy", "--json")) == charging.account(world.site, "toy")
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


RACE = """
import sys
from pathlib import Path
from participant import charging
from participant.site import Site
from privacy.errors import Refusal
from privacy.job import Job
from privacy.plan import parse_plan
site = Site.open(Path(sys.argv[1]))
job = Job.of(parse_plan(sys.stdin.buffer.read()), site.roster)
charging.bounded_pld_epsilon = charging.rdp_epsilon
print("ready", flush=True)
while not Path(sys.argv[2]).exists():
    pass
try:
    charging.reserve(site, job, 1)
    print("won")
except Refusal as error:
    print(f"lost: {error}")
"""


def test_of_two_sites_processes_that_race_for_the_last_of_a_budget_one_wins(world: World) -> None:
    world.configure(BUDGET.format("4.91") + "order = 3\n")  # one job of this kind costs 4.87, two 4.94
    charging.ledger_of(world.site, "toy")
    environment, go = {**os.environ, "PYTHONPATH": os.getcwd()}, world.directory / "go"
    racers = []
    for name in ("one", "two"):
        command = [sys.executable, "-c", RACE, str(world.directory), str(go)]
        racer = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert racer.stdin is not None
        racer.stdin.write(plan(name, PRIVACY))
        racer.stdin.close()
        racers.append(racer)
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == b"ready\n"
    go.touch()
    said = sorted(racer.stdout.read().decode() for racer in racers if racer.stdout is not None)
    assert [racer.wait() for racer in racers] == [0, 0]
    assert said[1] == "won\n"
    assert "would cost epsilon 4.871 alone and bring the data set to 4.939 of 4.91" in said[0]
    assert world.kinds() == ["REGISTER", "RESERVE"]


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
