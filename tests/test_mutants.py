"""What ``make mutants`` leaves out, how it names a mutant, and that its reasons are about code that is there."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from privacy.errors import UserError
from tests import operators
from tests.mutants import EQUIVALENT, ROOT, shortcomings


def function(body: str, arguments: str = "x, owner") -> ast.FunctionDef:
    (found,) = ast.parse(f"def x_f__mutmut_1({arguments}):\n    {body}").body
    assert isinstance(found, ast.FunctionDef)
    return found


def is_left_out(before: ast.FunctionDef, after: ast.FunctionDef) -> bool:
    return operators._lines(before, blank=True) == operators._lines(after, blank=True)


LEFT_OUT: dict[str, tuple[str, str]] = {
    "the text of an exception": ("raise ProtocolError(f'a {x}')", "raise ProtocolError(f'XXa {x}XX')"),
    "no text of an exception": ("raise ProtocolError('a', culprit=owner)", "raise ProtocolError(None, culprit=owner)"),
    "a name for a reason": ("check_signed(x, owner, 'M1')", "check_signed(x, owner, 'm1')"),
    "no name for a reason": ("check_length(x, 'root', 32)", "check_length(x, None, 32)"),
    "a text put together": ("return f'a {x}'", "return f'b {x}'"),
}


@pytest.mark.parametrize(("before", "after"), LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_a_text_that_only_people_read_is_left_out(before: str, after: str) -> None:
    assert is_left_out(function(before), function(after))


JUDGED: dict[str, tuple[str, str]] = {
    "a label": ("return digest('T1', x)", "return digest('XXT1XX', x)"),
    "a byte order": ("return x.to_bytes(4, 'big')", "return x.to_bytes(4, 'BIG')"),
    "a culprit": ("raise ProtocolError('a', culprit=owner)", "raise ProtocolError('a', culprit=None)"),
    "a length": ("check_length(x, 'root', 32)", "check_length(x, 'root', 33)"),
    "a length of nothing": ("check_length(x, 'root', 0)", "check_length(x, 'root', None)"),
    "what is checked": ("check_signed(x, owner, 'M1')", "check_signed(x, None, 'M1')"),
    "a number in a text": ("return f'a {x}'", "return f'a {x + 1}'"),
    "a comparison": ("return x < owner", "return x <= owner"),
}


@pytest.mark.parametrize(("before", "after"), JUDGED.values(), ids=JUDGED.keys())
def test_everything_else_is_judged(before: str, after: str) -> None:
    assert not is_left_out(function(before), function(after))


def test_a_default_is_judged() -> None:
    assert not is_left_out(function("return x", "x=0"), function("return x", "x=1"))
    assert (
        operators._difference(function("return x", "x=0"), function("return x", "x=1"))
        == "def f(x=0):  ->  def f(x=1):"
    )


def test_a_mutant_is_named_by_its_statement_and_by_how_often_it_stood_there_before() -> None:
    before = function("y = 1\n    z = 2\n    y = 1")
    assert operators._difference(before, function("y = 1\n    z = 3\n    y = 1")) == "z = 2  ->  z = 3"
    assert operators._difference(before, function("y = 1\n    z = 2\n    y = 4")) == "y = 1  ->  y = 4  (number 2)"


def test_a_long_statement_is_named_by_the_part_that_differs() -> None:
    before, after = (function(f"return [{'x, ' * 60}{i}, {'owner, ' * 60}x]") for i in (1, 2))
    around = ("x, " * 60)[-40:], (", " + "owner, " * 60)[:40]
    assert operators._difference(before, after) == f"…{around[0]}1{around[1]}…  ->  …{around[0]}2{around[1]}…"


def lines_of(file: str, name: str) -> list[str]:
    """The statements of a function or a method, as the table names them."""
    scope: Any = ast.parse((ROOT / file).read_text())
    for part in name.split("."):
        (scope,) = [n for n in scope.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
    return [line.strip() for line in operators._lines(scope, blank=False)]


def test_every_reason_is_about_a_statement_that_is_there() -> None:
    for file, name, change in operators.reasons(EQUIVALENT):
        before = change.partition("  ->  ")[0]
        part = before.removeprefix("…").removesuffix("…")
        found = [line for line in lines_of(file, name) if line == before or (part != before and part in line)]
        assert found, f"{file} {name}: {change}"


def test_a_reason_is_given_once_and_is_not_empty(tmp_path: Path) -> None:
    entry = '[[equivalent]]\nfile = "a"\nfunction = "b"\nchanges = ["c"]\nwhy = "{}"\n'
    (tmp_path / "one.toml").write_text(entry.format("d"))
    assert operators.reasons(tmp_path / "one.toml") == {("a", "b", "c"): "d"}
    (tmp_path / "two.toml").write_text(entry.format("d") * 2)
    (tmp_path / "empty.toml").write_text(entry.format(" "))
    for bad in ("two", "empty"):
        with pytest.raises(UserError, match="expected one reason for a b c"):
            operators.reasons(tmp_path / f"{bad}.toml")


def test_a_report_falls_short_by_a_check_by_the_share_killed_or_by_a_reason() -> None:
    good = {"checks": {"total": 2, "killed": 2}, "mutmut": {"total": 10, "killed": 9}, "survivors": [{"why": "same"}]}
    assert shortcomings(good) == []
    assert shortcomings(good | {"checks": {"total": 2, "killed": 1}}) == ["1 checks survive"]
    assert shortcomings(good | {"mutmut": {"total": 10, "killed": 8}}) == [
        "expected 90% of mutmut's mutants killed, found 80.0%"
    ]
    assert shortcomings(good | {"survivors": [{"why": ""}, {"line": 3}]}) == [
        "2 survivors without a reason in tests/equivalent.toml"
    ]
