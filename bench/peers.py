"""Against other people's secure aggregation, run from their published wheels on the same vectors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench.rows import Bar, Row, row
from bench.scale import PEERS, Scale, run_text
from privacy.errors import UserError

FLOWER, CKKS = "bench.peer_flower", "bench.peer_ckks"
#: Coordinates encrypted under CKKS: bytes grow by the coordinate, and ten million take minutes.
CKKS_SIZE = 1 << 20
#: Fresh processes of each side, in turns, and how often each repeats its task.
PROCESSES, REPEATS = 3, 3


def ask_own(task: str, **request: object) -> dict[str, Any]:
    """Run a task of ``bench/own.py`` in a fresh process."""
    return _ask(sys.executable, "bench.own", task, request)


def ask_peer(module: str, task: str, **request: object) -> dict[str, Any]:
    """Run a task of a peer in a fresh process of the peers' environment.

    Raises:
        UserError: that environment was not made.
    """
    if not PEERS.exists():
        raise UserError(f"expected {PEERS}, found nothing", hint="run scripts/peers.sh, as `make bench` does")
    return _ask(str(PEERS), module, task, request)


def _ask(python: str, module: str, task: str, request: dict[str, object]) -> dict[str, Any]:
    output = run_text([python, "-m", module, json.dumps({"task": task, **request})])
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def delta_file(scale: Scale) -> Path:
    """The vector that both sides get: (d,) float32, as small as a fine-tuned adapter's changes."""
    path = scale.scratch / f"delta-{scale.size}.npy"
    if not path.exists():
        np.save(path, np.random.default_rng(0).normal(0, 0.01, scale.size).astype(np.float32))
    return path


def alternate(scale: Scale, task: str, request: dict[str, object]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(ours, Flower's) reply to a task with the median CPU time over some fresh processes, taken in turns."""
    ours, theirs = [], []
    for _ in range(1 if scale.quick else PROCESSES):
        theirs.append(ask_peer(FLOWER, task, repeats=REPEATS, **request))
        ours.append(ask_own(task, repeats=REPEATS, **request))
    return _median_cpu(ours), _median_cpu(theirs)


def _median_cpu(replies: list[dict[str, Any]]) -> dict[str, Any]:
    return sorted(replies, key=lambda reply: float(reply["cpu_s"]))[len(replies) // 2]


def participant_mask(scale: Scale) -> list[Row]:
    """What one participant computes over its vector: CPU seconds and peak memory beside the vector itself."""
    n = scale.members(16)
    ours, theirs = alternate(scale, "participant", {"n": n, "vector": str(delta_file(scale))})
    note = "quantise, mask, pack into a spool file; reference: client functions of Flower's SecAgg+ (flwr 1.42.0)"
    sizes = {"n": n, "d": scale.size}
    return [
        row(
            "participant_mask",
            ours["cpu_s"],
            "CPU s",
            reference=theirs["cpu_s"],
            bar=Bar("ratio", most=1 / 8),
            note=note,
            **sizes,
        ),
        row(
            "participant_mask_memory",
            ours["extra_bytes"] / 2**20,
            "MiB",
            reference=theirs["extra_bytes"] / 2**20,
            bar=Bar("ratio", most=1 / 8),
            note="peak memory of the same beside the vector itself",
            **sizes,
        ),
    ]


def coordinator_unmask(scale: Scale) -> list[Row]:
    """What the coordinator computes once the shares are there: CPU seconds, one dropout."""
    n = scale.members(20)
    request = {"n": n, "size": scale.size, "directory": str(scale.scratch)}
    ours, theirs = alternate(scale, "coordinator", request)
    note = "open seeds, take masks off, hash, write durably, decode; reference: Flower's unmasking stage (flwr 1.42.0)"
    spent = ours["cpu_s"] + ours["opening_s"]
    bar = Bar("ratio", most=1 / 15)
    return [row("coordinator_unmask", spent, "CPU s", reference=theirs["cpu_s"], n=n, d=scale.size, bar=bar, note=note)]


def upload_bytes(scale: Scale) -> list[Row]:
    """Bytes a participant sends for each coordinate."""
    n, size = scale.members(16), min(CKKS_SIZE, scale.size)
    vector = str(delta_file(scale))
    ours = ask_own("upload", n=n, size=scale.size)["bytes"] / scale.size
    flower = ask_peer(FLOWER, "upload", n=n, vector=vector)["bytes"] / scale.size
    ckks = ask_peer(CKKS, "upload", vector=vector, size=size)["bytes"] / size
    bar = Bar("value", most=3.05)
    return [
        row(
            "upload_bytes",
            ours,
            "B/coordinate",
            reference=flower,
            n=n,
            d=scale.size,
            bar=bar,
            note="packed vector with chunk headers and all messages of a round; reference: Flower's serialised reply",
        ),
        row(
            "upload_bytes_ckks",
            ours,
            "B/coordinate",
            reference=ckks,
            n=n,
            d=scale.size,
            bar=bar,
            note=f"the same; reference: CKKS with NVFlare's parameters (tenseal 0.3.18), {size:,} coordinates",
        ),
    ]
