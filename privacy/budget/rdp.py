"""Renyi divergences of a step of DP-SGD: our own second accountant, apart from dp-accounting's and Opacus' code.

A step compares Q = N(0, sigma^2) with the mixture P = sum_i p_i N(i, sigma^2), where i of a unit's records are in the
batch (Mironov, Talwar and Zhang 2019, arXiv:1908.10530; for users Charles et al. 2024, arXiv:2407.07737). Whole
orders at one record have a finite sum; all others are integrals over one real number, done by the trapezoid rule.
Units: the clipping norm is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from privacy.budget.events import DpSgd, Mechanism, Unprotected

Floats = NDArray[np.float64]

#: Orders that a report takes the best of; a filter keeps to one.
ORDERS: tuple[float, ...] = (
    *(1 + i / 10 for i in range(1, 100)),
    *map(float, range(11, 64)),
    *map(float, (72, 80, 96, 112, 128, 160, 192, 224, 256)),
)
#: What lies this far below the peak, in nats, adds nothing to a float64.
_NEGLIGIBLE = 60.0
_CHUNK = 1 << 15


def _log_sum(logs: Floats) -> float:
    top = float(logs.max())
    return top + math.log(float(np.exp(logs - top).sum()))


def _finite_sum(q: float, sigma: float, order: int) -> float:
    """log E_Q[(P/Q)^order] for one record: section 3.3 of arXiv:1908.10530."""
    terms = [
        math.lgamma(order + 1)
        - math.lgamma(i + 1)
        - math.lgamma(order - i + 1)
        + i * math.log(q)
        + (order - i) * math.log1p(-q)
        + i * (i - 1) / (2 * sigma**2)
        for i in range(order + 1)
    ]
    return _log_sum(np.array(terms))


def _integral(log_f: _Integrand, low: float, high: float, coarse: float, fine: float) -> float:
    """log of the integral of exp(log_f): the cells of a coarse grid that are not negligible, then finely."""
    cells = math.ceil((high - low) / coarse)
    edges = low + coarse * np.arange(cells + 1)
    values = np.concatenate([log_f(part) for part in np.array_split(edges, cells // _CHUNK + 1)])
    wanted = values > values.max() - _NEGLIGIBLE
    first, last = int(wanted.argmax()), cells - int(wanted[::-1].argmax())
    logs = []
    for cell in range(max(0, first - 1), min(cells, last + 1)):
        if wanted[max(0, cell - 1) : cell + 3].any():
            count = math.ceil(coarse / fine)
            logs.append(log_f(edges[cell] + coarse * (np.arange(count) / count)))
    return _log_sum(np.concatenate(logs)) + math.log(coarse / math.ceil(coarse / fine))


class _Integrand:
    """log of Q(x) (P(x)/Q(x))^power, at many x."""

    def __init__(self, log_p: Floats, sigma: float, power: float) -> None:
        self.log_p, self.sigma, self.power = log_p, sigma, power

    def __call__(self, x: Floats) -> Floats:
        i = np.arange(len(self.log_p))[:, None]
        logs = self.log_p[:, None] + (i * x[None, :] - i * i / 2) / self.sigma**2
        top = logs.max(axis=0)
        ratio = top + np.log(np.exp(logs - top).sum(axis=0))
        out: Floats = self.power * ratio - (x / self.sigma) ** 2 / 2 - math.log(self.sigma * math.sqrt(2 * math.pi))
        return out


def _mixture(probabilities: tuple[float, ...], sigma: float, order: float) -> float:
    """log moment of the worse direction: max(E_Q[(P/Q)^order], E_P[(Q/P)^order])."""
    with np.errstate(divide="ignore"):
        log_p = np.log(np.array(probabilities))
    most, wide = len(probabilities) - 1, 12 * sigma
    # P/Q is a polynomial in exp(x / sigma^2) with real negative roots, hence analytic for |Im x| < pi sigma^2; with
    # this step the trapezoid rule is exact to rounding.
    fine = min(sigma / 8, sigma**2 / max(8.0, math.sqrt(most * order)))
    add = _integral(_Integrand(log_p, sigma, order), -wide, order * most + wide, sigma / 2, fine)
    remove = _integral(_Integrand(log_p, sigma, 1 - order), (1 - order) * most - wide, wide, sigma / 2, fine)
    return max(add, remove)


@lru_cache(maxsize=65536)
def _step(probabilities: tuple[float, ...], sigma: float, order: float) -> float:
    q = probabilities[-1]
    if len(probabilities) == 2 and q == 1.0:
        return order / (2 * sigma**2)
    if len(probabilities) == 2 and order == int(order):  # removing is never worse here: Theorem 5 of the same paper
        log_moment = _finite_sum(q, sigma, int(order))
    else:
        log_moment = _mixture(probabilities, sigma, order)
    return max(0.0, log_moment) / (order - 1)


@lru_cache(maxsize=65536)
def rdp(mechanism: Mechanism, order: float) -> float:
    """Renyi divergence of ``order`` > 1 over all steps of a mechanism; infinite without privacy.

    Both directions of adding or removing a unit; zeroing a unit out is the same mixture.
    """
    if order <= 1:
        raise ValueError(f"expected an order above 1, found {order}")
    if isinstance(mechanism, Unprotected):
        return math.inf
    return mechanism.steps * _step(_probabilities(mechanism), float(mechanism.sigma), float(order))


def _probabilities(mechanism: DpSgd) -> tuple[float, ...]:
    return tuple(float(p) for _, p in mechanism.sampled_records())


def epsilon_of_rdp(rdp: float, order: float, delta: float) -> float:
    """(epsilon, delta) from a Renyi divergence: Canonne, Kamath and Steinke, Proposition 12 of arXiv:2004.00010."""
    if math.isinf(rdp):
        return math.inf
    return max(0.0, rdp + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))


def rdp_epsilon(mechanisms: Sequence[Mechanism], delta: float, orders: Sequence[float] = ORDERS) -> float:
    """Epsilon of the composition at its best order; 0 for no mechanism. For reports: a filter has one order."""
    if not mechanisms:
        return 0.0
    if any(isinstance(m, Unprotected) for m in mechanisms):
        return math.inf
    return min(epsilon_of_rdp(math.fsum(rdp(m, a) for m in mechanisms), a, delta) for a in orders)
