"""Fingerprints as words for a telephone call: the encoding of BIP-39, with its English list.

2,048 words, no two of which begin with the same four letters; 11 bits a word, and the last one checks the others. The
list is that of the package ``mnemonic`` (MIT licence, beside it). Wallets use the same words for secrets; nothing here
is one.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources

from privacy.encoding import digest

#: Bytes of a key's fingerprint: nobody finds a second key that has the first one's.
FINGERPRINT_BYTES = 16


@cache
def _words() -> tuple[str, ...]:
    return tuple(resources.files(__name__).joinpath("english.txt").read_text(encoding="ascii").split())


def in_words(value: bytes) -> str:
    """16 bytes as 12 words, 32 bytes as 24 (BIP-39, "Generating the mnemonic")."""
    checksum_bits = len(value) // 4
    bits = int.from_bytes(value + hashlib.sha256(value).digest()[:1], "big") >> (8 - checksum_bits)
    count = (8 * len(value) + checksum_bits) // 11
    return " ".join(_words()[bits >> 11 * (count - 1 - i) & 2047] for i in range(count))


def fingerprint(value: bytes) -> str:
    """A key or a certificate as twelve words."""
    return in_words(digest("fingerprint", value)[:FINGERPRINT_BYTES])
