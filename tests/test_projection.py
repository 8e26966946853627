"""The random projection is an inner product, however the vector comes."""

from __future__ import annotations

import struct

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from privacy.secagg import projection
from privacy.secagg.masking import BLOCK, TILE, tiles_of

KEY = bytes(range(32))


def test_the_projection_is_the_inner_product_with_the_stream() -> None:
    vector = np.arange(-TILE, TILE + 77, dtype=np.int32)
    stream = Cipher(algorithms.AES256(KEY), modes.CTR(bytes(16))).encryptor().update(bytes(8 * len(vector)))
    words = struct.unpack(f"<{len(vector)}Q", stream)
    expected = sum(r * x for r, x in zip(words, vector.tolist(), strict=True)) % projection.WORD
    assert projection.project(KEY, vector) == projection.project(KEY, vector.astype(np.int64)) == expected
    assert projection.project(KEY, tiles_of(vector)) == expected
    for step in (999, BLOCK + 5):
        parts = (vector[low : low + step] for low in range(0, len(vector), step))
        assert projection.project(KEY, parts) == expected


def test_large_signed_integers_wrap_as_the_ring_does() -> None:
    vector = np.array([-(2**62), 2**62 - 1, -1, 0], np.int64)
    stream = Cipher(algorithms.AES256(KEY), modes.CTR(bytes(16))).encryptor().update(bytes(32))
    expected = sum(r * x for r, x in zip(struct.unpack("<4Q", stream), vector.tolist(), strict=True))
    assert projection.project(KEY, vector) == expected % projection.WORD
