"""The one threshold of a round, for Shamir and for signatures (protocol section 5)."""

from __future__ import annotations

MAX_COMPLETE_GRAPH = 128


def threshold(members: int, colluders: int) -> int:
    """t = floor((n + c) / 2) + 1 with n = |U1|.

    Two certified survivor lists would need 2 (t - c) <= n - c honest signers, impossible when 2 t > n + c: so each
    member's self-mask seed or its mask secret reaches t shares, never both (Bonawitz 2017, section 6.2, with c
    colluders beside a malicious coordinator).
    """
    return (members + colluders) // 2 + 1


def smallest_survivors(colluders: int, two_members_allowed: bool = False) -> int:
    """The least ``min_survivors`` that a policy may ask for.

    Even with c = 0 every member is curious and can subtract its own input, hence max(c, 1) + 2; two-member sums
    (each learns the other's delta) only where every site opted in.
    """
    return 2 if two_members_allowed and colluders == 0 else max(colluders, 1) + 2


def abort_quorum(members: int, colluders: int) -> int:
    """Signed "I have not released and never will" that keep a round shut: n + c - t + 1 (protocol section 6, a)."""
    return members + colluders - threshold(members, colluders) + 1
