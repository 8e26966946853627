"""Folding uploads into one running sum, and taking the opened masks off it: both block by block, O(block) memory.

A packed vector is a file of blocks (``privacy/secagg/masking.py``); a running sum is a file of little-endian uint32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from privacy import merkle
from privacy.files import disk_errors, fsync_directory
from privacy.secagg.masking import MaskStreams, block_sizes, pack, unpack
from privacy.secagg.transcript import Streams
from privacy.vectors import read_blocks


def _write(path: Path, blocks: Iterator[bytes]) -> None:
    staging = path.with_suffix(".tmp")
    with disk_errors(path):
        with staging.open("wb") as file:
            for block in blocks:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
        fsync_directory(path.parent)


def fold(uploads: Sequence[Path], target: Path, size: int, bits: int) -> None:
    """Write the sum of packed vectors, mod 2**32, to ``target``; durable when this returns."""

    def sums() -> Iterator[bytes]:
        readers = [read_blocks(path, size, bits) for path in uploads]
        for count in block_sizes(size):
            tile = np.zeros(count, np.uint32)
            for reader in readers:
                tile += unpack(next(reader), count, bits)
            yield tile.astype("<u4").tobytes()

    _write(target, sums())


def unmask(running_sum: Path, target: Path, streams: Streams, size: int, bits: int) -> bytes:
    """Take ``streams`` off the running sum and write the packed total; returns its Merkle root over blocks."""
    hashes: list[bytes] = []
    off = streams.inverse()

    def totals() -> Iterator[bytes]:
        masks = MaskStreams(off.plus, off.minus, bits)
        with running_sum.open("rb") as file:
            for count in block_sizes(size):
                tile = np.frombuffer(file.read(4 * count), "<u4").astype(np.uint32)
                masks.apply(tile)
                block = pack(tile, bits)
                hashes.append(merkle.leaf_hash(block))
                yield block

    _write(target, totals())
    return merkle.root(hashes)
