"""One arm over the network: a coordinator and the sites' daemons as processes, gRPC over mutual TLS on loopback.

It trains what ``one-freeze_a`` trains, from the same plan file, so its release must be that arm's but for rounding,
which is by chance. Its bytes are counted by the coordinator's service, where they leave and arrive.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from demo.compare import secure_equals_plain
from demo.federation import Federation
from participant.data import Examples
from privacy.adapter import Tensors, load_peft
from privacy.errors import UserError
from privacy.plan import PlanFile

SITE = """threads = 1
device = "cpu"
keep_plain_vector = true
[models]
"{base_name}" = "{base}"
[datasets.{dataset}]
path = "{data}"
format = "jsonl"
[policy]
plans = ["{plan}"]
min_cohort = 2
"""
TIMEOUT_S = 3600.0
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def federate(
    place: Path, plan: PlanFile, base: Path, parts: Sequence[Examples], at_once: int = 2
) -> tuple[Tensors, dict[str, Any]]:
    """(release, facts of the round); directories, logs and the data of the sites are written below ``place``.

    Args:
        at_once: sites that train at the same time; the next starts when one waits for the round.

    Raises:
        UserError: a daemon ended without a release, or takes too long.
    """
    place.mkdir(parents=True)
    p, names = plan.plan, [f"site-{i + 1}" for i in range(len(parts))]
    r = p.round
    policy = {"max_colluders": r.max_colluders, "min_cohort": r.min_cohort, "min_survivors": r.min_survivors}
    files = {}
    for name, examples in zip(names, parts, strict=True):
        data = place / f"{name}.jsonl"
        _write(data, examples, p.data.labels)
        files[name] = SITE.format(
            base_name=p.base.name, base=base.resolve(), dataset=p.data.dataset, data=data.resolve(), plan=p.name
        )
    federation = Federation(place / "federation", names, policy, files, OFFLINE, name="evidence")
    federation.create()
    path = place / "plan.toml"
    path.write_bytes(plan.raw)
    try:
        federation.start_coordinator()
        federation.operator("plan", "submit", str(path))
        _run_sites(federation, names, at_once)
        shown = federation.show(p.name)
        facts = _facts(shown["rounds"], len(names)) | {"secure_is_plain": secure_equals_plain(federation, plan)}
    finally:
        federation.stop_all()
    return load_peft(Path(shown["release"]["adapter"])), facts


def _write(path: Path, examples: Examples, labels: Sequence[str]) -> None:
    rows = zip(examples.texts, examples.labels, strict=True)
    lines = [json.dumps({"text": text, "label": labels[label]}, ensure_ascii=False) for text, label in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _run_sites(federation: Federation, names: Sequence[str], at_once: int) -> None:
    """Start every site, a few training at a time, and wait until each has verified the release."""
    deadline, waiting = time.monotonic() + TIMEOUT_S, list(names)
    while waiting or any(federation.processes[name].poll() is None for name in names):
        started = [name for name in names if name in federation.processes]
        busy = [n for n in started if federation.processes[n].poll() is None and not _has_trained(federation, n)]
        if waiting and len(busy) < at_once:
            federation.start_site(waiting.pop(0), "--once")
            continue
        failed = [name for name in started if federation.processes[name].poll()]
        if failed:
            raise UserError(f"{failed[0]} ended without a release:\n{federation.log_tail(failed[0])}")
        if time.monotonic() > deadline:
            raise UserError(f"expected a release within {TIMEOUT_S:.0f} s, found none; logs: {federation.directory}")
        time.sleep(0.5)


def _has_trained(federation: Federation, name: str) -> bool:
    log = federation.directory / f"{name}.log"
    return log.exists() and " trained " in log.read_text(errors="replace")


def _facts(rounds: Sequence[dict[str, Any]], members: int) -> dict[str, Any]:
    """Bytes a site sends and receives over all rounds, mean; the cohort of the last one."""
    last = rounds[-1]
    if len(last["survivors"]) != members:
        raise UserError(f"expected {members} sites in the total, found {len(last['survivors'])}")
    traffic = [one for r in rounds for one in r["traffic"].values()]
    return {
        "attempts": len(rounds),
        "coordinates": last["coordinates"],
        "sent": float(sum(t["sent"] for t in traffic) / members),
        "received": float(sum(t["received"] for t in traffic) / members),
    }


def largest_difference(one: Tensors, other: Tensors) -> float:
    """Over all tensors, of one coordinate."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name].astype(np.float64) - other[name]).max()) for name in one)
