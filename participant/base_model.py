"""Which files are the base model: their digest is in the plan, so that all sites train on the same one. No torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from participant.config import Home
from privacy.errors import UserError, shown
from privacy.plan import Plan

BASE_LABEL = b"veilsum/1/base-model\0"
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
#: A base model on a model hub: only the site's own file can name one, and only there is anything fetched.
HUB = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+?)(?:#(?P<file>[\w./-]+\.gguf))?")

_HINT = "name the directory of the base model in this site's configuration"


def base_digest(base: Path) -> str:
    """Hex SHA-256 over the files that determine the base model, in order of their names.

    Taken over a label, then for each file of the directory that matches :data:`BASE_FILES`: the length of its name
    (u64, big-endian), its name, the length of its content (u64, big-endian), its content. Other files, pickled weights
    and READMEs among them, and all below subdirectories but chat templates, do not count: they are never loaded. A GGUF
    file counts as a directory that has nothing but this file, under the name :data:`GGUF_NAME`.

    Raises:
        UserError: no such directory, no weights or no config.json in it, or a file cannot be read.
    """
    digest = hashlib.sha256(BASE_LABEL)
    for name, path in _base_files(base):
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                digest.update(len(name.encode()).to_bytes(8, "big") + name.encode() + size.to_bytes(8, "big"))
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"{path}: expected a readable file, found: {error.strerror}", hint=_HINT) from error
    return digest.hexdigest()


def _base_files(base: Path) -> list[tuple[str, Path]]:
    if base.is_file() and base.suffix == GGUF_SUFFIX:
        return [(GGUF_NAME, base)]
    found_files = {path for pattern in BASE_FILES for path in base.glob(pattern) if path.is_file()}
    names = sorted(path.relative_to(base).as_posix() for path in found_files)
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        found = ", ".join(names) or ("no directory" if not base.is_dir() else "neither")
        raise UserError(f"{base}: expected config.json and *.safetensors, found {found}", hint=_HINT)
    return [(name, base / name) for name in names]


def in_four_bits(base: Path) -> bool:
    """Whether a base model's linear layers are packed in 4 bits; only bitsandbytes' NF4 is taken.

    Raises:
        UserError: they are quantised in another way, or bitsandbytes is not installed.
    """
    settings = _quantization(base)
    if settings is None:
        return False
    method, storage = settings.get("quant_method"), settings.get("bnb_4bit_quant_storage", "uint8")
    kind = settings.get("bnb_4bit_quant_type", "fp4") if settings.get("load_in_4bit") else "8 bits"
    if (method, kind, storage) != ("bitsandbytes", "nf4", "uint8"):
        found = f"bitsandbytes {kind} in {storage}" if method == "bitsandbytes" else f"quant_method {method!r}"
        raise UserError(
            f"{base}: expected weights in full precision, or in 4 bits by bitsandbytes (nf4 in uint8), "
            f"found {shown(found)}",
            hint="take the model as it was before, or make a 4-bit one of it, see docs/how-to/gpu.md",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{base}: expected the package bitsandbytes, which unpacks its 4-bit weights, found none",
            hint="install veilsum with its extra: pip install 'veilsum[participant,quantized]'",
        )
    return True


def memory_of(base: Path) -> int:
    """Bytes that the weights of a directory take once they are loaded: what is packed as it lies, all else in float32.

    Raises:
        UserError: a file that is none of safetensors.
    """
    total = 0
    for path in sorted(base.glob("*.safetensors")):
        try:
            with safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(name)
                    total += math.prod(tensor.get_shape()) * (1 if tensor.get_dtype() == "U8" else 4)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: expected safetensors, found: {shown(str(error))}", hint=_HINT) from error
    return total


def _quantization(base: Path) -> dict[str, Any] | None:
    """What config.json says of it, None for nothing; a file that cannot be read is for transformers to complain of."""
    try:
        config = json.loads((base / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else None


def find_base(home: Home, name: str) -> Path:
    """Where the base model of this name lies at the site; fetched first where its file names a model hub.

    Raises:
        UserError: not the name of a model on a hub, or it cannot be fetched.
    """
    entry = home.settings.models[name]
    return fetch_base(entry) if entry.startswith("hub:") else home.path(entry)


def fetch_base(entry: str) -> Path:
    """A base model from the Hugging Face hub, out of the hub's own cache where it is there already.

    Only the files of :data:`BASE_FILES` are asked for, or the one GGUF file that is named. What comes is checked
    against the plan's digest like any other base model.

    Raises:
        UserError: not the name of a model, no connection, or no such model, revision or file.
    """
    found = HUB.fullmatch(entry)
    if found is None:
        raise UserError(
            f"models: expected hub:OWNER/NAME@REVISION, with #FILE.gguf for a GGUF file, found {shown(entry)!r}",
            hint="a revision is a commit of the model's repository; main is its newest",
        )
    import huggingface_hub  # imported here: few sites fetch anything
    from huggingface_hub.errors import HfHubHTTPError

    repo, revision = found["repo"], found["revision"]
    try:
        if found["file"]:
            return Path(huggingface_hub.hf_hub_download(repo, found["file"], revision=revision))
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(BASE_FILES)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{entry}: expected to fetch this base model, found: {shown(reason, 300)}",
            hint="check name, revision and connection, or name a directory with the model's files",
        ) from error


def check_base(plan: Plan, base: Path) -> None:
    """Raise UserError unless ``base`` holds the base model that the plan pins."""
    found = base_digest(base)
    if found != plan.base.digest:
        raise UserError(
            f"{base}: expected base model {plan.base.name} with digest {plan.base.digest}, found {found}",
            hint="install the very files the plan was drafted with; one changed byte changes the digest",
        )
