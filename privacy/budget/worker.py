"""``python -m privacy.budget.worker SECONDS MIB``: one accountant's task from standard input, under limits.

What a ledger says decides how much memory an accountant asks for, so the asking happens here and ends here.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

from privacy.budget.accounting import pld_epsilon
from privacy.budget.events import mechanism_from_json


def answer(task: dict[str, Any]) -> float:
    """Epsilon of the task's mechanisms; mechanisms are checked again on the way in."""
    mechanisms = [mechanism_from_json(m) for m in task["mechanisms"]]
    return pld_epsilon(mechanisms, float(task["delta"]), float(task["interval"]))


def main() -> None:
    """Entry point."""
    seconds, mib = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds + 1, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (mib << 20, mib << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    json.dump(answer(json.loads(sys.stdin.read())), sys.stdout)


if __name__ == "__main__":
    main()
