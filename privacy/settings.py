"""One way to read a TOML file into a validated, immutable model; an unknown key is an error that names it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from privacy.errors import UserError, shown

#: The time of Python's TOML parser grows with the square of the parts of a dotted key: one of 32,000 parts, in a file
#: of 64 KiB, takes it a quarter of a minute. A key cannot span lines.
MAX_DOTS = 1000

HexDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Positive = Annotated[int, Field(ge=1)]
#: A port, or host:port; empty for none.
Listen = Annotated[str, Field(pattern=r"^((.+:)?[0-9]{1,5})?$")]


class Section(BaseModel):
    """One table of a TOML file: immutable, no unknown keys, no silent conversions, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def explain(error: ValidationError) -> str:
    """The first thing wrong, as one line that names the key and what was found."""
    first = error.errors(include_url=False)[0]
    key = shown(".".join(str(part) for part in first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'"
    if first["type"] == "missing":
        return f"missing key '{key}'"
    where = f"key '{key}': " if key else ""
    found = "" if isinstance(first["input"], dict) else f", found {shown(repr(first['input']))}"
    return f"{where}{shown(first['msg'].removeprefix('Value error, '), 300)}{found}"


def parse_toml(model: type[S], raw: bytes, source: str) -> S:
    """Validate the bytes of a TOML file against ``model``; ``source`` names the file in errors.

    Raises:
        UserError: not UTF-8, not TOML, an unknown or missing key, or a value out of range.
    """
    try:
        if max(line.count(b".") for line in raw.split(b"\n")) > MAX_DOTS:
            raise ValueError(f"a line with more than {MAX_DOTS} dots")
        table = tomllib.loads(raw.decode("utf-8"))
        text = json.dumps(table)
    except (ValueError, TypeError, RecursionError) as error:  # also for an integer of more than 4,300 digits
        raise UserError(f"{source}: expected a TOML file, found: {shown(str(error), 300)}") from error
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error)}", hint=f"correct the file {source}") from error


def load_toml(model: type[S], path: Path) -> S:
    """Read and validate the TOML file at ``path``; raises as :func:`parse_toml`, and for an unreadable file."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: expected a readable file, found: {error.strerror}", hint="check the path") from error
    return parse_toml(model, raw, str(path))
