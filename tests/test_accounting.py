"""Epsilons against published values, against two other code bases, and an accountant that cannot be brought down."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import time
from typing import Literal

import pytest
from dp_accounting import rdp as google
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis import rdp as opacus

from privacy.budget.accounting import (
    LimitReached,
    ask_child,
    bounded_pld_epsilon,
    calibrate,
    epsilon_of_rdp,
    pld_epsilon,
    rdp,
    rdp_epsilon,
)
from privacy.budget.events import DpSgd, Mechanism, Unprotected
from privacy.errors import ProtocolError

WITHIN = 0.002


def job(rate: str, sigma: str, steps: int, delta: str = "0.00001", records: int = 1) -> DpSgd:
    unit: Literal["record", "user"] = "user" if records > 1 else "record"
    return DpSgd(rate, sigma, "1", delta, steps, 100, 10000, unit, records)


#: Mechanism -> epsilon by PLD at 1e-4, by RDP at Opacus' orders, by dp-accounting's RDP.
TABLE = [
    (job("0.01", "1", 1000), 1.8282, 2.1014, 2.1014),
    (job("0.1", "1", 100), 7.0466, 7.899, 7.904),
    (job("0.04", "0.8", 75), 4.2427, 5.039, 5.041),
    (job("0.001", "0.5", 5000, "0.000001"), 5.4353, 6.610, 6.611),
    (job("0.02", "0.35", 500), 51.098, 58.26, 58.64),
]
OPACUS_ORDERS = [*(1 + x / 10.0 for x in range(1, 100)), *map(float, range(12, 64))]


@pytest.mark.parametrize(("mechanism", "pld", "by_opacus", "by_google"), TABLE)
def test_known_epsilons(mechanism: DpSgd, pld: float, by_opacus: float, by_google: float) -> None:
    delta = float(mechanism.delta)
    assert pld_epsilon([mechanism], delta) == pytest.approx(pld, abs=WITHIN)
    assert rdp_epsilon([mechanism], delta, OPACUS_ORDERS) == pytest.approx(by_opacus, abs=WITHIN)
    divergences = opacus.compute_rdp(
        q=float(mechanism.rate), noise_multiplier=float(mechanism.sigma), steps=mechanism.steps, orders=OPACUS_ORDERS
    )
    theirs, _ = opacus.get_privacy_spent(orders=OPACUS_ORDERS, rdp=divergences, delta=delta)
    assert theirs == pytest.approx(by_opacus, abs=WITHIN)
    accountant = google.RdpAccountant()
    accountant.compose(mechanism.event())
    assert accountant.get_epsilon(delta) == pytest.approx(by_google, abs=WITHIN)
    assert rdp_epsilon([mechanism], delta) <= by_google + WITHIN  # its series leaves some broken orders out


@pytest.mark.parametrize("mechanism", [row[0] for row in TABLE])
def test_our_divergences_are_those_of_dp_accounting(mechanism: DpSgd) -> None:
    orders = [2, 3, 6, 16, 32]  # whole ones
    accountant = google.RdpAccountant(orders=orders)
    accountant.compose(mechanism.event())
    assert [rdp(mechanism, order) for order in orders] == pytest.approx(list(accountant.rdp), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    rate=st.integers(1, 1000),
    sigma=st.integers(30, 1000),
    order=st.one_of(st.integers(2, 64).map(float), st.integers(21, 300).map(lambda n: n / 10)),
)
def test_our_divergences_are_those_of_opacus(rate: int, sigma: int, order: float) -> None:
    mechanism = job(f"{rate / 1000:g}", f"{sigma / 100:g}", 1)
    theirs = opacus.compute_rdp(q=rate / 1000, noise_multiplier=sigma / 100, steps=1, orders=[order])[0]
    assert rdp(mechanism, order) == pytest.approx(theirs, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("mechanism", [row[0] for row in TABLE])
@pytest.mark.parametrize("order", [2, 3, 5.5, 8, 32])
def test_the_finite_sum_is_the_integral(mechanism: DpSgd, order: float) -> None:
    # An order beside a whole one is integrated, the whole one is summed: two ways to one number.
    nearby = rdp(mechanism, order + 1e-9)
    assert rdp(mechanism, order) == pytest.approx(nearby, rel=1e-6)


#: Records of a user -> epsilon at q = .01, sigma = 1, 1000 steps, delta 1e-5.
USERS = {1: 1.83, 2: 3.98, 4: 8.90, 8: 20.9}


@pytest.mark.parametrize("records", USERS)
def test_users_with_several_records(records: int) -> None:
    mechanism = job("0.01", "1", 1000, records=records)
    epsilon = pld_epsilon([mechanism], 1e-5, interval=1e-3)
    assert epsilon == pytest.approx(USERS[records], abs=0.05 if records == 8 else 0.006)
    assert epsilon <= rdp_epsilon([mechanism], 1e-5) <= 1.25 * epsilon


def test_a_user_with_one_record_is_a_record() -> None:
    user = dataclasses.replace(job("0.01", "1", 1000), unit="user")
    assert rdp(user, 3) == rdp(job("0.01", "1", 1000), 3)


def test_a_user_who_is_always_sampled_is_a_gaussian_of_k() -> None:
    mechanism = job("1", "2", 10, records=4)
    assert rdp(mechanism, 5.0) == pytest.approx(10 * 5 * 16 / (2 * 4), rel=1e-9)


PORTFOLIO = [job("0.04", "0.8", 75), job("0.02", "1", 200), job("0.01", "0.7", 300), job("0.1", "1.5", 60)]


def test_several_jobs() -> None:
    assert pld_epsilon(PORTFOLIO, 1e-5, 1e-3) == pytest.approx(5.68, abs=0.01)
    assert rdp_epsilon(PORTFOLIO, 1e-5) == pytest.approx(6.50, abs=0.01)
    fixed = {3: 6.82, 4: 7.09, 8: 1069}
    for order, expected in fixed.items():
        total = math.fsum(rdp(m, order) for m in PORTFOLIO)
        assert epsilon_of_rdp(total, order, 1e-5) == pytest.approx(expected, rel=0.002)


def test_equal_jobs_are_composed_at_the_price_of_one() -> None:
    apart = [job("0.04", "0.8", 25)] * 3
    assert pld_epsilon(apart, 1e-5, 1e-3) == pld_epsilon([job("0.04", "0.8", 75)], 1e-5, 1e-3)


def test_zeroing_out_costs_what_removing_does() -> None:
    removed = job("0.04", "0.8", 75)
    zeroed = dataclasses.replace(removed, adjacency="zero-out")
    assert pld_epsilon([zeroed], 1e-5, 1e-3) == pytest.approx(pld_epsilon([removed], 1e-5, 1e-3), abs=1e-6)


@pytest.mark.parametrize("jobs", [[Unprotected()], [*PORTFOLIO, Unprotected()]])
def test_a_job_without_privacy_makes_epsilon_infinite(jobs: list[Mechanism]) -> None:
    assert pld_epsilon(jobs, 1e-5) == rdp_epsilon(jobs, 1e-5) == bounded_pld_epsilon(jobs, 1e-5) == math.inf
    assert rdp(jobs[-1], 3) == math.inf


def test_nothing_costs_nothing() -> None:
    assert pld_epsilon([], 1e-5) == rdp_epsilon([], 1e-5) == bounded_pld_epsilon([], 1e-5) == 0


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps", "sigma"),
    [("1", "0.256", 40, "5.358"), ("8", "0.256", 40, "1.139"), ("4", "0.04", 75, "0.82")],
)
def test_calibration_rounds_up_to_three_decimals(epsilon: str, rate: str, steps: int, sigma: str) -> None:
    delta = "0.00001" if rate == "0.04" else "0.0001"
    found = calibrate(epsilon, delta, rate, steps)
    assert found == sigma
    assert pld_epsilon([job(rate, found, steps, delta)], float(delta)) <= float(epsilon)
    less = f"{float(found) - 0.001:.3f}".rstrip("0")
    assert pld_epsilon([job(rate, less, steps, delta)], float(delta), 1e-3) > float(epsilon)


def test_a_user_needs_more_noise_than_a_record() -> None:
    user = calibrate("1", "0.0001", "0.05", 20, "user", 2)
    assert float(user) > float(calibrate("1", "0.0001", "0.05", 20))
    assert pld_epsilon([job("0.05", user, 20, "0.0001", 2)], 1e-4, 1e-3) <= 1


def test_no_noise_is_enough() -> None:
    with pytest.raises(ValueError, match="no sigma up to 100"):
        calibrate("0.0001", "0.0000000001", "1", 10**6)


# -- the child process


def test_the_child_says_what_this_process_says() -> None:
    assert bounded_pld_epsilon([TABLE[0][0]], 1e-5) == pld_epsilon([TABLE[0][0]], 1e-5)


@pytest.mark.parametrize("mechanism", [job("1", "0.2", 10**6), job("0.5", "0.2", 100), job("0.01", "1", 10**6)])
def test_a_guarantee_that_means_nothing_is_not_computed(mechanism: DpSgd) -> None:
    started = time.process_time()
    assert bounded_pld_epsilon([mechanism], 1e-5) == math.inf
    assert time.process_time() - started < 5


def test_a_bomb_is_not_even_a_mechanism() -> None:
    with pytest.raises(ProtocolError, match="sigma"):
        job("0.1", "0.01", 1000)


def test_too_little_memory_is_said_so() -> None:
    with pytest.raises(LimitReached, match="out of memory"):
        bounded_pld_epsilon([job("0.1", "1", 100)], 1e-5, mib=512, interval=1e-8)


def test_too_little_time_is_said_so() -> None:
    started = time.monotonic()
    with pytest.raises(LimitReached, match="none in time"):
        bounded_pld_epsilon([job("0.1", "1", 100)], 1e-5, seconds=0.2)
    assert time.monotonic() - started < 5


def test_who_asks_for_no_epsilon_does_not_wait_for_scipy() -> None:
    """Half of what a site's daemon takes to start, and of each command that reads a ledger."""
    code = "import sys, participant.daemon, privacy.budget.ledger; sys.exit('scipy' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_the_child_checks_mechanisms_again() -> None:
    bomb = {**job("0.1", "1", 1000).to_json(), "sigma": "0.01"}
    with pytest.raises(LimitReached, match="ProtocolError"):
        ask_child({"what": "pld", "mechanisms": [bomb], "delta": 1e-5, "interval": 1e-4}, 60, 2048)


def test_the_auditor_needs_no_torch() -> None:
    modules = "cli, cli_budget, budget.federation, budget.report, budget.empirical, budget.worker"
    code = f"import sys, {', '.join('privacy.' + name for name in modules.split(', '))}"
    check = "; sys.exit('torch' in sys.modules or 'opacus' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code + check], env=environment, check=False).returncode == 0
