"""A plan for regression, its range, and a site's records with a number each: what is taken and what is refused."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from participant.config import DataSet
from participant.data import Format
from participant.measured import Measured, load_measured
from participant.task_data import load_for
from privacy.errors import UserError
from privacy.plan import Plan, parse_plan
from privacy.target import scaled, unscaled
from tests.regression import ANALYTIC, analytic_text, plan_text


def classification_text() -> str:
    text = plan_text().replace('"regression"', '"classification"').replace("target = [0, 5.5]", 'labels = ["a", "b"]')
    return text.replace('loss = "squared"\n', "").replace("[1, 12]", "[2, 12]").replace("= [1]", "= [2]")


def the_plan(text: str | None = None) -> Plan:
    return parse_plan((text or plan_text()).encode()).plan


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_for_regression_has_one_output_whatever_its_labels() -> None:
    plan = the_plan()
    assert (plan.outputs, plan.data.labels, plan.data.target) == (1, (), (0.0, 5.5))
    assert the_plan(classification_text()).outputs == 2
    assert the_plan(analytic_text()).aggregation.min_texts == 3


#: Sentence -> (which plan, what of it, what instead, what the error says).
BAD = {
    "without a range": (plan_text, "target = [0, 5.5]", "", "data.target: expected one"),
    "a range of classes": (classification_text, "labels", "target = [0, 1]\nlabels", "data.target: expected none"),
    "a range upside down": (plan_text, "[0, 5.5]", "[5.5, 0]", "expected [low, high] with low < high"),
    "a range of one number": (plan_text, "[0, 5.5]", "[2, 2]", "expected [low, high] with low < high"),
    "a range too small to be halved": (plan_text, "[0, 5.5]", "[0, 5e-324]", "expected [low, high] with low < high"),
    "a range without an end": (plan_text, "[0, 5.5]", "[0, inf]", "data.target"),
    "a range too wide for a float": (plan_text, "[0, 5.5]", "[-1.7e308, 1.7e308]", "expected [low, high]"),
    "a range that is no number": (plan_text, "[0, 5.5]", "[0, nan]", "data.target"),
    "a range of three": (plan_text, "[0, 5.5]", "[0, 1, 2]", "data.target"),
    "with labels": (plan_text, "target =", 'labels = ["a", "b"]\ntarget =', "data.labels: expected none"),
    "without a head": (
        plan_text,
        '[adapter.head]\n"classifier.bias" = [1]\n"classifier.weight" = [1, 12]\n',
        "",
        "a regression task needs a head",
    ),
    "another loss": (plan_text, 'loss = "squared"', 'loss = "cross_entropy"', 'expected "squared" for task'),
    "the default loss": (plan_text, 'loss = "squared"\n', "", 'expected "squared" for task'),
    "its loss for classes": (classification_text, "epochs", 'loss = "squared"\nepochs', "and only for it"),
    "a counted head": (
        plan_text,
        'weights = "examples"',
        'head = "counted"\n[aggregation.counted]\nmin_class_count = 3',
        "aggregation.counted: expected none",
    ),
    "an analytic head without a minimum": (
        analytic_text,
        "min_texts = 3",
        "",
        "aggregation.analytic.min_texts: expected one",
    ),
    "an analytic head with a minimum of classes": (
        analytic_text,
        "min_texts",
        "min_class_count = 3\nmin_texts",
        "aggregation.analytic.min_class_count: expected none",
    ),
    "an analytic head of two outputs": (analytic_text, "[1, 12]", "[2, 12]", "expected one linear layer of 1 outputs"),
    "classes with a minimum of texts": (
        lambda: classification_text().replace("[round]", ANALYTIC).replace('train = "all"', 'train = "head"'),
        "min_texts = 3",
        "min_class_count = 3\nmin_texts = 3",
        "aggregation.analytic.min_texts: expected none",
    ),
    "classes without a minimum": (
        lambda: classification_text().replace("[round]", ANALYTIC).replace('train = "all"', 'train = "head"'),
        "min_texts = 3",
        "",
        "aggregation.analytic.min_class_count: expected one",
    ),
    "an evaluation without a tolerance": (
        plan_text,
        "[round]",
        "[evaluation]\nholdout = 0.2\n[round]",
        "evaluation.tolerance: expected one",
    ),
    "an evaluation of classes with a tolerance": (
        classification_text,
        "[round]",
        "[evaluation]\nholdout = 0.2\ntolerance = 1.0\n[round]",
        "evaluation.tolerance: expected none",
    ),
    "a tolerance of nothing": (
        plan_text,
        "[round]",
        "[evaluation]\nholdout = 0.2\ntolerance = 0.0\n[round]",
        "evaluation.tolerance",
    ),
}


@pytest.mark.parametrize(("text", "old", "new", "fragment"), BAD.values(), ids=BAD.keys())
def test_a_bad_plan_is_refused(text: Any, old: str, new: str, fragment: str) -> None:
    assert old in text()
    with pytest.raises(UserError, match=r"^plan\.toml: ") as refused:
        parse_plan(text().replace(old, new, 1).encode(), "plan.toml")
    assert fragment in str(refused.value)


# --- the range -------------------------------------------------------------------------------------------------------


def test_the_ends_of_the_range_are_minus_one_and_one() -> None:
    assert [scaled(value, (10.0, 50.0)) for value in (10.0, 30.0, 50.0)] == [-1.0, 0.0, 1.0]
    assert [unscaled(value, (10.0, 50.0)) for value in (-1.0, 0.0, 1.0, 2.0)] == [10.0, 30.0, 50.0, 70.0]
    assert scaled(1e308, (0.0, 1.0)) == 1.0


@given(
    st.floats(-1e300, 1e300),
    st.floats(1e-300, 1e300),
    st.floats(0, 1),
)
def test_what_is_scaled_stays_within_one_and_leads_back(low: float, width: float, share: float) -> None:
    high = low + width
    if not (high - low) / 2 > 0:
        return
    value = min(high, low + share * (high - low))
    number = scaled(value, (low, high))
    assert -1 <= number <= 1
    assert math.isclose(unscaled(number, (low, high)), value, rel_tol=1e-12, abs_tol=1e-12 * (high - low))


# --- records ---------------------------------------------------------------------------------------------------------

WANTED = Measured(("one", "two", "three"), (0.0, 2.5, 5.0))
ROWS = [{"text": "one", "target": 0}, {"text": "two", "target": 2.5}, {"text": "three", "target": 5}]


def as_jsonl(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS))
    return path


def read(path: Path, fmt: Format = "jsonl") -> Measured:
    return load_measured(path, fmt, "text", "target", (0.0, 5.0))


def test_every_format_gives_the_same_numbers(tmp_path: Path) -> None:
    assert read(as_jsonl(tmp_path / "data")) == WANTED
    (tmp_path / "csv").write_text("text,target\none,0\ntwo, 2.5 \nthree,5e0\n")
    assert read(tmp_path / "csv", "csv") == WANTED
    numbers = [Decimal("0"), Decimal("2.5"), Decimal("5")]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["one", "two", "three"], "target": numbers}), tmp_path / "parquet"
    )
    assert read(tmp_path / "parquet", "parquet") == WANTED
    for row in ROWS:
        place = tmp_path / "tree" / str(row["target"])
        place.mkdir(parents=True)
        (place / "1.txt").write_text(str(row["text"]))
    assert read(tmp_path / "tree", "folder") == WANTED


#: Sentence -> (the value in JSON, what the error says was found).
WRONG = {
    "a text": ('"3.5"', "a text"),
    "an empty text": ('" "', "none"),
    "null": ("null", "none"),
    "not a number": ("NaN", "nan"),
    "infinity": ("-Infinity", "-inf"),
    "true": ("true", "bool"),
    "a list": ("[1]", "list"),
    "beyond the range": ("5.001", "5.001"),
    "below the range": ("-1", "-1.0"),
    "beyond all floats": ("1" + "0" * 400, "a number out of range"),
}


@pytest.mark.parametrize(("value", "found"), WRONG.values(), ids=WRONG.keys())
def test_what_is_no_number_of_the_range_is_refused_with_its_line(value: str, found: str, tmp_path: Path) -> None:
    as_jsonl(tmp_path / "data")
    with (tmp_path / "data").open("a") as file:
        file.write(f'{{"text": "secret", "target": {value}}}\n')
    with pytest.raises(UserError, match=r"line 4: expected a number from 0\.0 to 5\.0 ") as refused:
        read(tmp_path / "data")
    assert str(refused.value).endswith(f"found {found}")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("value", ["abc", "1_0", "nan", "", "0x1"])
def test_a_text_that_is_no_number_is_refused_in_a_file_of_texts(value: str, tmp_path: Path) -> None:
    (tmp_path / "csv").write_text(f"text,target\none,{value}\n")
    with pytest.raises(UserError, match=r"line 2: expected a number from 0\.0 to 5\.0 "):
        read(tmp_path / "csv", "csv")


def test_a_record_without_the_column_is_refused(tmp_path: Path) -> None:
    as_jsonl(tmp_path / "data", [*ROWS, {"text": "four", "label": "a"}])
    with pytest.raises(UserError, match="line 4: expected a column 'target'"):
        read(tmp_path / "data")


def test_no_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(UserError, match="expected at least one record"):
        read(tmp_path / "data")


def test_the_sites_own_file_names_the_column(tmp_path: Path) -> None:
    as_jsonl(tmp_path / "data", [{"body": "one", "stars": 5, "who": "x"}, {"body": "two", "stars": 1, "who": "x"}])
    data = DataSet(path="data", format="jsonl", text="body", target="stars", unit="who")
    assert load_for(the_plan(), tmp_path / "data", data) == Measured(("one", "two"), (5.0, 1.0))


def test_a_plan_that_protects_users_keeps_so_many_records_of_each(tmp_path: Path) -> None:
    as_jsonl(tmp_path / "data", [{"text": f"{i}", "target": i, "who": "x"} for i in range(4)])
    text = plan_text().replace("epochs = 1\n", "").replace("batch_size = 4\n", "")
    private = """[privacy]
unit = "user"
max_records_per_unit = 2
sigma = "1.0"
delta = "1e-5"
clip = "1.0"
rate = "0.25"
steps = 4
nominal_batch = 6
nominal_size = 24
[round]"""
    plan = the_plan(text.replace("[round]", private))
    data = DataSet(path="data", format="jsonl", unit="who")
    assert load_for(plan, tmp_path / "data", data, to_train=True) == Measured(("0", "1"), (0.0, 1.0))
    assert len(load_for(plan, tmp_path / "data", data)) == 4


def test_some_records_keep_their_numbers_and_neither_is_shown() -> None:
    assert WANTED.some([2, 0]) == Measured(("three", "one"), (5.0, 0.0))
    assert repr(WANTED) == "Measured()"
