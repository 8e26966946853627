"""Check the bounded model of the round with spin: `python -m model.run`, or `make model`.

Each case is one compiled search of model/round.pml. The checker's own lines are printed as they are; the table at the
end and build/model.json say what was expected. docs/model.md explains the cases.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build"
MEMORY_MB = 3500
DEPTH = 20_000
PROPERTIES = ("P1", "P2", "P3", "P4", "P5", "P6", "P7")
ALWAYS = ("P1", "P2", "P3", "P4", "P5")
SMALL = (*ALWAYS, "P6")
#: What a search that shall reach something breaks: the assertion that it is never reached.
REACHED = "not_reached"


@dataclass(frozen=True)
class Case:
    """One search: which members, which rules, what is asserted, and what should come out."""

    what: str
    properties: tuple[str, ...]
    n: int  # members of the roster; cohorts are any subset that is large enough
    c: int
    rounds: int = 0  # 0: any number
    smallest: int = 3  # min_survivors
    expected: int = 0  # errors
    options: dict[str, int] = field(default_factory=dict)
    breadth_first: bool = False  # the shortest counterexample, for more memory

    def defines(self) -> list[str]:
        """The options of spin that make this case."""
        asserted = sum(1 << PROPERTIES.index(p) for p in self.properties if p in PROPERTIES)
        if REACHED in self.properties:
            asserted |= 1 << PROPERTIES.index("P3")
        values = {"N": self.n, "C": self.c, "SMALLEST": self.smallest, "ROUNDS": self.rounds, "CHECK": asserted}
        return [f"-D{name}={value}" for name, value in (values | self.options).items()]


@dataclass(frozen=True)
class Verdict:
    """What pan printed."""

    errors: int
    states: int
    depth: int
    complete: bool  # the search was exhaustive: nothing was cut short
    violated: str  # the property whose assertion failed, empty for none


def correct(what: str, n: int, c: int, *properties: str, **changes: int) -> Case:
    """A search that should find nothing; honest members are interchangeable, so equivalent states are merged."""
    rounds, smallest = changes.pop("rounds", 0), changes.pop("smallest", max(c, 1) + 2)
    symmetry = {} if rounds == 1 else {"SYMMETRY": 1}
    return Case(what, properties or ALWAYS, n, c, rounds, smallest, 0, symmetry | changes)


def broken(what: str, prop: str, n: int, c: int, **changes: int) -> Case:
    """A search that should find something: in one round breadth first, in two depth first."""
    rounds, smallest = changes.pop("rounds", 1), changes.pop("smallest", max(c, 1) + 2)
    return Case(what, (prop,), n, c, rounds, smallest, 1, changes, breadth_first=rounds == 1)


BUILT = "as built"
TWO = "sums of two allowed"
SHORT = "broken: abort certificate one statement short"
OTHER_T2 = "broken: (b) accepted under another T2"
NO_BOND = "broken: (c) without the same-list rule"
M7_ONLY = "broken: (c) binds M7 only, as first designed"
CASES = (
    correct(BUILT, 3, 0, *SMALL),
    correct(BUILT, 3, 1, *SMALL),
    correct(BUILT, 4, 0, *SMALL),
    correct(BUILT, 4, 1, *SMALL),
    correct(BUILT, 4, 2, *SMALL),
    correct(BUILT, 5, 0),
    correct(BUILT, 5, 1),
    correct(BUILT, 6, 2),
    correct(BUILT, 6, 1, "P1", "P2", "P4", "P5", rounds=1),
    correct(f"{BUILT}, {TWO}", 3, 0, smallest=2),
    correct(f"{BUILT}, {TWO}", 4, 0, smallest=2),
    correct(f"{BUILT}, but (c) less proven cheats", 5, 1, CHEATS=1),
    broken("reached: a sum after a retry by (a)", REACHED, 3, 1, rounds=2, REACH=1),
    broken("reached: a sum after a retry by (b)", REACHED, 5, 1, rounds=2, REACH=2),
    broken("reached: the same sum again by (c)", REACHED, 3, 1, rounds=2, REACH=4),
    broken("broken: t lowered by one", "P1", 4, 1, T_LOWERED=1),
    broken("broken: t lowered by one", "P2", 3, 1, T_LOWERED=1),
    broken(f"broken: t lowered by one, {TWO}", "P1", 3, 0, smallest=2, T_LOWERED=1),
    broken("broken: no SIGNED record", "P2", 4, 1, NO_SIGNED_RECORD=1),
    broken(SHORT, "P5", 4, 1, SHORT_ABORT=1),
    broken(SHORT, "P3", 5, 1, rounds=2, SHORT_ABORT=1),
    broken(OTHER_T2, "P5", 5, 1, ANY_T2=1),
    broken(OTHER_T2, "P3", 5, 1, rounds=2, ANY_T2=1),
    broken(NO_BOND, "P3", 4, 0, rounds=2, NO_BOND=1),
    broken(NO_BOND, "P3", 4, 1, rounds=2, NO_BOND=1),
    broken(NO_BOND, "P7", 4, 1, rounds=2, NO_BOND=1),
    broken(M7_ONLY, "P3", 5, 0, rounds=2, BOND_AT_M7_ONLY=1),
    broken(M7_ONLY, "P3", 5, 1, rounds=2, BOND_AT_M7_ONLY=1),
    broken(f"{M7_ONLY}; {TWO}", "P3", 4, 0, rounds=2, smallest=2, BOND_AT_M7_ONLY=1),
    correct("how far that goes", 5, 0, "P7", rounds=2, BOND_AT_M7_ONLY=1),
    correct("how far that goes", 5, 1, "P7", rounds=2, BOND_AT_M7_ONLY=1),
    correct("how far that goes", 6, 2, "P7", rounds=2, BOND_AT_M7_ONLY=1),
    broken("broken: ABORTED ignored by release", "P4", 3, 1, ABORTED_IGNORED=1),
    broken("broken: ABORTED ignored by release", "P5", 3, 1, ABORTED_IGNORED=1),
    broken("broken: M9 sent before RELEASED is durable", "P4", 3, 1, RECORD_LATE=1),
    broken("two key lists, two cohorts in one round", "P6", 5, 1),
)


def parse_verdict(output: str) -> Verdict:
    """Read what pan prints at the end of a search.

    Raises:
        ValueError: not the output of a finished search.
    """
    found = re.search(r"depth reached (\d+), errors: (\d+)", output)
    states = re.search(r"^\s*(\S+) states, stored", output, re.MULTILINE)
    if found is None or states is None:
        raise ValueError(f"expected the verdict of spin's verifier, found:\n{output[-2000:]}")
    violated = re.search(r"^pan:\d*:?\s*assertion violated\s+\(?\s*(\w+)", output, re.MULTILINE)
    cut_short = ("Search not completed", "max search depth too small", "-DMEMLIM bound", "out of memory")
    return Verdict(
        errors=int(found[2]),
        states=int(float(states[1])),
        depth=int(found[1]),
        complete=not any(sign in output for sign in cut_short),
        violated=violated[1] if violated else "",
    )


def is_as_expected(case: Case, verdict: Verdict) -> bool:
    """No error in an exhaustive search, or an error of the property that should break."""
    if case.expected:
        return verdict.errors == case.expected and verdict.violated in case.properties
    return verdict.errors == 0 and verdict.complete


def tell(trail: str, case: Case) -> list[str]:
    """The lines that a replayed trail printed, with masks written as sets; colluders are C, C2."""
    honest = case.n - case.c

    def members(match: re.Match[str]) -> str:
        mask = int(match[1])
        names = [str(i) if i < honest else f"C{i - honest + 1 if i > honest else ''}" for i in range(case.n)]
        return "{" + ", ".join(name for i, name in enumerate(names) if mask >> i & 1) + "}"

    lines = [line for line in trail.splitlines() if line == "a round" or line.startswith("  ")]
    return [re.sub(r"#(\d+)", members, line) for line in lines if re.match(r"a round|  [a-zM#]", line)]


def call(directory: Path, *command: str) -> str:
    """Run one tool; what it printed, whatever its exit status: pan's is not its verdict."""
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def search(case: Case, directory: Path) -> tuple[str, list[str]]:
    """Compile and run one case: what the checker printed, and its counterexample if there is one."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for source in HERE.glob("*.pml"):
        shutil.copy(source, directory)
    log = call(directory, "spin", "-a", *case.defines(), "round.pml")
    flags = ["-DSAFETY", f"-DMEMLIM={MEMORY_MB}", *(["-DBFS"] if case.breadth_first else [])]
    log += call(directory, "gcc", "-O2", "-w", *flags, "-o", "pan", "pan.c")
    if not (directory / "pan").exists():
        raise ValueError(f"spin or gcc failed on {directory}:\n{log}")
    output = call(directory, "./pan", f"-m{DEPTH}", "-n")
    story = tell(call(directory, "./pan", "-r"), case) if (directory / "round.pml.trail").exists() else []
    (directory / "pan.log").write_text(output)
    (directory / "counterexample.txt").write_text("\n".join(story) + "\n")
    return output, story


def run_case(number: int, case: Case) -> dict[str, object]:
    """Search, print the checker's own lines, and return the row for the table."""
    started = time.monotonic()
    print(f"\n== {number}: {case.what}; n = {case.n}, c = {case.c}; {' '.join(case.properties)}", flush=True)
    print(f"   spin -a {' '.join(case.defines())} model/round.pml", flush=True)
    output, story = search(case, BUILD / "model" / f"{number:02}")
    verdict = parse_verdict(output)
    for line in output.splitlines():
        if re.search(r"assertion violated|errors:|states, stored$|not completed|too small|MEMLIM|total actual", line):
            print(f"   {line.strip()}")
    as_expected = is_as_expected(case, verdict)
    if story and not as_expected:
        print("\n".join(f"   | {line}" for line in story))
    if not as_expected:
        print(f"   NOT AS EXPECTED: errors: {case.expected}")
    return {
        **asdict(case),
        **asdict(verdict),
        "number": number,
        "as_expected": as_expected,
        "command": f"spin -a {' '.join(case.defines())} model/round.pml",
        "seconds": round(time.monotonic() - started, 1),
        "counterexample": story,
    }


def table(rows: list[dict[str, object]]) -> str:
    """property, n, c, rounds, verdict: one line a case."""
    head = f"{'':3} {'property':18} {'n':>2} {'c':>2} {'rounds':>6} {'verdict':10} {'states':>10} {'s':>6}  rules"
    lines = [head]
    for row in rows:
        properties = " ".join(row["properties"])  # type: ignore[arg-type]
        mark = "" if row["as_expected"] else "   <- NOT AS EXPECTED"
        lines.append(
            f"{row['number']:3} {properties:18} {row['n']:>2} {row['c']:>2} {row['rounds'] or 'any':>6} "
            f"errors: {row['errors']:<2} {row['states']:>10} {row['seconds']:>6}  {row['what']}{mark}"
        )
    return "\n".join(lines)


def main() -> int:
    """Run all cases; 0 if every verdict is the expected one."""
    missing = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]
    if missing:
        print(f"expected spin and gcc, found no {' and no '.join(missing)}; on Debian and Ubuntu: apt install spin gcc")
        return 2
    print(call(HERE, "spin", "-V").strip())
    rows = [run_case(number, case) for number, case in enumerate(CASES, 1)]
    BUILD.mkdir(exist_ok=True)
    (BUILD / "model.json").write_text(json.dumps({"cases": rows}, indent=1) + "\n")
    print(f"\n{table(rows)}")
    wrong = sum(not row["as_expected"] for row in rows)
    print(
        f"\n{len(rows) - wrong} of {len(rows)} verdicts as expected; see build/model.json, also for the counterexamples"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
