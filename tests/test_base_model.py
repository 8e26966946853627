"""Where a base model is, and its digest: a directory, a GGUF file, or a model of a hub that the site's file names."""

from __future__ import annotations

import hashlib
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers

from participant.base_files import BASE_FILES
from participant.base_model import base_digest, fetch_base, find_base
from participant.config import Home, Settings
from privacy.errors import UserError


def home(directory: Path, entry: str) -> Home:
    settings = {"coordinator": "localhost:1", "member": "a", "models": {"one": entry}}
    return Home(directory, Settings.model_validate(settings))


def test_the_digest_of_a_gguf_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(3_000_000))
    content = b"GGUF" + bytes(3_000_000)
    counted = b"model.gguf"
    expected = hashlib.sha256(
        b"veilsum/1/base-model\0"
        + len(counted).to_bytes(8, "big")
        + counted
        + len(content).to_bytes(8, "big")
        + content
    )
    assert base_digest(tmp_path / "a.gguf") == base_digest(tmp_path / "b.gguf") == expected.hexdigest()
    (tmp_path / "b.gguf").write_bytes(content + b"\0")
    assert base_digest(tmp_path / "b.gguf") != expected.hexdigest()


def test_the_chat_template_is_part_of_the_model(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("x")
    before = base_digest(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x")
    assert (first := base_digest(tmp_path)) != before
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    assert base_digest(tmp_path) == first
    (more / "default.jinja").write_text("x")  # which transformers prefers to the one above
    assert (second := base_digest(tmp_path)) != first
    (more / "default.jinja").write_text("y")
    assert base_digest(tmp_path) not in (first, second)


def test_every_file_that_a_tokenizer_of_transformers_names_counts() -> None:
    """Else two sites with one digest could tokenise one text otherwise."""
    named: set[str] = set()
    for path in (Path(transformers.__file__).parent / "models").rglob("tokenization_*.py"):
        for block in re.findall(r"VOCAB_FILES_NAMES\s*=\s*\{([^}]*)\}", path.read_text(encoding="utf-8"), re.DOTALL):
            named |= set(re.findall(r':\s*"([^"]+)"', block))
    assert {"vocab.txt", "bpe.codes", "source.spm"} <= named
    assert [name for name in sorted(named) if not any(fnmatchcase(name, pattern) for pattern in BASE_FILES)] == []


def test_another_file_is_no_base_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("x")
    with pytest.raises(UserError, match=r"model\.bin: expected config\.json and \*\.safetensors, found no directory"):
        base_digest(tmp_path / "model.bin")


def test_a_base_model_lies_where_the_sites_file_says(tmp_path: Path) -> None:
    assert find_base(home(tmp_path, "models/one"), "one") == tmp_path / "models" / "one"
    assert find_base(home(tmp_path, str(tmp_path / "x.gguf")), "one") == tmp_path / "x.gguf"


def test_a_model_of_a_hub_is_fetched_by_revision_and_only_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def snapshot(repo: str, **about: Any) -> str:
        asked.append((repo, about))
        return str(tmp_path)

    def single(repo: str, name: str, **about: Any) -> str:
        asked.append((repo, name, about))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", single)
    assert find_base(home(Path("unused"), "hub:org/Model-1.5@0123abc"), "one") == tmp_path
    assert fetch_base("hub:org/model@main#q4/m.gguf") == tmp_path / "q4" / "m.gguf"
    assert asked == [
        ("org/Model-1.5", {"revision": "0123abc", "allow_patterns": list(BASE_FILES)}),
        ("org/model", "q4/m.gguf", {"revision": "main"}),
    ]


@pytest.mark.parametrize("entry", ["hub:model@main", "hub:org/model", "hub:org/model@main#m.bin", "hub:a/b/c@main"])
def test_what_names_no_model_of_a_hub_asks_nobody(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    with pytest.raises(UserError, match="expected hub:OWNER/NAME@REVISION"):
        fetch_base(entry)


def test_a_hub_that_does_not_answer_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gone)
    with pytest.raises(UserError, match="hub:a/b@main: expected to fetch this base model, found: no connection") as e:
        fetch_base("hub:a/b@main")
    assert "\n" not in str(e.value)
    assert "name a directory" in e.value.hint
