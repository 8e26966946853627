"""The trust boundary: every message survives the wire, and what protobuf tolerates beyond that is refused."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor

from privacy.encoding import encode, field_types, union_members
from privacy.errors import ProtocolError
from privacy.secagg import dialogue, messages
from privacy.wire import secagg_pb2
from privacy.wire.convert import UNIONS, _field, _name, from_wire, parse, to_wire
from tests.simulation import Simulation


def reachable(kind: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Every message type that can be sent, by protobuf name."""
    if typing.get_origin(kind) is tuple:
        return reachable(typing.get_args(kind)[0], found)
    if kind in (int, bytes, str) or _name(kind) in found:
        return found
    found[_name(kind)] = kind
    for member in union_members(kind):
        reachable(member, found)
    if dataclasses.is_dataclass(typing.get_origin(kind) or kind):
        for _, hint in field_types(kind):
            reachable(hint, found)
    return found


KINDS = reachable(messages.Evidence, reachable(dialogue.FromMember, reachable(dialogue.ToMember, {})))


@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_proto_file_says_what_the_types_say(name: str) -> None:
    kind, descriptor = KINDS[name], secagg_pb2.DESCRIPTOR.message_types_by_name[name]
    assert isinstance(descriptor, Descriptor)
    if kind in UNIONS:
        assert [f.name for f in descriptor.fields] == [_field(member) for member in union_members(kind)]
        assert [o.name for o in descriptor.oneofs] == ["kind"]
    else:
        assert [f.name for f in descriptor.fields] == [name for name, _ in field_types(kind)]


def test_the_proto_file_has_no_message_beside_the_types() -> None:
    assert set(secagg_pb2.DESCRIPTOR.message_types_by_name) == set(KINDS)


def test_every_message_of_a_round_survives_the_wire() -> None:
    seen: list[tuple[Any, Any]] = []

    def heard(_member: int, message: dialogue.ToMember) -> dialogue.ToMember:
        seen.append((message, dialogue.ToMember))
        return message

    def said(_member: int, message: dialogue.FromMember) -> dialogue.FromMember:
        seen.append((message, dialogue.FromMember))
        return message

    Simulation(4, 1, silent={2: "M5"}, to_member=heard, from_member=said).run()
    assert len({type(message) for message, _ in seen}) >= 8
    for message, kind in seen:
        back = parse(to_wire(message, kind).SerializeToString(), kind)
        assert encode(back, kind) == encode(message, kind)


def header() -> messages.Header:
    return messages.Header(1, bytes(32), 1, 1, bytes(32), bytes(32), bytes(32))


def test_an_empty_oneof_is_refused() -> None:
    with pytest.raises(ProtocolError, match="expected one of offer"):
        parse(b"", dialogue.ToMember)


def test_an_absent_part_is_refused() -> None:
    with pytest.raises(ProtocolError, match="expected a header"):
        from_wire(secagg_pb2.Offer(), messages.Offer)


def test_unknown_fields_are_refused_at_any_depth() -> None:
    good = to_wire(messages.Offer(header()), dialogue.ToMember)
    inner = secagg_pb2.Header.FromString(good.offer.header.SerializeToString() + bytes([0xF8, 0x07, 1]))
    bad = secagg_pb2.ToMember(offer=secagg_pb2.Offer(header=inner))
    with pytest.raises(ProtocolError, match="unknown fields"):
        parse(bad.SerializeToString(), dialogue.ToMember)


def test_wrong_lengths_are_refused() -> None:
    bad = to_wire(header(), messages.Header)
    bad.plan = b"short"
    with pytest.raises(ProtocolError, match="plan: expected 32 bytes, found 5"):
        from_wire(bad, messages.Header)


def test_rubbish_is_refused() -> None:
    with pytest.raises(ProtocolError, match="expected a protobuf FromMember"):
        parse(b"\xff\xff\xff", dialogue.FromMember)
