"""The cheap checks on an outcome (protocol section 7): dealt blocks, and the random projection.

Random projection: every survivor opened its nonce with H(total), so r = AES-CTR(H(nonces, H(total))) over Z_2^64 is
known to nobody before the total was fixed. Each sends <r, x_i> hidden by pairwise zero-sum terms; the sum must be <r,
total>. A wrong coordinate escapes with 2^-(64-b), against a coordinator without colluders; one colluder can make any
total pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from privacy.encoding import digest, label, number
from privacy.secagg.keys import hkdf
from privacy.secagg.masking import BLOCK, tiles_of

WORD = 1 << 64

Integer = TypeVar("Integer", np.int32, np.int64)


def dealt_blocks(blocks: int, survivors: Sequence[int], me: int, colluders: int) -> tuple[int, ...]:
    """Blocks of the total that ``me`` recomputes: each block goes to c + 1 survivors, in turn.

    About c + 1 upload sizes of download per member; an honest one is among the c + 1 of every block.
    """
    count, place = len(survivors), list(survivors).index(me)
    each = min(colluders + 1, count)
    return tuple(e for e in range(blocks) if (place - e * each) % count < each)


def uncertified(blocks: int, checked: Mapping[int, Sequence[int]], colluders: int) -> int:
    """How many blocks fewer than c + 1 signers say they recomputed; 0 makes an outcome certificate.

    Args:
        checked: signer -> blocks, of signatures on one H(total).
    """
    counts = np.zeros(blocks, np.int64)
    for listed in checked.values():
        counts[[e for e in set(listed) if e < blocks]] += 1
    return int((counts < colluders + 1).sum())


def challenge(nonces: Mapping[int, bytes], total: bytes) -> bytes:
    """AES-256 key of r: a hash over all survivors' nonces and H(total)."""
    return digest("projection", total, *(part for i in sorted(nonces) for part in (number(i), nonces[i])))


def project(key: bytes, vector: NDArray[Integer] | Iterable[NDArray[Integer]]) -> int:
    """<r, x> mod 2**64 of signed integers (d + extras,), r the AES-CTR stream of ``key`` in 64-bit words.

    The vector may come tile by tile; extra memory is some blocks.
    """
    encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    zeros = memoryview(bytes(8 * BLOCK))
    r, x = np.empty(BLOCK, "<u8"), np.empty(BLOCK, np.int64)
    found = 0
    for tile in tiles_of(vector):
        for low in range(0, len(tile), BLOCK):
            count = min(BLOCK, len(tile) - low)
            x[:count] = tile[low : low + count]
            encryptor.update_into(zeros[: 8 * count], r.data.cast("B")[: 8 * count])
            found += int(np.dot(r[:count], x[:count].view(np.uint64)))  # wraps mod 2**64, as it must
    return found % WORD


def zero_sum_term(me: int, seeds: Mapping[int, bytes], key: bytes) -> int:
    """The sum of +-PRF(r_ij, H(r)) over the other survivors, mod 2**64; over all members it is zero.

    Args:
        seeds: other survivor -> pair seed; the lower id adds.
    """
    found = 0
    for other, seed in seeds.items():
        low, high = sorted((me, other))
        term = int.from_bytes(hkdf(seed, key, label("projection-term", number(low), number(high)), 8), "little")
        found += term if me == low else -term
    return found % WORD
