"""Private plans are drafted from presets: the noise keeps the epsilon asked for, and too much noise is said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from participant.cli import app
from participant.drafting import draft_plan
from privacy.budget import presets
from privacy.budget.accounting import pld_epsilon
from privacy.budget.events import DpSgd
from privacy.budget.presets import PRESETS, draft_privacy, preset_for
from privacy.budget.terms import mechanism
from privacy.errors import UserError
from privacy.plan import Plan, parse_plan
from tests.helpers_learning import LABELS, tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def drafted(base: Path, section: str) -> Plan:
    text = draft_plan(base=base, base_name="tiny", name="p", dataset="d", labels=LABELS, train="head", privacy=section)
    return parse_plan(text.encode()).plan


@pytest.mark.parametrize(
    ("size", "wanted"), [(2, 500), (499, 500), (500, 500), (1999, 500), (2000, 2000), (60_000, 50_000)]
)
def test_the_preset_goes_by_the_size(size: int, wanted: int) -> None:
    assert preset_for(size).size == wanted


@pytest.mark.parametrize(
    ("size", "epsilon", "sigma"), [(500, "1", 5.36), (500, "8", 1.14), (2_000, "3", 1.69), (10_000, "8", 0.80)]
)
def test_the_noise_is_that_of_the_table(size: int, epsilon: str, sigma: float) -> None:
    found = re.search(r'sigma = "([0-9.]+)"', draft_privacy(size, epsilon))
    assert found is not None
    assert abs(float(found[1]) - sigma) < 0.011


def test_a_draft_keeps_its_epsilon(base: Path) -> None:
    plan = drafted(base, draft_privacy(350, "8"))
    terms = mechanism(plan)
    assert isinstance(terms, DpSgd)
    assert (terms.rate, terms.nominal_batch, terms.nominal_size, terms.steps) == ("0.3657", 128, 350, 40)
    assert 7.9 < pld_epsilon([terms], float(terms.delta)) <= 8.0
    assert plan.adapter.train == "head"
    assert plan.training.epochs is None


def test_a_users_draft_asks_for_a_users_noise(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def calibrate(*terms: object) -> str:
        asked.append(terms)
        return "2.5"

    monkeypatch.setattr(presets, "calibrate", calibrate)
    plan = drafted(base, draft_privacy(500, "8.0", unit="user", max_records_per_unit=3))
    assert asked == [("8", "0.0001", "0.256", 40, "user", 3)]
    assert plan.privacy is not None
    assert (plan.privacy.unit, plan.privacy.max_records_per_unit, plan.privacy.sigma) == ("user", 3, "2.5")


@pytest.mark.parametrize(("size", "epsilon"), [(1, "8"), (500, "eight"), (500, "0.0001"), (500, "-1")])
def test_what_cannot_be_drafted_is_named(size: int, epsilon: str) -> None:
    with pytest.raises(UserError, match="draft: expected"):
        draft_privacy(size, epsilon)


def test_tiny_data_sets_still_give_a_plan(base: Path) -> None:
    assert drafted(base, draft_privacy(10, "20")).privacy is not None
    assert [p.size for p in PRESETS] == sorted(p.size for p in PRESETS)


ARGUMENTS = [
    "--name",
    "p",
    "--base-name",
    "tiny",
    "--dataset",
    "d",
    *(word for name in LABELS for word in ("--label", name)),
]


def test_the_command_drafts_a_private_plan_and_says_that_it_is_noisy(base: Path) -> None:
    found = CliRunner().invoke(
        app, ["draft", str(base), *ARGUMENTS, "--epsilon", "3", "--size", "500", "--train", "head"]
    )
    assert found.exit_code == 0, found.output
    plan = parse_plan(found.stdout.encode()).plan
    assert plan.privacy is not None
    assert (plan.adapter.train, plan.privacy.nominal_size) == ("head", 500)
    assert "note: sigma / nominal_batch is 0.0173" in found.stderr


def test_an_unknown_part_to_train_is_named(base: Path) -> None:
    found = CliRunner().invoke(app, ["draft", str(base), *ARGUMENTS, "--train", "heads"])
    assert isinstance(found.exception, UserError)
    assert "expected --train all or head, found 'heads'" in str(found.exception)


def test_an_epsilon_needs_a_size(base: Path) -> None:
    found = CliRunner().invoke(app, ["draft", str(base), *ARGUMENTS, "--epsilon", "3"])
    assert isinstance(found.exception, UserError)
    assert "expected --epsilon and --size together" in str(found.exception)
