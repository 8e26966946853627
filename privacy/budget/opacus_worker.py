"""``python -m privacy.budget.opacus_worker SECONDS MIB``: what Opacus' RDP accountant says about each job.

A third accountant where Opacus happens to be installed. Nothing imports this module: it brings torch with it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

from privacy.budget.events import DpSgd, mechanism_from_json
from privacy.budget.worker import limited


def answer(task: dict[str, Any]) -> list[float]:
    """Epsilon of each job at its own delta; -1 for users with several records, whom Opacus does not know."""
    return [_epsilon(mechanism_from_json(m), task["orders"]) for m in task["mechanisms"]]


def _epsilon(mechanism: Any, orders: list[float]) -> float:
    if not isinstance(mechanism, DpSgd) or mechanism.max_records_per_unit > 1:
        return -1.0
    divergences = compute_rdp(
        q=float(mechanism.rate), noise_multiplier=float(mechanism.sigma), steps=mechanism.steps, orders=orders
    )
    return float(get_privacy_spent(orders=orders, rdp=divergences, delta=float(mechanism.delta))[0])


if __name__ == "__main__":
    limited(int(sys.argv[1]), int(sys.argv[2]))
    json.dump(answer(json.loads(sys.stdin.read())), sys.stdout)
