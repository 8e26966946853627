"""Ledgers for tests: a site's key, clocks that stand where a test puts them, and lines with nothing but defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.budget.entries import (
    Abort,
    Claim,
    Commit,
    Facts,
    Policy,
    Register,
    Release,
    Reserve,
    Start,
    canonical,
    line_of,
    signed_bytes,
)
from privacy.budget.events import Mechanism, Unprotected
from privacy.budget.ledger import Ledger, Stamp
from privacy.secagg.keys import identity_public

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
SITE = identity_public(KEY)
DATASET = "ab" * 32
PLAN = "cd" * 32
POLICY = Policy(delta="0.00001", epsilon="8", order=3)


def stamp() -> Stamp:
    return Stamp("2026-11-25T12:00:00Z", "b00t".replace("t", "1"), 123456789)


def job(number: int) -> str:
    return f"{number:032x}"


def reserve(number: int, does: Mechanism | None = None, **changes: Any) -> Reserve:
    facts: dict[str, Any] = {
        "job": job(number),
        "plan": f"news-{number}",
        "plan_digest": f"{number:064x}",
        "stage": 1,
        "mechanism": (does or Unprotected()).to_json(),
        "rdp": {},
        "claim": Claim(pld="inf", rdp="inf", accountant="none", version="0"),
        "code": {"veilsum": "0.1.0"},
        "model": {"base": "ef" * 32},
    }
    return Reserve(**(facts | changes))


def start(number: int) -> Start:
    return Start(job=job(number), selftest=None)


def release(number: int, round_number: int = 1) -> Release:
    return Release(job=job(number), round=round_number, t2="11" * 32, vector_digest="22" * 32, coordinator="33" * 32)


def commit(number: int, round_number: int = 1) -> Commit:
    return Commit(job=job(number), steps=0, round=round_number, root="44" * 32)


def abort(number: int, reason: str = "no reason") -> Abort:
    return Abort(job=job(number), reason=reason)


def new_ledger(path: Path, *facts: Facts, policy: Policy = POLICY) -> Ledger:
    """A registered ledger with these lines."""
    ledger = Ledger(path, KEY, stamp)
    ledger.append(Register(name="news", policy=policy), dataset=DATASET)
    for entry in facts:
        ledger.append(entry)
    return ledger


def resigned(body: dict[str, Any], key: Ed25519PrivateKey = KEY) -> bytes:
    """A line with any content, rightly signed."""
    raw = canonical(body)
    return line_of(raw, key.sign(signed_bytes(raw)))
