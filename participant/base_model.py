"""The digest of the base model is in the plan, so that all sites train on the same one; where it lies. No torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from participant.base_files import BASE_FILES, HINT, counted_files, weight_files
from participant.config import Home
from privacy.errors import UserError, shown
from privacy.plan import Plan

BASE_LABEL = b"veilsum/1/base-model\0"
#: A base model on a model hub: only the site's own file can name one, and only there is anything fetched.
HUB = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+?)(?:#(?P<file>[\w./-]+\.gguf))?")


def base_digest(base: Path) -> str:
    """Hex SHA-256 over the files that determine the base model, in order of their names.

    Taken over a label, then for each file of the directory that matches one of BASE_FILES: the length of its name (u64,
    big-endian), its name, the length of its content (u64, big-endian), its content. Other files, pickled weights and
    READMEs among them, and all below subdirectories but chat templates, do not count. They are not loaded either: a
    directory whose files name one of them is refused, and transformers is shown no others. A GGUF file counts as a
    directory that has nothing but this file, under the name GGUF_NAME.

    Raises:
        UserError: no such directory, no weights or no config.json in it, one of its files names a file that does not
            count, or a file cannot be read.
    """
    digest = hashlib.sha256(BASE_LABEL)
    for name, path in counted_files(base).items():
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                digest.update(len(name.encode()).to_bytes(8, "big") + name.encode() + size.to_bytes(8, "big"))
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"{path}: expected a readable file, found: {error.strerror}", hint=HINT) from error
    return digest.hexdigest()


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

    Files of weights that are not loaded, as those of a second format beside the first, take nothing.

    Raises:
        UserError: a file that is none of safetensors.
    """
    total = 0
    for path in weight_files(base):
        try:
            with safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(name)
                    total += math.prod(tensor.get_shape()) * (1 if tensor.get_dtype() == "U8" else 4)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: expected safetensors, found: {shown(str(error))}", hint=HINT) from error
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

    Only the files of BASE_FILES are asked for, or the one GGUF file that is named. What comes is checked
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
