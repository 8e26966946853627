"""Signed bodies: Ed25519 over domain label, message type, sender, header hash and canonical encoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.encoding import digest, encode, label, number
from privacy.secagg.keys import verify_signature
from privacy.secagg.shapes import check_length

SIGNATURE_BYTES = 64


B = TypeVar("B")


@dataclass(frozen=True)
class Signed(Generic[B]):
    """A body with its sender and Ed25519 signature; transcript hashes cover the body, since a signer can make many."""

    sender: int
    body: B
    signature: bytes

    def __post_init__(self) -> None:
        check_length(self.signature, "signature", SIGNATURE_BYTES)

    def body_hash(self) -> bytes:
        """H(message): sender and body, without the signature."""
        return digest("body", type(self.body).__name__.encode(), number(self.sender), encode(self.body))


def signing_input(sender: int, body: object, header_hash: bytes) -> bytes:
    """The signed bytes: domain label, message type, sender, header hash, canonical encoding of the body."""
    return label("signature", type(body).__name__.encode(), number(sender), header_hash, encode(body))


def sign(key: Ed25519PrivateKey, sender: int, body: B, header_hash: bytes) -> Signed[B]:
    """Sign ``body`` as member ``sender`` in the round of this header."""
    return Signed(sender, body, key.sign(signing_input(sender, body, header_hash)))


def has_valid_signature(message: Signed[B], public: bytes, header_hash: bytes) -> bool:
    """Did the owner of ``public`` sign this body, as this sender, in the round of this header?"""
    return verify_signature(public, message.signature, signing_input(message.sender, message.body, header_hash))
