"""What people see: one line and a hint for what they can mend, an exit code per kind, never a traceback."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer

from coordinator import cli as coordinator_cli
from demo.federation import Federation
from participant import cli as participant_cli
from participant.client import Client
from participant.site import Site
from privacy import cli as audit_cli
from privacy import console, files
from privacy.errors import UserError
from privacy.wire import federation_pb2 as pb
from tests.test_end_to_end import toy_plan

MAINS: dict[str, Callable[[], None]] = {
    "veilsum-coordinator": coordinator_cli.main,
    "veilsum-participant": participant_cli.main,
    "veilsum-audit": audit_cli.main,
}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: (exit code, standard output, standard error)."""

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        code = 0
        try:
            MAINS[name]()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A federation that is set up and not running."""
    names = ["site-1", "site-2", "site-3"]
    policy = {"max_colluders": 0, "min_cohort": 3, "min_survivors": 3}
    found = Federation(tmp_path_factory.mktemp("f"), names, policy, dict.fromkeys(names, ""))
    found.create()
    return found


@contextmanager
def edited(federation: Federation, name: str, old: str, new: str) -> Iterator[None]:
    """Change a file of site-1 for a while."""
    path = federation.site("site-1") / name
    before = path.read_bytes()
    assert old.encode() in before
    path.write_bytes(before.replace(old.encode(), new.encode()))
    try:
        yield
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", list(MAINS))
def test_help_lists_the_commands_and_each_command_has_an_example(
    name: str, command: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = command(name, "--help")
    assert code == 0
    for listed in {
        "veilsum-coordinator": ("serve", "plan", "status", "show"),
        "veilsum-participant": ("run", "fetch"),
    }.get(name, ("transcript",)):
        assert listed in out
        if listed != "plan":
            assert "Example:" in command(name, listed, "--help")[1]


def test_a_directory_without_a_configuration(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    for name, file in (("veilsum-coordinator", "coordinator.toml"), ("veilsum-participant", "participant.toml")):
        code, _, err = command(name, "status", "--dir", str(tmp_path))
        assert code == 1
        assert f"{file}: expected a readable file, found: No such file" in err
        assert "hint:" in err
        assert "Traceback" not in err


def test_a_coordinator_that_is_down(federation: Federation, command: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = command("veilsum-coordinator", "status", "--dir", str(federation.coordinator))
    assert code == console.EXIT_UNREACHABLE
    assert "expected a coordinator running in" in err
    assert "hint: start it: veilsum-coordinator serve" in err


def test_a_site_whose_coordinator_is_down(federation: Federation, command: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = command("veilsum-participant", "fetch", "plan", "--dir", str(federation.site("site-1")))
    assert code == console.EXIT_UNREACHABLE
    assert "expected an answer" in err
    assert "hint: is the coordinator running" in err


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("participant.toml", "member =", "mamber =", "unknown key 'mamber'|missing key 'member'"),
        ("participant.toml", "member =", "member = 3 #", "key 'member'"),
        ("participant.toml", '"site-1"', '"site-9"', "'site-9' is not a member of the federation"),
        ("participant.toml", '"site-1"', '"site-2"', "expected the identity key"),
        ("roster.toml", "min_survivors = 3", "min_survivors = 2", "expected at least 3"),
        ("roster.toml", "[policy]", "# edited\n[policy]", "expected the pinned roster"),
        ("roster.pin", "\n", "x", "expected a hash in hex"),
        ("identity.key", "BEGIN", "BEGUN", "expected an Ed25519 key in PEM"),
    ],
)
def test_a_damaged_file_of_a_site_is_named(
    federation: Federation,
    command: Callable[..., tuple[int, str, str]],
    name: str,
    old: str,
    new: str,
    expected: str,
) -> None:
    with edited(federation, name, old, new):
        code, _, err = command("veilsum-participant", "status", "--dir", str(federation.site("site-1")))
    assert code in (console.EXIT_USER, console.EXIT_REFUSED)
    assert any(part in err for part in expected.split("|"))
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_a_lost_identity_key_says_what_to_do(
    federation: Federation, command: Callable[..., tuple[int, str, str]]
) -> None:
    key = federation.site("site-1") / "identity.key"
    kept = key.read_bytes()
    key.unlink()
    try:
        code, _, err = command("veilsum-participant", "status", "--dir", str(federation.site("site-1")))
    finally:
        key.write_bytes(kept)
        key.chmod(0o600)
    assert code == 1
    assert "expected this site's identity key, found: No such file" in err
    assert "restore the key from your backup" in err


def test_a_key_that_others_can_read_is_refused(
    federation: Federation, command: Callable[..., tuple[int, str, str]]
) -> None:
    key = federation.site("site-1") / "identity.key"
    key.chmod(0o644)
    try:
        code, _, err = command("veilsum-participant", "status", "--dir", str(federation.site("site-1")))
    finally:
        key.chmod(0o600)
    assert code == 1
    assert "expected mode 0600, found 0644" in err
    assert "chmod 600" in err


def test_private_files_are_private(federation: Federation) -> None:
    for path in federation.directory.rglob("*"):
        if path.is_file() and path.suffix in (".key", ".toml", ".pin"):
            assert path.stat().st_mode & 0o077 == 0, path


def test_status_of_a_site_that_saw_no_plan(
    federation: Federation, command: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = command("veilsum-participant", "status", "--dir", str(federation.site("site-1")))
    assert code == 0
    assert "no plans seen yet" in out
    code, out, _ = command("veilsum-participant", "status", "--json", "--dir", str(federation.site("site-1")))
    assert json.loads(out) == {"member": "site-1", "rounds_joined": 0, "plans": []}


def test_another_version_at_the_other_end(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Site.open(federation.site("site-1")).client()
    reply = pb.HelloReply(protocol_version=99, software="9.9.9", roster=b"", coordinator=b"")
    monkeypatch.setattr(Client, "_call", lambda *_: reply)
    with pytest.raises(UserError, match=r"expected protocol version 1 .* found 99") as caught:
        client.hello()
    assert "same version" in caught.value.hint


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    files.write_durably(path, b"before")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device") as caught:
        files.write_durably(path, b"after")
    assert "free space" in caught.value.hint
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_plan_with_an_unknown_key_names_key_and_file(
    tmp_path: Path, federation: Federation, command: Callable[..., tuple[int, str, str]]
) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(Path("demo/plan.toml").read_text().replace("[round]", "[round]\nquorum = 3"))
    code, _, err = command("veilsum-coordinator", "plan", "submit", str(plan), "--dir", str(federation.coordinator))
    assert code == 1
    assert f"{plan}: unknown key 'round.quorum'" in err


def test_what_a_running_coordinator_refuses_comes_with_what_to_do(
    federation: Federation, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_bytes(toy_plan())
    federation.start_coordinator()
    try:
        code, _, err = command("veilsum-coordinator", "plan", "submit", str(plan), "--dir", str(federation.coordinator))
    finally:
        federation.stop_all()
    assert code == console.EXIT_USER
    first, second = err.splitlines()
    assert "its min_cohort is 4, and the roster has 3 members" in first
    assert "no round of it could ever open" in second


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("2\n", "expected what a site keeps in version 1 or older, found 2"),
        ("1\n2\n", "expected the version of what a site keeps, found something else"),
        ("-1\n", "expected the version of what a site keeps, found something else"),
        ("", "expected the version of what a site keeps, found something else"),
    ],
)
def test_a_site_on_which_a_newer_veilsum_has_run_is_left_alone(
    federation: Federation, command: Callable[..., tuple[int, str, str]], found: str, said: str
) -> None:
    site = federation.site("site-2")
    (site / "state.version").write_text(found)
    before = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    try:
        for asked in (("run", "--once"), ("status",), ("budget",), ("doctor",)):
            code, out, err = command("veilsum-participant", *asked, "--dir", str(site))
            assert code == console.EXIT_USER, asked
            assert said in out + err
            if said.endswith("found 2"):
                assert "run the version of veilsum that wrote it" in out + err
        assert {path: path.read_bytes() for path in site.rglob("*") if path.is_file()} == before
    finally:
        (site / "state.version").unlink()


def test_a_daemon_notes_the_version_of_what_it_keeps(
    federation: Federation, command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = federation.site("site-2")
    monkeypatch.setattr("participant.daemon.Daemon.run", lambda _self, **_: None)
    try:
        for _ in range(2):
            assert command("veilsum-participant", "run", "--once", "--dir", str(site))[0] == 0
            assert (site / "state.version").read_text() == "1\n"
    finally:
        (site / "state.version").unlink()


def test_an_audit_of_a_directory_that_is_no_release(
    tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = command("veilsum-audit", "transcript", str(tmp_path))
    assert code == 1
    assert "expected a plan file" in err


def test_a_roster_hash_that_is_none_sends_nobody_to_the_telephone(
    tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = command("veilsum-audit", "transcript", str(tmp_path), "--roster", "abcd")
    assert (code, "--roster: expected 64 hexadecimal digits, found 'abcd'" in err) == (1, True)


def test_witnesses_of_a_member_that_was_never_seen(
    federation: Federation, command: Callable[..., tuple[int, str, str]]
) -> None:
    """An empty anchor file would look like an answer."""
    directory = str(federation.coordinator)
    assert command("veilsum-coordinator", "witnesses", "--dir", directory)[0] == 0
    code, out, err = command("veilsum-coordinator", "witnesses", "--dir", directory, "--member", "nobody")
    assert (code, out) == (1, "")
    assert "expected a member whose ledger was witnessed, found 'nobody'; witnessed: none" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max-records-per-user", "4"), "expected --max-records-per-user with --epsilon and --size, found it alone"),
        (("--epsilon", "8"), "expected --epsilon and --size together, or neither"),
        ((), "expected the directory of a base model, found none"),
    ],
    ids=["users without an epsilon", "an epsilon without a size", "no such directory"],
)
def test_a_draft_that_would_not_be_what_was_asked_for(
    more: tuple[str, ...], message: str, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    names = ("--name", "p", "--base-name", "b", "--dataset", "d", "--label", "a", "--label", "b")
    code, out, err = command("veilsum-participant", "draft", str(tmp_path / "none"), *names, *more)
    assert (code, out) == (1, "")
    assert message in err


def commands(app: Any) -> Iterator[Any]:
    for one in getattr(app, "commands", {}).values():
        yield one
        yield from commands(one)


@pytest.mark.parametrize("app", [coordinator_cli.app, participant_cli.app, audit_cli.app], ids=list(MAINS))
def test_no_help_text_has_what_would_be_taken_for_markup(app: typer.Typer) -> None:
    every = list(commands(typer.main.get_command(app)))
    assert {"version"} < {one.name for one in every}
    for one in every:
        for text in (one.help, *(getattr(parameter, "help", None) for parameter in one.params)):
            assert not re.search(r"\[[a-z]+\]|``", text or ""), f"{one.name}: {text}"


def test_two_daemons_of_one_site_or_two_coordinators_do_not_run_at_once(
    federation: Federation, command: Callable[..., tuple[int, str, str]]
) -> None:
    """Neither would see what the other records as spent or signed."""
    site = str(federation.site("site-1"))
    for name, verb, directory in (
        ("veilsum-participant", "run", site),
        ("veilsum-coordinator", "serve", str(federation.coordinator)),
    ):
        with files.only_one(Path(directory), "process"):
            code, _, err = command(name, verb, "--dir", directory)
        assert code == 1
        assert "found one running" in err
    with files.only_one(Path(site), "process"):
        pass
