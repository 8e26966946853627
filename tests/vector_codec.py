"""Values of the protocol as JSON and back: bytes are hex, a member of a union stands under the name of its type."""

from __future__ import annotations

import typing
from typing import Any

from privacy.encoding import encode, field_types, union_members


def type_name(kind: Any) -> str:
    """``Signed[Advertise]`` for a generic type, else the plain name."""
    arguments = ", ".join(map(type_name, typing.get_args(kind)))
    return f"{kind.__name__}[{arguments}]" if arguments else str(kind.__name__)


def to_json(value: Any, kind: Any) -> Any:
    """``value`` of the declared type ``kind``, readable."""
    members = union_members(kind)
    if members:
        member = members[encode(value, kind)[0]]
        return {type_name(member): to_json(value, member)}
    if kind is bytes:
        return value.hex()
    if kind in (int, str):
        return value
    if typing.get_origin(kind) is tuple:
        return [to_json(item, typing.get_args(kind)[0]) for item in value]
    return {name: to_json(getattr(value, name), hint) for name, hint in field_types(kind)}


def from_json(data: Any, kind: Any) -> Any:
    """The inverse of :func:`to_json`; a value that cannot be said raises as its type does."""
    members = {type_name(member): member for member in union_members(kind)}
    if members:
        ((name, inner),) = data.items()
        return from_json(inner, members[name])
    if kind is bytes:
        return bytes.fromhex(data)
    if kind in (int, str):
        return data
    if typing.get_origin(kind) is tuple:
        return tuple(from_json(item, typing.get_args(kind)[0]) for item in data)
    origin = typing.get_origin(kind) or kind
    return origin(*(from_json(data[name], hint) for name, hint in field_types(kind)))
