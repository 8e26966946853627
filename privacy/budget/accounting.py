"""From facts to epsilon. The tight number is dp-accounting's privacy loss distribution (PLD), an upper bound.

A PLD of hostile parameters takes all the memory there is, so :func:`bounded_pld_epsilon` asks a child process with
limits, and only where the Renyi bound says that the answer means anything. The CLT approximation by Gaussian DP is
not here: it falls below proven lower bounds.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

from privacy.budget.events import MAX_SIGMA, MIN_SIGMA, DpSgd, Mechanism, Unprotected
from privacy.budget.rdp import epsilon_of_rdp, rdp, rdp_epsilon
from privacy.errors import UserError

if TYPE_CHECKING:
    import dp_accounting

__all__ = [
    "LimitReached",
    "bounded_pld_epsilon",
    "calibrate",
    "epsilon_of_rdp",
    "pld_epsilon",
    "rdp",
    "rdp_epsilon",
]

#: Above this an epsilon is no meaningful guarantee, and its PLD is not worth its memory: reported as infinite.
MEANINGLESS = 50.0
INTERVAL = 1e-4
#: For users with several records, whose PLD takes minutes at 1e-4; an upper bound comes out of any interval.
MIXTURE_INTERVAL = 1e-3
#: Few orders that bracket the noise for a PLD to refine.
_BRACKET_ORDERS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)
#: Names of dp-accounting, which is imported where it computes: with it comes SciPy, half of what a site takes to start.
_NEIGHBOURS = {"add-remove": "ADD_OR_REMOVE_ONE", "zero-out": "REPLACE_SPECIAL"}


class LimitReached(UserError):
    """An accountant did not answer within its limits of time and memory; no epsilon is known."""


def merged(mechanisms: Sequence[DpSgd]) -> list[dp_accounting.DpEvent]:
    """Events with equal steps counted together, which a PLD composes at the price of one."""
    import dp_accounting

    steps: Counter[DpSgd] = Counter()
    for m in mechanisms:
        alike = replace(m, steps=1, clip="1", delta="0.001", nominal_batch=1, nominal_size=1, adjacency="add-remove")
        steps[alike] += m.steps
    return [dp_accounting.SelfComposedDpEvent(m.event().event, count) for m, count in steps.items()]


def pld_epsilon(mechanisms: Sequence[Mechanism], delta: float, interval: float = INTERVAL) -> float:
    """Epsilon of the composition by PLD, in this process, an upper bound; infinite with one unprotected job.

    The composition assumes that no mechanism was chosen in sight of the results of those before.

    Raises:
        MemoryError: the parameters ask for more than there is.
    """
    private = [m for m in mechanisms if isinstance(m, DpSgd)]
    if len(private) < len(mechanisms):
        return math.inf
    if not private:
        return 0.0
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    relations = {m.adjacency for m in private}
    # Adding or removing and zeroing out give the same pair of distributions for these mechanisms.
    relation = NeighboringRelation[_NEIGHBOURS["add-remove" if len(relations) > 1 else relations.pop()]]
    accountant = PLDAccountant(relation, value_discretization_interval=interval)
    for event in merged(private):
        accountant.compose(event)
    return float(accountant.get_epsilon(delta))


def interval_for(mechanisms: Sequence[Mechanism]) -> float:
    """How finely a PLD of these is worth computing."""
    mixtures = any(isinstance(m, DpSgd) and m.max_records_per_unit > 1 for m in mechanisms)
    return MIXTURE_INTERVAL if mixtures else INTERVAL


def bounded_pld_epsilon(
    mechanisms: Sequence[Mechanism], delta: float, seconds: float = 60, mib: int = 2048, interval: float | None = None
) -> float:
    """As :func:`pld_epsilon`, for mechanisms that somebody else wrote: in a child process with limits.

    The interval is :func:`interval_for`'s unless one is given.

    Infinite where the Renyi bound is above :data:`MEANINGLESS`; no PLD is tried then.

    Raises:
        LimitReached: no answer within ``seconds`` or ``mib`` MiB of address space.
    """
    if not mechanisms:
        return 0.0
    if any(isinstance(m, Unprotected) for m in mechanisms) or rdp_epsilon(mechanisms, delta) > MEANINGLESS:
        return math.inf
    task = {
        "mechanisms": [m.to_json() for m in mechanisms],
        "delta": delta,
        "interval": interval or interval_for(mechanisms),
    }
    return float(ask_child(task | {"what": "pld"}, seconds, mib))


def ask_child(task: dict[str, Any], seconds: float, mib: int, worker: str = "privacy.budget.worker") -> Any:
    """The answer of a worker module to one task, JSON for JSON; raises :class:`LimitReached`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", worker, str(math.ceil(seconds)), str(mib)]
    limits = f"{seconds:g} s and {mib} MiB"
    try:
        done = subprocess.run(
            command,
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=seconds,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LimitReached(f"accountant: expected an answer within {limits}, found none in time") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
        why = "out of memory" if any(w in done.stderr for w in ("MemoryError", "bad_alloc")) else said[:200]
        raise LimitReached(f"accountant: expected an answer within {limits}, found exit {done.returncode}: {why}")
    return json.loads(done.stdout)


def calibrate(
    epsilon: str,
    delta: str,
    rate: str,
    steps: int,
    unit: str = "record",
    max_records_per_unit: int = 1,
) -> str:
    """The smallest noise multiplier of three decimals whose PLD keeps ``epsilon`` at ``delta``, as a decimal string.

    Args:
        epsilon, delta, rate: decimal strings.

    Raises:
        ProtocolError: a parameter out of range.
        ValueError: no noise in the accepted range keeps it.
    """
    goal, at = float(epsilon), float(delta)
    if unit not in ("record", "user"):
        raise ValueError(f"expected unit 'record' or 'user', found '{unit}'")
    whose: Literal["record", "user"] = "user" if unit == "user" else "record"

    def job(thousandths: int) -> DpSgd:
        sigma = f"{(Decimal(thousandths) / 1000).normalize():f}"
        return DpSgd(rate, sigma, "1", delta, steps, 1, 1, whose, max_records_per_unit)

    def excess(thousandths: int) -> float:
        """How far above the goal, in the logarithm: nearly a straight line over that of the noise."""
        return math.log(max(pld_epsilon([job(thousandths)], at, 1e-3), 1e-12) / goal)

    least, most = int(MIN_SIGMA * 1000), int(MAX_SIGMA * 1000)
    high = next((m for m in _geometric(least, most) if rdp_epsilon([job(m)], at, _BRACKET_ORDERS) <= goal), most)
    while (above := excess(high)) > 0:  # a PLD in steps of 1e-3 is coarse for a tiny epsilon
        if high == most:
            raise ValueError(f"no sigma up to {MAX_SIGMA} keeps epsilon {epsilon} at delta {delta}")
        high = min(most, 2 * high)
    low = high
    while (below := excess(low)) <= 0:  # Renyi needs more noise than PLD: step down until PLD refuses
        if low == least:
            return job(least).sigma
        high, above, low = low, below, max(least, int(low * 0.85))
    return job(_crossing(low, below, high, above, excess)).sigma


def _geometric(least: int, most: int) -> list[int]:
    """Whole numbers from ``least`` to ``most``, each about 5 % above the one before."""
    count = math.ceil(math.log(most / least) / math.log(1.05))
    return [round(least * (most / least) ** (i / count)) for i in range(count + 1)]


def _crossing(low: int, below: float, high: int, above: float, excess: Callable[[int], float]) -> int:
    """The smallest whole number where a falling function is <= 0, given its values at low (> 0) and high (<= 0)."""
    while high - low > 1:
        guess = math.log(low) + (math.log(high) - math.log(low)) * below / (below - above)
        probe = min(max(math.ceil(math.exp(guess)), low + 1), high - 1)
        for middle in {probe, max(probe - 1, low + 1)}:  # both sides of the guess, which often end it
            if low < middle < high:
                value = excess(middle)
                low, below, high, above = (low, below, middle, value) if value <= 0 else (middle, value, high, above)
    return high
