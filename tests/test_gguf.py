"""A GGUF file is the whole base model: its digest counts nothing beside it, and nothing beside it is loaded.

The files here are made, of the tiny Llama of the other tests; the pretrained one takes ten seconds to read.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from participant.base_model import base_digest
from participant.loading import load_causal, load_tokenizer
from privacy.errors import UserError
from tests.helpers_text import END, TEMPLATE, tiny_causal, tiny_tokenizer

needs = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")

#: What llama.cpp calls the weights of one layer.
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_gguf(path: Path, scratch: Path) -> Path:
    """:func:`tiny_causal` with its tokenizer into one file; q and k stay as they are, which makes another model."""
    import gguf

    model: Any = transformers.LlamaForCausalLM.from_pretrained(str(tiny_causal(scratch, vocab_size=259)))
    tokenizer = tiny_tokenizer()
    # A tokenizer without a single merge cannot be read again.
    words = [*sorted(tokenizer.get_vocab(), key=tokenizer.convert_tokens_to_ids), "ÿÿ"]
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["ÿ ÿ"])
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids(END))
    writer.add_chat_template(TEMPLATE)
    for name, value in model.state_dict().items():
        if name.startswith("model.layers."):
            number, _, layer = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
            writer.add_tensor(f"blk.{number}.{LAYER[layer]}.weight", value.numpy())
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gguf")
    return tiny_gguf(place / "file" / "tiny.gguf", place / "scratch")


def beside(file: Path, directory: Path) -> Path:
    """The same file in a directory with all that transformers looks for, of another model."""
    directory.mkdir()
    tiny_causal(directory, template="{{ 'other' }}", vocab_size=300)
    other = tiny_tokenizer("{{ 'other' }}")
    other.add_tokens(["France"])
    other.save_pretrained(directory)
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": "r"}))
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "default.jinja").write_text("other")
    return Path(shutil.copy(file, directory))


@needs
def test_a_gguf_file_is_loaded_with_its_own_tokenizer_whatever_is_beside_it(file: Path, tmp_path: Path) -> None:
    """transformers takes a tokenizer.json beside it before the tokenizer in it."""
    copy = beside(file, tmp_path / "crowded")
    assert base_digest(copy) == base_digest(file)
    for path in (file, copy):
        tokenizer = load_tokenizer(path)
        assert (tokenizer.eos_token, tokenizer.chat_template) == (END, TEMPLATE)
        assert tokenizer("France")["input_ids"] == tiny_tokenizer()("France")["input_ids"]
        assert tokenizer.name_or_path == str(path.parent)


@needs
def test_a_gguf_file_is_the_one_that_was_named_wherever_the_program_runs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would take weights of this name in the working directory before those in the model's."""
    copy = beside(file, tmp_path / "crowded")
    plain = load_causal(file)[0].state_dict()
    for name in (file.name, "model.gguf"):
        (tmp_path / name).write_bytes(b"no GGUF")
    monkeypatch.chdir(tmp_path)
    model, _, missing = load_causal(copy.relative_to(tmp_path))
    assert not missing
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())


@needs
def test_a_gguf_file_that_is_none_is_called_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").write_bytes(b"no GGUF")
    with pytest.raises(UserError, match=r"mine\.gguf: expected a base model for text generation, found: ") as caught:
        load_causal(tmp_path / "mine.gguf")
    assert "veilsum-base-" not in str(caught.value)


@needs
def test_what_is_shown_of_a_gguf_file_is_gone_afterwards(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    load_tokenizer(file)
    assert list(tmp_path.iterdir()) == []
    assert file.exists()
