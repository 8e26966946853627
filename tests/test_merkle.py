"""Merkle trees against the known answers of RFC 6962 and against its recursive definition."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest

from privacy.merkle import EMPTY_ROOT, leaf_hash, path, root, verify

#: The tree of the reference tests of Certificate Transparency (RFC 6962).
LEAVES = [
    bytes.fromhex(leaf)
    for leaf in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
PATH_0_OF_8 = [
    "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
    "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
    "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
]
SIZES = range(1, 34)


def leaf_hashes(count: int) -> list[bytes]:
    return [leaf_hash(b"leaf %d" % i) for i in range(count)]


def rfc_root(hashes: Sequence[bytes]) -> bytes:
    """MTH of RFC 6962, section 2.1, word for word."""
    if len(hashes) == 1:
        return hashes[0]
    k = 1
    while 2 * k < len(hashes):
        k *= 2
    return hashlib.sha256(b"\1" + rfc_root(hashes[:k]) + rfc_root(hashes[k:])).digest()


def rfc_path(hashes: Sequence[bytes], index: int) -> list[bytes]:
    """PATH of RFC 6962, section 2.1.1, word for word."""
    if len(hashes) == 1:
        return []
    k = 1
    while 2 * k < len(hashes):
        k *= 2
    if index < k:
        return [*rfc_path(hashes[:k], index), rfc_root(hashes[k:])]
    return [*rfc_path(hashes[k:], index - k), rfc_root(hashes[:k])]


@pytest.mark.parametrize("count", range(9))
def test_roots_are_those_of_certificate_transparency(count: int) -> None:
    assert root([leaf_hash(leaf) for leaf in LEAVES[:count]]).hex() == ROOTS[count]


def test_the_path_is_that_of_certificate_transparency() -> None:
    assert [node.hex() for node in path([leaf_hash(leaf) for leaf in LEAVES], 0)] == PATH_0_OF_8


def test_the_empty_tree_has_the_hash_of_nothing() -> None:
    assert root([]) == EMPTY_ROOT == hashlib.sha256(b"").digest()


@pytest.mark.parametrize("count", SIZES)
def test_root_and_paths_follow_the_recursive_definition(count: int) -> None:
    hashes = leaf_hashes(count)
    assert root(hashes) == rfc_root(hashes)
    assert [list(path(hashes, i)) for i in range(count)] == [rfc_path(hashes, i) for i in range(count)]


@pytest.mark.parametrize("count", SIZES)
def test_every_path_verifies_at_its_own_place_only(count: int) -> None:
    hashes = leaf_hashes(count)
    top = root(hashes)
    for index in range(count):
        proof = path(hashes, index)
        places = [i for i in range(-1, count + 1) if verify(hashes[index], i, count, proof, top)]
        assert places == [index]


@pytest.mark.parametrize("count", SIZES)
def test_a_changed_path_does_not_verify(count: int) -> None:
    hashes = leaf_hashes(count)
    top = root(hashes)
    for index in range(count):
        proof = path(hashes, index)
        wrong = [(*proof, bytes(32))] + [(*proof[:i], bytes(32), *proof[i + 1 :]) for i in range(len(proof))]
        wrong += [proof[:-1], proof[1:]] if proof else []
        assert not any(verify(hashes[index], index, count, bad, top) for bad in wrong)
        assert not verify(bytes(32), index, count, proof, top)
        assert not verify(hashes[index], index, count, proof, bytes(32))


def test_a_node_cannot_pass_for_a_leaf() -> None:
    hashes = leaf_hashes(4)
    inner = hashes[0] + hashes[1]
    assert leaf_hash(inner) != root(hashes[:2])
    assert not verify(leaf_hash(inner), 0, 2, (root(hashes[2:]),), root(hashes))


@pytest.mark.parametrize("index", [-1, 3])
def test_a_path_outside_the_tree_is_a_bug_of_the_caller(index: int) -> None:
    with pytest.raises(IndexError, match="tree of 3"):
        path(leaf_hashes(3), index)
