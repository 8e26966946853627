"""All benchmarks in one run: ``python -m bench.run`` writes build/bench.json and build/bench.md.

Every row that has a reference measures it in the same run, so that the ratio means something on a noisy machine too.
A bar that does not hold is said at the end, and the exit status is 1. ``--only NAME`` runs single groups of rows,
``--quick`` all of them at sizes that show only that the scripts work.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from bench import growth, masking, memory, peers, private, wire
from bench.rows import Row, describe, table
from bench.scale import ROOT, Scale, run_text
from privacy.errors import UserError
from privacy.secagg.masking import best_engine

GROUPS: dict[str, Callable[[Scale], list[Row]]] = {
    "mask_stream": masking.mask_stream,
    "mask_stream_fast": masking.mask_stream_fast,
    "mask_threads": masking.mask_threads,
    "participant_mask": peers.participant_mask,
    "upload_bytes": peers.upload_bytes,
    "coordinator_unmask": peers.coordinator_unmask,
    "coordinator_memory": memory.coordinator_memory,
    "round_end_to_end": wire.round_end_to_end,
    "growth": growth.growth,
    "shamir_128": growth.shamir_128,
    "dp_step": private.dp_step,
}


def machine() -> list[str]:
    """What this ran on, without the machine's name."""
    processor = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("cryptography", "numpy", "grpcio"))
    return [
        f"Processor: {processor}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}, {packages}; {run_text(['openssl', 'version']).strip()}",
        f"Mask engine with the extra fast: {best_engine()[1]}",
    ]


def _lines(path: str) -> list[str]:
    return Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []


def run_groups(names: Sequence[str], scale: Scale) -> tuple[list[Row], list[str]]:
    """(rows, what went wrong); a group that fails does not stop the others."""
    rows: list[Row] = []
    failed: list[str] = []
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name}", flush=True)
        began = time.monotonic()
        try:
            found = GROUPS[name](scale)
        except UserError as error:
            failed.append(f"{name}: {error} ({error.hint})" if error.hint else f"{name}: {error}")
            continue
        except Exception:
            failed.append(f"{name}: {traceback.format_exc()}")
            continue
        rows += found
        for r in found:
            print(f"    {describe(r)}")
        print(f"    ({time.monotonic() - began:.0f} s)", flush=True)
    return rows, failed


def write(rows: Sequence[Row], out: Path, command: str) -> None:
    """``out``.json and ``out``.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps([asdict(r) for r in rows], indent=2) + "\n")
    head = [f"Made by `{command}`. Ratios are value / reference, both of this run.", ""]
    head += [f"* {line}" for line in machine()]
    out.with_suffix(".md").write_text("\n".join([*head, "", table(rows), ""]))


def judge(rows: Sequence[Row], failed: Sequence[str], quick: bool) -> int:
    """Say which bars do not hold and what failed; the exit status."""
    for reason in failed:
        print(f"FAILED {reason}")
    if quick:
        print("quick: sizes too small for the bars to mean anything")
        return 1 if failed else 0
    missed = [r for r in rows if r.holds is False]
    for r in missed:
        print(f"BAR MISSED {describe(r)}")
    if not missed and not failed:
        print(f"all {sum(r.holds is not None for r in rows)} bars hold")
    return 1 if missed or failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), metavar="NAME", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no judgement")
    parser.add_argument("--out", type=Path, help="path of the results without suffix (default: build/bench)")
    chosen = parser.parse_args(arguments)
    suffix = "-quick" if chosen.quick else "-only" if chosen.only else ""
    out: Path = chosen.out or ROOT / "build" / f"bench{suffix}"
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=ROOT / "build") as scratch:
        rows, failed = run_groups(chosen.only or list(GROUPS), Scale(Path(scratch), chosen.quick))
    command = "make bench" if not suffix else "python -m bench.run " + ("--quick" if chosen.quick else "--only ...")
    write(rows, out, command)
    print(f"\nwrote {out.with_suffix('.json')} and {out.with_suffix('.md')}")
    return judge(rows, failed, chosen.quick)


if __name__ == "__main__":
    raise SystemExit(main())
