"""Which files are the base model: their digest is in the plan, so that all sites train on the same one. No torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from privacy.errors import UserError
from privacy.plan import Plan

BASE_LABEL = b"veilsum/1/base-model\0"
#: What determines the model: weights and their index, configuration, and every file a tokenizer may read.
BASE_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",
)


def base_digest(directory: Path) -> str:
    """Hex SHA-256 over the files that determine the base model, in order of their names.

    Taken over a label, then for each file of ``directory`` that matches :data:`BASE_FILES`: the length of its name
    (u64, big-endian), its name, the length of its content (u64, big-endian), its content. Files below
    subdirectories, pickled weights and READMEs do not count: they are never loaded.

    Raises:
        UserError: no such directory, no weights or no config.json in it, or a file cannot be read.
    """
    hint = "name the directory of the base model in this site's configuration"
    names = sorted({path.name for pattern in BASE_FILES for path in directory.glob(pattern) if path.is_file()})
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        found = ", ".join(names) or ("no directory" if not directory.is_dir() else "neither")
        raise UserError(f"{directory}: expected config.json and *.safetensors, found {found}", hint=hint)
    digest = hashlib.sha256(BASE_LABEL)
    for name in names:
        try:
            with (directory / name).open("rb") as file:
                size = (directory / name).stat().st_size
                digest.update(len(name.encode()).to_bytes(8, "big") + name.encode() + size.to_bytes(8, "big"))
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise UserError(
                f"{directory / name}: expected a readable file, found: {error.strerror}", hint=hint
            ) from error
    return digest.hexdigest()


def check_base(plan: Plan, base: Path) -> None:
    """Raise UserError unless ``base`` holds the base model that the plan pins."""
    found = base_digest(base)
    if found != plan.base.digest:
        raise UserError(
            f"{base}: expected base model {plan.base.name} with digest {plan.base.digest}, found {found}",
            hint="install the very files the plan was drafted with; one changed byte changes the digest",
        )
