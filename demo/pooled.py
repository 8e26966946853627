"""What training on everything would give, if the newsrooms could share: the comparison of ``make demo-compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from demo import corpus
from participant.data import Examples, load_examples
from participant.evaluation import accuracy
from participant.training import train
from privacy.adapter import layout_of, release, start_adapter
from privacy.plan import Plan


def pooled_accuracy(plan: Plan, data: Path, names: Sequence[str]) -> float:
    """Accuracy on the held-out fifth after the same training on all sites' records together."""
    parts = [load_examples(data / f"{name}.jsonl", "jsonl", "text", "label", plan.data.labels) for name in names]
    everything = Examples(
        tuple(text for part in parts for text in part.texts), tuple(label for part in parts for label in part.labels)
    )
    base, start = corpus.base_model(), start_adapter(plan.adapter)
    result = train(plan=plan, base=base, start=start, examples=everything)
    tensors = release(start, result.delta, 1.0, layout_of(plan.adapter))
    test = load_examples(data / "test.jsonl", "jsonl", "text", "label", plan.data.labels)
    return accuracy(plan=plan, base=base, adapter=tensors, examples=test).accuracy
