"""One value, one encoding: round trips, known answers, and what does not decode."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.encoding import decode, digest, encode, label, number, pack_bytes
from privacy.errors import ProtocolError


@dataclass(frozen=True)
class Left:
    size: int


@dataclass(frozen=True)
class Right:
    text: str


@dataclass(frozen=True)
class Everything:
    """One field of every kind that the encoding knows."""

    count: int
    raw: bytes
    text: str
    numbers: tuple[int, ...]
    either: Left | Right
    nested: tuple[Left | Right, ...]


EITHER = st.builds(Left, st.integers(0, 2**64 - 1)) | st.builds(Right, st.text(max_size=8))
EVERYTHING = st.builds(
    Everything,
    st.integers(0, 2**64 - 1),
    st.binary(max_size=20),
    st.text(max_size=8),
    st.lists(st.integers(0, 2**64 - 1), max_size=4).map(tuple),
    EITHER,
    st.lists(EITHER, max_size=3).map(tuple),
)

KNOWN = {
    "an integer has eight big-endian bytes": (Left(0x0102), "0000000000000102"),
    "the largest integer has eight bytes of ones": (Left(2**64 - 1), "ff" * 8),
    "text has a length of four bytes and is UTF-8": (Right("é"), "00000002c3a9"),
    "empty text is four zero bytes": (Right(""), "00000000"),
    "fields follow one another with nothing between": (
        Everything(1, b"\xab", "c", (2, 3), Right("d"), (Left(4), Right(""))),
        "0000000000000001"
        "00000001ab"
        "0000000163"
        "00000002" + "0000000000000002" + "0000000000000003"
        "01" + "0000000164"
        "00000002" + "00" + "0000000000000004" + "01" + "00000000",
    ),
}


@pytest.mark.parametrize(("value", "expected"), KNOWN.values(), ids=KNOWN.keys())
def test_known_encodings(value: object, expected: str) -> None:
    assert encode(value).hex() == expected
    assert decode(type(value), bytes.fromhex(expected)) == value


BAD = {
    "an empty string is no value": (Left, "", "truncated"),
    "an integer lacks its last byte": (Left, "00" * 7, "expected 8 more bytes, found 7"),
    "a byte follows the value": (Left, "00" * 9, "found 1 more bytes"),
    "a length points beyond the end": (Right, "0000000561", "expected 5 more bytes, found 1"),
    "a length is cut short": (Right, "000000", "truncated"),
    "text is not UTF-8": (Right, "00000001ff", "UTF-8"),
    "text is an overlong form of a slash": (Right, "00000002c0af", "UTF-8"),
    "text holds half of a surrogate pair": (Right, "00000003eda080", "UTF-8"),
}


@pytest.mark.parametrize(("kind", "data", "fragment"), BAD.values(), ids=BAD.keys())
def test_bad_encodings_are_refused(kind: type, data: str, fragment: str) -> None:
    with pytest.raises(ProtocolError, match=fragment):
        decode(kind, bytes.fromhex(data))


def test_a_union_refuses_a_kind_that_it_does_not_have() -> None:
    with pytest.raises(ProtocolError, match="expected one of 2 kinds, found kind 2"):
        decode(Left | Right, bytes.fromhex("02" + "00" * 8))  # type: ignore[arg-type]


def test_a_count_of_four_billion_items_costs_nothing() -> None:
    encoded = encode(Everything(1, b"", "", (), Left(0), ()))
    huge = encoded[:16] + b"\xff\xff\xff\xff" + encoded[20:]  # the count of ``numbers``
    with pytest.raises(ProtocolError, match="truncated"):
        decode(Everything, huge)


@given(EVERYTHING)
def test_every_value_survives_the_round_trip(value: Everything) -> None:
    assert decode(Everything, encode(value)) == value


@given(EVERYTHING)
def test_every_truncation_and_every_extension_is_refused(value: Everything) -> None:
    encoded = encode(value)
    for wrong in [encoded[:end] for end in range(len(encoded))] + [encoded + b"\0", encoded + encoded]:
        with pytest.raises(ProtocolError):
            decode(Everything, wrong)


@given(EVERYTHING, st.data())
def test_other_bytes_that_decode_encode_to_themselves(value: Everything, data: st.DataObject) -> None:
    changed = bytearray(encode(value))
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode(Everything, bytes(changed))
    except ProtocolError:
        return
    assert encode(found) == bytes(changed)


@given(EVERYTHING, EVERYTHING)
def test_different_values_have_different_encodings(one: Everything, other: Everything) -> None:
    assert (one == other) == (encode(one) == encode(other))


@pytest.mark.parametrize("value", [-1, 2**64])
def test_an_integer_out_of_range_is_a_bug_of_the_caller(value: int) -> None:
    with pytest.raises(ValueError, match="found"):
        number(value)


def test_a_kind_without_an_encoding_is_a_bug_of_the_caller() -> None:
    with pytest.raises(TypeError, match="no canonical encoding"):
        encode(1.5)


def test_a_label_is_domain_name_zero_byte_and_parts_behind_their_lengths() -> None:
    wanted = b"veilsum/1/name\0" + b"\0\0\0\1a" + b"\0\0\0\0"
    assert label("name", b"a", b"") == wanted
    assert digest("name", b"a", b"") == hashlib.sha256(wanted).digest()
    assert pack_bytes(b"a") == b"\0\0\0\1a"


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_labels_of_different_parts_differ(one: list[bytes], other: list[bytes]) -> None:
    assert (one == other) == (label("x", *one) == label("x", *other))
