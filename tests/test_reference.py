"""The reference pages are written from the code: every table is fresh, and every model of a file has one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
from pydantic import BaseModel

import coordinator.config
from participant import config
from privacy.plan import Plan
from privacy.roster import Roster
from scripts import keys, reference


def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
    """A model and all that are in its fields, however deep."""

    def within(form: object) -> Iterator[type[BaseModel]]:
        if isinstance(form, type) and issubclass(form, BaseModel):
            yield from sections(form)
        for inner in get_args(form):
            yield from within(inner)

    return {model}.union(*(within(field.annotation) for field in model.model_fields.values()))


def marks(page: str) -> list[str]:
    """Names of the tables on a page."""
    return reference.MARK.findall((reference.DOCS / page).read_text("utf-8"))


@pytest.mark.parametrize("name", reference.PAGES)
def test_the_tables_of_a_page_are_fresh(name: str) -> None:
    page = (reference.DOCS / name).read_text("utf-8")
    assert marks(name)
    assert page == reference.filled(page, reference.PAGES[name]), "write it: python -m scripts.reference"


def test_every_model_of_a_file_has_one_table() -> None:
    read: tuple[type[BaseModel], ...] = (config.Settings, coordinator.config.Settings, Plan, Roster)
    assert set(keys.MODELS.values()) == {found for model in read for found in sections(model)}
    assert sorted(marks("configuration.md") + marks("plan.md")) == sorted(keys.MODELS)


def test_every_key_says_what_it_is_and_every_link_belongs_to_one() -> None:
    for model in keys.MODELS.values():
        schema, said = model.model_json_schema(), keys.comments(model)
        assert set(said) <= set(model.model_fields)
        for key, found in schema["properties"].items():
            assert said.get(key) or keys.about(found, schema), key
    for name, key in keys.MORE:
        assert key in keys.MODELS[name].model_fields


def test_what_a_key_may_hold_is_what_its_model_takes() -> None:
    rows = {row.split(" | ")[0]: row.split(" | ")[1:3] for row in keys.table("site").splitlines()}
    assert rows["| `device`"] == ['`"auto"`, `"cpu"`, `"cuda"`', '`"auto"`']
    assert rows["| `max_upload_rate`"] == ["integer from 20,000", "none"]
    assert rows["| `member`"] == ["name", "required"]
    assert rows["| `datasets`"] == ["tables by name", "none"]
    assert "| `modules` | table: name = [integer from 1, integer from 1] | required |" in keys.table("adapter")
    assert "| `learning_rate` | number above 0 to 1 | required |" in keys.table("training")
    assert "| `epsilon` | decimal number in quotes | required |" in keys.table("budget")
    assert "| `digest` | 64 hex digits | required |" in keys.table("base")
