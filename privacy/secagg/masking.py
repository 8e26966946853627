"""The mask stream and the wire format of masked vectors (protocol sections 3 and 8).

PRG = AES-256-CTR under a key used for nothing else, hence a zero IV is right: one key, one stream. Words are little-
endian, 2 bytes wide for b = 16, else 4; coordinate e stands at byte e * width, so any range can be computed alone.
Sums stay in uint32: reduction mod 2**b commutes with addition, only the wire needs b bits.

On the wire a vector is a sequence of blocks of 64 Ki coordinates, the last one as long as it is; inside a block the low
16 bits of all coordinates come first (a plane that packs at memory speed), then the bits above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from privacy.errors import ProtocolError

BLOCK = 1 << 16  # coordinates
WIDTHS = (16, 20, 24, 32)


def word_bytes(bits: int) -> int:
    """Width of one PRG word in bytes."""
    return 2 if bits == 16 else 4


def keystream(key: bytes, bits: int, start: int = 0) -> Callable[[int], NDArray[np.unsignedinteger]]:
    """Words of the mask stream of ``key`` from coordinate ``start`` (a multiple of 8) on.

    Returns:
        ``f(count)``, the next ``count`` words as a view into a buffer that the next call overwrites.
    """
    width = word_bytes(bits)
    if start * width % 16:
        raise ValueError(f"expected a start on an AES block, found coordinate {start}")
    counter = (start * width // 16).to_bytes(16, "big")
    encryptor = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()
    dtype = np.dtype("<u2" if width == 2 else "<u4")
    zeros, buffer = bytes(BLOCK * width), bytearray(BLOCK * width)

    def words(count: int) -> NDArray[np.unsignedinteger]:
        if count > BLOCK:
            raise ValueError(f"expected at most {BLOCK} words at a time, found {count}")
        encryptor.update_into(zeros[: count * width], memoryview(buffer)[: count * width])
        return np.frombuffer(buffer, dtype, count)

    return words


class MaskStreams:
    """All streams of one vector, each with one open encryptor, applied tile by tile while the tile is in cache."""

    def __init__(self, plus: Sequence[bytes], minus: Sequence[bytes], bits: int, start: int = 0) -> None:
        self._plus = [keystream(key, bits, start) for key in plus]
        self._minus = [keystream(key, bits, start) for key in minus]

    def apply(self, tile: NDArray[np.uint32]) -> None:
        """Add and subtract the next ``len(tile)`` words of every stream, in place, mod 2**32."""
        for words in self._plus:
            np.add(tile, words(len(tile)), out=tile)
        for words in self._minus:
            np.subtract(tile, words(len(tile)), out=tile)


def block_sizes(size: int) -> list[int]:
    """Coordinates in each block of a vector of ``size`` coordinates."""
    return [min(BLOCK, size - low) for low in range(0, size, BLOCK)]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of one block of ``count`` coordinates."""
    return 2 * count + {16: 0, 20: -(-count // 2), 24: count, 32: 2 * count}[bits]


def packed_length(size: int, bits: int) -> int:
    """Bytes of a whole packed vector; the last block is not padded."""
    return sum(packed_bytes(count, bits) for count in block_sizes(size))


def pack(block: NDArray[np.uint32], bits: int) -> bytes:
    """The low ``bits`` bits of up to 64 Ki coordinates, in planes."""
    low = block.astype("<u2").tobytes()
    if bits == 16:
        return low
    high = block >> np.uint32(16)
    if bits == 32:
        return low + high.astype("<u2").tobytes()
    top = high.astype(np.uint8)
    if bits == 24:
        return low + top.tobytes()
    half = -(-len(block) // 2)  # nibbles: the first half of the block low, the second half high
    nibbles = top[:half] & 15
    nibbles[: len(block) - half] |= top[half:] << 4
    return low + nibbles.tobytes()


def unpack(data: bytes | memoryview, count: int, bits: int) -> NDArray[np.uint32]:
    """Inverse of :func:`pack`: (count,) uint32.

    Raises:
        ProtocolError: wrong length, or padding bits that are not zero.
    """
    if len(data) != packed_bytes(count, bits):
        raise ProtocolError(f"expected a block of {packed_bytes(count, bits)} bytes, found {len(data)}")
    block = np.frombuffer(data, "<u2", count).astype(np.uint32)
    if bits == 16:
        return block
    rest = memoryview(data)[2 * count :]
    if bits == 32:
        block |= np.frombuffer(rest, "<u2").astype(np.uint32) << 16
    elif bits == 24:
        block |= np.frombuffer(rest, np.uint8).astype(np.uint32) << 16
    else:
        nibbles = np.frombuffer(rest, np.uint8).astype(np.uint32)
        half = len(nibbles)
        if count % 2 and nibbles[-1] >> 4:
            raise ProtocolError("expected zero padding in the last nibble of a block")
        block[:half] |= (nibbles & 15) << 16
        block[half:] |= (nibbles >> 4)[: count - half] << 16
    return block


def masked_blocks(
    vector: NDArray[np.int32], plus: Sequence[bytes], minus: Sequence[bytes], bits: int
) -> Iterator[bytes]:
    """Mask a quantised vector (d + extras,) and pack it, block by block: extra memory is one tile."""
    streams = MaskStreams(plus, minus, bits)
    for low in range(0, len(vector), BLOCK):
        tile = vector[low : low + BLOCK].astype(np.uint32)  # two's complement: negative q wrap mod 2**32
        streams.apply(tile)
        yield pack(tile, bits)
