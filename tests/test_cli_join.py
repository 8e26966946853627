"""The commands about membership and consent: what they print, and what they refuse in one line."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from coordinator import cli as coordinator_cli
from demo.federation import Federation
from participant import cli as participant_cli
from participant.client import Client, OfferedPlan
from privacy import console
from tests.hostile import Log
from tests.joining import Coordinator
from tests.test_end_to_end import SITE, toy_plan

MAINS = {"veilsum-coordinator": coordinator_cli.main, "veilsum-participant": participant_cli.main}
COMMANDS = {
    "veilsum-coordinator": ("init", "invite", "members", "add", "remove", "roster draft", "roster publish"),
    "veilsum-participant": ("join", "identity", "renew", "roster show", "roster approve", "plans", "approve"),
}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: (exit code, standard output, standard error)."""

    def run(*line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", list(line))
        capsys.readouterr()
        code = 0
        try:
            MAINS[line[0]]()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    structlog.configure(processors=[Log()])  # its log lines are not what a command prints
    found = Coordinator(tmp_path)
    yield found
    found.close()


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, paths in COMMANDS.items() for path in paths])
def test_every_command_has_an_example(name: str, path: str, command: Run) -> None:
    code, out, _ = command(name, *path.split(), "--help")
    assert code == 0
    assert f"Example: {name} {path}" in " ".join(out.replace("│", " ").split())


def test_a_new_coordinator_prints_its_fingerprint_and_is_not_made_twice(tmp_path: Path, command: Run) -> None:
    line = ("veilsum-coordinator", "init", str(tmp_path / "c"), "--host", "example.org", "--federation", "newsrooms")
    code, out, _ = command(*line)
    assert code == 0
    words = next(line for line in out.splitlines() if "in words" in line)
    assert len(words.partition(": ")[2].split()) == 12
    code, _, err = command(*line)
    assert code == console.EXIT_USER
    assert "expected no coordinator here yet, found one" in err
    code, _, err = command("veilsum-coordinator", "init", str(tmp_path / "d"), "--federation", "News Rooms")
    assert code == console.EXIT_USER
    assert "expected a name of lower-case letters" in err


def test_the_line_that_invite_prints_is_the_one_to_run(coordinator: Coordinator, command: Run) -> None:
    at, site = ("--dir", str(coordinator.home.directory)), ("--dir", str(coordinator.site("north")))
    code, out, err = command("veilsum-coordinator", "invite", "north", *at)
    assert code == 0
    assert "good once, until" in err
    assert "invited until" in command("veilsum-coordinator", "members", *at)[1]
    code, told, _ = command(*out.split(), *site)
    assert code == 0
    assert "'north' has joined 'newsrooms'" in told
    words = next(line for line in told.splitlines() if "key in words" in line).partition(": ")[2]
    assert command("veilsum-coordinator", "members", *at)[1] == f"north: {words}\n"
    assert command("veilsum-participant", "identity", *site)[1].splitlines()[1] == words
    code, _, err = command("veilsum-coordinator", "invite", "north", *at)
    assert code == console.EXIT_REFUSED
    assert "remove it first" in err
    assert command("veilsum-participant", "renew", *site)[1].startswith("valid until 20")
    assert command("veilsum-coordinator", "remove", "north", *at)[0] == 0
    assert command("veilsum-coordinator", "members", *at)[1] == "north: removed\n"
    code, _, err = command("veilsum-participant", "renew", *site)
    assert code == console.EXIT_REFUSED
    assert "was removed from this federation" in err


def test_an_invitation_may_come_by_standard_input(
    coordinator: Coordinator, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(coordinator.invite("north") + "\n"))
    line = ("veilsum-participant", "join", coordinator.url, "-", "--dir", str(coordinator.site("north")), "--json")
    code, out, _ = command(*line)
    assert code == 0
    assert json.loads(out)["member"] == "north"


def test_without_a_port_to_join_at_nobody_is_invited(tmp_path: Path, command: Run) -> None:
    (tmp_path / "coordinator.toml").write_text("")
    code, _, err = command("veilsum-coordinator", "invite", "north", "--dir", str(tmp_path))
    assert code == console.EXIT_USER
    assert "expected join_listen and address, found none" in err
    assert not (tmp_path / "members.jsonl").exists()


@pytest.mark.parametrize(("name", "key"), [("North", "1" * 64), ("north", "1" * 63), ("north", "G" * 64)])
def test_what_is_no_member_is_not_added(coordinator: Coordinator, command: Run, name: str, key: str) -> None:
    code, _, err = command("veilsum-coordinator", "add", name, key, "--dir", str(coordinator.home.directory))
    assert code == console.EXIT_USER
    assert "expected a" in err
    assert not coordinator.members.read().members


def test_a_roster_from_draft_to_approval(coordinator: Coordinator, command: Run) -> None:
    at, site = ("--dir", str(coordinator.home.directory)), ("--dir", str(coordinator.site("north")))
    for name in ("north", "south", "west"):
        coordinator.join(name)
    assert "has joined already" in command("veilsum-coordinator", "invite", "south", *at)[2]
    assert command("veilsum-coordinator", "roster", "draft", *at)[0] == 0
    code, out, _ = command("veilsum-coordinator", "roster", "publish", *at)
    assert code == 0
    assert "no coordinator is running here" in out
    words = next(line for line in out.splitlines() if line.startswith("in words")).partition(": ")[2]
    code, shown, _ = command("veilsum-participant", "roster", "show", *site)
    assert code == 0
    assert words in shown
    assert "north (this site): " in shown
    assert "read the words to the other members by telephone" in shown
    assert command("veilsum-participant", "roster", "approve", *site)[1].startswith("approved: 3 members")
    assert "this site has approved it" in command("veilsum-participant", "roster", "show", *site)[1]
    code, _, err = command("veilsum-participant", "roster", "approve", *site)
    assert code == console.EXIT_USER
    assert "expected a roster that was shown" in err


@pytest.mark.parametrize(("joined", "note"), [(2, "a round takes 3 members, so no plan can run"), (3, "")])
def test_a_roster_of_fewer_than_a_round_takes_says_so(
    coordinator: Coordinator, command: Run, joined: int, note: str
) -> None:
    at = ("--dir", str(coordinator.home.directory))
    for name in ("north", "south", "west")[:joined]:
        coordinator.join(name)
    command("veilsum-coordinator", "roster", "draft", *at)
    code, _, err = command("veilsum-coordinator", "roster", "publish", *at)
    assert code == 0
    assert note in err
    assert bool(err) == bool(note)


def test_a_coordinator_without_a_roster_says_what_to_do(tmp_path: Path, command: Run) -> None:
    (tmp_path / "coordinator.toml").write_text("")
    code, _, err = command("veilsum-coordinator", "roster", "publish", "--dir", str(tmp_path))
    assert code == console.EXIT_USER
    assert "expected a roster file" in err


def test_plans_and_their_approval(tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["site-1", "site-2", "site-3"]
    text = SITE.replace('plans = ["toy"]\n', "")
    policy = {"max_colluders": 1, "min_cohort": 3, "min_survivors": 3}
    federation = Federation(tmp_path, names, policy, dict.fromkeys(names, text))
    federation.create()
    at = ("--dir", str(federation.site("site-1")))
    offers = [OfferedPlan(toy_plan(), "open", "", 1)]
    monkeypatch.setattr(Client, "hello", lambda _: None)
    monkeypatch.setattr(Client, "plans", lambda _: offers)
    code, out, _ = command("veilsum-participant", "plans", *at)
    assert code == 0
    assert out.startswith("toy: waiting: plan 'toy' has no consent here")
    assert "trains all of tiny on toy, without differential privacy" in out
    code, _, err = command("veilsum-participant", "approve", "other", *at)
    assert code == console.EXIT_USER
    assert "shown: toy" in err
    assert command("veilsum-participant", "approve", "toy", *at)[1].startswith("approved: plan 'toy', digest")
    [found] = json.loads(command("veilsum-participant", "plans", "--json", *at)[1])
    assert (found["state"], found["reason"], found["dataset"]) == ("admitted", "approved", "toy")
    offers.clear()
    assert command("veilsum-participant", "plans", *at)[1] == "no plans are offered\n"
