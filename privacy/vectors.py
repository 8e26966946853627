"""Packed vectors as files: uploads, spools and totals (format in ``privacy/secagg/masking.py``)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from privacy import merkle
from privacy.errors import ProtocolError, Refusal
from privacy.secagg.masking import BLOCK, block_sizes, packed_bytes, unpack


def round_name(round_id: bytes) -> str:
    """Name of the directory of a round's uploads at the coordinator."""
    return round_id.hex()[:32]


def upload_name(member: int) -> str:
    """Name of a member's upload in it."""
    return f"upload-{member}.bin"


def block_start(block: int, bits: int) -> int:
    """Byte at which a block of a packed vector begins."""
    return block * packed_bytes(BLOCK, bits)


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


def read_block(path: Path, size: int, bits: int, block: int) -> tuple[bytes, tuple[bytes, ...]]:
    """One packed block of a vector file and its Merkle path to the file's root.

    Raises:
        Refusal: there is no such block.
    """
    counts = block_sizes(size)
    if not 0 <= block < len(counts):
        raise Refusal(f"expected a block below {len(counts)}, found {block}")
    with path.open("rb") as file:
        file.seek(block_start(block, bits))
        data = file.read(packed_bytes(counts[block], bits))
    return data, merkle.path(_leaf_hashes(path, size, bits), block)


@lru_cache(maxsize=256)
def _leaf_hashes(path: Path, size: int, bits: int) -> list[bytes]:
    """Leaf hashes of a file that does not change any more."""
    return [merkle.leaf_hash(block) for block in read_blocks(path, size, bits)]
