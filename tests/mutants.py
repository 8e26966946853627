"""Every check bites: ``make mutants`` disables each refusal in turn, and each time a named test must fail.

A refusal is a ``raise ProtocolError`` or ``raise Refusal``; it is replaced by ``pass`` in a copy of the tree, and the
tests run until the first one fails. Besides, ``mutmut`` changes operators and constants in the same files (it neither
deletes checks nor mutates module tables, so it does not replace this script). Writes ``build/mutants.json``, and fails
if a check survives, if fewer than nine in ten of mutmut's mutants are killed, or if a survivor has no reason in
``tests/equivalent.toml``. After an interruption ``--resume`` keeps what was found killed.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from rich.progress import MofNCompleteColumn, Progress

from tests import operators
from tests.operators import Operator

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    "privacy/secagg/*.py",
    "privacy/aggregation.py",
    "privacy/evaluation.py",
    "privacy/guarantee.py",
    "privacy/plan.py",
    "privacy/sections.py",
    "privacy/roster.py",
    "privacy/stages.py",
    "coordinator/round.py",
    "coordinator/opening.py",
    "coordinator/proofs.py",
    "coordinator/stage.py",
    "participant/round.py",
    "participant/retry.py",
    "participant/policy.py",
)
#: Left out by mutmut: it is compiled when it is imported, before a mutant is chosen. At every start it is compared with
#: pyca's cipher and not used where they differ (``tests/test_fast.py``).
COMPILED = "privacy/secagg/fast.py"
REFUSALS = ("ProtocolError", "Refusal")
#: Fast tests, the likeliest to notice first; slow ones (processes, training) never needed.
SUITE = (
    "tests/test_{module}.py",
    "tests/test_transcript.py",
    "tests/test_retry.py",
    "tests/test_round_records.py",
    "tests/test_naming.py",
    "tests/test_messages.py",
    "tests/test_dealing.py",
    "tests/test_outcome.py",
    "tests/test_stage.py",
    "tests/test_votes.py",
    "tests/adversary",
    "tests/test_liveness.py",
    "tests/test_coordinator_round.py",
    "tests/test_round.py",
    "tests/test_vectors.py",
)
TIMEOUT_S = 600
#: What mutmut runs: whatever needs no process, disk, network or training.
UNIT = tuple(
    f"tests/{name}.py"
    for name in (
        *(
            "test_dealing",
            "test_encoding",
            "test_guarantee",
            "test_keys",
            "test_liveness",
            "test_masking",
            "test_messages",
            "test_naming",
        ),
        *("test_outcome", "test_plan", "test_policy", "test_quantize", "test_retry", "test_roster", "test_round"),
        *(
            "test_coordinator_round",
            "test_round_machine",
            "test_round_records",
            "test_shamir",
            "test_stage",
            "test_threshold",
            "test_votes",
            "test_candidates",
        ),
        *(
            "test_projection",
            "test_transcript",
            "test_vectors",
            "adversary/test_audit",
            "adversary/test_certificates",
        ),
        *("adversary/test_ciphertexts", "adversary/test_dealers", "adversary/test_framing", "adversary/test_lists"),
        *("adversary/test_members", "adversary/test_offers", "adversary/test_outcome", "adversary/test_projection"),
    )
)
#: Share of mutmut's mutants that must be killed.
LEAST = 0.9
#: Why a mutant that no test can notice changes nothing.
EQUIVALENT = ROOT / "tests" / "equivalent.toml"


@dataclass(frozen=True)
class Mutant:
    """One refusal, by file and line."""

    file: str
    line: int
    end: int
    text: str


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant; ``test`` is the first test that failed."""

    file: str
    line: int
    text: str
    killed: bool
    test: str


Bar = Callable[[int, int], None]


def refusals(root: Path, patterns: tuple[str, ...] = FILES) -> list[Mutant]:
    """Every raise of a refusal in the files that this is about."""
    found = []
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    name = getattr(node.exc.func, "id", "")
                    if name in REFUSALS:
                        text = re.sub(r"\s+", " ", ast.unparse(node))[:160]
                        file = str(path.relative_to(root))
                        found.append(Mutant(file, node.lineno, node.end_lineno or node.lineno, text))
    return found


def without(source: str, mutant: Mutant) -> str:
    """The source with one refusal replaced by ``pass``."""
    lines = source.splitlines(keepends=True)
    first = lines[mutant.line - 1]
    indent = first[: len(first) - len(first.lstrip())]
    return "".join([*lines[: mutant.line - 1], f"{indent}pass\n", *lines[mutant.end :]])


def copy_tree(target: Path) -> None:
    """A tree of its own for one worker."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in ("coordinator", "participant", "privacy", "proto", "tests", "demo", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)


def first_failure(tree: Path, module: str) -> str | None:
    """Run the suite in a tree until a test fails; its name, ``None`` if all pass."""
    files = [found for entry in SUITE if (tree / (found := entry.format(module=module))).exists()]
    ordered = sorted(dict.fromkeys(files), key=lambda file: file == "tests/test_round.py")  # the slowest comes last
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *ordered]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
    try:
        done = subprocess.run(
            command, cwd=tree, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "timeout"
    if done.returncode == 0:
        return None
    named = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return named.group(1) if named else "the tests do not run"


def judge(tree: Path, mutant: Mutant) -> Verdict:
    """Disable one refusal in a worker's tree, run the tests, restore the file."""
    path = tree / mutant.file
    source = path.read_text()
    path.write_text(without(source, mutant))
    try:
        failed = first_failure(tree, path.stem)
    finally:
        path.write_text(source)
    return Verdict(mutant.file, mutant.line, mutant.text, failed is not None, failed or "")


def judge_all(mutants: list[Mutant], work: Path, workers: int, progress: Bar) -> list[Verdict]:
    """Judge all mutants, each worker in a tree of its own; verdicts so far stand in ``work / "checks.json"``."""
    trees: Queue[Path] = Queue()
    for number in range(workers):
        copy_tree(work / f"tree-{number}")
        trees.put(work / f"tree-{number}")

    def one(mutant: Mutant) -> Verdict:
        tree = trees.get()
        try:
            return judge(tree, mutant)
        finally:
            trees.put(tree)

    killed = {(v.file, v.line, v.text): v for v in kept(work) if v.killed}
    verdicts = [killed[m.file, m.line, m.text] for m in mutants if (m.file, m.line, m.text) in killed]
    todo = [m for m in mutants if (m.file, m.line, m.text) not in killed]
    with ThreadPoolExecutor(workers) as pool:
        for verdict in pool.map(one, todo):
            verdicts.append(verdict)
            (work / "checks.json").write_text(json.dumps([asdict(v) for v in verdicts]))
            progress(len(verdicts), len(mutants))
    return verdicts


def kept(work: Path) -> list[Verdict]:
    """Verdicts of an earlier run."""
    path = work / "checks.json"
    return [Verdict(**entry) for entry in json.loads(path.read_text())] if path.exists() else []


def judge_operators(work: Path, only: str, workers: int, progress: Bar) -> list[Operator]:
    """mutmut's mutants, each survivor with the reason that the table of equivalent ones gives."""
    copy_tree(work / "mutmut")
    files = sorted({str(p.relative_to(ROOT)) for pattern in FILES for p in ROOT.glob(pattern)} - {COMPILED})
    suite = sorted({str(p.relative_to(ROOT)) for entry in UNIT for p in ROOT.glob(entry)})
    chosen, why = [f for f in files if only in f], operators.reasons(EQUIVALENT)
    return operators.run(ROOT, work / "mutmut", chosen, suite, workers, why, progress)


def summary(verdicts: list[Verdict], found: list[Operator]) -> dict[str, Any]:
    """The report: totals, and every survivor of either half."""
    survivors = [asdict(v) for v in verdicts if not v.killed] + [asdict(o) for o in found if not o.killed]
    seen = {operator.key for operator in found}
    files = {operator.file for operator in found}
    stale = [" ".join(key) for key in operators.reasons(EQUIVALENT) if key[0] in files and key not in seen]
    return {
        "checks": {"total": len(verdicts), "killed": sum(v.killed for v in verdicts)},
        "mutmut": {"total": len(found), "killed": sum(o.killed for o in found)},
        "survivors": survivors,
        "killed_by": {f"{v.file}:{v.line}": v.test for v in verdicts if v.killed},
        "stale_reasons": stale,
    }


def shortcomings(report: dict[str, Any]) -> list[str]:
    """What keeps a report from being good enough, one line each."""
    checks, mutmut = report["checks"], report["mutmut"]
    found = [f"{checks['total'] - checks['killed']} checks survive"] if checks["killed"] < checks["total"] else []
    if mutmut["killed"] < LEAST * mutmut["total"]:
        found.append(f"expected {LEAST:.0%} of mutmut's mutants killed, found {mutmut['killed'] / mutmut['total']:.1%}")
    unexplained = [s for s in report["survivors"] if not s.get("why")]
    if unexplained:
        found.append(f"{len(unexplained)} survivors without a reason in {EQUIVALENT.relative_to(ROOT)}")
    return found


def main() -> None:
    """Judge every refusal and every mutant of mutmut, write the report, and fail if it falls short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="judge only files whose path contains this")
    parser.add_argument("--checks", action="store_true", help="only disable refusals")
    parser.add_argument("--operators", action="store_true", help="only run mutmut")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run found killed")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutants.json")
    arguments = parser.parse_args()
    began, work = time.monotonic(), ROOT / "build" / "mutants"
    if not arguments.resume:
        shutil.rmtree(work, ignore_errors=True)
    mutants = [m for m in refusals(ROOT) if arguments.only in m.file]
    verdicts: list[Verdict] = []
    found: list[Operator] = []
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as bar:
        if not arguments.operators:
            task = bar.add_task("refusals disabled", total=len(mutants))
            verdicts = judge_all(
                mutants, work, arguments.workers, lambda n, of: bar.update(task, completed=n, total=of)
            )
        if not arguments.checks:
            second = bar.add_task("mutants of mutmut", total=None)
            found = judge_operators(
                work, arguments.only, arguments.workers, lambda n, of: bar.update(second, completed=n, total=of)
            )
    report = summary(verdicts, found) | {"seconds": round(time.monotonic() - began)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(f"checks {report['checks']}, mutmut {report['mutmut']}, {report['seconds']} s; written: {arguments.out}")
    for survivor in report["survivors"]:
        print("survives:", *survivor.values())
    for stale in report["stale_reasons"]:
        print("a reason for a mutant that is no more:", stale)
    if lacking := shortcomings(report):
        sys.exit("; ".join(lacking))


if __name__ == "__main__":
    main()
