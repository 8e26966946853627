"""Root does not write into the directory of another account: the daemon that runs as that could not read the files."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

import coordinator.cli
import participant.cli
from privacy import console
from privacy.errors import UserError
from privacy.files import as_its_owner

SOMEBODY = next(found for found in pwd.getpwall() if found.pw_uid != 0)
COORDINATOR = (["init", "{}", "--host", "localhost"], ["invite", "north", "--dir", "{}"], ["status", "--dir", "{}"])
SITE = (["doctor", "--dir", "{}"], ["plans", "--dir", "{}"], ["roster", "approve", "--dir", "{}"])


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that root looks at, and that is somebody else's."""
    if os.geteuid() == 0:
        os.chown(tmp_path, SOMEBODY.pw_uid, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return tmp_path


def owner(directory: Path) -> str:
    return pwd.getpwuid(directory.stat().st_uid).pw_name


@pytest.mark.parametrize("command", [*COORDINATOR, *SITE], ids=" ".join)
def test_root_is_told_whose_directory_it_is_and_writes_nothing(
    theirs: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    side = coordinator.cli if command in COORDINATOR else participant.cli
    monkeypatch.setattr("sys.argv", ["/opt/veilsum/bin/veilsum", *(word.format(theirs) for word in command)])
    with pytest.raises(SystemExit) as left:
        console.run(side.app)
    assert left.value.code == console.EXIT_USER
    said = "".join(capsys.readouterr())
    assert f"expected to be run as '{owner(theirs)}', whose directory it is, found root" in said
    assert f"runuser -u {owner(theirs)} -- veilsum …" in said
    assert list(theirs.iterdir()) == []


def test_an_account_without_a_name_is_told_by_its_number(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    number = f"'#{theirs.stat().st_uid}'"
    with pytest.raises(UserError, match=f"run as {number}, whose directory it is") as refused:
        as_its_owner(theirs)
    assert refused.value.hint == f"sudo -u {number} …"


def test_ones_own_directory_and_one_to_be_made_are_fine(tmp_path: Path) -> None:
    as_its_owner(tmp_path)
    as_its_owner(tmp_path / "new")


def test_nobody_else_is_asked_what_they_may_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY.pw_uid)
    monkeypatch.setattr(Path, "stat", refused)
    as_its_owner(tmp_path)
