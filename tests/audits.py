"""Ledgers that an audit finds nothing in, and ways to write the lines of one that no honest site would write."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.budget.accounting import pld_epsilon, rdp, rdp_epsilon
from privacy.budget.anchors import Anchor
from privacy.budget.audit import LedgerReport, Terms, audit_ledger
from privacy.budget.entries import Claim, Commit, Facts, Policy, Reserve, Start, decimal_text
from privacy.budget.events import DpSgd
from privacy.budget.ledger import GENESIS, Ledger, line_hash
from privacy.budget.self_tests import BOUNDS
from privacy.secagg.keys import identity_public
from tests.ledgers import KEY, POLICY, SITE, job, new_ledger, release, reserve, resigned

MECHANISM = DpSgd("0.04", "1.2", "1", "0.00001", 75, 40, 1000)
SELF_TEST = dict.fromkeys(BOUNDS, "0") | {"sensitivity": "0.9999985", "noise_ks_p": "0.83", "passed": True}
NOW = datetime(2026, 11, 25, 12, 0, 30, tzinfo=UTC)
TERMS = Terms(now=NOW, with_opacus=False)


@cache
def numbers(mechanism: DpSgd) -> tuple[str, str]:
    """(PLD, RDP) of a job at its own delta, as a site claims them."""
    delta = float(mechanism.delta)
    return decimal_text(pld_epsilon([mechanism], delta)), decimal_text(rdp_epsilon([mechanism], delta))


def reservation(number: int, mechanism: DpSgd = MECHANISM, **changes: Any) -> Reserve:
    """An honest reservation under :data:`POLICY`."""
    pld, bound = numbers(mechanism)
    honest = {
        "rdp": {str(POLICY.order): decimal_text(rdp(mechanism, POLICY.order))},
        "claim": Claim(pld=pld, rdp=bound, accountant="dp-accounting", version="0.6.0"),
    }
    return reserve(number, mechanism, **(honest | changes))


def private_job(number: int, mechanism: DpSgd = MECHANISM) -> list[Facts]:
    """All lines of a private job that went well."""
    return [
        reservation(number, mechanism),
        Start(job=job(number), selftest=SELF_TEST),
        release(number),
        Commit(job=job(number), steps=mechanism.steps, round=1, root="44" * 32),
    ]


def honest(path: Path, jobs: int = 1, policy: Policy = POLICY) -> Ledger:
    """A ledger with private jobs and nothing wrong."""
    return new_ledger(path, *(line for number in range(1, jobs + 1) for line in private_job(number)), policy=policy)


def anchor_of(ledger: Ledger, size: int | None = None, time: str = "") -> Anchor:
    """What a witness of the ledger's first lines remembers."""
    from privacy.budget.ledger import head_of

    return Anchor(*head_of(ledger.entries, size), "the witness", time)


def audit(raw: bytes, *anchors: Anchor, terms: Terms = TERMS) -> LedgerReport:
    return audit_ledger(raw, SITE, source="news.jsonl", anchors=anchors, terms=terms)


def bodies(ledger: Ledger) -> list[dict[str, Any]]:
    """The lines of a ledger as JSON objects without signature, to be changed and written again."""
    found = [json.loads(entry.line) for entry in ledger.entries]
    for body in found:
        del body["signature"]
    return found


def rewritten(
    lines: Sequence[dict[str, Any]],
    key: Ed25519PrivateKey = KEY,
    write: Callable[[dict[str, Any]], bytes] | None = None,
) -> bytes:
    """A ledger of these bodies by a site that signs anything: sequence, chain and signatures hold."""
    raw, previous = b"", GENESIS
    for number, body in enumerate(lines):
        whole = body | {"seq": number, "previous": previous, "site": identity_public(key).hex()}
        line = write(whole) if write else resigned(whole, key)
        raw, previous = raw + line + b"\n", line_hash(line)
    return raw


def later(**delta: float) -> Terms:
    """The terms of an auditor who comes later."""
    return Terms(now=NOW + timedelta(**delta), with_opacus=False)
