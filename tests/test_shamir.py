"""Shamir's scheme over 2**256 + 297: any t shares give the secret, t - 1 say nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.secagg.shamir import PRIME, SHARE_BYTES, combine, is_share, lagrange_at_zero, share
from tests.simulation import seeded

SECRETS = st.binary(min_size=32, max_size=32)


def fixed(*coefficients: int) -> Callable[[int], bytes]:
    """Random bytes that give exactly these coefficients, the highest power first."""
    values = iter(coefficients)
    return lambda count: next(values).to_bytes(count, "big")


def value_at(points: dict[int, int], x: int) -> int:
    """The polynomial through ``points``, at x: plain Lagrange interpolation, for comparison."""
    total = 0
    for i, y in points.items():
        factor = 1
        for j in points:
            if j != i:
                factor = factor * (x - j) * pow(i - j, -1, PRIME) % PRIME
        total += y * factor
    return total % PRIME


def test_the_prime_is_the_smallest_above_2_to_the_256() -> None:
    def is_probably_prime(n: int) -> bool:
        return all(pow(base, n - 1, n) == 1 for base in (2, 3, 5, 7, 11, 13, 17, 19, 23))

    assert is_probably_prime(PRIME)
    assert not any(is_probably_prime(n) for n in range(2**256 + 1, PRIME))


def test_shares_are_the_values_of_the_polynomial_highest_coefficient_drawn_first() -> None:
    secret = (7).to_bytes(32, "big")
    shares = share(secret, 3, [1, 2, 10], fixed(5, 11))  # 5 x^2 + 11 x + 7
    assert {x: int.from_bytes(s, "big") for x, s in shares.items()} == {1: 23, 2: 49, 10: 617}


def test_coefficients_are_48_random_bytes_reduced_once() -> None:
    asked: list[int] = []

    def rand(count: int) -> bytes:
        asked.append(count)
        return (PRIME + 5).to_bytes(count, "big")

    assert share(bytes(32), 3, [1, 2, 3], rand)[1] == (10).to_bytes(33, "big")
    assert asked == [48, 48]


def test_arithmetic_wraps_at_the_prime() -> None:
    shares = share(b"\xff" * 32, 2, [1, 2], fixed(PRIME - 1))
    assert int.from_bytes(shares[1], "big") == 2**256 - 2
    assert combine(shares) == b"\xff" * 32


@settings(max_examples=30, deadline=None)
@given(SECRETS, st.integers(1, 9), st.integers(0, 4), st.integers(0, 2**32))
def test_any_t_shares_give_the_secret(secret: bytes, t: int, spare: int, seed: int) -> None:
    points = [2 * i + 1 for i in range(t + spare)]
    shares = share(secret, t, points, seeded(f"shamir {seed}"))
    for chosen in itertools.islice(itertools.combinations(points, t), 20):
        assert combine({x: shares[x] for x in chosen}) == secret


@settings(max_examples=30, deadline=None)
@given(SECRETS, SECRETS, st.integers(2, 8))
def test_t_minus_1_shares_fit_every_secret_alike(secret: bytes, other: bytes, t: int) -> None:
    points = list(range(1, t + 1))
    shares = share(secret, t, points, seeded("one missing"))
    known = {x: int.from_bytes(shares[x], "big") for x in points[:-1]}
    last = value_at(known | {0: int.from_bytes(other, "big")}, t)
    assert combine({x: shares[x] for x in points[:-1]} | {t: last.to_bytes(SHARE_BYTES, "big")}) == other


def test_fewer_than_t_shares_give_something_else() -> None:
    shares = share(bytes(range(32)), 4, [1, 2, 3, 4], seeded("few"))
    assert combine({x: shares[x] for x in (1, 2, 3)}) != bytes(range(32))


def test_one_share_of_a_fixed_secret_is_uniform() -> None:
    rand = seeded("uniform")
    counts = [0] * 256
    for _ in range(2000):
        for byte in share(bytes(32), 2, [1, 2], rand)[2][1:]:
            counts[byte] += 1
    expected = 2000 * 32 / 256
    chi_square = sum((count - expected) ** 2 / expected for count in counts)
    assert 160 < chi_square < 370  # 255 degrees of freedom: beyond this with probability below 1e-5


def test_shares_beyond_the_threshold_agree_with_interpolation() -> None:
    shares = {x: int.from_bytes(s, "big") for x, s in share(bytes(range(32)), 3, range(1, 8), seeded("more")).items()}
    known = {x: shares[x] for x in (1, 2, 3)}
    assert all(value_at(known, x) == y for x, y in shares.items())


def test_coefficients_computed_once_serve_many_secrets() -> None:
    points = [2, 5, 9]
    weights = dict(zip(points, lagrange_at_zero(points), strict=True))
    for secret in (bytes(32), bytes(range(32)), b"\xff" * 32):
        shares = share(secret, 3, points, seeded("many"))
        assert combine(shares, weights) == combine(shares) == secret


def test_a_value_beyond_32_bytes_is_no_secret() -> None:
    assert combine({1: (2**256).to_bytes(33, "big")}) is None
    assert combine({1: (2**256 - 1).to_bytes(33, "big")}) == b"\xff" * 32


SHARES = {
    "zero": (bytes(33), True),
    "the largest field element": ((PRIME - 1).to_bytes(33, "big"), True),
    "the prime itself": (PRIME.to_bytes(33, "big"), False),
    "all ones": (b"\xff" * 33, False),
    "a byte short": (bytes(32), False),
    "a byte long": (bytes(34), False),
    "nothing": (b"", False),
}


@pytest.mark.parametrize(("value", "good"), SHARES.values(), ids=SHARES.keys())
def test_a_share_has_one_encoding(value: bytes, good: bool) -> None:
    assert is_share(value) == good


BUGS: dict[str, tuple[bytes, int, Sequence[int]]] = {
    "a secret of 31 bytes": (bytes(31), 2, [1, 2]),
    "a point at zero, where the secret lies": (bytes(32), 2, [0, 1]),
    "a point twice": (bytes(32), 2, [1, 1]),
    "fewer points than the threshold": (bytes(32), 3, [1, 2]),
    "a threshold of none": (bytes(32), 0, [1, 2]),
}


@pytest.mark.parametrize(("secret", "t", "points"), BUGS.values(), ids=BUGS.keys())
def test_wrong_arguments_are_refused(secret: bytes, t: int, points: Sequence[int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        share(secret, t, points, seeded("wrong"))
