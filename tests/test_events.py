"""What a ledger may say about a mechanism: the whitelist, the ranges, and that nothing else gets past."""

from __future__ import annotations

import dataclasses
import json
from decimal import Decimal
from typing import Any, Literal

import dp_accounting
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.budget.events import DpSgd, Unprotected, mechanism_from_json
from privacy.errors import ProtocolError

RECORD = DpSgd("0.01", "1", "0.5", "0.00001", 1000, 100, 10000)
USER = dataclasses.replace(RECORD, unit="user", max_records_per_unit=3)


def deep(levels: int) -> Any:
    tree: Any = {"type": "GaussianDpEvent", "noise_multiplier": "1"}
    for _ in range(levels):
        tree = {"type": "SelfComposedDpEvent", "count": 1, "event": tree}
    return tree


#: A sentence, then what is changed in the JSON of RECORD.
ATTACKS: dict[str, dict[str, Any]] = {
    "an unknown kind": {"kind": "gdp"},
    "a kind that is no text": {"kind": ["dp-sgd"]},
    "another mechanism's kind": {"kind": "unprotected"},
    "a bomb: so little noise that a PLD asks for all memory": {"sigma": "0.01"},
    "noise beyond the range": {"sigma": "100.001"},
    "no noise": {"sigma": "0"},
    "negative noise": {"sigma": "-1"},
    "a float": {"sigma": 1.0},
    "NaN": {"sigma": float("nan")},
    "NaN as text": {"sigma": "NaN"},
    "infinity as text": {"sigma": "Infinity"},
    "an exponent": {"rate": "1e-2"},
    "zeros that say nothing": {"rate": "0.010"},
    "digits of another script": {"sigma": "\u0661"},
    "a line end after the number": {"sigma": "1\n"},
    "a rate above 1": {"rate": "1.1"},
    "a rate of 0": {"rate": "0"},
    "delta at its bound": {"delta": "0.01"},
    "2^60 steps": {"steps": 1 << 60},
    "a step too many": {"steps": 10**6 + 1},
    "no step": {"steps": 0},
    "steps as a truth value": {"steps": True},
    "steps as text": {"steps": "1000"},
    "a batch of 2^60": {"nominal_batch": 1 << 60},
    "an unknown unit": {"unit": "household"},
    "several records of a record": {"max_records_per_unit": 2},
    "an unknown adjacency": {"adjacency": "replace-one"},
    "shuffling": {"sampling": "shuffle"},
    "an extra key": {"gdp": "0.1"},
    "an event of another kind": {"event": {"type": "LaplaceDpEvent", "noise_multiplier": "1"}},
    "an event of an unknown type": {"event": {"type": "__import__", "name": "os"}},
    "an event with other noise than the field": {
        "event": {**RECORD.to_json()["event"], "event": {"type": "GaussianDpEvent", "noise_multiplier": "9"}}
    },
    "an event with an extra key": {"event": {**RECORD.to_json()["event"], "note": ""}},
    "an event a thousand levels deep": {"event": deep(1000)},
    "an event that counts in another type": {"event": {**RECORD.to_json()["event"], "count": 1000.0}},
    "no event": {"event": None},
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_a_ledger_may_not_say(attack: str) -> None:
    with pytest.raises(ProtocolError):
        mechanism_from_json({**RECORD.to_json(), **ATTACKS[attack]})


@pytest.mark.parametrize("mechanism", [RECORD, USER, Unprotected()])
def test_every_key_is_needed(mechanism: DpSgd | Unprotected) -> None:
    for key in mechanism.to_json():
        with pytest.raises(ProtocolError):
            mechanism_from_json({k: v for k, v in mechanism.to_json().items() if k != key})


@pytest.mark.parametrize("value", [None, [], "dp-sgd", 7, {}, {"kind": None}])
def test_what_is_no_mechanism_at_all(value: object) -> None:
    with pytest.raises(ProtocolError):
        mechanism_from_json(value)


@pytest.mark.parametrize("mechanism", [RECORD, USER, Unprotected()])
def test_json_comes_back_and_holds_no_float(mechanism: DpSgd | Unprotected) -> None:
    def no_float(text: str) -> None:
        raise AssertionError(f"a float: {text}")

    text = json.dumps(mechanism.to_json())
    assert mechanism_from_json(json.loads(text, parse_float=no_float)) == mechanism


def test_an_unprotected_job_has_no_parameters() -> None:
    with pytest.raises(ProtocolError):
        mechanism_from_json({**Unprotected().to_json(), "sigma": "1"})


def test_the_events_are_those_of_dp_accounting() -> None:
    noise = dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(1.0))
    assert RECORD.event() == dp_accounting.SelfComposedDpEvent(noise, 1000)
    mixture = USER.event().event
    assert list(mixture.sensitivities) == [0, 1, 2, 3]
    assert mixture.sampling_probs == pytest.approx([0.99**3, 3 * 0.01 * 0.99**2, 3 * 0.01**2 * 0.99, 0.01**3])


@given(thousandths=st.integers(1, 1000), records=st.integers(1, 64))
def test_the_records_of_a_user_in_a_batch_are_binomial(thousandths: int, records: int) -> None:
    rate = f"{(Decimal(thousandths) / 1000).normalize():f}"
    unit: Literal["record", "user"] = "user" if records > 1 else "record"
    mechanism = dataclasses.replace(RECORD, rate=rate, unit=unit, max_records_per_unit=records)
    sampled = mechanism.sampled_records()
    assert float(sum(p for _, p in sampled)) == pytest.approx(1, abs=1e-12)
    assert float(sum(i * p for i, p in sampled)) == pytest.approx(records * thousandths / 1000)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=20), inner, max_size=4)),
    max_leaves=20,
)


@given(value=JSON, changes=st.dictionaries(st.sampled_from([*RECORD.to_json(), "more"]), JSON, max_size=3))
def test_any_json_is_a_mechanism_or_refused_in_one_line(value: Any, changes: dict[str, Any]) -> None:
    for candidate in (value, {**RECORD.to_json(), **changes}, {**USER.to_json(), **changes}):
        try:
            text = json.dumps(mechanism_from_json(candidate).to_json(), sort_keys=True)
        except ProtocolError as error:
            refusal = str(error)
        else:
            refusal = "none"
            assert text == json.dumps(candidate, sort_keys=True)
        assert refusal.isprintable()
        assert len(refusal) < 300
