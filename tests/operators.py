"""The second half of ``make mutants``: mutmut changes operators, constants and arguments in the protocol's files.

mutmut runs from a directory of its own (it is no dependency of the project) on a copy of the tree. Mutants that change
only the text of a message are left out.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from privacy.errors import UserError

MUTMUT = "mutmut==3.8.1"
CONFIGURATION = """
[tool.mutmut]
source_paths = ["privacy", "coordinator", "participant"]
only_mutate = {files}
also_copy = ["proto", "demo", "tests"]
do_not_mutate_patterns = ["Error\\\\(", "Refusal\\\\("]
pytest_add_cli_args = ["-p", "no:cacheprovider"]
pytest_add_cli_args_test_selection = {suite}
use_git_change_detection = false
"""
#: Exit codes that mutmut keeps: a failing test, a crash or a run without end notice the mutant; 0 does not.
SURVIVED, NOT_COVERED = 0, (5, 33)


@dataclass(frozen=True)
class Operator:
    """One mutant of mutmut and what became of it."""

    name: str
    killed: bool
    change: str


def run(root: Path, work: Path, files: list[str], suite: list[str], workers: int) -> list[Operator]:
    """Mutate ``files`` in the copy of the tree at ``work`` and judge each mutant by the tests of ``suite``.

    Raises:
        UserError: mutmut cannot be installed, or the tests do not pass unmutated.
    """
    site = root / "build" / "mutmut"
    if not site.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(site), MUTMUT]
        if subprocess.run(command, check=False).returncode:
            shutil.rmtree(site, ignore_errors=True)
            raise UserError(f"expected to install {MUTMUT}, pip failed", hint="is a package index reachable?")
    configuration = CONFIGURATION.format(files=json.dumps(files), suite=json.dumps(suite))
    (work / "pyproject.toml").write_text((root / "pyproject.toml").read_text() + configuration)
    log = work / "mutmut.log"
    with log.open("w") as output:
        subprocess.run(
            [sys.executable, "-m", "mutmut", "run", "--max-children", str(workers)],
            cwd=work,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(site)},
            check=False,
        )
    found = [operator for meta in sorted((work / "mutants").rglob("*.meta")) for operator in _read(meta)]
    if not found:
        raise UserError(f"mutmut judged nothing, see {log}")
    return found


def _read(meta: Path) -> list[Operator]:
    """The verdicts on one file; mutants of messages and those never judged are left out."""
    codes: dict[str, int | None] = json.loads(meta.read_text())["exit_code_by_key"]
    functions = {
        node.name: node
        for node in ast.walk(ast.parse(meta.with_suffix("").read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    found = []
    for key, code in codes.items():
        name = key.rpartition(".")[2]
        mutant, original = functions.get(name), functions.get(name.rpartition("_")[0] + "_orig")
        if code is None or mutant is None or original is None or _text_only(original, mutant):
            continue
        killed = code != SURVIVED and code not in NOT_COVERED
        found.append(Operator(key, killed, _difference(original, mutant)))
    return found


class _Blank(ast.NodeTransformer):
    """Replaces every text by an empty one."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("") if isinstance(node.value, str) else node


def _body(function: ast.FunctionDef, *, blank: bool) -> list[str]:
    module = ast.parse(ast.unparse(ast.Module(function.body, [])))
    return ast.unparse(_Blank().visit(module) if blank else module).splitlines()


def _text_only(original: ast.FunctionDef, mutant: ast.FunctionDef) -> bool:
    return _body(original, blank=True) == _body(mutant, blank=True)


def _difference(original: ast.FunctionDef, mutant: ast.FunctionDef) -> str:
    before, after = _body(original, blank=False), _body(mutant, blank=False)
    pairs = zip(before, after, strict=False)
    return next((f"{a.strip()}  ->  {b.strip()}" for a, b in pairs if a != b), "arguments")
