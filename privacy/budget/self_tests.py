"""The numbers of a self-test before private training, and what each must be within.

The site judges its own by them before it reads a record (``participant/self_test.py``); an auditor judges what the
ledger says again, so that a site that only writes ``passed`` shows no more than its numbers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation

#: Name of a check -> (least, most). Deviations are standard deviations, distances are in clipping norms C.
BOUNDS: dict[str, tuple[str, str]] = {
    "frozen_with_gradients": ("0", "0"),
    "trained_without_gradients": ("0", "0"),
    "sensitivity": ("0", "1.00001"),
    # The clipped sum of the same examples in other chunks; float32 alone gives 1e-6.
    "chunking": ("0", "0.001"),
    "not_finite": ("0", "0.001"),
    "empty_batch_sum": ("0", "0"),
    "empty_batch_unmoved": ("0", "0"),
    "noise_ks_p": ("1e-10", "1"),
    "noise_size_deviations": ("0", "6"),
    "noise_repeat_deviations": ("0", "6"),
    "sampler_repeats": ("0", "0"),
    "sampler_inclusions_deviations": ("0", "7"),
    "sampler_sizes_deviations": ("0", "7"),
}


def within(name: str, value: Decimal | float) -> bool:
    """Is the value of a check one that a sound training gives? Not a number never is."""
    least, most = BOUNDS[name]
    number = Decimal(value)
    return number.is_finite() and Decimal(least) <= number <= Decimal(most)


def lack_of(selftest: Mapping[str, object] | None) -> str:
    """What is missing or out of bounds in a ledger's result of a self-test; empty if nothing is."""
    if selftest is None:
        return "without a self-test"
    if selftest.get("passed") is not True:
        return "after a self-test that did not pass"
    if missing := [name for name in BOUNDS if name not in selftest]:
        return f"after a self-test without {', '.join(missing)}"
    for name, (least, most) in BOUNDS.items():
        if not _holds(name, selftest[name]):
            span = f"from {least} to {most}" if least != most else least
            return f"after a self-test with {name} = {str(selftest[name])[:20]!r}, expected {span}"
    return ""


def _holds(name: str, text: object) -> bool:
    """Only a decimal string counts, as the site writes it: a JSON number or ``true`` is none."""
    if not isinstance(text, str) or len(text) > 400:
        return False
    try:
        return within(name, Decimal(text))
    except InvalidOperation:
        return False
