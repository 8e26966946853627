"""Packed vectors as files: uploads, spools and totals (format in ``privacy/secagg/masking.py``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from privacy import merkle
from privacy.errors import ProtocolError
from privacy.secagg.masking import block_sizes, packed_bytes, unpack


def read_blocks(path: Path, size: int, bits: int) -> Iterator[bytes]:
    """The packed blocks of a vector file of ``size`` coordinates.

    Raises:
        ProtocolError: the file is shorter or longer than such a vector.
    """
    with path.open("rb") as file:
        for count in block_sizes(size):
            block = file.read(packed_bytes(count, bits))
            if len(block) != packed_bytes(count, bits):
                raise ProtocolError(f"{path.name}: expected a vector of {size} coordinates, the file ends early")
            yield block
        if file.read(1):
            raise ProtocolError(f"{path.name}: expected a vector of {size} coordinates, the file goes on")


def file_root(path: Path, size: int, bits: int) -> bytes:
    """Merkle root over the packed blocks of a vector file; raises as :func:`read_blocks`."""
    return merkle.root([merkle.leaf_hash(block) for block in read_blocks(path, size, bits)])


def read_total(path: Path, size: int, bits: int) -> NDArray[np.uint32]:
    """A whole packed vector, (size,) uint32."""
    total = np.empty(size, np.uint32)
    at = 0
    for block, count in zip(read_blocks(path, size, bits), block_sizes(size), strict=True):
        total[at : at + count] = unpack(block, count, bits)
        at += count
    return total
