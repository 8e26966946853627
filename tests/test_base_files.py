"""What the digest of a base model counts is what is loaded: nothing beside those files, and nothing that they name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from participant.base_model import base_digest, memory_of
from participant.loading import load_causal, load_classifier, load_tokenizer
from privacy.errors import UserError
from tests.helpers_learning import tiny_base
from tests.helpers_text import TEMPLATE, tiny_causal, tiny_tokenizer

SHARD = "model-00001-of-00001.safetensors"


def say(path: Path, **changes: Any) -> None:
    """Change a file of JSON, or write one."""
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | changes))


def sharded(base: Path, shard: str, name: str = "model.safetensors.index.json", scale: float = 1.0) -> Path:
    """Move the weights of a base model to ``shard`` (from there, times ``scale``) and write the index that names it."""
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    (base / shard).parent.mkdir(exist_ok=True)
    save_file({key: value * scale for key, value in weights.items()}, base / shard, metadata={"format": "pt"})
    say(base / name, metadata={}, weight_map=dict.fromkeys(weights, shard))
    return base


def other_weights(base: Path) -> None:
    """A file of weights that nobody looks for; without one a directory is no base model."""
    save_file({"x": torch.zeros(1)}, base / "extra.safetensors", metadata={"format": "pt"})


def total(base: Path) -> float:
    return float(sum(weight.detach().abs().sum() for weight in load_causal(base)[0].parameters()))


# --- what a directory may say of its weights -------------------------------------------------------------------------


def test_an_index_of_shards_beside_it_is_loaded(tmp_path: Path) -> None:
    plain, base = tiny_causal(tmp_path / "plain"), sharded(tiny_causal(tmp_path / "base"), SHARD)
    before = base_digest(base)
    assert total(base) == total(plain)
    say(base / "model.safetensors.index.json", metadata={"total_size": 1})
    assert base_digest(base) != before


@pytest.mark.parametrize("way", ["below", "beside", "absolute", "a link below", "a pickle", "by another index"])
def test_an_index_that_names_weights_beyond_the_digest_is_refused(way: str, tmp_path: Path) -> None:
    base = tiny_causal(tmp_path / "base")
    shard = {
        "below": f"shards/{SHARD}",
        "beside": f"../{SHARD}",
        "absolute": str(tmp_path / SHARD),
        "a pickle": "weights.bin",
    }.get(way, f"shards/{SHARD}")
    index = "other.safetensors.index.json" if way == "by another index" else "model.safetensors.index.json"
    sharded(base, shard, index)
    other_weights(base)
    if way == "by another index":
        say(base / "config.json", transformers_weights=index)
    if way == "a link below":
        (base / "shards").rename(tmp_path / "elsewhere")
        (base / "shards").symlink_to(tmp_path / "elsewhere")
    for what in (base_digest, load_causal, load_tokenizer):
        with pytest.raises(UserError, match="expected no file but those that the base model's digest counts") as caught:
            what(base)
        assert index in str(caught.value)
        assert shard in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.hint


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    base = sharded(tiny_causal(tmp_path / "base"), SHARD)
    (base / SHARD).rename(base / "other.safetensors")
    with pytest.raises(UserError, match=f"found '{SHARD}'"):
        base_digest(base)


def test_an_index_that_nobody_reads_may_name_what_is_gone(tmp_path: Path) -> None:
    """Beside a model that was put into one file; but not what is there, since other versions might read it."""
    base = tiny_causal(tmp_path / "base")
    index = base / "model.safetensors.index.json"
    say(index, metadata={}, weight_map={"lm_head.weight": SHARD})
    base_digest(base)
    assert total(base) == total(tiny_causal(tmp_path / "plain"))
    (tmp_path / "more.safetensors").write_text("x")
    say(index, weight_map={"lm_head.weight": "../more.safetensors"})
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: expected no file but"):
        base_digest(base)


def test_a_file_that_is_no_index_is_for_transformers_to_complain_of(tmp_path: Path) -> None:
    for number, content in enumerate(("{", "[]", '{"weight_map": 3}', '"x"', "[" * 200_000)):
        base = tiny_causal(tmp_path / str(number))
        (base / "model.safetensors").rename(base / SHARD)
        (base / "model.safetensors.index.json").write_text(content)
        base_digest(base)
        with pytest.raises(UserError, match="expected a base model for text generation, found: "):
            load_causal(base)


@pytest.mark.parametrize("name", ["sub/model.safetensors", "../model.safetensors", "gone.safetensors", "model.bin"])
@pytest.mark.parametrize("part", [False, True])
def test_a_config_that_names_weights_beyond_the_digest_is_refused(name: str, part: bool, tmp_path: Path) -> None:
    base = tiny_causal(tmp_path / "base")
    said: Any = {"transformers_weights": name}
    say(base / "config.json", **({"text_config": said} if part else said))
    for what in (base_digest, load_causal):
        with pytest.raises(UserError, match=r"config\.json: expected no file but those") as caught:
            what(base)
        assert name in str(caught.value)


def test_a_config_may_name_weights_that_count(tmp_path: Path) -> None:
    base = tiny_causal(tmp_path / "base")
    doubled = {name: 2 * value for name, value in load_file(base / "model.safetensors").items()}
    save_file(doubled, base / "twice.safetensors", metadata={"format": "pt"})
    plain = total(base)
    say(base / "config.json", transformers_weights="twice.safetensors")
    base_digest(base)
    assert total(base) == 2 * plain


def test_memory_counts_the_weights_that_are_loaded(tmp_path: Path) -> None:
    base = tiny_causal(tmp_path / "base")
    once = memory_of(base)
    save_file(load_file(base / "model.safetensors"), base / "consolidated.safetensors")
    assert memory_of(base) == once
    (base / "model.safetensors").rename(base / SHARD)
    say(base / "model.safetensors.index.json", weight_map={"x": SHARD})
    assert memory_of(base) == once
    (base / SHARD).unlink()
    assert memory_of(base) == once, "none that would be loaded: all that there are"


# --- code ------------------------------------------------------------------------------------------------------------


def test_attention_from_a_hub_is_refused(tmp_path: Path) -> None:
    base = tiny_causal(tmp_path / "base")
    say(base / "config.json", attn_implementation="somebody/attention")
    with pytest.raises(UserError, match=r"config\.json: expected no file but those.*found 'somebody/attention'"):
        base_digest(base)
    say(base / "config.json", attn_implementation="eager")
    base_digest(base)
    load_causal(base)


def test_code_of_a_model_is_not_run_and_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, ran = tiny_causal(tmp_path / "base"), tmp_path / "ran"
    (base / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    say(base / "config.json", model_type="unheard-of", auto_map={"AutoConfig": "code.Config"})

    def asked(*_: Any) -> str:
        raise AssertionError("asked whether to run code")

    monkeypatch.setattr("builtins.input", asked)
    for load in (load_causal, lambda path: load_classifier(path, 2)):
        with pytest.raises(UserError, match="expected a base model for "):
            load(base)
    assert not ran.exists()


# --- what is beside the files that count -----------------------------------------------------------------------------


def test_files_that_do_not_count_are_not_seen(tmp_path: Path) -> None:
    plain, base = load_causal(tiny_causal(tmp_path / "plain"))[0], tiny_causal(tmp_path / "base")
    digest = base_digest(base)
    say(base / "generation_config.json", max_new_tokens=7)
    (base / "pytorch_model.bin").write_text("x")
    (base / "merges_file").write_text("x")
    (base / "onnx").mkdir()
    (base / "onnx" / "model.safetensors").write_text("x")
    assert base_digest(base) == digest
    model, tokenizer, missing = load_causal(base)
    assert not missing
    assert model.generation_config.max_new_tokens == plain.generation_config.max_new_tokens
    assert model.name_or_path == model.config.name_or_path == tokenizer.name_or_path == str(base)


def test_what_is_shown_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = tmp_path / "shown"
    shown.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(shown))
    base = tiny_causal(tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("x")
    assert load_tokenizer(base).chat_template == {"default": TEMPLATE, "rag": "x"}
    load_classifier(tiny_base(tmp_path / "classifier"), 2)
    (base / "config.json").write_text("{")
    with pytest.raises(UserError) as caught:
        load_causal(base)
    assert str(shown) not in str(caught.value)
    assert list(shown.iterdir()) == []
    assert (base / "tokenizer.json").exists()


def test_no_place_for_temporary_files_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"expected a base model for text generation, found: .*gone"):
        load_causal(tiny_causal(tmp_path / "base"))


# --- what a directory may say of its tokenizer -----------------------------------------------------------------------


def other_tokenizer(path: Path) -> str:
    """A tokenizer file that takes whole words; its name."""
    backend = tiny_tokenizer().backend_tokenizer
    backend.normalizer = None
    backend.add_tokens(["France"])
    backend.save(str(path))
    return str(path)


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "merges_file", "vocab", "merges", "name_or_path"])
def test_special_tokens_that_name_a_file_are_refused(key: str, tmp_path: Path) -> None:
    """They come last, so they would be taken even where the directory has its own tokenizer.json."""
    base = tiny_causal(tmp_path / "base")
    say(base / "special_tokens_map.json", eos_token="<|im_end|>")
    base_digest(base)
    say(base / "special_tokens_map.json", **{key: other_tokenizer(tmp_path / "other.json")})
    for what in (base_digest, load_tokenizer):
        with pytest.raises(UserError, match=r"special_tokens_map\.json: expected no file but those"):
            what(base)


@pytest.mark.parametrize(
    "said",
    [
        {"vocab": "OTHER"},
        {"merges_file": "OTHER"},
        {"spm_file": "OTHER"},
        {"gguf_file": "beside.gguf"},
        {"init_inputs": ["OTHER"]},
        {"fast_tokenizer_files": ["tokenizer.json", "../tokenizer.4.json"]},
        {"mecab_kwargs": {"dictionary_path": "OTHER"}},
    ],
)
def test_a_tokenizers_configuration_that_names_a_file_beyond_the_digest_is_refused(
    said: dict[str, Any], tmp_path: Path
) -> None:
    base = tiny_causal(tmp_path / "base")
    other_tokenizer(tmp_path / "tokenizer.4.json")
    (base / "beside.gguf").write_text("x")
    text = json.dumps(said).replace("OTHER", str(tmp_path / "tokenizer.4.json"))
    say(base / "tokenizer_config.json", **json.loads(text))
    for what in (base_digest, load_tokenizer):
        with pytest.raises(UserError, match=r"tokenizer_config\.json: expected no file but those") as caught:
            what(base)
        assert "\n" not in str(caught.value)


def test_what_old_versions_wrote_into_a_tokenizers_configuration_is_nothing_to_refuse(tmp_path: Path) -> None:
    """Some name the files they were made of, which may lie there still, and files that lie nowhere."""
    base = tiny_causal(tmp_path / "base")
    other = other_tokenizer(tmp_path / "tokenizer.4.json")
    spared = ("tokenizer_file", "special_tokens_map_file", "name_or_path")
    gone: dict[str, Any] = {"vocab_file": "/content/vocab.txt", "merges_file": None, "init_inputs": []}
    say(base / "tokenizer_config.json", **dict.fromkeys(spared, other), **gone, fast_tokenizer_files=["tokenizer.json"])
    base_digest(base)
    assert load_tokenizer(base)("France")["input_ids"] == tiny_tokenizer()("France")["input_ids"]


def test_a_name_is_looked_for_where_the_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_causal(tmp_path / "base")
    say(base / "tokenizer_config.json", vocab_file="tokenizer.json")
    monkeypatch.chdir(base)
    base_digest(Path(os.curdir))
    base_digest(base)
    other_tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"found 'tokenizer\.json'"):
        base_digest(base)
