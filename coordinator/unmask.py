"""Folding uploads into the running sum, and taking the opened masks off it; both block by block, O(block) memory.

A packed vector is a file of blocks (``privacy/secagg/masking.py``); a running sum is a file of little-endian uint32
that never changes once it has its name. The total is made in shards of some blocks that depend on nothing but the sum
and the seeds: they run side by side, on whatever :class:`coordinator.executor.Executor` offers, and one that was cut
short is simply done again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from coordinator.executor import Executor
from privacy import merkle
from privacy.errors import ProtocolError
from privacy.files import disk_errors, fsync_file, replace_durably, reserve
from privacy.secagg.masking import (
    BLOCK,
    TILE,
    Engine,
    MaskStreams,
    block_sizes,
    engine_for,
    pack,
    packed_length,
    unpack_add,
)
from privacy.secagg.transcript import Streams
from privacy.vectors import block_start, read_blocks

#: Blocks of one shard: 1 Mi coordinates, 4 MiB of the sum.
SHARD_BLOCKS = 16
HASH_BYTES = 32


def fold(base: Path | None, uploads: Sequence[Path], target: Path, size: int, bits: int) -> None:
    """Write ``base`` plus packed vectors, mod 2**32, to ``target``; durable when this returns.

    Args:
        base: the generation before, ``None`` for the empty sum.

    Raises:
        UserError: the disk is full; ``base`` and the uploads are as they were.
    """
    staging = target.with_suffix(".tmp")
    with disk_errors(target), ExitStack() as stack:
        before = stack.enter_context(base.open("rb")) if base else None
        readers = [read_blocks(path, size, bits) for path in uploads]
        with staging.open("wb") as file:
            for count in block_sizes(size):
                tile = np.zeros(count, np.uint32)
                if before:
                    tile += np.frombuffer(before.read(4 * count), "<u4")
                for reader in readers:
                    unpack_add(next(reader), tile, bits)
                file.write(tile.astype("<u4", copy=False).data)
            file.flush()
            fsync_file(file.fileno(), target)
        replace_durably(staging, target)


def shard_count(size: int) -> int:
    """Shards of a total of ``size`` coordinates."""
    return -(-len(block_sizes(size)) // SHARD_BLOCKS)


@dataclass(frozen=True)
class Shard:
    """Blocks ``first`` to ``last`` (exclusive) of one total, and everything that making them needs."""

    running_sum: Path
    target: Path
    size: int
    bits: int
    first: int
    last: int
    plus: tuple[bytes, ...] = field(repr=False)
    minus: tuple[bytes, ...] = field(repr=False)
    engine: Engine


def unmask_shard(shard: Shard) -> bytes:
    """Take the streams off one shard and write its packed blocks in place; their leaf hashes, durable on return."""
    hashes = []
    masks = MaskStreams(shard.plus, shard.minus, shard.bits, shard.first * BLOCK, shard.engine)
    with disk_errors(shard.target), shard.running_sum.open("rb") as source, shard.target.open("rb+") as file:
        source.seek(4 * shard.first * BLOCK)
        file.seek(block_start(shard.first, shard.bits))
        for low in range(shard.first * BLOCK, min(shard.last * BLOCK, shard.size), TILE):
            tile = np.empty(min(TILE, shard.last * BLOCK - low, shard.size - low), "<u4")
            if source.readinto(tile.data.cast("B")) != tile.nbytes:
                raise ProtocolError(f"{shard.running_sum.name}: expected {shard.size} coordinates, the file ends early")
            masks.apply(tile)
            for at in range(0, len(tile), BLOCK):
                block = pack(tile[at : at + BLOCK], shard.bits)
                hashes.append(merkle.leaf_hash(block))
                file.write(block)
        file.flush()
        fsync_file(file.fileno(), shard.target)
    return b"".join(hashes)


def unmask(
    running_sum: Path,
    target: Path,
    streams: Streams,
    size: int,
    bits: int,
    executor: Executor,
    done: Mapping[int, bytes],
    keep: Callable[[int, bytes], None],
) -> bytes:
    """Take ``streams`` off the running sum and write the packed total; returns its Merkle root over blocks.

    Args:
        done: first block -> leaf hashes of shards that an earlier run finished.
        keep: called with each further shard once it is on disk.

    Raises:
        UserError: the disk is full; what is done stays done.
    """
    staging, off = target.with_suffix(".part"), streams.inverse()
    hashes = dict(done) if staging.exists() or target.exists() else {}
    blocks = len(block_sizes(size))
    if not target.exists():
        reserve(staging, packed_length(size, bits))
        engine = engine_for(size)
        shards = [
            Shard(
                running_sum, staging, size, bits, first, min(first + SHARD_BLOCKS, blocks), off.plus, off.minus, engine
            )
            for first in range(0, blocks, SHARD_BLOCKS)
            if first not in hashes
        ]
        for shard, found in executor.run(unmask_shard, shards):
            hashes[shard.first] = found
            keep(shard.first, found)
        with disk_errors(target):
            os.chmod(staging, 0o600)
            replace_durably(staging, target)
    leaves = b"".join(hashes[first] for first in range(0, blocks, SHARD_BLOCKS))
    return merkle.root([leaves[at : at + HASH_BYTES] for at in range(0, len(leaves), HASH_BYTES)])
