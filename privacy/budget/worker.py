"""``python -m privacy.budget.worker SECONDS MIB``: one accountant's task from standard input, under limits.

What a ledger says decides how much memory an accountant asks for, so the asking happens here and ends here.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from typing import Any

from privacy.budget.accounting import pld_epsilon
from privacy.budget.events import DpSgd, mechanism_from_json
from privacy.budget.recompute import by_pld, by_rdp
from privacy.budget.terms import mechanism as mechanism_of
from privacy.plan import parse_plan


def answer(task: dict[str, Any]) -> Any:
    """The answer to one task; mechanisms are checked again on the way in."""
    if task["what"] == "plan":
        return mechanism_of(parse_plan(task["plan"].encode()).plan).to_json()
    mechanisms = [mechanism_from_json(m) for m in task["mechanisms"]]
    delta = float(task["delta"])
    if task["what"] == "pld":
        return pld_epsilon(mechanisms, delta, float(task["interval"]))
    private = [m for m in mechanisms if isinstance(m, DpSgd)]
    sums = {"rdp": by_rdp(private, delta)}
    if task["interval"] is not None:
        sums["pld"] = by_pld(private, delta, float(task["interval"]))
    return {name: dataclasses.asdict(found) for name, found in sums.items()}


def limited(seconds: int, mib: int) -> None:
    """Take away from this process what it has no use for: more time, more memory, a core file."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds + 1, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (mib << 20, mib << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    limited(int(sys.argv[1]), int(sys.argv[2]))
    json.dump(answer(json.loads(sys.stdin.read())), sys.stdout)
