"""Protobuf <-> messages, or raise: the trust boundary. Nothing past this file handles protobuf of the round.

Every message type stands in ``proto/secagg.proto`` with the same field names, so one walk over the declared types
serves them all. Anything protobuf tolerates and we do not (unknown fields, absent parts, an empty ``oneof``) is refused
here; lengths and ranges the types check themselves.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from functools import cache
from typing import Any

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from privacy.encoding import field_types, is_a, union_members
from privacy.errors import ProtocolError
from privacy.secagg import dialogue, messages
from privacy.wire import secagg_pb2

#: Unions have a message of their own with one ``oneof kind``.
UNIONS = {
    messages.RetryProof: "RetryProof",
    messages.Share: "Share",
    messages.Opened: "Opened",
    dialogue.ToMember: "ToMember",
    dialogue.FromMember: "FromMember",
}


def _name(kind: Any) -> str:
    """Name of the protobuf message of a type: ``Signed[A]`` is ``SignedA``."""
    if kind in UNIONS:
        return UNIONS[kind]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    return f"{origin.__name__}{args[0].__name__}" if origin else str(kind.__name__)


def _field(kind: Any) -> str:
    """Name of a union member's field in its ``oneof``: snake case of the message name."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", _name(kind)).lower()


@cache
def _protobuf(kind: Any) -> type[Message]:
    found: type[Message] = getattr(secagg_pb2, _name(kind))
    return found


def to_wire(value: Any, kind: Any) -> Any:
    """The protobuf message (or scalar) for ``value`` of the declared type ``kind``."""
    members = union_members(kind)
    if members:
        member = next(m for m in members if is_a(value, m))
        return _protobuf(kind)(**{_field(member): to_wire(value, member)})
    if kind in (int, bytes, str):
        return value
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return [to_wire(v, item) for v in value]
    fields = {name: to_wire(getattr(value, name), hint) for name, hint in field_types(kind)}
    return _protobuf(kind)(**fields)


def from_wire(message: Any, kind: Any) -> Any:
    """The value of declared type ``kind`` in a protobuf message.

    Raises:
        ProtocolError: unknown fields, absent parts, or a value that its type refuses.
    """
    if kind in (int, bytes, str):
        return message
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(from_wire(m, item) for m in message)
    if len(UnknownFieldSet(message)):
        raise ProtocolError(f"{_name(kind)}: expected no unknown fields; do both ends run the same version?")
    members = union_members(kind)
    if members:
        chosen = message.WhichOneof("kind")
        for member in members:
            if chosen == _field(member):
                return from_wire(getattr(message, chosen), member)
        raise ProtocolError(f"{_name(kind)}: expected one of {', '.join(map(_field, members))}, found none")
    values = []
    for name, hint in field_types(kind):
        if _is_message(hint) and not message.HasField(name):
            raise ProtocolError(f"{_name(kind)}: expected a {name}, found none")
        values.append(from_wire(getattr(message, name), hint))
    return (typing.get_origin(kind) or kind)(*values)


def _is_message(hint: Any) -> bool:
    return bool(union_members(hint)) or dataclasses.is_dataclass(typing.get_origin(hint) or hint)


def parse(data: bytes, kind: Any) -> Any:
    """Parse protobuf bytes from an untrusted peer into a value of type ``kind``; raises ProtocolError."""
    message = _protobuf(kind)()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise ProtocolError(f"expected a protobuf {_name(kind)}: {error}") from error
    return from_wire(message, kind)
