"""Every job of a ledger and their composition, computed anew: by PLD, by our own Renyi divergences, and by Opacus'.

All of it runs in child processes with limits, whatever the ledger says.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dp_accounting.pld import PLDAccountant

from privacy.budget.accounting import MEANINGLESS, LimitReached, ask_child, interval_for, merged
from privacy.budget.events import DpSgd, Mechanism, Unprotected
from privacy.budget.rdp import ORDERS, epsilon_of_rdp, rdp

#: Where the limits are not enough for better.
COARSE = 1e-2


@dataclass(frozen=True)
class Sums:
    """Epsilons of one accountant.

    Attributes:
        each: of each job alone, at its own delta.
        after: of all jobs up to and with each, at the ledger's delta.
    """

    each: tuple[float, ...]
    after: tuple[float, ...]

    def padded(self, count: int) -> Sums:
        """Longer by jobs that make the composition infinite."""
        return Sums(self.each + (math.inf,) * count, self.after + (math.inf,) * count)


@dataclass(frozen=True)
class Recomputed:
    """Both accountants' sums; ``opacus`` is empty where Opacus is not installed or was not asked."""

    pld: Sums
    rdp: Sums
    opacus: tuple[float, ...] = ()
    #: Why an accountant gave no answer; its numbers are infinite then.
    limit: str = ""


def by_pld(mechanisms: Sequence[DpSgd], delta: float, interval: float) -> Sums:
    """By PLD, in this process; infinite where the Renyi bound says that the answer means nothing."""
    screen = by_rdp(mechanisms, delta)
    alone: dict[DpSgd, float] = {}
    after: list[float] = []
    together = PLDAccountant(value_discretization_interval=interval)
    for mechanism, bound, bound_after in zip(mechanisms, screen.each, screen.after, strict=True):
        event = merged([mechanism])[0]
        if mechanism not in alone:
            accountant = PLDAccountant(value_discretization_interval=interval)
            meaningless = bound > MEANINGLESS
            alone[mechanism] = (
                math.inf if meaningless else float(accountant.compose(event).get_epsilon(float(mechanism.delta)))
            )
        if bound_after > MEANINGLESS:  # and so it stays
            after.append(math.inf)
            continue
        together.compose(event)
        after.append(float(together.get_epsilon(delta)))
    return Sums(tuple(alone[m] for m in mechanisms), tuple(after))


def by_rdp(mechanisms: Sequence[DpSgd], delta: float) -> Sums:
    """By our own divergences, each time at the best order."""
    totals = [0.0] * len(ORDERS)
    each, after = [], []
    for m in mechanisms:
        mine = [rdp(m, order) for order in ORDERS]
        each.append(min(epsilon_of_rdp(r, a, float(m.delta)) for r, a in zip(mine, ORDERS, strict=True)))
        totals = [total + r for total, r in zip(totals, mine, strict=True)]
        after.append(min(epsilon_of_rdp(r, a, delta) for r, a in zip(totals, ORDERS, strict=True)))
    return Sums(tuple(each), tuple(after))


@lru_cache(maxsize=1024)  # sites of a federation often ran the same jobs
def recompute(
    mechanisms: tuple[Mechanism, ...], delta: float, seconds: float, mib: int, *, with_opacus: bool = True
) -> Recomputed:
    """Compute all jobs of a ledger anew; from the first unprotected one on the composition is infinite."""
    first = next((i for i, m in enumerate(mechanisms) if isinstance(m, Unprotected)), len(mechanisms))
    private = [m for m in mechanisms if isinstance(m, DpSgd)]
    if not private:
        nothing = Sums((), ()).padded(len(mechanisms))
        return Recomputed(nothing, nothing)
    task = {"mechanisms": [m.to_json() for m in private], "delta": delta}
    pld_sums, rdp_sums, limit = _ask(task, private, seconds, mib)
    opacus = _opacus(task, seconds, mib) if with_opacus and importlib.util.find_spec("opacus") else ()
    return Recomputed(
        _spread(pld_sums, mechanisms, first), _spread(rdp_sums, mechanisms, first), opacus=opacus, limit=limit
    )


def _ask(task: dict[str, Any], private: Sequence[DpSgd], seconds: float, mib: int) -> tuple[Sums, Sums, str]:
    """(PLD, RDP, why one of them is missing): as finely as the limits allow, then coarsely, then without PLD."""
    unknown, said = Sums((), ()).padded(len(private)), ""
    for interval in (interval_for(private), COARSE, None):
        try:
            found = ask_child(task | {"what": "ledger", "interval": interval}, seconds, mib)
        except LimitReached as error:
            said = str(error)
            continue
        return _sums(found["pld"]) if interval else unknown, _sums(found["rdp"]), "" if interval else said
    return unknown, unknown, said


def _sums(answer: Any) -> Sums:
    return Sums(tuple(map(float, answer["each"])), tuple(map(float, answer["after"])))


def _spread(sums: Sums, mechanisms: Sequence[Mechanism], first: int) -> Sums:
    """Numbers of the private jobs -> of all jobs: an unprotected one is infinite, and so is all after it."""
    each, after = iter(sums.each), iter(sums.after)
    alone = [next(each) if isinstance(m, DpSgd) else math.inf for m in mechanisms]
    together = [next(after) if i < first else math.inf for i, _ in enumerate(mechanisms)]
    return Sums(tuple(alone), tuple(together))


def _opacus(task: dict[str, Any], seconds: float, mib: int) -> tuple[float, ...]:
    """Opacus' RDP of each private job at our orders; nothing where it cannot be had (it needs torch and its memory)."""
    try:
        found = ask_child(task | {"orders": ORDERS}, seconds, max(mib, 8192), "privacy.budget.opacus_worker")
    except LimitReached:
        return ()
    return tuple(map(float, found))
