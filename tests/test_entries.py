"""Ledger lines: what is written reads back byte for byte, and nothing else is read at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from privacy.budget.book import weakened
from privacy.budget.entries import (
    MAX_INTEGER,
    Policy,
    PolicyChange,
    Reserve,
    decimal_text,
    parse_line,
    strict_json,
)
from privacy.budget.ledger import LedgerError, verify_lines
from privacy.errors import ProtocolError
from tests.ledgers import POLICY, SITE, abort, commit, new_ledger, release, reserve, resigned, start


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    path = tmp_path_factory.mktemp("ledger") / "news.jsonl"
    facts = (reserve(1), start(1), release(1), commit(1), reserve(2), abort(2, "plan cancelled: ünicode\n"))
    return new_ledger(path, *facts).path.read_bytes().splitlines()


def body(line: bytes) -> dict[str, Any]:
    return {key: value for key, value in json.loads(line).items() if key != "signature"}


def test_every_kind_reads_back(lines: list[bytes]) -> None:
    found = [parse_line(line) for line in lines]
    assert [e.kind for e in found] == ["REGISTER", "RESERVE", "START", "RELEASE", "COMMIT", "RESERVE", "ABORT"]
    assert [e.line for e in found] == lines
    assert found[-1].facts == abort(2, "plan cancelled: ünicode\n")
    assert all(e.line.isascii() for e in found)


#: What is wrong with a RESERVE line, rightly signed: the change of its body, and the refusal.
WRONG: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "an unknown key": (lambda b: b | {"epsilon": "1"}, "unknown key 'epsilon'"),
    "a missing key": (lambda b: {k: v for k, v in b.items() if k != "plan"}, "missing key 'plan'"),
    "a missing sequence": (lambda b: {k: v for k, v in b.items() if k != "seq"}, "missing key 'seq'"),
    "another version": (lambda b: b | {"v": 2}, "key 'v'"),
    "an unknown kind": (lambda b: b | {"kind": "REFUND"}, "key 'kind'"),
    "a key of another kind": (lambda b: b | {"kind": "START"}, "missing key 'selftest'"),
    "a number below zero": (lambda b: b | {"stage": -1}, "key 'stage'"),
    "a number as text": (lambda b: b | {"stage": "1"}, "key 'stage'"),
    "a truth for a number": (lambda b: b | {"stage": True}, "key 'stage'"),
    "2**60": (lambda b: b | {"stage": 1 << 60}, r"below 2\*\*53"),
    "2**60 in a mechanism": (lambda b: b | {"mechanism": {"steps": 1 << 60}}, r"below 2\*\*53"),
    "a float": (lambda b: b | {"mechanism": {"sigma": 1.0}}, "no floating-point number"),
    "an upper-case hash": (lambda b: b | {"plan_digest": "AB" * 32}, "key 'plan_digest'"),
    "a hash with a line end": (lambda b: b | {"plan_digest": "ab" * 32 + "\n"}, "key 'plan_digest'"),
    "a divergence with an exponent": (lambda b: b | {"rdp": {"3": "1e400"}}, "key 'rdp"),
    "a negative divergence": (lambda b: b | {"rdp": {"3": "-1"}}, "key 'rdp"),
    "no divergence but its name": (lambda b: b | {"rdp": {"3": "NaN"}}, "key 'rdp"),
    "a claim of something else": (lambda b: b | {"claim": b["claim"] | {"pld": "Infinity"}}, "key 'claim.pld'"),
    "a local time": (lambda b: b | {"time": "2026-11-25T12:00:00+01:00"}, "key 'time'"),
    "a clock before zero": (lambda b: b | {"monotonic": "-1"}, "key 'monotonic'"),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_line_with_other_facts_is_refused_though_signed(lines: list[bytes], sentence: str) -> None:
    change, text = WRONG[sentence]
    assert parse_line(resigned(body(lines[1])))
    with pytest.raises(ProtocolError, match=text):
        parse_line(resigned(change(body(lines[1]))))


#: What is wrong with the bytes of a line.
BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a key twice": (lambda line: line.replace(b'"stage":1', b'"stage":1,"stage":1'), "stands there twice"),
    "a key twice, deep inside": (
        lambda line: line.replace(b'"mechanism":{', b'"mechanism":{"a":1,"a":1,'),
        "stands there twice",
    ),
    "NaN": (lambda line: line.replace(b'"stage":1', b'"stage":NaN'), "no floating-point number"),
    "minus infinity": (lambda line: line.replace(b'"stage":1', b'"stage":-Infinity'), "no floating-point number"),
    "an integer of 5,000 digits": (lambda line: line.replace(b'"stage":1', b'"stage":' + b"1" * 5000), "2\\*\\*53"),
    "a space": (lambda line: line.replace(b'"stage":1', b'"stage": 1'), "canonical form"),
    "a number with a zero in front": (lambda line: line.replace(b'"stage":1', b'"stage":01'), "expected a ledger line"),
    "an escape where none is needed": (lambda line: line.replace(b'"plan":"n', b'"plan":"\\u006e'), "canonical form"),
    "a byte that is no text": (lambda line: line.replace(b'"plan":"n', b'"plan":"\xff'), "expected a ledger line"),
    "no signature": (lambda line: line[: line.rindex(b',"signature"')] + b"}", "ends with its signature"),
    "a short signature": (lambda line: line[:-4] + b'"}', "ends with its signature"),
    "two signatures": (
        lambda line: line[:-1] + line[line.rindex(b',"signature"') :],
        "unknown key 'signature'|canonical form",
    ),
    "something behind it": (lambda line: line + b" ", "ends with its signature"),
    "a list": (lambda line: b"[1" + line[line.rindex(b',"signature"') :], "expected a ledger line"),
    "nothing": (lambda _: b"", "ends with its signature"),
}


@pytest.mark.parametrize("sentence", BYTES)
def test_other_bytes_are_refused(lines: list[bytes], sentence: str) -> None:
    change, text = BYTES[sentence]
    changed = change(lines[1])
    assert changed != lines[1]
    with pytest.raises(ProtocolError, match=text):
        parse_line(changed)
    with pytest.raises(LedgerError) as raised:
        verify_lines(lines[0] + b"\n" + changed + b"\n", SITE)
    assert raised.value.finding == "format"


def test_whole_numbers_end_where_every_reader_agrees() -> None:
    assert strict_json(b'{"n":%d}' % MAX_INTEGER) == {"n": 2**53 - 1}
    for number in (MAX_INTEGER + 1, -MAX_INTEGER - 1):
        with pytest.raises(ValueError, match=r"2\*\*53"):
            strict_json(b'{"n":%d}' % number)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.5, "1.5"), (100.0, "100"), (1e-12, "0.000000000001"), (0.1, "0.1"), (math.inf, "inf")],
)
def test_a_float_becomes_a_decimal_that_reads_back_as_the_same_float(value: float, text: str) -> None:
    assert decimal_text(value) == text
    assert float(decimal_text(value)) == value
    if text != "inf":
        Reserve.model_validate(reserve(1).model_dump() | {"rdp": {"3": text}})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"delta": "0"}, "0 < delta"),
        ({"delta": "0.01"}, "0 < delta"),
        ({"epsilon": "0"}, "0 < epsilon"),
        ({"epsilon": "51"}, "0 < epsilon"),
        ({"order": 1}, "order"),
        ({"max_records_per_unit": 2}, "expected 1 where the unit is the record"),
        ({"protected": False}, "not protected has no budget"),
    ],
)
def test_a_policy_that_protects_nothing_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        Policy.model_validate(POLICY.model_dump() | changes)


def changed(**changes: Any) -> Policy:
    return Policy.model_validate(POLICY.model_dump() | changes)


def test_a_budget_is_lowered_freely_and_raised_with_a_reason(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path / "news.jsonl", reserve(1))
    ledger.append(PolicyChange(policy=changed(epsilon="5"), reason=""))
    for new in (changed(epsilon="5.01"), changed(epsilon=None), changed(epsilon=None, protected=False)):
        assert weakened(ledger.book.policy, new)
        for reason in ("", "  "):
            with pytest.raises(LedgerError, match="a weaker policy carries a reason"):
                ledger.append(PolicyChange(policy=new, reason=reason))
    ledger.append(PolicyChange(policy=changed(epsilon="6"), reason="the ethics board agreed"))
    assert ledger.book.policy.epsilon == "6"
    assert [change.reason for change in ledger.book.changes] == ["", "the ethics board agreed"]


@pytest.mark.parametrize(
    "changes",
    [{"order": 4}, {"delta": "0.0001"}, {"unit": "user"}, {"adjacency": "zero-out"}],
)
def test_after_the_first_job_the_terms_of_the_filter_stay(tmp_path: Path, changes: dict[str, Any]) -> None:
    change = PolicyChange(policy=changed(**changes), reason="we like it better")
    new_ledger(tmp_path / "early.jsonl", change, reserve(1))
    with pytest.raises(LedgerError, match="stay what they were at the first job"):
        new_ledger(tmp_path / "late.jsonl", reserve(1), change)
