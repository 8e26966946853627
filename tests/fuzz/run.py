"""Fuzz the parsers with atheris, some at a time: ``python -m tests.fuzz.run SECONDS [PARSER...]``.

What was learned stays in ``build/fuzz/PARSER/corpus`` and the next run starts from it. An input that shows a bug is
left as ``build/fuzz/PARSER/crash-...`` (or ``timeout-``, ``oom-``); the exit status is 1 if there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "fuzz"
#: Seconds after which one input counts as a hang.
HANG_S = 10


@dataclass(frozen=True)
class Result:
    """What one parser's run came to."""

    name: str
    executions: int
    per_second: int
    corpus: int
    found: tuple[Path, ...]
    ended: str  # what libFuzzer said last, where it ended early


def _words(seeds: list[bytes]) -> str:
    """A dictionary for libFuzzer: the words of the seeds, and what text formats trip over."""
    words = {w for seed in seeds for w in re.findall(rb"[A-Za-z_]{3,24}", seed[:4000])}
    words |= {b"NaN", b"Infinity", b"null", b"1e999", b"0x", b'"""', b"'''", b"\xff\xff\xff\xff", b"\0\0\0\0"}
    return "".join('"{}"\n'.format("".join(f"\\x{b:02x}" for b in word)) for word in sorted(words))


def fuzz(name: str, seconds: int) -> Result:
    """Fuzz one parser in a process of its own."""
    directory, seeds = BUILD / name, TARGETS[name].seeds()
    corpus, started = directory / "corpus", directory / "seeds"
    for path in (corpus, started):
        path.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (started / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    (directory / "words").write_text(_words(seeds))
    before = set(directory.glob("*-*"))
    command = [sys.executable, "-m", "tests.fuzz.one", name, str(corpus), str(started), f"-dict={directory / 'words'}"]
    command += [f"-max_total_time={seconds}", f"-timeout={HANG_S}", f"-artifact_prefix={directory}/"]
    done = subprocess.run(
        [*command, "-print_final_stats=1"], cwd=ROOT, capture_output=True, text=True, errors="replace"
    )
    (directory / "log").write_text(done.stdout + done.stderr)
    stats = dict(re.findall(r"^stat::(\w+):\s+(\d+)", done.stderr, re.MULTILINE))
    found = tuple(sorted(set(directory.glob("*-*")) - before))
    ended = "" if done.returncode == 0 else f"exit status {done.returncode}, see {directory / 'log'}"
    executions = int(stats.get("number_of_executed_units", 0))
    return Result(name, executions, executions // max(seconds, 1), len(list(corpus.iterdir())), found, ended)


def report(results: list[Result]) -> str:
    """A Markdown table."""
    lines = ["| parser | executions | a second | inputs kept | findings |", "|---|---|---|---|---|"]
    for r in sorted(results, key=lambda r: list(TARGETS).index(r.name)):
        lines.append(f"| {r.name} | {r.executions:,} | {r.per_second:,} | {r.corpus:,} | {len(r.found)} |")
    return "\n".join(lines)


def main() -> None:
    """Divide the seconds among the parsers, one at a time on each core."""
    parser = argparse.ArgumentParser(prog="make fuzz", description="Fuzz the parsers with atheris.")
    parser.add_argument("seconds", type=int, help="for all of them together")
    parser.add_argument("parsers", nargs="*", help=f"default: all of {', '.join(TARGETS)}")
    asked = parser.parse_args()
    unknown = sorted(set(asked.parsers) - set(TARGETS))
    if unknown:
        parser.error(f"expected parsers out of {', '.join(TARGETS)}, found {', '.join(unknown)}")
    names, cores = asked.parsers or list(TARGETS), len(os.sched_getaffinity(0))
    each = max(1, asked.seconds * min(cores, len(names)) // len(names))
    print(f"{len(names)} parsers, {each} s each, {cores} at a time; inputs and logs in {BUILD.relative_to(ROOT)}")
    with ThreadPoolExecutor(cores) as pool:
        results = list(pool.map(lambda name: fuzz(name, each), names))
    print(report(results))
    for result in results:
        for path in result.found:
            print(f"{result.name}: {path.relative_to(ROOT)}", file=sys.stderr)
        if result.ended:
            print(f"{result.name}: {result.ended}", file=sys.stderr)
    sys.exit(any(r.found or r.ended for r in results))


if __name__ == "__main__":
    main()
