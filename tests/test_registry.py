"""Registered records: the same data under another name is found, and nobody without the secret can tell what it is."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from participant.config import DataSet, Home, Settings
from participant.registry import Growth, Registry, normalised
from privacy.errors import Refusal, UserError

DATA = DataSet(path="news.jsonl", format="jsonl")
TEXTS = [f"record number {i}" for i in range(100)]
SITE, TIME = "5a" * 32, "2026-11-25T12:00:00Z"


def home(directory: Path) -> Home:
    return Home(directory, Settings(coordinator="localhost:1", member="north"))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(home(tmp_path))


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "registry").iterdir()}


RACE = """
import sys
from pathlib import Path
from participant.registry import Registry
from privacy.errors import Refusal
from tests.test_registry import TEXTS, home
registry = Registry(home(Path(sys.argv[1])))
print("ready", flush=True)
sys.stdin.readline()
try:
    registry.take(sys.argv[2], TEXTS)
    print("taken")
except Refusal:
    print("refused")
"""


def test_of_two_names_that_take_the_same_records_at_once_one_gets_them(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path), name],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("news", "fresh", "other")
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    assert sorted(racer.communicate()[0] for racer in racers) == ["refused\n", "refused\n", "taken\n"]


def test_the_same_records_under_another_name_are_refused_with_count_and_names(registry: Registry) -> None:
    registry.take("news", TEXTS)
    registry.take("mail", ["something else"])
    with pytest.raises(Refusal) as raised:
        registry.take("fresh", [*TEXTS[:30], "something else", "and new"])
    assert str(raised.value) == (
        "data set 'fresh': of its 32 records these are registered already: 1 under 'mail', 30 under 'news'; use that "
        "name in plans, so that its budget is charged, or take the records out of this data set"
    )
    assert registry.names() == ["mail", "news"]


@pytest.mark.parametrize("changed", ["  Record\tnumber 7 ", "RECORD NUMBER 7", "record\u00a0number 7", "re\u200bcord"])
def test_records_that_look_alike_are_one(registry: Registry, changed: str) -> None:
    registry.take("news", TEXTS)
    if "\u200b" in changed:  # only what NFKC, case and white space make equal is equal: stated, and no more
        assert registry.take("fresh", [changed]) == Growth(1, 1)
        return
    assert normalised(changed) == "record number 7"
    with pytest.raises(Refusal, match="of its 1 records these are registered already: 1 under 'news'"):
        registry.take("fresh", [changed])


def test_a_data_set_grows_and_never_shrinks(registry: Registry) -> None:
    assert registry.take("news", TEXTS[:60]) == Growth(60, 60)
    assert registry.take("news", TEXTS[40:]) == Growth(100, 40)
    assert registry.take("news", TEXTS[:1]) == Growth(100, 0)
    assert registry.records("news") == 100
    with pytest.raises(Refusal, match="1 under 'news'"):
        registry.take("fresh", [TEXTS[0]])


def test_what_grows_into_anothers_records_is_refused_and_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    registry.take("news", TEXTS[:50])
    registry.take("mail", TEXTS[50:])
    before = files(tmp_path)
    with pytest.raises(Refusal, match="50 under 'mail'"):
        registry.take("news", TEXTS)
    assert files(tmp_path) == before


def test_repeated_records_count_once(registry: Registry) -> None:
    assert registry.take("news", [*TEXTS, *TEXTS]) == Growth(100, 100)


def test_files_are_private_sorted_and_tell_nothing_without_the_secret(registry: Registry, tmp_path: Path) -> None:
    registry.take("news", TEXTS)
    registry.register("news", DATA, SITE, TIME)
    found = files(tmp_path)
    assert set(found) == {"lock", "secret", "news.json", "news.records"}
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "registry").iterdir()} == {0o600}
    hashes = [found["news.records"][i : i + 16] for i in range(0, len(found["news.records"]), 16)]
    assert hashes == sorted(set(hashes))
    assert len(hashes) == len(TEXTS)
    guesses = {hashlib.sha256(t.encode()).digest()[:16] for t in TEXTS}
    assert not guesses & set(hashes)
    assert b"record number" not in b"".join(found.values())


def test_two_sites_know_the_same_data_by_different_names(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        registry = Registry(home(tmp_path / name))
        registry.take("news", TEXTS)
        found.append((registry.register("news", DATA, SITE, TIME), files(tmp_path / name)["news.records"]))
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_an_identity_stays_while_the_data_set_grows(registry: Registry, tmp_path: Path) -> None:
    registry.take("news", TEXTS[:10])
    identity = registry.register("news", DATA, SITE, TIME)
    registry.take("news", TEXTS)
    assert registry.register("news", DATA, SITE, "2027-01-01T00:00:00Z") == identity
    assert Registry(home(tmp_path)).identity("news") == identity
    assert registry.identity("mail") is None


def test_without_its_secret_a_registry_is_not_begun_anew(registry: Registry, tmp_path: Path) -> None:
    registry.take("news", TEXTS)
    secret = tmp_path / "registry" / "secret"
    secret.chmod(0o644)
    with pytest.raises(UserError, match="expected mode 0600, found 0644"):
        registry.take("news", TEXTS)
    secret.chmod(0o600)
    secret.write_bytes(b"short")
    with pytest.raises(UserError, match="expected 32 bytes, found 5"):
        registry.take("news", TEXTS)
    secret.unlink()
    with pytest.raises(UserError, match="expected the site's registry secret, found none"):
        registry.take("mail", TEXTS)
    assert not secret.exists()


@pytest.mark.parametrize(("name", "content"), [("news.json", b"{"), ("news.records", b"x" * 17)])
def test_a_damaged_file_is_named(registry: Registry, tmp_path: Path, name: str, content: bytes) -> None:
    registry.take("news", TEXTS)
    registry.register("news", DATA, SITE, TIME)
    (tmp_path / "registry" / name).write_bytes(content)
    use = registry.identity if name.endswith("json") else registry.records
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        use("news")
