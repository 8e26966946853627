"""From a plan to its mechanism: the same for site and auditor, from the plan alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from privacy.budget.accounting import pld_epsilon
from privacy.budget.events import DpSgd
from privacy.budget.terms import canonical, mechanism, noise_warning
from privacy.errors import UserError
from privacy.plan import Plan
from tests.helpers_learning import private_plan, tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plan(base: Path) -> Plan:
    return private_plan(base)


def test_the_mechanism_is_the_plans_alone(plan: Plan) -> None:
    terms = mechanism(plan)
    assert isinstance(terms, DpSgd)
    assert plan.privacy is not None
    assert (terms.sigma, terms.rate, terms.delta, terms.clip) == ("1", "0.25", "0.0001", "1")
    assert (terms.steps, terms.nominal_batch, terms.nominal_size) == (12, 6, 24)


def test_an_epsilon_becomes_the_noise_that_keeps_it(base: Path) -> None:
    plan = private_plan(base, sigma=None, epsilon="4")
    terms = mechanism(plan)
    assert isinstance(terms, DpSgd)
    assert 3.9 < pld_epsilon([terms], 1e-4) <= 4.0
    assert mechanism(plan) == terms


def test_an_epsilon_that_no_noise_keeps_is_the_plans_fault(base: Path) -> None:
    with pytest.raises(UserError, match="expected an epsilon that noise in range can keep, found 1e-9") as refused:
        mechanism(private_plan(base, sigma=None, epsilon="1e-9"))
    assert refused.value.hint


@pytest.mark.parametrize(
    ("number", "wanted"), [("1e-4", "0.0001"), ("1.50", "1.5"), ("100", "100"), ("0.25", "0.25"), ("8", "8")]
)
def test_numbers_have_one_form(number: str, wanted: str) -> None:
    assert canonical(number) == wanted


def test_much_noise_is_said(base: Path) -> None:
    assert "sigma / nominal_batch is 0.167, above 0.01" in noise_warning(private_plan(base))
    assert noise_warning(private_plan(base)).endswith("helps, or training the head alone")
    assert noise_warning(private_plan(base, train="head")).endswith("helps")
    assert noise_warning(private_plan(base, nominal_batch=100, nominal_size=400)) == ""
