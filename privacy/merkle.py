"""Merkle trees with the hashing of RFC 6962, section 2.1: leaves and nodes are hashed under different prefixes.

Used for the leaves of M3, the blocks of an upload and of the total, and the ledger.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

EMPTY_ROOT = hashlib.sha256(b"").digest()


def leaf_hash(leaf: bytes | memoryview) -> bytes:
    """Hash of one leaf's content, 32 bytes."""
    h = hashlib.sha256(b"\0")
    h.update(leaf)
    return h.digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def root(hashes: Sequence[bytes]) -> bytes:
    """Root over leaf hashes, 32 bytes; linear time, also for trees that are not full."""
    if not hashes:
        return EMPTY_ROOT
    level = list(hashes)
    while len(level) > 1:  # an odd node at the end moves up unchanged, which gives the tree of the RFC
        paired = [_node(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = paired + level[len(level) & ~1 :]
    return level[0]


def path(hashes: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """Audit path of leaf ``index``, from the leaf upwards (RFC 6962, section 2.1.1)."""
    if not 0 <= index < len(hashes):
        raise IndexError(f"leaf {index} of a tree of {len(hashes)}")
    level, found = list(hashes), []
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):
            found.append(level[sibling])
        paired = [_node(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level, index = paired + level[len(level) & ~1 :], index >> 1
    return tuple(found)


def verify(leaf: bytes, index: int, count: int, proof: Sequence[bytes], expected_root: bytes) -> bool:
    """Does ``proof`` show the leaf hash ``leaf`` at ``index`` of a tree of ``count`` leaves with this root?"""
    if not 0 <= index < count:
        return False
    node, rest = leaf, list(proof)
    while count > 1:
        sibling = index ^ 1
        if sibling < count:
            if not rest:
                return False
            other = rest.pop(0)
            node = _node(other, node) if index & 1 else _node(node, other)
        index, count = index >> 1, count + 1 >> 1
    return not rest and node == expected_root
