"""What continuous integration runs (``.ci/run``), with targets of make that stand for the real ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = "docs/commands.md"


def run(directory: Path, *, test: str, docs: str) -> subprocess.CompletedProcess[str]:
    """``.ci/run`` in a checkout whose two targets are a line of shell each."""
    (directory / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", directory / ".ci" / "run")
    (directory / "docs").mkdir()
    (directory / PAGE).write_text("as committed\n")
    (directory / "Makefile").write_text(f".PHONY: test docs\ntest:\n\t@{test}\ndocs:\n\t@{docs}\n")
    outside = {
        key: value for key, value in os.environ.items() if not key.startswith("MAKE")
    }  # these tests run in a make
    return subprocess.run([directory / ".ci" / "run"], env=outside, capture_output=True, text=True, check=False)


def test_tests_and_docs_that_pass_pass(tmp_path: Path) -> None:
    done = run(tmp_path, test="echo tested", docs=f"echo built; echo as committed > {PAGE}")
    assert (done.returncode, done.stdout) == (0, "tested\nbuilt\n"), done.stderr


@pytest.mark.parametrize(
    ("test", "docs", "said"),
    [
        ("echo a test failed; false", "echo built", "a test failed\n"),
        ("echo tested", "echo a link leads nowhere; false", "tested\na link leads nowhere\n"),
    ],
    ids=["a test fails", "the site does not build"],
)
def test_a_failure_of_either_fails(tmp_path: Path, test: str, docs: str, said: str) -> None:
    done = run(tmp_path, test=test, docs=docs)
    assert done.returncode
    assert done.stdout == said


@pytest.mark.parametrize("write", [f"echo another > {PAGE}", "echo another > docs/new.md", f"rm {PAGE}"])
def test_a_page_other_than_committed_fails(tmp_path: Path, write: str) -> None:
    done = run(tmp_path, test=":", docs=write)
    assert done.returncode == 1
    assert "run it and commit the result" in done.stderr
    assert "commands.md" in done.stdout or "new.md" in done.stdout
