"""The second half of ``make mutants``: mutmut changes operators, constants and arguments in the protocol's files.

mutmut runs from a directory of its own (it is no dependency of the project) on a copy of the tree. Mutants that change
only what a person reads are left out; labels and byte orders are texts too, and stay in. Why a survivor is equivalent
stands in ``tests/equivalent.toml``.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from privacy.errors import UserError

MUTMUT = "mutmut==3.8.1"
CONFIGURATION = """
[tool.mutmut]
source_paths = ["privacy", "coordinator", "participant"]
only_mutate = {files}
also_copy = ["proto", "demo", "tests"]
do_not_mutate_patterns = ["Error\\\\(", "Refusal\\\\("]
pytest_add_cli_args = ["-p", "no:cacheprovider", "-p", "tests.mutmut_plugin", "-m", "not slow"]
pytest_add_cli_args_test_selection = {suite}
use_git_change_detection = false
"""
#: Exit codes that mutmut keeps: a failing test, a crash or a run without end notice the mutant; 0 does not.
SURVIVED, NOT_COVERED = 0, (5, 33)
#: Functions whose texts end in the reason of a refusal and nowhere else.
READ_BY_PEOPLE = {"check_signed", "check_ascending", "check_length", "check_text", "_too_few"}
#: What mutmut prints of its progress.
JUDGED = re.compile(r"(\d+)/(\d+)\s")

#: Statements longer than this are named by what differs and its surroundings, in characters.
LONG, AROUND = 160, 40

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Operator:
    """One mutant of mutmut and what became of it; ``why`` says why a survivor changes nothing."""

    name: str
    file: str
    function: str
    change: str
    killed: bool
    why: str = ""

    @property
    def key(self) -> Key:
        """What names this mutant whatever its number and line are."""
        return self.file, self.function, self.change


def run(
    root: Path, work: Path, files: list[str], suite: list[str], workers: int, progress: Callable[[int, int], None]
) -> list[Operator]:
    """Mutate ``files`` in the copy of the tree at ``work`` and judge each mutant by the tests of ``suite``.

    A mutant that an earlier run in ``work`` judged killed is not judged again; a survivor is.

    Args:
        progress: called with the numbers of mutants judged so far and in all.

    Raises:
        UserError: mutmut cannot be installed, the tests do not pass unmutated, or mutants were left unjudged.
    """
    site = root / "build" / "mutmut"
    if not site.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(site), MUTMUT]
        if subprocess.run(command, check=False).returncode:
            shutil.rmtree(site, ignore_errors=True)
            raise UserError(f"expected to install {MUTMUT}, pip failed", hint="is a package index reachable?")
    configuration = CONFIGURATION.format(files=json.dumps(files), suite=json.dumps(suite))
    (work / "pyproject.toml").write_text((root / "pyproject.toml").read_text() + configuration)
    (work / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)  # which test reaches what is measured anew
    for meta in _metas(work, files):
        _forget_survivors(meta)
    log = work / "mutmut.log"
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(workers)]
    with log.open("w") as output:
        judging = subprocess.Popen(
            command, cwd=work, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": str(site)}
        )
        while judging.poll() is None:
            _wait(judging)
            if seen := JUDGED.findall(log.read_text(errors="replace")[-400:]):
                progress(*map(int, seen[-1]))
    if judging.returncode:
        raise UserError(f"expected mutmut to judge every mutant, it stopped with {judging.returncode}: see {log}")
    return [operator for meta in _metas(work, files) for operator in _read(meta, work / "mutants")]


def _metas(work: Path, files: list[str]) -> list[Path]:
    metas = [work / "mutants" / f"{file}.meta" for file in files]
    return [meta for meta in metas if meta.exists()]


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        return


def _is_killed(code: int | None) -> bool:
    return code is not None and code != SURVIVED and code not in NOT_COVERED


def _forget_survivors(meta: Path) -> None:
    """mutmut judges again what has no verdict."""
    kept = json.loads(meta.read_text())
    codes = kept["exit_code_by_key"]
    kept["exit_code_by_key"] = {key: code if _is_killed(code) else None for key, code in codes.items()}
    meta.write_text(json.dumps(kept))


def _read(meta: Path, top: Path) -> Iterator[Operator]:
    """The verdicts on one file, without mutants that only people could notice."""
    codes: dict[str, int | None] = json.loads(meta.read_text())["exit_code_by_key"]
    file = str(meta.with_suffix("").relative_to(top))
    functions = {
        node.name: node
        for node in ast.walk(ast.parse(meta.with_suffix("").read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    for key, code in codes.items():
        name = key.rpartition(".")[2]
        original = name.rpartition("__mutmut_")[0]
        before, after = functions[f"{original}__mutmut_orig"], functions[name]
        if code is None:
            raise UserError(f"{key}: expected a verdict, mutmut left it unjudged")
        if _lines(before, blank=True) != _lines(after, blank=True):
            function = original.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
            yield Operator(key, file, function, _difference(before, after), _is_killed(code))


class _Blank(ast.NodeTransformer):
    """Empties the texts that only people read: those of exceptions, and names handed to checks for their reasons."""

    def __init__(self) -> None:
        self.inside = self.silent = 0  # in a text, and in one that nothing but its reader depends on

    def _within(self, node: ast.AST) -> ast.AST:
        self.inside += 1
        self.generic_visit(node)
        self.inside -= 1
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        self.silent += 1
        self._within(node)
        self.silent -= 1
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        self._within(node)
        return ast.Constant("") if self.silent else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name not in READ_BY_PEOPLE:
            return self.generic_visit(node)
        self.silent += 1
        self._within(node)
        self.silent -= 1
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        is_text = isinstance(node.value, str) or (self.silent and node.value is None)
        return ast.Constant("") if self.inside and is_text else node


def _lines(function: ast.FunctionDef, *, blank: bool) -> list[str]:
    """The function's source in one form, statement by statement, under one name whatever its mutant's number is."""
    plain = ast.FunctionDef("f", function.args, function.body, [], function.returns)
    module = ast.parse(ast.unparse(ast.fix_missing_locations(ast.Module([plain], []))))
    return ast.unparse(_Blank().visit(module) if blank else module).splitlines()


def _difference(original: ast.FunctionDef, mutant: ast.FunctionDef) -> str:
    """``before  ->  after`` of the first statement that differs, counted where the same one stands there earlier."""
    before, after = _lines(original, blank=False), _lines(mutant, blank=False)
    place = next(i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
    line, other = _around(before[place].strip(), after[place].strip())
    earlier = [earlier.strip() for earlier in before[:place]].count(line)
    return f"{line}  ->  {other}" + (f"  (number {earlier + 1})" if earlier else "")


def _around(before: str, after: str) -> tuple[str, str]:
    """Two statements, or of long ones the part that differs with ``AROUND`` characters on either side."""
    if len(before) <= LONG:
        return before, after
    low = _alike(before, after)
    high = _alike(before[low:][::-1], after[low:][::-1])
    first = max(low - AROUND, 0)
    last = max(high - AROUND, 0)
    return f"…{before[first : len(before) - last]}…", f"…{after[first : len(after) - last]}…"


def _alike(one: str, other: str) -> int:
    """How many first characters two texts share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def reasons(path: Path) -> dict[Key, str]:
    """Why each mutant of a table is equivalent.

    Raises:
        UserError: an entry without a reason, or a mutant that stands there twice.
    """
    found: dict[Key, str] = {}
    for entry in tomllib.loads(path.read_text())["equivalent"]:
        for change in entry["changes"]:
            key = (entry["file"], entry["function"], change)
            if key in found or not entry["why"].strip():
                raise UserError(f"{path}: expected one reason for {' '.join(key)}, found two or an empty one")
            found[key] = entry["why"].strip()
    return found
