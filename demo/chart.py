"""A bar chart of the demo's accuracies: what joining one round brings over training alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor looked for

from matplotlib import pyplot

#: Key in summary["accuracy"] -> what the reader sees; in the order of the bars. ``pooled`` is there after demo-compare.
BARS = {
    "base": "base model",
    "alone_mean": "alone, mean",
    "alone_best": "alone, best",
    "one_shot": "one round",
    "with_adapter": "and adapter",
    "without_privacy": "not private",
    "pooled": "pooled data",
}
GREY, BLUE = "#9aa5b1", "#1f6feb"


def bar_chart(summary: Mapping[str, Any], path: Path) -> None:
    """Draw ``summary["accuracy"]`` (key of :data:`BARS` -> share of right answers) into the PNG file ``path``."""
    accuracy = summary["accuracy"]
    keys = [key for key in BARS if key in accuracy]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    bars = axes.bar(
        [BARS[key] for key in keys],
        [accuracy[key] for key in keys],
        color=[BLUE if key == "one_shot" else GREY for key in keys],
    )
    axes.bar_label(bars, fmt="{:.3f}", padding=3)
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("accuracy on held-out articles")
    axes.set_title("Five newsrooms, one upload each, no article shared")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
