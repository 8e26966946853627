"""Changed inputs without a fuzzer: what bytes, numbers and pieces of other inputs do to a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

#: Lengths, counts and numbers that parsers trip over.
NUMBERS = [
    *(n.to_bytes(4, "big") for n in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)),
    *(n.to_bytes(8, "little") for n in (0, 1, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)),
]
#: Pieces of text formats that their usual parsers accept, or have crashed on.
TEXTS = [
    *(b"NaN", b"Infinity", b"-0", b"1e999", b"1" * 5000, b"0x" + b"f" * 5000, b"null", b"true", b"[[[[", b"{}"),
    *(
        b"[" * 3000,
        b'{"a":' * 3000,
        b"a." * 3000,
        b"\0",
        b"\n",
        b"\r",
        b"\x1b[2J",
        b"\xff",
        b"\\ud800",
        b"\xed\xa0\x80",
    ),
    *(b'"', b"'''", b"#", b",", b"=", b"1979-05-27T07:32:00Z", "é\u2028\u202e".encode()),
]


def changed(seed: bytes, others: Sequence[bytes], dice: random.Random) -> bytes:
    """``seed`` after one to four random changes."""
    data = bytearray(seed)
    for _ in range(dice.choice((1, 1, 2, 4))):
        at = dice.randrange(len(data) + 1)
        piece = dice.choice(
            (NUMBERS, TEXTS, [bytes([dice.randrange(256)])], [dice.choice(others)[: dice.randrange(64)]])
        )
        match dice.randrange(5):
            case 0:
                data[at : at + dice.randrange(1, 9)] = b""
            case 1:
                data = data[:at] if dice.random() < 0.3 else data + data[at:]
            case 2:
                data[at : at + 1] = bytes([dice.randrange(256)])
            case 3:
                chosen = dice.choice(piece)
                data[at : at + len(chosen)] = chosen
            case _:
                data[at:at] = dice.choice(piece)
    return bytes(data)


def inputs(seeds: Sequence[bytes], count: int, longest: int, seed: int) -> Iterator[bytes]:
    """The seeds themselves, the empty input, then ``count`` changed ones; the same for the same ``seed``."""
    yield b""
    yield from seeds
    dice = random.Random(seed)
    for _ in range(count):
        yield changed(dice.choice(seeds), seeds, dice)[: longest + 5000]
