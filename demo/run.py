"""The demonstration: five newsrooms fine-tune one model together, and the coordinator learns only the sum.

One coordinator process and five participant daemons, gRPC over mutual TLS on loopback, each with its own directory.
This script makes the directories, starts only the installed commands, and then checks what came out: that the unmasked
total is, integer for integer, the plain sum of the vectors the sites kept for this comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table

from demo import corpus
from demo.chart import bar_chart
from demo.compare import secure_equals_plain
from demo.federation import BIN, Federation
from privacy import console
from privacy.errors import UserError, VeilsumError
from privacy.plan import PlanFile, load_plan

PLAN = Path(__file__).with_name("plan.toml")
NAMES = tuple(f"site-{i + 1}" for i in range(corpus.SITES))
#: Each organisation pins this; no coordinator can weaken it.
POLICY = {"max_colluders": 1, "min_cohort": 4, "min_survivors": 3}
SITE_TOML = """threads = 1
keep_plain_vector = true  # only for the comparison below; it never leaves the site
[models]
"{base_name}" = "{base}"
[datasets.{dataset}]
path = "{data}"
format = "jsonl"
[policy]
plans = ["{plan}"]
min_cohort = 4
min_survivors = 3
max_colluders = 1
"""
TIMEOUT_S = 900.0
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass
class Timing:
    """Seconds of the parts of a run, and the most memory all processes had together."""

    training: float = 0.0
    aggregation: float = 0.0
    peak_pss: int = 0


def set_up(out: Path, plan: PlanFile, site_toml: str = SITE_TOML) -> Federation:
    """Write the sites' records and make the federation's directories; ``site_toml`` is every site's file."""
    corpus.write(out / "data")
    base = corpus.base_model()
    files = {
        name: site_toml.format(
            base_name=plan.plan.base.name,
            base=base,
            dataset=plan.plan.data.dataset,
            data=out / "data" / f"{name}.jsonl",
            plan=plan.plan.name,
        )
        for name in NAMES
    }
    federation = Federation(out / "federation", NAMES, POLICY, files, OFFLINE, name="newsrooms")
    federation.create()
    return federation


def pss(pids: list[int]) -> int:
    """Proportional set size of some processes together, bytes; processes that ended count nothing."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
    return total


def run_round(federation: Federation, plan: PlanFile, screen: Console, path: Path = PLAN) -> Timing:
    """Start everything, offer the plan at ``path``, wait until every site has verified the release."""
    timing, began = Timing(), time.time()
    federation.start_coordinator()
    federation.operator("plan", "submit", str(path))
    for name in NAMES:
        federation.start_site(name, "--once")
    with screen.status("five sites train, each on its own records …") as status:
        while any(federation.processes[name].poll() is None for name in NAMES):
            timing.peak_pss = max(timing.peak_pss, pss([p.pid for p in federation.processes.values()]))
            watch(federation, status, time.time() - began)
            time.sleep(2)
    ended = time.time()
    for name in NAMES:
        if federation.processes[name].returncode:
            raise UserError(f"{name} ended without a release:\n{federation.log_tail(name)}")
    opened = federation.show(plan.plan.name)["rounds"][-1]["opened"]
    timing.training, timing.aggregation = opened - began, ended - opened
    return timing


def watch(federation: Federation, status: Status, seconds: float) -> None:
    """Show the last word of each site; end what takes too long."""
    if seconds > TIMEOUT_S:
        federation.stop_all()
        raise UserError(f"expected a release within {TIMEOUT_S:.0f} s, found none; logs: {federation.directory}/*.log")
    words = [federation.log_tail(name, 1).partition("] ")[2].split(" plan=")[0].strip() for name in NAMES]
    status.update(
        f"{seconds:4.0f} s  " + "  ".join(f"{n}: {w or 'starting'}" for n, w in zip(NAMES, words, strict=True))
    )


def accuracies(federation: Federation, out: Path, path: Path = PLAN) -> dict[str, float]:
    """Accuracy on the held-out fifth after stage 1, measured by the sites' own command."""

    def measure(name: str) -> dict[str, Any]:
        adapters = ["local", *(("base", "release") if name == NAMES[0] else ())]
        options = [option for adapter in adapters for option in ("--adapter", adapter)]
        test = out / "data" / "test.jsonl"
        options += ["--data", str(test), "--stage", "1", "--json"]
        found = federation.participant(name, "evaluate", str(path), *options)
        result: dict[str, Any] = json.loads(found)
        return result

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        results = list(pool.map(measure, NAMES))
    alone = [result["local"]["accuracy"] for result in results]
    return {
        "base": results[0]["base"]["accuracy"],
        "alone_mean": sum(alone) / len(alone),
        "alone_best": max(alone),
        "one_shot": results[0]["release"]["accuracy"],
    }


def summarise(federation: Federation, plan: PlanFile, timing: Timing, accuracy: Mapping[str, float]) -> dict[str, Any]:
    """The numbers of a run, from the coordinator's receipts and the files at both ends."""
    shown = federation.show(plan.plan.name)
    last = shown["rounds"][-1]
    uploads = [sum(name in r["receipts"] for r in shown["rounds"]) for name in last["survivors"]]
    traffic = [last["traffic"][name] for name in last["survivors"]]
    return {
        "accuracy": {key: round(value, 4) for key, value in accuracy.items()},
        "participants": len(NAMES),
        "survivors": len(last["survivors"]),
        "uploads_per_participant": max(uploads) if min(uploads) == max(uploads) else uploads,
        "upload_bytes_per_coordinate": round(max(t["upload"] for t in traffic) / last["coordinates"], 4),
        "bytes_per_participant": max(t["sent"] + t["received"] for t in traffic),
        "coordinates": last["coordinates"],
        "secure_equals_plain": secure_equals_plain(federation, plan),
        "seconds": {"training": round(timing.training, 1), "aggregation": round(timing.aggregation, 1)},
        "peak_pss_bytes": timing.peak_pss,
        "adapter": shown["release"]["adapter"],
    }


def show_table(summary: Mapping[str, Any], screen: Console) -> None:
    """One table for people."""
    table = Table(title="One round of federated fine-tuning", show_header=False)
    words = {
        "base": "base model",
        "alone_mean": "sites alone, mean",
        "alone_best": "sites alone, best",
        "one_shot": "one round together",
        "with_adapter": "and then the adapter behind that head",
        "without_privacy": "one round without differential privacy",
        "pooled": "all data pooled",
    }
    for key, value in summary["accuracy"].items():
        table.add_row(f"accuracy, {words[key]}", f"{value:.3f}")
    table.add_section()
    table.add_row("sites, and how many are in the sum", f"{summary['participants']}, {summary['survivors']}")
    table.add_row("uploads per site", str(summary["uploads_per_participant"]))
    table.add_row("upload bytes per coordinate", str(summary["upload_bytes_per_coordinate"]))
    table.add_row("all bytes per site, both ways", f"{summary['bytes_per_participant']:,}")
    table.add_row("unmasked total equals the plain sum", "yes" if summary["secure_equals_plain"] else "NO")
    seconds = summary["seconds"]
    table.add_row("seconds: training, aggregation, all", ", ".join(str(seconds[k]) for k in seconds))
    table.add_row("adapter", summary["adapter"])
    screen.print(table)


def demonstrate(out: Path, *, pooled: bool) -> dict[str, Any]:
    """Run the whole demonstration into ``out``; the summary that is also written there."""
    began, screen = time.monotonic(), Console()
    plan = load_plan(PLAN)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    federation = set_up(out, plan)
    try:
        timing = run_round(federation, plan, screen)
        with screen.status("measuring on the held-out fifth …"):
            accuracy = accuracies(federation, out)
        if pooled:
            from demo.pooled import pooled_accuracy

            with screen.status("training on everything pooled, for comparison …"):
                accuracy["pooled"] = pooled_accuracy(plan.plan, out / "data", NAMES)
        summary = summarise(federation, plan, timing, accuracy)
    finally:
        federation.stop_all()
    summary["seconds"]["total"] = round(time.monotonic() - began, 1)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    bar_chart(summary, out / "accuracy.png")
    show_table(summary, screen)
    screen.print(f"written: {out / 'summary.json'}, {out / 'accuracy.png'}")
    return summary


def main() -> None:
    """Entry point of ``python -m demo.run``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="where to write (default: %(default)s)")
    parser.add_argument("--pooled", action="store_true", help="also train on all data pooled, for comparison")
    arguments = parser.parse_args()
    finish("demo", lambda: demonstrate(arguments.out.resolve(), pooled=arguments.pooled))


def finish(target: str, demonstrated: Callable[[], dict[str, Any]]) -> None:
    """Run a demo; leave with an error unless it came to its end and its masked total is the plain sum."""
    if not (BIN / "veilsum-coordinator").exists():
        sys.exit(f"error: expected the installed commands; run: make {target}")
    try:
        summary = demonstrated()
    except VeilsumError as error:
        console.fail(error)
    except KeyboardInterrupt:
        sys.exit(console.EXIT_INTERRUPTED)
    if not summary["secure_equals_plain"]:
        sys.exit("error: the unmasked total is not the plain sum")


if __name__ == "__main__":
    main()
