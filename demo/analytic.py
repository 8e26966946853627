"""A head from sums: the five newsrooms again, and the ridge solution of all their articles, which no split can change.

As ``make demo``, with another plan (``demo/plan-analytic.toml``): in stage 1 no site trains. Each sends sums of
products of the frozen model's features, masked, and what is released is compared with the solution of the pooled
articles, computed in the clear by LAPACK. In stage 2 they train the adapter behind that very head. After that, without
any round: what quantising costs at 24 and 32 bits and for several weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from demo import corpus, run
from demo.chart import bar_chart
from demo.compare import secure_equals_plain
from demo.federation import BIN, Federation
from privacy import console
from privacy.adapter import Matrix, Tensors, load_peft, start_adapter
from privacy.aligned import plan_at
from privacy.analytic import head_of, pack, rounding_ridge, solved
from privacy.errors import VeilsumError
from privacy.plan import Plan, load_plan
from privacy.secagg.quantize import quantizer_for

PLAN = Path(__file__).with_name("plan-analytic.toml")
SITE_TOML = run.SITE_TOML + "min_class_count = 5  # this site's consent to sums of statistics, and its own minimum\n"
Part = tuple[Matrix, tuple[int, ...]]


def features(plan: Plan, data: Path, names: Sequence[str]) -> list[Part]:
    """(features, labels) of each file, as the frozen model gives them; the same code as at a site."""
    from participant.analytic import features_of
    from participant.data import load_examples
    from participant.training import load_model, tokenise

    loaded = load_model(plan, corpus.base_model(), start_adapter(plan.adapter), "cpu")
    found = []
    for name in names:
        examples = load_examples(data / f"{name}.jsonl", "jsonl", "text", "label", plan.data.labels)
        texts = tokenise(loaded.tokenizer, examples.texts, plan.data.max_length)
        found.append((features_of(loaded, texts).double().numpy(), examples.labels))
    return found


def head_in(tensors: Tensors, plan: Plan) -> Matrix:
    """(inputs, classes) of an adapter with a bias, in float64."""
    name = f"base_model.model.{head_of(plan).module}"
    return np.concatenate([tensors[f"{name}.weight"].T, tensors[f"{name}.bias"][None]]).astype(np.float64)


def pooled_head(parts: Sequence[Part], plan: Plan) -> Matrix:
    """The ridge solution of all records by LAPACK, from their features and the plan's constants alone."""
    settings = plan.aggregation.analytic
    assert settings is not None
    x = np.concatenate([part for part, _ in parts]) / settings.feature_clip
    z = np.concatenate([np.clip(x, -1, 1), np.ones((len(x), 1))], axis=1)
    targets = np.eye(len(plan.data.labels))[[label for _, labels in parts for label in labels]]
    gram = z.T @ z / len(z) + settings.ridge * np.eye(z.shape[1])
    weights: Matrix = np.linalg.solve(gram, z.T @ targets / len(z))
    weights[:-1] /= settings.feature_clip
    return weights


def right(head: Matrix, test: Part) -> float:
    """Accuracy of a head on features."""
    said = (test[0] @ head[:-1] + head[-1]).argmax(axis=1)
    return float(np.mean(said == np.array(test[1])))


def quantised_head(parts: Sequence[Part], plan: Plan, bits: int, max_weight: int) -> tuple[Matrix, float]:
    """The head of the parts' quantised statistics, summed in the clear, and the ridge that was used."""
    from participant.analytic import means_of

    changed = plan.model_copy(update={"round": plan.round.model_copy(update={"bits": bits, "max_weight": max_weight})})
    quantizer, head = quantizer_for(changed, head_of(plan).size), head_of(plan)
    total = np.zeros(quantizer.total_size, np.int64)
    for part in parts:
        vector = pack(*means_of(*part, plan), plan.round.clip)
        total += quantizer.quantize(vector, len(part[1]), {"weight": len(part[1]), "loss": 0})
    decoded = quantizer.decode_sum(total, len(parts))
    unit = quantizer.max_weight / (quantizer.qmax * decoded.weight)
    least = rounding_ridge(head.inputs, unit, len(parts))
    tensors, ridge = solved(start_adapter(plan.adapter), decoded.mean, plan, least)
    return head_in(tensors, plan), ridge


def costs_of_quantising(parts: Sequence[Part], test: Part, plan: Plan) -> list[dict[str, Any]]:
    """How far from the pooled solution each choice of bits and max_weight ends."""
    exact, rows = pooled_head(parts, plan), []
    for bits in (24, 32):
        for max_weight in (512, 4096, 65536):
            head, ridge = quantised_head(parts, plan, bits, max_weight)
            error = float(np.linalg.norm(head - exact) / np.linalg.norm(exact))
            rows.append(
                {"bits": bits, "max_weight": max_weight, "ridge": ridge, "error": error, "accuracy": right(head, test)}
            )
    return rows


def show(summary: dict[str, Any], screen: Console) -> None:
    """The figures of this demonstration, for people."""
    found = summary["analytic"]
    screen.print(f"relative difference of the released head from the pooled ridge solution: {found['error']:.1e}")
    for row in found["stages"]:
        screen.print(f"stage {row['stage']}: {row['coordinates']:,} coordinates, {row['bytes']:,} bytes per site")
    table = Table("bits", "max_weight", "ridge used", "relative error", "accuracy", title="What quantising costs")
    for row in found["quantising"]:
        table.add_row(
            str(row["bits"]),
            str(row["max_weight"]),
            f"{row['ridge']:.1e}",
            f"{row['error']:.1e}",
            f"{row['accuracy']:.4f}",
        )
    screen.print(table)


def after(federation: Federation, out: Path, stage: int) -> float:
    """Accuracy of a stage's release on the held-out fifth, measured by one site's own command."""
    options = ("--data", str(out / "data" / "test.jsonl"), "--adapter", "release", "--stage", str(stage), "--json")
    found = json.loads(federation.participant(run.NAMES[0], "evaluate", str(PLAN), *options))
    return float(found["release"]["accuracy"])


def stages_of(federation: Federation, name: str) -> list[dict[str, int]]:
    """What each stage sent, from the coordinator's receipts: coordinates with extras, and bytes per site both ways."""
    return [
        {
            "stage": found["stage"],
            "coordinates": found["coordinates"],
            "bytes": max(t["sent"] + t["received"] for t in found["traffic"].values()),
        }
        for found in federation.show(name)["rounds"]
    ]


def demonstrate(out: Path) -> dict[str, Any]:
    """Run the demonstration into ``out``; the summary that is also written there."""
    began, screen = time.monotonic(), Console()
    plan = load_plan(PLAN)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    federation = run.set_up(out, plan, SITE_TOML)
    try:
        timing = run.run_round(federation, plan, screen, PLAN)
        with screen.status("measuring on the held-out fifth …"):
            accuracy = run.accuracies(federation, out, PLAN)
            accuracy["with_adapter"] = after(federation, out, 2)
        summary = run.summarise(federation, plan, timing, accuracy)
        summary["secure_equals_plain"] &= secure_equals_plain(federation, plan, 2)
        stages = stages_of(federation, plan.plan.name)
    finally:
        federation.stop_all()
    with screen.status("solving for everything pooled, for comparison …"):
        first = plan_at(plan.plan, 1)
        *parts, test = features(first, out / "data", [*run.NAMES, "test"])
        exact = pooled_head(parts, first)
        released = head_in(load_peft(Path(summary["adapter"])), first)
        summary["accuracy"]["pooled"] = round(right(exact, test), 4)
        summary["analytic"] = {
            "stages": stages,
            "error": float(np.linalg.norm(released - exact) / np.linalg.norm(exact)),
            "largest_feature": float(max(np.abs(x).max() for x, _ in parts)),
            "quantising": costs_of_quantising(parts, test, first),
        }
    summary["seconds"]["total"] = round(time.monotonic() - began, 1)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    bar_chart(summary, out / "accuracy.png")
    run.show_table(summary, screen)
    show(summary, screen)
    screen.print(f"written: {out / 'summary.json'}, {out / 'accuracy.png'}")
    return summary


def main() -> None:
    """Entry point of ``python -m demo.analytic``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path("build/demo-analytic")
    parser.add_argument("--out", type=Path, default=default, help="where to write (default: %(default)s)")
    arguments = parser.parse_args()
    if not (BIN / "veilsum-coordinator").exists():
        sys.exit("error: expected the installed commands; run: make demo-analytic")
    try:
        summary = demonstrate(arguments.out.resolve())
    except VeilsumError as error:
        console.fail(error)
    except KeyboardInterrupt:
        sys.exit(console.EXIT_INTERRUPTED)
    if not summary["secure_equals_plain"]:
        sys.exit("error: the unmasked total is not the plain sum")


if __name__ == "__main__":
    main()
