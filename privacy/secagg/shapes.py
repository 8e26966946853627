"""What a well-formed field looks like: lengths, order, text; checked when a message is made."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise

from privacy.errors import ProtocolError

HASH_BYTES = 32
MAX_MEMBERS = 1000
MAX_TEXT = 500


def check_length(value: bytes, name: str, *allowed: int) -> None:
    """Raise ProtocolError unless ``value`` has one of the allowed lengths."""
    if len(value) not in allowed:
        raise ProtocolError(f"{name}: expected {' or '.join(map(str, allowed))} bytes, found {len(value)}")


def check_ascending(numbers: tuple[int, ...], name: str, most: int = MAX_MEMBERS) -> None:
    """Raise ProtocolError unless the numbers rise strictly and are not too many."""
    if len(numbers) > most or any(a >= b for a, b in pairwise(numbers)):
        raise ProtocolError(f"{name}: expected at most {most} members, each once, in ascending order")


def check_text(value: str, name: str) -> None:
    """Raise ProtocolError for a text that is too long."""
    if len(value) > MAX_TEXT:
        raise ProtocolError(f"{name}: expected at most {MAX_TEXT} characters, found {len(value)}")


def check_hashes(message: object, *except_for: str) -> None:
    """Every ``bytes`` field not named is a hash of 32 bytes."""
    for f in fields(message):  # type: ignore[arg-type]
        value = getattr(message, f.name)
        if isinstance(value, bytes) and f.name not in except_for:
            check_length(value, f.name, HASH_BYTES)
