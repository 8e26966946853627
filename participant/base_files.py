"""Which files are the base model, that none of them leads to a file beyond them, and a place with just these. No torch.

transformers goes by what it finds in a directory and by names that configuration files give. The digest in the plan
says which model it is only if both end at the files that it counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from privacy.errors import UserError, shown

#: What determines the model: weights and their index, configuration, and every file a tokenizer may read.
BASE_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",
    # What only some tokenizers read; a directory without these keeps the digest that it had before they were listed.
    "additional_chat_templates/*.jinja",
    *("tokenizer.*.json", "tekken.json", "tokenizer.model.*", "*.tiktoken", "*.tokenizer", "*.spm", "*.codes"),
    *("dict.txt", "emoji.json", "entity_vocab.json", "target_vocab.json", "vocab-*.json", "byte_maps.json"),
    *("normalizer.json", "word_shape.json", "word_pronunciation.json"),
    # With this file transformers would load another base, and an adapter into it.
    "adapter_config.json",
)
#: One file with weights, configuration and tokenizer; it counts under the name GGUF_NAME, whatever it is called.
GGUF_SUFFIX, GGUF_NAME = ".gguf", "model.gguf"
#: Weights that transformers takes where config.json names none, in this order; an index says which files hold them.
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS_SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
#: In config.json: a file of weights or an index to take in place of those; and code to compute attention with, where
#: the name has a slash, which is fetched.
EXPLICIT_WEIGHTS, ATTENTION = "transformers_weights", frozenset({"attn_implementation", "_attn_implementation"})
#: Keys of a tokenizer's configuration under which some tokenizer takes text for the name of a file: by their end, ...
FILE_KEYS = ("_file", "_files", "_path", "_spm")
#: ... or wherever they stand, what is below them included.
FILE_SECTIONS = frozenset({"vocab", "merges", "init_inputs"})
#: What older versions wrote into tokenizer_config.json, often where the file lay back then, and nothing goes by.
UNREAD = frozenset(
    {"name_or_path", "tokenizer_file", "special_tokens_map_file", "added_tokens_file", "chat_template_file"}
)

HINT = "name the directory of the base model in this site's configuration"


def counted_files(base: Path) -> dict[str, Path]:
    """The files that determine a base model, by the names that they count under, in the order of these.

    Raises:
        UserError: no such directory, no weights or no config.json in it, or one of its files names a file beyond them.
    """
    if base.is_file() and base.suffix == GGUF_SUFFIX:
        return {GGUF_NAME: base}
    found_files = {path for pattern in BASE_FILES for path in base.glob(pattern) if path.is_file()}
    names = sorted(path.relative_to(base).as_posix() for path in found_files)
    if "config.json" not in names or not any(name.endswith(WEIGHTS_SUFFIX) for name in names):
        found = ", ".join(names) or ("no directory" if not base.is_dir() else "neither")
        raise UserError(f"{base}: expected config.json and *.safetensors, found {found}", hint=HINT)
    for where, name in (*_weights_beyond(base, names), *_files_beyond(base, names)):
        raise UserError(
            f"{base / where}: expected no file but those that the base model's digest counts, found {shown(name)!r}",
            hint="put what it names beside config.json and give its name alone, or take another base model",
        )
    return {name: base / name for name in names}


@contextmanager
def only_counted(base: Path) -> Iterator[Path]:
    """A directory with links to the files of :func:`counted_files`, and nothing else; it goes when the block ends.

    transformers looks for dozens of files by name, and takes a tokenizer.json beside a GGUF file before the tokenizer
    in it. What it finds here is in the digest.

    Raises:
        UserError: as :func:`counted_files`. OSError: there is no place for temporary files.
    """
    files = counted_files(base)
    with TemporaryDirectory(prefix="veilsum-base-") as directory:
        for name, path in files.items():
            link = Path(directory, name)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(path.absolute())
        yield Path(directory)


def weight_files(base: Path) -> list[Path]:
    """Of a directory's files of weights those that are loaded; all of them where it has none that would be."""
    names = [path.name for path in sorted(base.glob("*" + WEIGHTS_SUFFIX))]
    read = _weights_read(base, (*names, *(path.name for path in base.glob("*" + INDEX_SUFFIX))))
    shards = {shard for name in read if name.endswith(INDEX_SUFFIX) for shard in _shards(base / name)}
    return [base / name for name in names if name in read | shards] or [base / name for name in names]


def _weights_read(base: Path, names: Collection[str]) -> set[str]:
    """Weights or index that transformers begins with; more than one where parts of config.json name their own."""
    explicit = {text for keys, text in _texts(base / "config.json") if EXPLICIT_WEIGHTS in keys}
    return explicit or {WEIGHTS} & set(names) or {INDEX} & set(names)


def _weights_beyond(base: Path, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """(file, name of weights in it that do not count).

    An index that nobody reads may name what is not there: some lie beside a model that was put into one file.
    """
    read = _weights_read(base, names)
    for keys, text in _texts(base / "config.json"):
        fetched = "/" in text and not ATTENTION.isdisjoint(keys)
        if fetched or (EXPLICIT_WEIGHTS in keys and text not in names):
            yield "config.json", text
    for index in (name for name in names if name.endswith(INDEX_SUFFIX)):
        for shard in _shards(base / index):
            counts = shard in names and shard.endswith(WEIGHTS_SUFFIX)
            if not counts and (index in read or os.path.exists(base / shard)):
                yield index, shard


def _files_beyond(base: Path, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """(file, name in it of a file that a tokenizer may open, though it does not count).

    Old directories name files that lie nowhere any more, so it has to be there: seen from the directory, or from where
    this program runs. What special_tokens_map.json says comes last, even over the files that were found by their names.
    """
    for keys, text in _texts(base / "special_tokens_map.json"):  # nothing but tokens has a place in it
        if _names_file(keys):
            yield "special_tokens_map.json", text
    counted = {os.path.realpath(base / name) for name in names}
    for keys, text in _texts(base / "tokenizer_config.json"):
        there = [os.path.realpath(path) for path in (text, base / text) if _names_file(keys) and os.path.isfile(path)]
        if keys[-1] not in UNREAD and not counted.issuperset(there):
            yield "tokenizer_config.json", text


def _names_file(keys: tuple[str, ...]) -> bool:
    return keys[-1].endswith(FILE_KEYS) or not FILE_SECTIONS.isdisjoint(keys)


def _shards(index: Path) -> list[str]:
    """Names of files that an index gives; one that cannot be read is for transformers to complain of."""
    return sorted({text for keys, text in _texts(index) if keys[0] == "weight_map"})


def _texts(path: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys that lead to it, text) of every text in a file of JSON; nothing of one that cannot be read."""
    try:
        waiting: list[tuple[tuple[str, ...], Any]] = [((), json.loads(path.read_bytes()))]
    except (OSError, ValueError, RecursionError):
        return
    while waiting:
        keys, value = waiting.pop()
        if isinstance(value, str) and keys:
            yield keys, value
        elif isinstance(value, dict):
            waiting += [((*keys, key), part) for key, part in value.items()]
        elif isinstance(value, list):
            waiting += [(keys, part) for part in value]
