"""Reading a site's records, and every mistake a site can make with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from participant.data import Examples, Format, load_examples
from privacy.errors import UserError

LABELS = ("cat", "dog", "7")
WANTED = Examples(("purrs, softly", 'says\n"woof"', "is seven"), (0, 1, 2))


def write_csv(path: Path) -> None:
    path.write_text('id,text,label\n1,"purrs, softly",cat\n2,"says\n""woof""",dog\n\n3,is seven,7\n')


def write_jsonl(path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": WANTED.texts[i], "label": LABELS[i], "id": i} for i in range(2)]
    rows.append({"text": "is seven", "label": 7})
    path.write_text("\n\n".join(map(json.dumps, rows)))


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"label": LABELS, "text": WANTED.texts}), path)


WRITERS = {"csv": write_csv, "jsonl": write_jsonl, "parquet": write_parquet}


@pytest.mark.parametrize("fmt", ["csv", "jsonl", "parquet"])
def test_every_format_gives_the_same_examples(fmt: Format, tmp_path: Path) -> None:
    WRITERS[fmt](tmp_path / "data")
    assert load_examples(tmp_path / "data", fmt, "text", "label", LABELS) == WANTED


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes("text,label\ngrüßt,cat\n".encode("utf-8-sig"))
    assert load_examples(tmp_path / "data", "csv", "text", "label", LABELS) == Examples(("grüßt",), (0,))


def test_numbers_in_parquet_are_labels_too(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"y": [7], "x": ["is seven"]}), tmp_path / "data")
    assert load_examples(tmp_path / "data", "parquet", "x", "y", LABELS) == Examples(("is seven",), (2,))


def test_a_folder_tree_is_read_in_sorted_order(tmp_path: Path) -> None:
    for name, text in {"dog/b": "second", "dog/a": "first", "cat/z": "two\nlines", ".git/x": "hidden"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "cat" / ".hidden").write_text("hidden")
    assert load_examples(tmp_path, "folder", "", "", LABELS) == Examples(("two\nlines", "first", "second"), (0, 1, 1))


def test_records_do_not_print() -> None:
    assert "purrs" not in repr(WANTED)


#: What is wrong -> (format, bytes of the file, expected error).
MISTAKES: dict[str, tuple[Format, bytes, str]] = {
    "a CSV without the text column": (
        "csv",
        b"body,label\nx,cat\n",
        "data: expected a column 'text', found the columns 'body', 'label'",
    ),
    "a CSV without the label column": (
        "csv",
        b"text,class\nx,cat\n",
        "data: expected a column 'label', found the columns 'text', 'class'",
    ),
    "a CSV of no bytes": ("csv", b"", "data: expected a column 'text', found the columns (none)"),
    "a CSV with a header only": ("csv", b"text,label\n", "data: expected at least one record, found none"),
    "a CSV row that is too short": ("csv", b"text,label\nx,cat\ny\n", "data, line 3: expected 2 columns, found 1"),
    "a CSV quote that never closes": ("csv", b'text,label\n"x,cat\n', "data, line 2: expected a CSV row, found: "),
    "a label the plan does not have": (
        "csv",
        b"text,label\nx,cat\ny,cow\n",
        "data, line 3: expected a label of the plan (cat, dog, 7), found 'cow'",
    ),
    "bytes that are not UTF-8": (
        "csv",
        b"text,label\nx,cat\n\xa3,dog\n",
        "data, line 3: expected UTF-8, found byte 0xa3",
    ),
    "an empty text": ("csv", b"text,label\n  ,cat\n", "data, line 2: expected a text, found an empty text"),
    "JSONL that is not JSON": (
        "jsonl",
        b'{"text": "x", "label": "cat"}\n{"text": \n',
        "data, line 2: expected a JSON object, found invalid JSON",
    ),
    "JSONL of lists": ("jsonl", b"[1]\n", "data, line 1: expected a JSON object, found list"),
    "JSONL without the text key": (
        "jsonl",
        b'{"body": "x", "label": "cat"}\n',
        "data, line 1: expected a column 'text', found the columns 'body', 'label'",
    ),
    "JSONL with a text that is a number": (
        "jsonl",
        b'{"text": 5, "label": "cat"}\n',
        "data, line 1: expected a text, found int",
    ),
    "JSONL with a label that is a truth value": (
        "jsonl",
        b'{"text": "x", "label": true}\n',
        "data, line 1: expected a label of the plan (cat, dog, 7), found True",
    ),
    "JSONL with a label that is a list": (
        "jsonl",
        b'{"text": "x", "label": ["cat"]}\n',
        "data, line 1: expected a label of the plan (cat, dog, 7), found ['cat']",
    ),
    "JSONL of blank lines": ("jsonl", b"\n \n", "data: expected at least one record, found none"),
    "Parquet that is a CSV": ("parquet", b"text,label\nx,cat\n", "data: expected a Parquet file, found: "),
    "a folder that is a file": ("folder", b"x", "data: expected a readable directory, found: Not a directory"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_named(what: str, tmp_path: Path) -> None:
    fmt, content, message = MISTAKES[what]
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_examples(tmp_path / "data", fmt, "text", "label", LABELS)
    assert message in str(caught.value)
    assert str(tmp_path / "data") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("fmt", ["csv", "jsonl", "parquet", "folder"])
def test_a_missing_file_is_named(fmt: Format, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone: expected a readable .*, found: No such file"):
        load_examples(tmp_path / "gone", fmt, "text", "label", LABELS)


def test_parquet_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data")
    with pytest.raises(UserError, match="expected a column 'body', found the columns 'label', 'text'"):
        load_examples(tmp_path / "data", "parquet", "body", "label", LABELS)


def test_parquet_names_the_row_of_a_bad_label(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y"], "label": ["cat", None]}), tmp_path / "data")
    with pytest.raises(UserError, match=r"row 2: expected a label of the plan .*, found None"):
        load_examples(tmp_path / "data", "parquet", "text", "label", LABELS)


def test_a_file_beside_the_label_directories_is_named(tmp_path: Path) -> None:
    (tmp_path / "readme").write_text("x")
    with pytest.raises(UserError, match="readme: expected only directories"):
        load_examples(tmp_path, "folder", "", "", LABELS)


def test_a_directory_that_is_no_label_is_named(tmp_path: Path) -> None:
    (tmp_path / "cow").mkdir()
    (tmp_path / "cow" / "1").write_text("moos")
    with pytest.raises(UserError, match=r"expected a label of the plan .*, found 'cow'"):
        load_examples(tmp_path, "folder", "", "", LABELS)


def test_a_long_label_is_cut_short(tmp_path: Path) -> None:
    """Somebody who names the wrong column must not find whole records in the log."""
    (tmp_path / "data").write_text("text,label\nx," + "secret " * 100 + "\n")
    with pytest.raises(UserError) as caught:
        load_examples(tmp_path / "data", "csv", "text", "label", LABELS)
    assert str(caught.value).count("secret") < 10


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected one of csv, jsonl, parquet, arrow, folder, found 'xml'"):
        load_examples(tmp_path, "xml", "text", "label", LABELS)  # type: ignore[arg-type]


# --- users -----------------------------------------------------------------------------------------------------------

OF_USERS = [("a", 7), ("b", "eve"), ("c", 7), ("d", 7), ("e", " 7 "), ("f", "eve"), ("g", "adam")]


def write_of_users(fmt: Format, path: Path) -> None:
    texts, users = ([text for text, _ in OF_USERS], [str(user) for _, user in OF_USERS])
    if fmt == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"who": users, "text": texts, "label": ["cat"] * 7}), path)
    elif fmt == "csv":
        path.write_text("who,text,label\n" + "".join(f"{u},{t},cat\n" for t, u in zip(texts, users, strict=True)))
    else:
        path.write_text("\n".join(json.dumps({"text": t, "who": u, "label": "cat"}) for t, u in OF_USERS))


@pytest.mark.parametrize("fmt", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(("most", "kept"), [(1, "abg"), (2, "abcfg"), (4, "abcdefg")])
def test_only_the_first_records_of_each_user_are_kept(fmt: Format, most: int, kept: str, tmp_path: Path) -> None:
    write_of_users(fmt, tmp_path / "data")
    found = load_examples(tmp_path / "data", fmt, "text", "label", LABELS, unit_column="who", max_records_per_unit=most)
    assert "".join(found.texts) == kept


def test_one_user_more_changes_no_other_users_records(tmp_path: Path) -> None:
    """What the accounting of users stands on: data sets that differ in one user's records differ in nothing else."""
    kept = []
    for left in (None, 7):
        rows = [{"text": t, "who": u, "label": "cat"} for t, u in OF_USERS if left is None or str(u).strip() != "7"]
        (tmp_path / "data").write_text("\n".join(map(json.dumps, rows)))
        found = load_examples(
            tmp_path / "data", "jsonl", "text", "label", LABELS, unit_column="who", max_records_per_unit=2
        )
        kept.append(set(found.texts))
    assert kept[0] - kept[1] == {"a", "c"}
    assert kept[1] <= kept[0]


def test_a_unit_column_alone_drops_nothing(tmp_path: Path) -> None:
    write_of_users("csv", tmp_path / "data")
    assert len(load_examples(tmp_path / "data", "csv", "text", "label", LABELS, unit_column="who")) == 7


@pytest.mark.parametrize("unit", ["", "  ", None, 1.5, True])
def test_a_record_of_nobody_is_named(unit: object, tmp_path: Path) -> None:
    (tmp_path / "data").write_text(json.dumps({"text": "x", "label": "cat", "who": unit}))
    with pytest.raises(UserError, match="data, line 1: expected whose record it is, found"):
        load_examples(tmp_path / "data", "jsonl", "text", "label", LABELS, unit_column="who", max_records_per_unit=1)


@pytest.mark.parametrize(("fmt", "column"), [("csv", None), ("folder", "who")])
def test_users_without_a_column_are_refused(fmt: Format, column: str | None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected to know whose record each is") as refused:
        load_examples(tmp_path, fmt, "text", "label", LABELS, unit_column=column, max_records_per_unit=1)
    assert refused.value.hint


def test_a_missing_user_column_is_named(tmp_path: Path) -> None:
    write_of_users("csv", tmp_path / "data")
    with pytest.raises(UserError, match="expected a column 'patient'"):
        load_examples(tmp_path / "data", "csv", "text", "label", LABELS, unit_column="patient", max_records_per_unit=1)


def test_reading_data_and_drafting_need_no_torch() -> None:
    code = "import sys, participant.data, participant.drafting, privacy.adapter; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
