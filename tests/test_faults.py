"""Fault points: off unless a variable asks, and then at exactly the pass that was asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from privacy import faults
from privacy.faults import Fault, name_of, parse_fault
from privacy.files import make_private_directory, reserve

SAVE_TWICE = """
import sys
from pathlib import Path
from privacy.errors import UserError
from privacy.files import append_durably
for line in (b"one\\n", b"two\\n", b"three\\n"):
    try:
        append_durably(Path(sys.argv[1]), line)
    except UserError as error:
        print(error)
"""


def save(path: Path, fault: str = "", trace: str = "") -> subprocess.CompletedProcess[str]:
    """Append three lines in a process of its own."""
    environment = {**os.environ, "VEILSUM_FAULT": fault, "VEILSUM_FAULT_TRACE": trace, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", SAVE_TWICE, str(path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", None),
        ("before-M5", Fault("before-M5")),
        ("before-fsync:records.jsonl@3", Fault("before-fsync:records.jsonl", 3)),
        ("x@2@full", Fault("x", 2, full=True)),
        ("x@2@full@3", Fault("x", 2, full=True, times=3)),
    ],
)
def test_a_fault_is_read_from_its_variable(text: str, fault: Fault | None) -> None:
    assert parse_fault(text) == fault


@pytest.mark.parametrize("text", ["x@", "x@y", "x@1@empty", "x@1@full@2@3"])
def test_another_fault_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"VEILSUM_FAULT|invalid literal"):
        parse_fault(text)


def test_a_name_is_the_same_in_every_run() -> None:
    assert name_of("before-M5") == "before-M5"
    assert name_of("after-fsync", Path("/a/b-1/upload-3.bin")) == "after-fsync:upload-#.bin"
    assert name_of("after-fsync", Path(f"/a/.adapter-{'0a' * 8}-old")) == "after-fsync:.adapter-#-old"
    assert name_of("before-fsync", "site-7/") == "before-fsync:site-#/"


def test_a_process_dies_at_the_pass_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    assert save(path, "before-write:records.jsonl@2").returncode == -signal.SIGKILL
    assert path.read_bytes() == b"one\n"
    assert save(path).returncode == 0
    assert path.read_bytes() == b"one\none\ntwo\nthree\n"


def test_a_full_disk_takes_back_what_was_not_confirmed(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    done = save(path, "before-fsync:records.jsonl@1@full@2")
    assert done.returncode == 0
    assert done.stdout.count("No space left on device") == 2
    assert path.read_bytes() == b"three\n"


def test_a_driver_asks_for_a_fault_while_the_process_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "asked"
    monkeypatch.setattr(faults, "_on", True)
    monkeypatch.setattr(faults, "_file", str(asked))
    faults.point("here")
    for _ in range(2):  # asking again, with another text between, counts from the start
        asked.write_text("here@2@full")
        faults.point("here")
        with pytest.raises(OSError, match="No space left"):
            faults.point("here")
        faults.point("here")
        asked.write_text("")
        faults.point("here")


def test_a_trace_names_every_point_in_order(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    save(tmp_path / "records.jsonl", trace=str(trace))
    line = [f"{action}:records.jsonl" for action in ("before-write", "before-fsync", "after-fsync")]
    names = trace.read_text().splitlines()
    assert [name for name in names if name.endswith("records.jsonl")] == line * 3
    assert len(names) == len(line) * 3 + 2  # the directory once, around its fsync


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The points that this process passes."""
    found: list[str] = []

    def note(action: str, where: str | Path = "") -> None:
        found.append(name_of(action, where))

    monkeypatch.setattr(faults, "point", note)
    return found


def test_every_directory_on_the_way_has_a_durable_name_and_is_private(tmp_path: Path, passed: list[str]) -> None:
    made = make_private_directory(tmp_path / "plan" / "stage" / "rounds")
    assert [oct(p.stat().st_mode & 0o777) for p in (made, made.parent, made.parent.parent)] == ["0o700"] * 3
    assert [p for p in passed if p.startswith("after-fsync")][1:] == ["after-fsync:plan/", "after-fsync:stage/"]
    assert len(passed) == 6


def test_a_file_whose_space_was_taken_has_a_durable_name(tmp_path: Path, passed: list[str]) -> None:
    """Or its notes of what is durable in it could stand beside a new, empty file of that name."""
    reserve(tmp_path / "upload.part", 10)
    assert passed[-1].startswith("after-fsync:")
    passed.clear()
    reserve(tmp_path / "upload.part", 10)
    assert passed == ["before-reserve:upload.part"]
