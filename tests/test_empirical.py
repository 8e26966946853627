"""The one-run audit: bounds against published values and simulated mechanisms, and that missing noise is caught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from typer.testing import CliRunner

from privacy.budget.empirical import (
    SHARES,
    Scores,
    as_bytes,
    bounds,
    gaussian_lower_bound,
    is_gaussian_refuted,
    lower_bound,
    p_value,
    read_scores,
)
from privacy.budget.events import DpSgd
from privacy.cli import app
from privacy.errors import ProtocolError

#: sigma = 40: the mechanism promises an epsilon of about half.
MECHANISM = DpSgd("0.5", "40", "1", "0.0001", 150, 100, 200)


@pytest.mark.parametrize(
    ("m", "guesses", "most"),
    [(100, 20, 1.82), (100, 50, 2.78), (1000, 100, 3.47), (1000, 300, 4.57), (5000, 1000, 5.67)],
)
def test_the_most_that_can_be_shown(m: int, guesses: int, most: float) -> None:
    assert lower_bound(m, guesses, guesses, 1e-5) == pytest.approx(most, abs=0.006)
    assert gaussian_lower_bound(m, guesses, guesses, 1e-5) > most


def test_a_p_value_is_the_binomial_tail_where_delta_is_zero() -> None:
    assert p_value(10, 10, 10, 0.0, 0.0) == pytest.approx(2**-10)
    assert p_value(10, 2, 1, 0.0, 0.0) == pytest.approx(3 / 4)
    assert p_value(10, 10, 10, 0.0, 0.01) > p_value(10, 10, 10, 0.0, 0.0)
    assert p_value(10, 4, 0, 1.0, 0.0) == 1


@pytest.mark.parametrize("m", [100, 1000])
def test_chance_refutes_nothing(m: int) -> None:
    assert lower_bound(m, m // 5, m // 10, 1e-5) == 0
    assert gaussian_lower_bound(m, m // 5, m // 10, 1e-5) == 0
    assert not is_gaussian_refuted(m, m // 5, m // 10, 0.0, 0.05)


def test_more_right_guesses_refute_more() -> None:
    found = [(lower_bound(1000, 200, v, 1e-5), gaussian_lower_bound(1000, 200, v, 1e-5)) for v in range(100, 201, 20)]
    assert found == sorted(found)
    assert found[0] == (0, 0) < found[-1]


def test_a_gaussian_mechanism_is_rarely_called_worse_than_it_is() -> None:
    """Scores as a Gaussian mechanism gives them, mu = 1: the bounds hold, and the Gaussian one is the tighter."""
    delta, rng = 1e-5, np.random.default_rng(5)
    truth = dp_accounting.get_epsilon_gaussian(1.0, delta)
    found = []
    for _ in range(10):
        included = rng.random(1000) < 0.5
        scores = rng.normal(size=1000) + included
        found.append(bounds(Scores(DpSgd("1", "1", "1", "0.00001", 1, 1, 1), tuple(included.tolist()), tuple(scores))))
    assert sum(b.gaussian > truth for b in found) <= 2  # one in twenty is the price of 95 %
    assert np.mean([b.gaussian for b in found]) > np.mean([b.general for b in found]) > 0.1
    assert all(b.general <= b.ceiling for b in found)


def scored(gap: float, count: int = 400, mechanism: DpSgd = MECHANISM) -> Scores:
    """Canaries whose score tells all (a large gap) or nothing (0)."""
    rng = np.random.default_rng(1)
    included = rng.random(count) < 0.5
    return Scores(mechanism, tuple(included.tolist()), tuple((rng.normal(size=count) + gap * included).tolist()))


def test_scores_are_read_as_they_were_written() -> None:
    found = read_scores(as_bytes(scored(1.0)))
    assert found.mechanism == MECHANISM
    assert found.included == scored(1.0).included
    assert found.scores == pytest.approx(scored(1.0).scores, abs=1e-9)


BAD: dict[str, Any] = {
    "a key too many": lambda x: {**x, "more": 1},
    "another version": lambda x: {**x, "v": 2},
    "a mechanism out of range": lambda x: {**x, "mechanism": {**x["mechanism"], "sigma": "0.01"}},
    "no mechanism with privacy": lambda x: {
        **x,
        "mechanism": {"kind": "unprotected", "event": {"type": "NonPrivateDpEvent"}},
    },
    "too few canaries": lambda x: {**x, "canaries": x["canaries"][:3]},
    "a score that is no number": lambda x: {**x, "canaries": [{"in": True, "score": "nan"}] * 20},
    "a canary half in": lambda x: {**x, "canaries": [{"in": "half", "score": "1"}] * 20},
    "canaries that are a number": lambda x: {**x, "canaries": 7},
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_scores_file(case: str) -> None:
    with pytest.raises(ProtocolError):
        read_scores(json.dumps(BAD[case](scored(1.0).to_json())).encode())


def run(tmp_path: Path, scores: Scores, *options: str) -> Any:
    path = tmp_path / "scores.json"
    path.write_bytes(as_bytes(scores))
    return CliRunner().invoke(app, ["empirical", str(path), *options])


def test_the_command_convicts_and_does_not_acquit(tmp_path: Path) -> None:
    caught = run(tmp_path, scored(5.0))
    assert (caught.exit_code, "above what is promised" in caught.output) == (30, True)
    passed = run(tmp_path, scored(0.0))
    assert (passed.exit_code, "a small lower bound proves nothing" in passed.output) == (0, True)
    facts = json.loads(run(tmp_path, scored(0.0), "--json").output)
    assert facts["lower"] <= facts["upper"] < facts["ceiling"]
    assert facts["guesses"] <= facts["canaries"] * max(SHARES)


def test_training_without_noise_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same training code, its noise silently zero and its self-test gone: the canaries tell."""
    from participant import canaries, dp_sgd
    from participant.noise import SecretRandom
    from tests.helpers_learning import private_plan, tiny_base

    base = tiny_base(tmp_path)
    plan = private_plan(
        base, sigma="40", rate="0.5", steps=150, nominal_batch=100, nominal_size=200, training={"learning_rate": 0.02}
    )
    honest = canaries.audit_training(plan=plan, base=base, count=400)
    assert run(tmp_path, honest).exit_code == 0
    monkeypatch.setattr(SecretRandom, "normal", lambda _, count: np.zeros(count))
    monkeypatch.setattr(dp_sgd, "run_self_test", lambda *_: None)
    silent = canaries.audit_training(plan=plan, base=base, count=400)
    found = run(tmp_path, silent, "--json")
    facts = json.loads(found.output)
    assert found.exit_code == 30
    assert facts["lower"] > facts["upper"]
