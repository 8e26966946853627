"""What holds for all commands: exit codes as documented, JSON wherever something is listed, completion in a shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import coordinator.cli
import participant.cli
import privacy.cli
from demo.federation import BIN
from participant.site import Site
from privacy import console
from privacy.budget.findings import MEANINGS, SEVERITY, Code
from privacy.errors import ProtocolError, Refusal, UserError
from privacy.files import DiskError
from tests.on_disk import OnDisk

APPS = {app.info.name: app for app in (coordinator.cli.app, participant.cli.app, privacy.cli.app)}
#: What lists nothing: it runs, writes a file of its own, or does one thing and says so.
NO_LIST = {
    "veilsum-coordinator serve": "logs, see --json-logs",
    "veilsum-coordinator plan cancel": "does one thing",
    "veilsum-coordinator add": "does one thing",
    "veilsum-coordinator remove": "does one thing",
    "veilsum-coordinator roster draft": "prints a roster, which is TOML",
    "veilsum-participant approve": "does one thing",
    "veilsum-participant renew": "does one thing",
    "veilsum-participant roster approve": "does one thing",
    "veilsum-participant run": "logs, see --json-logs",
    "veilsum-participant draft": "prints a plan, which is TOML",
    "veilsum-participant audit-training": "writes a file, which is JSON",
    "veilsum-participant dataset policy": "does one thing",
    "veilsum-participant dataset close": "does one thing",
}


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command below, with the words that call it."""
    if hasattr(command, "commands"):
        for name, one in command.commands.items():
            yield from commands(one, f"{path} {name}")
    else:
        yield path, command


EVERY = {path: one for name, app in APPS.items() for path, one in commands(typer.main.get_command(app), str(name))}


def test_every_command_that_lists_something_prints_json_for_machines() -> None:
    without = {path for path, one in EVERY.items() if not any("--json" in option.opts for option in one.params)}
    assert {path for path in without if not path.endswith(" version")} == set(NO_LIST)


def test_every_exit_code_has_its_meaning() -> None:
    assert set(console.ENDS) == {0, *(getattr(console, name) for name in dir(console) if name.startswith("EXIT_"))}
    assert set(MEANINGS) == set(Code) == set(SEVERITY)
    assert set(console.ENDS) & set(Code) == {0}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError(""), console.EXIT_USER),
        (DiskError("", hint=""), console.EXIT_USER),
        (Refusal(""), console.EXIT_REFUSED),
        (ProtocolError(""), console.EXIT_PROTOCOL),
        (console.Unreachable(""), console.EXIT_UNREACHABLE),
    ],
)
def test_each_kind_of_error_has_its_code(error: Any, code: int) -> None:
    assert console.exit_code(error) == code


def test_an_interrupted_command_and_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    monkeypatch.setattr(sys, "argv", ["stop"])

    @app.command()
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        console.run(app)
    assert caught.value.code == console.EXIT_INTERRUPTED
    done = subprocess.run([BIN / "veilsum-audit", "--no-such-option"], capture_output=True, check=False)
    assert done.returncode == 2


def test_witnesses_of_a_site_as_lines_and_as_one_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from participant.cli_data import witnesses

    world = OnDisk(tmp_path)
    world.ready()
    world.run()
    directory = world.federation.site("site-1")
    capsys.readouterr()
    witnesses(directory)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(Site.open(directory).store.witnesses()) >= 5
    witnesses(directory, as_json=True)
    assert json.loads(capsys.readouterr().out) == lines


@pytest.mark.parametrize(
    ("name", "typed", "expected"),
    [
        ("veilsum-coordinator", "plan s", {"submit"}),
        ("veilsum-participant", "dataset re", {"register"}),
        ("veilsum-audit", "fed", {"federation"}),
    ],
)
def test_a_shell_completes_the_commands(name: str, typed: str, expected: set[str]) -> None:
    words = f"{name} {typed}"
    asked = {f"_{name.replace('-', '_').upper()}_COMPLETE": "complete_bash", "COMP_WORDS": words}
    environment = {**os.environ, **asked, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run([BIN / name], capture_output=True, text=True, env=environment, check=False)
    assert set(done.stdout.split()) == expected, done.stderr


def test_the_lines_for_a_shell_can_be_shown() -> None:
    for name in APPS:
        shown = subprocess.run(
            ["bash", "-c", f"{BIN / str(name)} --show-completion bash || {BIN / str(name)} --show-completion"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"complete -o default -F _{str(name).replace('-', '_')}_completion {name}" in shown.stdout, shown.stderr
