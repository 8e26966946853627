"""The private demonstration: the five newsrooms again, each record protected by (epsilon, delta)-differential privacy.

As ``make demo``, with another plan (``demo/plan-private.toml``): each site trains the head with DP-SGD under a budget
of its own, epsilon 8 at delta 1e-4, and writes what it did into its ledger. Beside it stands the accuracy of ``make
demo`` without privacy, and at the end an auditor recomputes every epsilon from the ledgers, with what the coordinator
witnessed as the anchor.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from demo import corpus, run
from demo.chart import bar_chart
from demo.federation import BIN, Federation
from privacy.adapter import Vector, layout_of, release, start_adapter
from privacy.errors import UserError
from privacy.plan import load_plan

PLAN = Path(__file__).with_name("plan-private.toml")
SITE_TOML = (
    run.SITE_TOML
    + """\
[datasets.{dataset}.budget]  # over all plans together, for one record
epsilon = "8"
delta = "1e-4"
"""
)


def _without_privacy(data: Path, name: str) -> tuple[Vector, int]:
    """(delta, examples) of one site under the plan of ``make demo``."""
    from participant.data import load_examples
    from participant.training import train

    plan = load_plan(run.PLAN).plan
    examples = load_examples(data / f"{name}.jsonl", "jsonl", "text", "label", plan.data.labels)
    start = start_adapter(plan.adapter)
    result = train(plan=plan, base=corpus.base_model(), start=start, examples=examples, threads=1)
    return result.delta, result.examples


def accuracy_without_privacy(data: Path) -> float:
    """What ``make demo`` reaches: the same sites train LoRA and head without noise, and their mean is taken.

    The mean is computed in the clear here; that the masked one is the same, ``make demo`` shows. No ledger is charged:
    this is a comparison for the reader, which no site with a budget would run.
    """
    from participant.data import load_examples
    from participant.evaluation import accuracy

    workers = min(2, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        deltas = list(pool.map(_without_privacy, [data] * len(run.NAMES), run.NAMES))
    plan = load_plan(run.PLAN).plan
    mean = np.average([delta for delta, _ in deltas], axis=0, weights=[count for _, count in deltas])
    tensors = release(start_adapter(plan.adapter), mean.astype(np.float32), 1.0, layout_of(plan.adapter))
    test = load_examples(data / "test.jsonl", "jsonl", "text", "label", plan.data.labels)
    return accuracy(plan=plan, base=corpus.base_model(), adapter=tensors, examples=test).accuracy


def audit(federation: Federation, out: Path, screen: Console) -> None:
    """Let the auditor's command recompute every ledger against what the coordinator witnessed; print its report.

    Raises:
        UserError: the audit found something.
    """
    anchor = out / "witnessed.anchor"
    anchor.write_text(federation.operator("witnesses"))
    ledgers = sorted(str(path) for name in run.NAMES for path in (federation.site(name) / "ledger").glob("*.jsonl"))
    roster = federation.coordinator / "roster.toml"
    command = [str(BIN / "veilsum-audit"), "ledger", *ledgers, "--roster", str(roster), "--anchor", str(anchor)]
    report = subprocess.run([*command, "--html", str(out / "audit.html")], capture_output=True, text=True, check=False)
    screen.print(report.stdout, markup=False, highlight=False)
    (out / "audit.txt").write_text(report.stdout)
    if report.returncode:
        raise UserError(f"expected an audit without findings, found exit status {report.returncode}: {report.stderr}")


def demonstrate(out: Path) -> dict[str, Any]:
    """Run the private demonstration into ``out``; the summary that is also written there."""
    began, screen = time.monotonic(), Console()
    plan = load_plan(PLAN)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    federation = run.set_up(out, plan, SITE_TOML)
    try:
        timing = run.run_round(federation, plan, screen, PLAN)
        with screen.status("measuring on the held-out fifth …"):
            accuracy = run.accuracies(federation, out, PLAN)
        with screen.status("training without privacy, for comparison …"):
            accuracy["without_privacy"] = accuracy_without_privacy(out / "data")
        summary = run.summarise(federation, plan, timing, accuracy)
    finally:
        federation.stop_all()
    assert plan.plan.privacy is not None
    summary["privacy"] = plan.plan.privacy.model_dump(mode="json")
    summary["seconds"]["total"] = round(time.monotonic() - began, 1)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    bar_chart(summary, out / "accuracy.png")
    run.show_table(summary, screen)
    audit(federation, out, screen)
    written = ", ".join(str(out / name) for name in ("summary.json", "accuracy.png", "audit.txt", "audit.html"))
    screen.print(
        "A site alone answers with its own desk: its labels are not counted, so nothing takes their skew out.\n"
        f"written: {written}"
    )
    return summary


def main() -> None:
    """Entry point of ``python -m demo.private``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path("build/demo-private")
    parser.add_argument("--out", type=Path, default=default, help="where to write (default: %(default)s)")
    arguments = parser.parse_args()
    run.finish("demo-private", lambda: demonstrate(arguments.out.resolve()))


if __name__ == "__main__":
    main()
