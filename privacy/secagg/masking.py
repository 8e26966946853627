"""The mask stream and the wire format of masked vectors (protocol sections 3 and 8).

PRG = AES-256-CTR under a key used for nothing else, hence a zero IV is right: one key, one stream. Words are little-
endian, 2 bytes wide for b = 16, else 4; coordinate e stands at byte e * width, so any range can be computed alone.
Sums stay in uint32: reduction mod 2**b commutes with addition, only the wire needs b bits.

On the wire a vector is a sequence of blocks of 64 Ki coordinates, the last one as long as it is; inside a block the low
16 bits of all coordinates come first (a plane that packs at memory speed), then the bits above.

A vector in memory is an array; one on disk, or one that is still being computed, is an iterator over its tiles. A
tile is a whole number of blocks, the last one as long as it is, and may be overwritten once the next is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from privacy.errors import ProtocolError

BLOCK = 1 << 16  # coordinates
#: Coordinates worked on at a time: a tile of 512 KiB and its keystream stay in cache, and two threads seldom want the
#: interpreter's lock at once.
TILE = 2 * BLOCK
WIDTHS = (16, 20, 24, 32)
#: Coordinates from which the fastest engine is looked for: loading it takes most of a second, once in a process.
FAST_FROM = 1 << 20

Number = TypeVar("Number", np.int32, np.int64, np.float32)
#: Adds the next len(tile) words of some streams to a tile (at most TILE coordinates, uint32), in place.
Apply = Callable[[NDArray[np.uint32]], None]
#: (keys added, keys subtracted, bits, first coordinate) -> their streams.
Engine = Callable[[Sequence[bytes], Sequence[bytes], int, int], Apply]


def word_bytes(bits: int) -> int:
    """Width of one PRG word in bytes."""
    return 2 if bits == 16 else 4


def _word_type(bits: int) -> np.dtype[np.unsignedinteger]:
    return np.dtype("<u2" if bits == 16 else "<u4")


def _encryptor(key: bytes, bits: int, start: int) -> CipherContext:
    """AES-256-CTR of a stream from coordinate ``start`` on: what it makes of zeros is the stream."""
    first_byte = start * word_bytes(bits)
    if first_byte % 16:
        raise ValueError(f"expected a start on an AES block, found coordinate {start}")
    return Cipher(algorithms.AES256(key), modes.CTR((first_byte // 16).to_bytes(16, "big"))).encryptor()


class _Scratch:
    """Room for the words of one stream over one tile, and the zeros they are made from."""

    def __init__(self, count: int, bits: int) -> None:
        self.words: NDArray[np.unsignedinteger] = np.empty(count, _word_type(bits))
        self._width = word_bytes(bits)
        self._bytes = self.words.data.cast("B")
        # Never written, so the system may back all of it with one page of zeros: reading it costs no cache.
        self._zeros = memoryview(bytes(len(self._bytes)))

    def fill(self, encryptor: CipherContext, count: int) -> NDArray[np.unsignedinteger]:
        """The next ``count`` words of a stream, a view that the next call overwrites."""
        size = count * self._width
        encryptor.update_into(self._zeros[:size], self._bytes[:size])
        return self.words[:count]


def keystream(key: bytes, bits: int, start: int = 0) -> Callable[[int], NDArray[np.unsignedinteger]]:
    """Words of the mask stream of ``key`` from coordinate ``start`` (a multiple of 8) on.

    Returns:
        ``f(count)``, the next ``count`` words as a view into a buffer that the next call overwrites.
    """
    encryptor, scratch = _encryptor(key, bits, start), _Scratch(BLOCK, bits)

    def words(count: int) -> NDArray[np.unsignedinteger]:
        if count > BLOCK:
            raise ValueError(f"expected at most {BLOCK} words at a time, found {count}")
        return scratch.fill(encryptor, count)

    return words


def pyca(plus: Sequence[bytes], minus: Sequence[bytes], bits: int, start: int) -> Apply:
    """The engine that is always there: one open encryptor for each seed, the words added while they are in cache."""
    added = [_encryptor(key, bits, start) for key in plus]
    taken_off = [_encryptor(key, bits, start) for key in minus]
    scratch = _Scratch(TILE, bits)

    def apply(tile: NDArray[np.uint32]) -> None:
        for encryptor in added:
            np.add(tile, scratch.fill(encryptor, len(tile)), out=tile)
        for encryptor in taken_off:
            np.subtract(tile, scratch.fill(encryptor, len(tile)), out=tile)

    return apply


@cache
def best_engine() -> tuple[Engine, str]:
    """The fastest engine that works on this machine, and in words which and why. Loading it takes about a second, once.

    The kernel of the extra ``fast`` is taken if it can be imported, the processor has what it needs, and it agrees with
    pyca's cipher; pyca's cipher otherwise.
    """
    try:
        from privacy.secagg import fast

        objection = fast.objection()
    except Exception as error:  # whatever is wrong with an optional compiler must not stop a round
        objection = f"its extra cannot be loaded: {error}"
    if objection:
        return pyca, f"pyca/cryptography; no VAES kernel: {objection}"
    return fast.vaes, "VAES kernel, checked against pyca/cryptography"


def engine_for(coordinates: int) -> Engine:
    """The engine for vectors of this size: who installed the extra ``fast`` waits for it once, but not for toys."""
    return best_engine()[0] if coordinates >= FAST_FROM else pyca


class MaskStreams:
    """All streams of one vector from coordinate ``start`` (a multiple of 8) on, applied tile by tile."""

    def __init__(
        self, plus: Sequence[bytes], minus: Sequence[bytes], bits: int, start: int = 0, engine: Engine = pyca
    ) -> None:
        self._apply = engine(plus, minus, bits, start)

    def apply(self, tile: NDArray[np.uint32]) -> None:
        """Add and subtract the next ``len(tile)`` words of every stream, in place, mod 2**32; any length."""
        for low in range(0, len(tile), TILE):
            self._apply(tile[low : low + TILE])


def apply_in_threads(
    vector: NDArray[np.uint32],
    plus: Sequence[bytes],
    minus: Sequence[bytes],
    bits: int,
    *,
    start: int = 0,
    workers: int = 2,
    engine: Engine = pyca,
) -> None:
    """Mask a long piece of a vector from coordinate ``start`` (a multiple of 8) on, in place, each thread a range."""
    share = -(-len(vector) // (workers * TILE)) * TILE

    def work(low: int) -> None:
        MaskStreams(plus, minus, bits, start + low, engine).apply(vector[low : low + share])

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(0, len(vector), share or 1)))


def tiles_of(vector: NDArray[Number] | Iterable[NDArray[Number]]) -> Iterator[NDArray[Number]]:
    """The tiles of a vector, whether it lies in memory or comes tile by tile."""
    if not isinstance(vector, np.ndarray):
        yield from vector
        return
    for low in range(0, len(vector), TILE):
        yield vector[low : low + TILE]


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
    low = block.astype("<u2")  # numpy casts and shifts whole vector registers; strided views of halves are slower
    if bits == 16:
        return low.tobytes()
    if bits == 32:
        return b"".join((low.data, np.right_shift(block, 16, out=np.empty(len(block), "<u2"), casting="unsafe").data))
    top = np.right_shift(block, 16, out=np.empty(len(block), np.uint8), casting="unsafe")
    if bits == 24:
        return b"".join((low.data, top.data))
    half = -(-len(block) // 2)  # nibbles: the first half of the block low, the second half high
    nibbles = top[:half] & 15
    nibbles[: len(block) - half] |= top[half:] << 4
    return b"".join((low.data, nibbles.data))


def _high_plane(data: bytes | memoryview, count: int, bits: int) -> NDArray[np.uint32]:
    """The bits above the lowest 16 of a packed block that has any, in their place; (count,) uint32."""
    rest = memoryview(data)[2 * count :]
    high = np.empty(count, np.uint32)
    if bits == 20:
        nibbles = np.frombuffer(rest, np.uint8)
        half = len(nibbles)
        if count % 2 and nibbles[-1] >> 4:
            raise ProtocolError("expected zero padding in the last nibble of a block")
        np.bitwise_and(nibbles, 15, out=high[:half])
        np.right_shift(nibbles[: count - half], 4, out=high[half:])
    else:
        high[:] = np.frombuffer(rest, np.uint8 if bits == 24 else "<u2")
    high <<= np.uint32(16)
    return high


def unpack_add(data: bytes | memoryview, tile: NDArray[np.uint32], bits: int) -> None:
    """Add a packed block to ``tile``, (count,) uint32, in place, mod 2**32.

    Raises:
        ProtocolError: wrong length, or padding bits that are not zero; the tile is as it was.
    """
    count = len(tile)
    if len(data) != packed_bytes(count, bits):
        raise ProtocolError(f"expected a block of {packed_bytes(count, bits)} bytes, found {len(data)}")
    if bits > 16:
        tile += _high_plane(data, count, bits)
    np.add(tile, np.frombuffer(data, "<u2", count), out=tile)


def unpack(data: bytes | memoryview, count: int, bits: int) -> NDArray[np.uint32]:
    """Inverse of :func:`pack`: (count,) uint32; raises as :func:`unpack_add`."""
    block = np.zeros(count, np.uint32)
    unpack_add(data, block, bits)
    return block


def masked_blocks(
    vector: NDArray[np.int32] | Iterable[NDArray[np.int32]],
    plus: Sequence[bytes],
    minus: Sequence[bytes],
    bits: int,
    engine: Engine = pyca,
) -> Iterator[bytes]:
    """Mask a quantised vector (d + extras,) and pack it, block by block: extra memory is one tile."""
    streams = MaskStreams(plus, minus, bits, engine=engine)
    room = np.empty(0, np.uint32)
    for tile in tiles_of(vector):
        if len(room) < len(tile):
            room = np.empty(len(tile), np.uint32)
        masked = room[: len(tile)]
        masked[:] = tile  # two's complement: negative q are themselves mod 2**32
        streams.apply(masked)
        for low in range(0, len(masked), BLOCK):
            yield pack(masked[low : low + BLOCK], bits)
