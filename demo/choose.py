"""How the learning rate of ``demo/plan-private.toml`` was chosen: on training articles set aside, not on test articles.

    python -m demo.choose sgd=0.03 sgd=0.1 adamw=0.002

Each site trains privately on four fifths of its articles; the mean of the heads is measured on the fifths set aside. In
a federation these trials would be charged to the sites' budgets, or be done on public data: this is a demonstration.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import numpy as np

from demo import corpus
from demo.private import PLAN
from participant.data import Examples
from participant.dp_sgd import train_private
from participant.evaluation import accuracy
from privacy.adapter import layout_of, release, start_adapter
from privacy.plan import Plan, load_plan

SET_ASIDE = 5
#: Fixes which articles are set aside; demo data, nothing secret.
SEED = 7


def _examples(part: Sequence[corpus.Article]) -> Examples:
    return Examples(tuple(a.text for a in part), tuple(corpus.LABELS.index(a.label) for a in part))


def parts() -> tuple[list[Examples], Examples]:
    """(what each site trains on, what is set aside of all of them); the test articles are in neither."""
    rng = random.Random(SEED)
    trained, aside = [], []
    for site in corpus.split(corpus.articles()).sites:
        shuffled = rng.sample(site, len(site))
        cut = len(site) // SET_ASIDE
        aside += shuffled[:cut]
        trained.append(_examples(shuffled[cut:]))
    return trained, _examples(aside)


def measure(plan: Plan, sites: Sequence[Examples], aside: Examples) -> float:
    """Accuracy of the mean of all sites' private heads on what was set aside."""
    base, start = corpus.base_model(), start_adapter(plan.adapter)
    deltas = [
        train_private(plan=plan, base=base, start=start, examples=site, threads=1, on_selftest=lambda _: None).delta
        for site in sites
    ]
    mean = np.stack(deltas).mean(0, dtype=np.float64).astype(np.float32)
    adapter = release(start, mean, 1.0, layout_of(plan.adapter))
    return accuracy(plan=plan, base=base, adapter=adapter, examples=aside).accuracy


def main() -> None:
    """Command line: one line for each candidate."""
    parser = argparse.ArgumentParser(prog="python -m demo.choose", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("candidates", nargs="+", metavar="OPTIMIZER=RATE", help="such as sgd=0.1 or adamw=0.002")
    arguments = parser.parse_args()
    sites, aside = parts()
    fields = load_plan(PLAN).plan.model_dump(exclude_unset=True)
    for candidate in arguments.candidates:
        optimizer, _, rate = candidate.partition("=")
        fields["training"] |= {"optimizer": optimizer, "learning_rate": float(rate)}
        print(f"{candidate}: {measure(Plan.model_validate(fields), sites, aside):.3f} of {len(aside)}", flush=True)


if __name__ == "__main__":
    main()
