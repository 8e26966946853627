"""The second half of ``make mutants``: mutmut changes operators, constants and arguments in the protocol's files.

mutmut runs from a directory of its own (it is no dependency of the project) on a copy of the tree. Mutants that change
only what a person reads are left out; labels and byte orders are texts too, and stay in. Why a survivor is equivalent
stands in ``tests/equivalent.toml``.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from privacy.errors import UserError

MUTMUT = "mutmut==3.8.1"
CONFIGURATION = '[tool.mutmut]\nsource_paths = ["privacy"]\ndo_not_mutate_patterns = ["Error\\\\(", "Refusal\\\\("]\n'
#: mutmut writes each file with all of its mutants in it, switched by an environment variable.
GENERATE = """
import json, sys
from pathlib import Path
from mutmut.mutation.file_mutation import mutate_file_contents
found = {}
for name in sys.argv[1:]:
    mutated = mutate_file_contents(name, Path(name).read_text())
    Path(name).write_text(mutated.code)
    found[name] = list(mutated.mutant_names)
print(json.dumps(found))
"""
#: How the tests are run for that.
JUDGING = ("-q", "-p", "no:cacheprovider", "-m", "not slow", "--tb", "short")
#: Exit codes of tests/judge.py for a mutant that nothing noticed: the tests pass, or none reaches it.
NOT_NOTICED = (0, 33)
#: Functions whose texts end in the reason of a refusal and nowhere else.
READ_BY_PEOPLE = {"check_signed", "check_ascending", "check_length", "check_text", "_too_few"}
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
    root: Path,
    work: Path,
    files: list[str],
    suite: list[str],
    workers: int,
    known_why: Mapping[Key, str],
    progress: Callable[[int, int], None],
) -> list[Operator]:
    """Mutate ``files`` in the copy of the tree at ``work`` and judge each mutant by the tests of ``suite``.

    A mutant that ``verdicts.json`` beside ``work`` calls killed is not judged again, nor is one whose reason stands in
    ``known_why``; other survivors are.

    Args:
        progress: called with the numbers of mutants judged so far and in all.

    Raises:
        UserError: mutmut cannot be installed, or the tests do not pass unmutated.
    """
    _install(root / "build" / "mutmut")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root / "build" / "mutmut"), str(work)])}
    with (work / "pyproject.toml").open("a") as file:
        file.write(CONFIGURATION)
    command = [sys.executable, "-c", GENERATE, *files]
    generated = subprocess.run(command, cwd=work, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    names: dict[str, list[str]] = json.loads(generated.stdout)
    mutants = [mutant for file in files for mutant in _read(work, file, names[file])]
    store = work.parent / "verdicts.json"
    killed = {tuple(key) for key in json.loads(store.read_text())} if store.exists() else set()
    todo = [mutant for mutant in mutants if mutant.key not in killed and mutant.key not in known_why]
    verdicts = work / "verdicts.jsonl"
    try:
        _judge(work, [m.name for m in todo], suite, workers, environment, progress)
    finally:
        noticed = dict(map(json.loads, verdicts.read_text().splitlines())) if verdicts.exists() else {}
        known = killed | {mutant.key for mutant in todo if noticed.get(mutant.name, 0) not in NOT_NOTICED}
        store.write_text(json.dumps(sorted(known), ensure_ascii=False))
    if unjudged := [mutant.name for mutant in todo if mutant.name not in noticed]:
        raise UserError(f"expected a verdict on every mutant, {len(unjudged)} have none, the first: {unjudged[0]}")
    return [replace(m, killed=m.key in known, why=known_why.get(m.key, "")) for m in mutants]


def _install(site: Path) -> None:
    if not site.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(site), MUTMUT]
        if subprocess.run(command, check=False).returncode:
            shutil.rmtree(site, ignore_errors=True)
            raise UserError(f"expected to install {MUTMUT}, pip failed", hint="is a package index reachable?")


def _judge(
    work: Path,
    names: list[str],
    suite: list[str],
    workers: int,
    environment: dict[str, str],
    progress: Callable[[int, int], None],
) -> None:
    """Run ``tests/judge.py`` in the mutated tree; it writes ``verdicts.jsonl``."""
    verdicts, task, log = work / "verdicts.jsonl", work / "task.json", work / "judge.log"
    verdicts.write_text("")
    task.write_text(json.dumps({"mutants": names, "workers": workers, "verdicts": str(verdicts)}))
    command = [sys.executable, "-m", "pytest", "-p", "tests.judge", *JUDGING, *suite]
    with log.open("w") as output:
        judging = subprocess.Popen(
            command, cwd=work, stdout=output, stderr=subprocess.STDOUT, env=environment | {"JUDGE": str(task)}
        )
        while judging.poll() is None:
            _wait(judging)
            progress(verdicts.read_text().count("\n"), len(names))
    if judging.returncode not in (0, 5):  # 5: pytest itself ran no test
        raise UserError(f"expected the tests to pass without a mutant, see {log}")


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        return


def _read(work: Path, file: str, names: list[str]) -> Iterator[Operator]:
    """The mutants of one file, without those that only people could notice."""
    tree = ast.parse((work / file).read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for name in names:
        original = name.rpartition("__mutmut_")[0]
        before, after = functions[f"{original}__mutmut_orig"], functions[name]
        if _lines(before, blank=True) != _lines(after, blank=True):
            function = original.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
            yield Operator(f"{module}.{name}", file, function, _difference(before, after), killed=False)


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
