"""Shamir's secret sharing over GF(p), p = 2**256 + 297, the smallest prime above 2**256 (Shamir 1979).

Any 32-byte secret is a field element; a share is 33 bytes. Python integers are not constant-time: shares are
computed at the site that owns the secret, where nobody else measures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import urandom

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33


def share(
    secret: bytes, threshold: int, points: Sequence[int], rand: Callable[[int], bytes] = urandom
) -> dict[int, bytes]:
    """Split a 32-byte secret so that any ``threshold`` of the shares give it back and fewer say nothing.

    Args:
        points: distinct x coordinates, never 0 (there lies the secret).

    Returns:
        x -> share, 33 bytes, big-endian.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"expected a secret of {SECRET_BYTES} bytes, found {len(secret)}")
    if not 1 <= threshold <= len(points) or len(set(points)) != len(points) or min(points) < 1:
        raise ValueError("expected distinct positive points, at least as many as the threshold")
    # 48 bytes mod p: statistical distance from uniform below 2**-127 a coefficient.
    coefficients = [int.from_bytes(rand(48), "big") % PRIME for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "big"))
    return {x: _horner(coefficients, x).to_bytes(SHARE_BYTES, "big") for x in points}


def _horner(coefficients: Sequence[int], x: int) -> int:
    y = 0
    for coefficient in coefficients:
        y = (y * x + coefficient) % PRIME
    return y


def lagrange_at_zero(points: Sequence[int]) -> list[int]:
    """Lagrange coefficients at 0 for distinct non-zero ``points``; compute once per set of holders."""
    found = []
    for i, x in enumerate(points):
        numerator = denominator = 1
        for j, other in enumerate(points):
            if i != j:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - x) % PRIME
        found.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return found


def is_share(value: bytes) -> bool:
    """Is this the canonical encoding of a field element?"""
    return len(value) == SHARE_BYTES and int.from_bytes(value, "big") < PRIME


def combine(shares: Mapping[int, bytes], coefficients: Mapping[int, int] | None = None) -> bytes | None:
    """Interpolate the secret at 0 from x -> share; ``None`` if the value does not fit 32 bytes.

    Args:
        coefficients: x -> Lagrange coefficient for exactly these points, where many secrets share the holders.
    """
    points = sorted(shares)
    weights = coefficients or dict(zip(points, lagrange_at_zero(points), strict=True))
    value = sum(weights[x] * int.from_bytes(shares[x], "big") for x in points) % PRIME
    return value.to_bytes(SECRET_BYTES, "big") if value < 1 << 256 else None
