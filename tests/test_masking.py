"""Mask streams and packing: exact, seekable, and they cancel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from privacy.errors import ProtocolError
from privacy.secagg import masking
from privacy.secagg.masking import (
    BLOCK,
    FAST_FROM,
    TILE,
    WIDTHS,
    Apply,
    MaskStreams,
    apply_in_threads,
    block_sizes,
    engine_for,
    keystream,
    masked_blocks,
    pack,
    packed_bytes,
    packed_length,
    pyca,
    tiles_of,
    unpack,
    unpack_add,
    word_bytes,
)

KEY = bytes(range(32))
BITS = st.sampled_from(WIDTHS)
VECTORS = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=67).map(lambda v: np.array(v, np.int32))


def low_bits(bits: int) -> np.uint32:
    return np.uint32((1 << bits) - 1)


def words_of(key: bytes, bits: int, count: int) -> NDArray[np.uint32]:
    """The stream by its definition: AES-256-CTR, zero IV, little-endian words."""
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(count * word_bytes(bits)))
    return np.frombuffer(stream, "<u2" if bits == 16 else "<u4").astype(np.uint32)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_stream_is_aes_ctr_in_little_endian_words(bits: int) -> None:
    assert np.array_equal(keystream(KEY, bits)(100), words_of(KEY, bits, 100))


def test_a_word_has_two_bytes_for_16_bits_and_else_four() -> None:
    assert [word_bytes(bits) for bits in WIDTHS] == [2, 4, 4, 4]


@settings(max_examples=30, deadline=None)
@given(BITS, st.integers(0, 400), st.integers(1, 300))
def test_any_range_computed_alone_equals_the_whole_stream(bits: int, start: int, count: int) -> None:
    start *= 8
    assert np.array_equal(keystream(KEY, bits, start)(count), words_of(KEY, bits, start + count)[start:])


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_block_computed_alone_equals_the_whole_stream(bits: int) -> None:
    whole = words_of(KEY, bits, 3 * BLOCK)
    for block in range(3):
        start = block * BLOCK
        assert np.array_equal(keystream(KEY, bits, start)(BLOCK), whole[start : start + BLOCK])


def test_the_counter_is_right_far_beyond_32_bits_of_coordinates() -> None:
    start = 1 << 36
    counter = (start * 4 // 16).to_bytes(16, "big")
    expected = Cipher(algorithms.AES256(KEY), modes.CTR(counter)).encryptor().update(bytes(16))
    assert keystream(KEY, 24, start)(4).tobytes() == expected


@settings(max_examples=30, deadline=None)
@given(BITS, st.lists(st.integers(1, 7), min_size=1, max_size=8))
def test_calls_of_any_size_continue_one_stream(bits: int, counts: list[int]) -> None:
    words = keystream(KEY, bits)
    parts = [words(count).copy() for count in counts]
    assert np.array_equal(np.concatenate(parts), words_of(KEY, bits, sum(counts)))


@pytest.mark.parametrize(("bits", "start"), [(16, 4), (24, 2), (32, 5)])
def test_a_start_within_an_aes_block_is_a_bug_of_the_caller(bits: int, start: int) -> None:
    with pytest.raises(ValueError, match=f"found coordinate {start}"):
        keystream(KEY, bits, start)


def test_more_than_a_block_at_a_time_is_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="words at a time"):
        keystream(KEY, 24)(BLOCK + 1)


@given(BITS, VECTORS)
def test_packing_keeps_exactly_the_low_bits(bits: int, vector: NDArray[np.int32]) -> None:
    data = pack(vector.astype(np.uint32), bits)
    assert len(data) == packed_bytes(len(vector), bits) == -(-bits * len(vector) // 8)
    assert np.array_equal(unpack(data, len(vector), bits), vector.astype(np.uint32) & low_bits(bits))


@given(BITS, st.integers(1, 33), st.data())
def test_bytes_that_unpack_pack_to_themselves(bits: int, count: int, data: st.DataObject) -> None:
    size = packed_bytes(count, bits)
    block = data.draw(st.binary(min_size=size, max_size=size))
    try:
        found = unpack(block, count, bits)
    except ProtocolError:
        assert bits == 20
        assert count % 2
        assert block[-1] >> 4
        return
    assert pack(found, bits) == block


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_block_of_another_length_is_refused(bits: int) -> None:
    good = pack(np.arange(7, dtype=np.uint32), bits)
    for wrong in (good[:-1], good + b"\0", b""):
        with pytest.raises(ProtocolError, match=f"expected a block of {len(good)} bytes, found {len(wrong)}"):
            unpack(wrong, 7, bits)


def test_padding_that_is_not_zero_is_refused() -> None:
    good = pack(np.arange(7, dtype=np.uint32), 20)
    with pytest.raises(ProtocolError, match="zero padding"):
        unpack(good[:-1] + bytes([good[-1] | 0x10]), 7, 20)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("bits", WIDTHS)
def test_the_last_block_is_as_long_as_it_is(bits: int, size: int) -> None:
    sizes = block_sizes(size)
    assert sum(sizes) == size
    assert all(count == BLOCK for count in sizes[:-1])
    blocks = list(masked_blocks(np.zeros(size, np.int32), [KEY], [], bits))
    assert [len(block) for block in blocks] == [packed_bytes(count, bits) for count in sizes]
    assert sum(map(len, blocks)) == packed_length(size, bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_masking_is_addition_modulo_the_ring(bits: int) -> None:
    size, other = BLOCK + 5, bytes(32)
    vector = np.arange(size, dtype=np.int32) - 1000
    wanted = (vector.astype(np.uint32) + words_of(KEY, bits, size) - words_of(other, bits, size)) & low_bits(bits)
    blocks = list(masked_blocks(vector, [KEY], [other], bits))
    found = [unpack(block, count, bits) for block, count in zip(blocks, block_sizes(size), strict=True)]
    assert np.array_equal(np.concatenate(found), wanted)


@settings(max_examples=20, deadline=None)
@given(BITS, VECTORS, st.lists(st.binary(min_size=32, max_size=32), max_size=4, unique=True))
def test_taking_the_same_streams_off_gives_the_vector_back(
    bits: int, vector: NDArray[np.int32], streams: list[bytes]
) -> None:
    plus, minus = streams[::2], streams[1::2]
    block = next(masked_blocks(vector, plus, minus, bits))
    found = unpack(block, len(vector), bits)
    MaskStreams(minus, plus, bits).apply(found)
    assert np.array_equal(found & low_bits(bits), vector.astype(np.uint32) & low_bits(bits))


@settings(max_examples=20, deadline=None)
@given(BITS, st.integers(2, 6), st.integers(1, 40))
def test_pair_masks_cancel_in_the_sum(bits: int, members: int, size: int) -> None:
    def pair_key(low: int, high: int) -> bytes:
        return bytes([low, high]) * 16

    total = np.zeros(size, np.uint32)
    for i in range(members):
        plus = [pair_key(i, j) for j in range(i + 1, members)]
        minus = [pair_key(j, i) for j in range(i)]
        vector = np.full(size, (-1) ** i * 10**i, np.int32)
        total += unpack(next(masked_blocks(vector, plus, minus, bits)), size, bits)
    expected = sum((-1) ** i * 10**i for i in range(members)) % 2**bits
    assert (total & low_bits(bits) == expected).all()


def test_streams_started_at_a_block_take_the_masks_of_that_block_off() -> None:
    vector = np.arange(2 * BLOCK + 9, dtype=np.int32)
    last = list(masked_blocks(vector, [KEY], [bytes(32)], 24))[2]
    found = unpack(last, 9, 24)
    MaskStreams([bytes(32)], [KEY], 24, start=2 * BLOCK).apply(found)
    assert (found & low_bits(24)).tolist() == vector[2 * BLOCK :].tolist()


# --- tiles, threads and memory ---


def arange(size: int) -> NDArray[np.uint32]:
    """Words that use all 32 bits, (size,) uint32."""
    return np.arange(size, dtype=np.uint32) * np.uint32(2654435761)


@given(BITS, VECTORS, st.data())
def test_adding_a_packed_block_is_unpacking_and_adding(
    bits: int, vector: NDArray[np.int32], data: st.DataObject
) -> None:
    packed = pack(vector.astype(np.uint32), bits)
    before = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=len(vector), max_size=len(vector)))
    tile = np.array(before, np.uint32)
    unpack_add(memoryview(packed), tile, bits)
    assert np.array_equal(tile, np.array(before, np.uint32) + (vector.astype(np.uint32) & low_bits(bits)))


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_bad_block_leaves_the_tile_as_it_was(bits: int) -> None:
    tile, good = arange(7), pack(np.zeros(7, np.uint32), bits)
    bad = [good[:-1], good + b"\0"] + ([good[:-1] + b"\x10"] if bits == 20 else [])
    for data in bad:
        with pytest.raises(ProtocolError):
            unpack_add(data, tile, bits)
    assert np.array_equal(tile, arange(7))


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_tile_of_any_length_is_masked_as_its_blocks_are(bits: int) -> None:
    size = 2 * TILE + BLOCK + 77
    whole = arange(size)
    MaskStreams([KEY], [bytes(32)], bits).apply(whole)
    for low in range(0, size, BLOCK):
        block = arange(size)[low : low + BLOCK]
        MaskStreams([KEY], [bytes(32)], bits, start=low).apply(block)
        assert np.array_equal(block, whole[low : low + BLOCK])


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("size", [0, 1, TILE, 4 * TILE + 13])
def test_threads_over_ranges_do_what_one_stream_does(size: int, workers: int) -> None:
    start, plus, minus = 24, [KEY, b"k" * 32], [bytes(32)]
    expected, found = arange(size), arange(size)
    MaskStreams(plus, minus, 24, start).apply(expected)
    apply_in_threads(found, plus, minus, 24, start=start, workers=workers)
    assert np.array_equal(found, expected)


def test_the_engine_that_was_named_makes_the_masks() -> None:
    asked: list[tuple[int, int, int, int]] = []

    def engine(plus: Sequence[bytes], minus: Sequence[bytes], bits: int, start: int) -> Apply:
        asked.append((len(plus), len(minus), bits, start))
        return pyca(plus, minus, bits, start)

    apply_in_threads(arange(3 * TILE), [KEY], [], 20, start=8, workers=2, engine=engine)
    assert sorted(asked) == [(1, 0, 20, 8), (1, 0, 20, 8 + 2 * TILE)]
    asked.clear()
    apply_in_threads(arange(3 * TILE), [KEY], [], 20, engine=engine)
    assert sorted(asked) == [(1, 0, 20, 0), (1, 0, 20, 2 * TILE)], "two threads from the beginning, unless told"
    asked.clear()
    list(masked_blocks(np.zeros(9, np.int32), [], [KEY], 16, engine))
    assert asked == [(0, 1, 16, 0)]


def test_the_fastest_engine_is_for_long_vectors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fastest(plus: Sequence[bytes], minus: Sequence[bytes], bits: int, start: int) -> Apply:
        return pyca(plus, minus, bits, start)

    monkeypatch.setattr(masking, "best_engine", lambda: (fastest, "a kernel"))
    assert [engine_for(size) for size in (1, FAST_FROM - 1, FAST_FROM)] == [pyca, pyca, fastest]


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_vector_that_comes_tile_by_tile_is_masked_as_one_in_memory(bits: int) -> None:
    vector = arange(2 * TILE + 9).view(np.int32)
    buffer = np.empty(TILE, np.int32)

    def tiles() -> Iterator[NDArray[np.int32]]:
        for tile in tiles_of(vector):
            buffer[: len(tile)] = tile  # the next tile overwrites the last
            yield buffer[: len(tile)]

    assert list(masked_blocks(tiles(), [KEY], [], bits)) == list(masked_blocks(vector, [KEY], [], bits))
    assert np.array_equal(vector, arange(2 * TILE + 9).view(np.int32)), "the vector itself stays unmasked"
