"""The runner of the bounded model (model/run.py): it reads spin's verdict rightly and tries every switch of the model.

`make model` runs all cases. Here, where spin is installed, one of the true model and one that must fail.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from model import ring, run
from model.run import CASES, REACHED, Verdict, broken, correct, is_as_expected, parse_verdict, tell

CLEAN = """
Full statespace search for:
	assertion violations	+

State-vector 76 byte, depth reached 455, errors: 0
      324 states, stored
     2767 states, matched
"""

VIOLATED = """
pan:1: assertion violated P2 (at depth 119)
pan: wrote round.pml.trail

(Spin Version 6.5.2 -- 6 December 2019)
Warning: Search not completed

State-vector 68 byte, depth reached 119, errors: 1
     1270 states, stored
"""

TRUE = correct("true", 4, 1)
FALSE = broken("false", "P2", 4, 1)


def test_an_exhaustive_search_without_error_is_read() -> None:
    assert parse_verdict(CLEAN) == Verdict(errors=0, states=324, depth=455, complete=True, violated="")


def test_a_violated_property_is_read_by_name() -> None:
    assert parse_verdict(VIOLATED) == Verdict(errors=1, states=1270, depth=119, complete=False, violated="P2")


def test_many_states_are_read_in_spins_short_form() -> None:
    assert parse_verdict(CLEAN.replace("      324 ", "1.2643537e+08 ")).states == 126435370


@pytest.mark.parametrize("output", ["", "pan: out of memory", CLEAN.replace("errors:", "errors"), "Segmentation fault"])
def test_without_a_verdict_there_is_none(output: str) -> None:
    with pytest.raises(ValueError, match="expected the verdict"):
        parse_verdict(output)


@pytest.mark.parametrize(
    "sign", ["error: max search depth too small", "pan: reached -DMEMLIM bound", "Warning: Search not completed"]
)
def test_a_search_that_was_cut_short_proves_nothing(sign: str) -> None:
    verdict = parse_verdict(f"{sign}\n{CLEAN}")
    assert verdict.errors == 0
    assert not is_as_expected(TRUE, verdict)


def test_a_correct_model_must_not_fail_and_a_broken_one_must() -> None:
    clean, violated = parse_verdict(CLEAN), parse_verdict(VIOLATED)
    assert is_as_expected(TRUE, clean)
    assert not is_as_expected(TRUE, violated)
    assert is_as_expected(FALSE, violated)
    assert not is_as_expected(FALSE, clean)


def test_a_broken_model_must_fail_by_the_property_named() -> None:
    """Also an invalid end state counts as an error; it would be a mistake of the model."""
    violated = parse_verdict(VIOLATED)
    assert not is_as_expected(FALSE, replace(violated, violated="P1"))
    assert not is_as_expected(FALSE, replace(violated, violated=""))


def test_every_switch_of_the_model_is_tried_and_makes_something_fail() -> None:
    settings = (run.HERE / "settings.pml").read_text()
    switches = set(re.findall(r"#ifndef (\w+)", settings.split("/* --- rules taken out")[1]))
    assert len(switches) == 8
    failing = {name for case in CASES if case.expected for name in case.options}
    assert switches <= failing


def test_each_property_is_asserted_and_seen_to_fail() -> None:
    assert {p for case in CASES if not case.expected for p in case.properties} == set(run.PROPERTIES)
    assert {p for case in CASES if case.expected for p in case.properties} == {*run.PROPERTIES, REACHED}


def test_only_what_is_named_is_asserted() -> None:
    assert "-DCHECK=2" in FALSE.defines()
    assert "-DCHECK=31" in TRUE.defines()


def test_a_counterexample_is_told_with_sets_instead_of_masks() -> None:
    trail = "a round\n  M2 key list #11: taken by #3\nMSC: ~G 12\n\tP2 = 0\n    spin: trail ends\n"
    assert tell(trail, correct("", 4, 1)) == ["a round", "  M2 key list {0, 1, C}: taken by {0, 1}"]
    assert tell("  opened: the sum over #60\n", correct("", 6, 2)) == ["  opened: the sum over {2, 3, C, C2}"]


def test_without_spin_the_user_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "spin" else f"/usr/bin/{tool}")
    assert run.main() == 2
    assert capsys.readouterr().out == (
        "expected spin and gcc, found no spin; on Debian and Ubuntu: apt install spin gcc\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")), reason="needs spin and gcc (apt install spin gcc)"
)
@pytest.mark.parametrize("case", [correct("true", 3, 1, *run.SMALL), broken("t - 1", "P2", 3, 1, T_LOWERED=1)])
def test_spin_finds_what_is_expected(case: run.Case, tmp_path: Path) -> None:
    output, story = run.search(case, tmp_path / "case")
    assert is_as_expected(case, parse_verdict(output))
    assert bool(story) == bool(case.expected)


RULES = [
    (ring.as_designed, (False, False)),
    (ring.against_two_lists_only, (False, True)),
    (ring.one_too_few, (True, True)),
]


@pytest.mark.parametrize(("rule", "broken"), RULES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_threshold_of_the_ring_holds_and_lower_ones_do_not(rule: ring.Threshold, broken: tuple[bool, bool]) -> None:
    verdict = ring.enumerate_ring(9, 4, 4, rule)
    assert verdict.graphs == 2368
    assert (verdict.r1_broken > 0, verdict.r2_broken > 0) == broken


def test_a_ring_falls_apart_where_it_should() -> None:
    found = ring.Ring(8, 2)
    assert [found.neighbours(i) for i in (0, 7)] == [0b10000010, 0b01000001]
    assert sorted(found.parts(0b01101110)) == [0b00001110, 0b01100000]
    assert list(ring.Ring(8, 4).parts(0b01101110)) == [0b01101110]
