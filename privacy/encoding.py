"""The canonical encoding: what is signed, hashed and kept on disk.

One value has exactly one encoding, and only that encoding decodes. Protobuf promises neither, so its bytes are never
signed. The encoding is that of the declared types, field by field, in order:

* ``int``      8 bytes, big-endian, 0 <= value < 2**64
* ``bytes``    4-byte big-endian length, then the bytes
* ``str``      as the bytes of its UTF-8
* ``tuple``    4-byte big-endian count, then the items
* dataclass    its fields, nothing else
* ``A | B``    1 byte, the position of the type in the union, then the value

Hashes and derived keys take a label, so that no value can be mistaken for one of another kind.
"""

from __future__ import annotations

import dataclasses
import hashlib
import types
import typing
from functools import cache
from typing import Any, TypeVar

from privacy.errors import ProtocolError

T = TypeVar("T")

DOMAIN = b"veilsum/1/"


def pack_bytes(value: bytes) -> bytes:
    """``value`` behind its 4-byte length."""
    return len(value).to_bytes(4, "big") + value


def label(name: str, *parts: bytes) -> bytes:
    """Domain label ``name`` followed by length-prefixed ``parts``: injective, for hashes, KDF and HPKE info."""
    return DOMAIN + name.encode() + b"\0" + b"".join(map(pack_bytes, parts))


def digest(name: str, *parts: bytes) -> bytes:
    """SHA-256 of the labelled parts, 32 bytes."""
    return hashlib.sha256(label(name, *parts)).digest()


def number(value: int) -> bytes:
    """An integer as 8 big-endian bytes."""
    if not 0 <= value < 1 << 64:
        raise ValueError(f"expected 0 <= integer < 2**64, found {value}")
    return value.to_bytes(8, "big")


@cache
def field_types(cls: Any) -> tuple[tuple[str, Any], ...]:
    """Name and type of each field of a dataclass, with the parameters of a generic one put in."""
    origin = typing.get_origin(cls) or cls
    given = dict(zip(getattr(origin, "__parameters__", ()), typing.get_args(cls), strict=False))
    hints = typing.get_type_hints(origin)
    return tuple((f.name, given.get(hints[f.name], hints[f.name])) for f in dataclasses.fields(origin))


def union_members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, in order; empty for anything else."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else ()


def is_a(value: Any, kind: Any) -> bool:
    """``isinstance`` that looks into generic dataclasses: a ``Signed[A]`` is not a ``Signed[B]``."""
    origin = typing.get_origin(kind)
    if origin is None:
        return isinstance(value, kind)
    return isinstance(value, origin) and all(
        is_a(getattr(value, name), hint) for name, hint in field_types(kind) if dataclasses.is_dataclass(hint)
    )


def encode(value: Any, kind: Any = None) -> bytes:
    """Encode ``value`` as the declared type ``kind`` (default: its own class).

    Raises:
        TypeError: the value is not of the declared type; always a bug of the caller.
    """
    kind = type(value) if kind is None or isinstance(kind, TypeVar) else kind
    members = union_members(kind)
    if members:
        index = next((i for i, member in enumerate(members) if is_a(value, member)), None)
        if index is None:
            raise TypeError(f"{type(value).__name__} is not one of {members}")
        return bytes([index]) + encode(value, members[index])
    if kind is int:
        return number(value)
    if kind is bytes:
        return pack_bytes(bytes(value))
    if kind is str:
        return pack_bytes(value.encode("utf-8"))
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return len(value).to_bytes(4, "big") + b"".join(encode(v, item) for v in value)
    if dataclasses.is_dataclass(typing.get_origin(kind) or kind):
        return b"".join(encode(getattr(value, name), hint) for name, hint in field_types(kind))
    raise TypeError(f"no canonical encoding for {kind!r}")


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = memoryview(data), 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ProtocolError(f"truncated encoding: expected {count} more bytes, found {len(self.data) - self.at}")
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def length(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def value(self, kind: Any) -> Any:
        members = union_members(kind)
        if members:
            index = self.take(1)[0]
            if index >= len(members):
                raise ProtocolError(f"expected one of {len(members)} kinds, found kind {index}")
            return self.value(members[index])
        if kind is int:
            return int.from_bytes(self.take(8), "big")
        if kind is bytes:
            return self.take(self.length())
        if kind is str:
            try:
                return self.take(self.length()).decode("utf-8")
            except UnicodeDecodeError as error:
                raise ProtocolError("expected UTF-8 text in an encoding") from error
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            return tuple(self.value(item) for _ in range(self.length()))
        return (typing.get_origin(kind) or kind)(*(self.value(hint) for _, hint in field_types(kind)))


def decode(kind: type[T], data: bytes) -> T:
    """Decode exactly one value of type ``kind`` from ``data``.

    Raises:
        ProtocolError: truncated, trailing bytes, or a field that the type itself refuses.
    """
    reader = _Reader(data)
    try:
        value: T = reader.value(kind)
    except RecursionError as error:
        raise ProtocolError("encoding nested too deep") from error
    if reader.at != len(data):
        raise ProtocolError(f"expected the encoding to end, found {len(data) - reader.at} more bytes")
    return value
