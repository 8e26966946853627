"""The coordinator's signed receipt for one upload, given only after it is durable."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.encoding import label, number
from privacy.secagg.keys import verify_signature


def _input(round_id: bytes, member: int, root: bytes, length: int) -> bytes:
    return label("receipt", round_id, number(member), root, number(length))


def sign_receipt(key: Ed25519PrivateKey, round_id: bytes, member: int, root: bytes, length: int) -> bytes:
    """Signature over (round id, member, Merkle root of the upload, its length in bytes)."""
    return key.sign(_input(round_id, member, root, length))


def is_receipt(public: bytes, signature: bytes, round_id: bytes, member: int, root: bytes, length: int) -> bool:
    """Did the coordinator with this key confirm this very upload?"""
    return verify_signature(public, signature, _input(round_id, member, root, length))
