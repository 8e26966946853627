"""A site's records for text generation: every kind and format, and every mistake a site can make with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from participant.config import DataSet
from participant.data import load_examples
from participant.rows import Columns, Format, read_rows
from participant.text_data import Message, Record, load_records
from privacy.errors import UserError

TALK = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Why?"}]
ANSWER = {"role": "assistant", "content": "Because."}
ROWS: list[dict[str, Any]] = [
    {"messages": [*TALK, ANSWER]},
    {"prompt": "2 + 2 = ", "response": "4"},
    {"text": "Once upon a time"},
]
WANTED = [
    ("conversation", (Message("system", "Be brief"), Message("user", "Why?"), Message("assistant", "Because."))),
    ("pair", (Message("user", "2 + 2 = "), Message("assistant", "4"))),
    ("text", (Message("", "Once upon a time"),)),
]


def full(row: dict[str, Any]) -> dict[str, Any]:
    """As tables have it: every column in every row, null where there is nothing."""
    return {column: row.get(column) for column in ("messages", "prompt", "response", "text", "id")}


def write_arrow(directory: Path, rows: list[dict[str, Any]], files: int = 1) -> Path:
    """The layout that ``Dataset.save_to_disk`` of datasets 5.2 leaves, as far as it is read."""
    directory.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    names = [f"data-{number:05}-of-{files:05}.arrow" for number in range(files)]
    share = -(-len(rows) // files)
    for number, name in enumerate(names):
        part = table.slice(number * share, share)
        with pyarrow.OSFile(str(directory / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as out:
            out.write_table(part, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (directory / "state.json").write_text(json.dumps(state))
    (directory / "dataset_info.json").write_text("{}")
    return directory


def write(path: Path, fmt: str, rows: list[dict[str, Any]]) -> None:
    if fmt == "arrow":
        write_arrow(path, rows)
    elif fmt == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def data(fmt: str, **columns: str) -> DataSet:
    return DataSet.model_validate({"path": "data", "format": fmt, **columns})


@pytest.mark.parametrize("fmt", ["jsonl", "parquet", "arrow"])
def test_every_format_gives_the_same_records(fmt: str, tmp_path: Path) -> None:
    write(tmp_path / "data", fmt, [full(row) for row in ROWS])
    found = load_records(tmp_path / "data", data(fmt))
    assert [(record.kind, record.messages) for record in found.records] == WANTED
    assert len(found) == 3
    assert found.kinds() == {"conversation": 1, "pair": 1, "text": 1}


def test_a_file_of_lines_need_not_have_every_column(tmp_path: Path) -> None:
    write(tmp_path / "data", "jsonl", ROWS)
    found = load_records(tmp_path / "data", data("jsonl"))
    assert [(record.kind, record.messages) for record in found.records] == WANTED
    assert [record.where for record in found.records] == [f"{tmp_path / 'data'}, line {i}" for i in (1, 2, 3)]


def test_columns_are_named_by_the_site(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("frage,antwort,text\nWarum?,Darum.,beides\n")
    found = load_records(tmp_path / "data", data("csv", prompt="frage", response="antwort"))
    assert found.records[0].messages == (Message("user", "Warum?"), Message("assistant", "Darum."))
    assert load_records(tmp_path / "data", data("csv", text="frage")).texts == ("Warum?",)


def test_a_conversation_is_one_whatever_else_the_record_has(tmp_path: Path) -> None:
    write(tmp_path / "data", "jsonl", [ROWS[0] | ROWS[1] | ROWS[2], ROWS[1] | ROWS[2], {"prompt": "x"} | ROWS[2]])
    assert [r.kind for r in load_records(tmp_path / "data", data("jsonl")).records] == ["conversation", "pair", "text"]


def test_a_tree_of_files_has_a_text_in_each(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a").write_text("Dear Anna")
    found = load_records(tmp_path, data("folder", text="body"))
    assert found.records == (Record(str(tmp_path / "letters" / "a"), "text", (Message("", "Dear Anna"),)),)


def test_records_are_recognised_by_all_that_was_said(tmp_path: Path) -> None:
    write(tmp_path / "data", "jsonl", ROWS)
    assert load_records(tmp_path / "data", data("jsonl")).texts == (
        "Be brief\nWhy?\nBecause.",
        "2 + 2 = \n4",
        "Once upon a time",
    )


def test_records_do_not_print(tmp_path: Path) -> None:
    write(tmp_path / "data", "jsonl", ROWS)
    found = repr(load_records(tmp_path / "data", data("jsonl")))
    assert not any(said in found for said in ("Because", "2 + 2", "Once"))


#: What is wrong -> (a row, the error behind the place).
MISTAKES: dict[str, tuple[Any, str]] = {
    "nothing to learn from": (
        {"id": 1, "prompt": "only"},
        "expected a column 'messages', or 'prompt' and 'response', or 'text', found 'prompt'",
    ),
    "none of the columns": ({"id": 1}, "or 'text', found none of them"),
    "messages as a text": ({"messages": "hello"}, "expected a list of messages, found str"),
    "no messages": ({"messages": []}, "expected a list of messages, found an empty list"),
    "a message that is no object": (
        {"messages": ["hello"]},
        "message 1: expected an object with role and content, found str",
    ),
    "an unknown role": (
        {"messages": [{"role": "gpt\n", "content": "x"}]},
        "message 1: expected a role of system, user, assistant, found 'gpt\\\\n'",
    ),
    "no role": ({"messages": [*TALK, {"content": "x"}]}, "message 3: expected a role of .*, found NoneType"),
    "no content": (
        {"messages": [*TALK, {"role": "assistant", "content": None}]},
        "message 3: expected a text as 'content', found NoneType",
    ),
    "an empty answer": (
        {"messages": [*TALK, {"role": "assistant", "content": " "}]},
        "message 3: expected a text as 'content', found an empty text",
    ),
    "a conversation without an answer": ({"messages": TALK}, "expected a message of the assistant to learn from"),
    "an empty response": ({"prompt": "x", "response": ""}, "expected a text as 'response', found an empty text"),
    "half a character": ({"text": "\ud83d"}, "expected a text as 'text', found half a character"),
    "a number as text": ({"text": 3}, "expected a text as 'text', found int"),
}


@pytest.mark.parametrize(("row", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_bad_record_is_named_by_its_place_and_never_shown(row: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / "data", "jsonl", [ROWS[0], row])
    with pytest.raises(UserError, match=message) as caught:
        load_records(tmp_path / "data", data("jsonl"))
    assert str(caught.value).startswith(f"{tmp_path / 'data'}, line 2")
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert not any(said in str(caught.value) for said in ("hello", "Be brief", "only", "Why"))


def test_no_records_are_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("\n")
    with pytest.raises(UserError, match="expected at least one record, found none"):
        load_records(tmp_path / "data", data("jsonl"))


# --- the directory that datasets saves -------------------------------------------------------------------------------


def read(path: Path, fmt: Format = "arrow", *columns: str) -> Iterator[dict[str, object]]:
    return (dict(row.values) for row in read_rows(path, fmt, Columns(columns or ("text",))))


def test_files_are_read_in_the_order_that_the_state_gives(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(7)]
    write_arrow(tmp_path / "saved", rows, files=3)
    assert list(read(tmp_path / "saved", "arrow", "label", "text")) == rows
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_data_files"].reverse()
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    assert [row["text"] for row in read(tmp_path / "saved")] == ["t6", "t3", "t4", "t5", "t0", "t1", "t2"]
    assert len(load_examples(tmp_path / "saved", "arrow", "text", "label", ("a", "b"))) == 7


def test_one_split_of_a_dictionary_must_be_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_arrow(tmp_path / "saved" / split, [{"text": split}])
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match="expected one split of a data set, found several: 'test', 'train'"):
        list(read(tmp_path / "saved"))
    assert list(read(tmp_path / "saved" / "train")) == [{"text": "train"}]


def test_what_is_wrong_with_a_saved_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone/state\.json: expected a readable directory, found: No such file"):
        list(read(tmp_path / "gone"))
    saved = write_arrow(tmp_path / "saved", [{"text": "x"}])
    state = saved / "state.json"
    good = json.loads(state.read_text())
    for bad, message in (
        ("no json", "state.json: expected the names of the data files"),
        ("[]", "state.json: expected the names of the data files"),
        (json.dumps(good | {"_data_files": [{}]}), "state.json: expected the names of the data files"),
        (json.dumps(good | {"_data_files": [{"filename": "../x.arrow"}]}), "expected files of this directory"),
        (json.dumps(good | {"_indices_data_files": [{"filename": "x"}]}), "expected a data set without an index"),
        (json.dumps(good | {"_data_files": [{"filename": "gone.arrow"}]}), "gone.arrow: expected a readable directory"),
    ):
        state.write_text(bad)
        with pytest.raises(UserError, match=message):
            list(read(saved))
    state.write_text(json.dumps(good))
    with pytest.raises(UserError, match="expected a column 'body', found the columns 'text'"):
        list(read(saved, "arrow", "body"))
    (saved / "data-00000-of-00001.arrow").write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"\.arrow: expected an Arrow stream, found: "):
        list(read(saved))
