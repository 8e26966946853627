"""How CPU time grows with the length of the vector and with the cohort, and what 128 members cost one of them."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.costs import Costs
from bench.masking import keys
from bench.meter import cpu_seconds
from bench.own import BITS, WEIGHT, RoundDriver, quantizer_of
from bench.rows import Bar, Row, row
from bench.scale import Scale
from coordinator.executor import Threads
from coordinator.unmask import fold, unmask
from coordinator.work import FOLD
from privacy.secagg.masking import engine_for, masked_blocks
from privacy.secagg.transcript import Streams

Seconds = dict[tuple[int, int], float]

#: What counts as linear: an exponent of one, and some noise.
LINEAR = 1.1


def protocol_cpu(costs: Costs) -> tuple[float, float]:
    """CPU seconds of the protocol's cryptography in one round: at one member, at the coordinator."""
    member = sum(costs.row(name)["member_ms"] for name in costs.member_ms)
    coordinator = sum(sum(spent) for spent in costs.coordinator_ms.values())
    return member / 1e3, coordinator / 1e3


def _median_cpu(call: Callable[[], object], repeats: int) -> float:
    spent = []
    for _ in range(repeats):
        began = cpu_seconds()
        call()
        spent.append(cpu_seconds() - began)
    return statistics.median(spent)


def participant_cpu(size: int, n: int, spool: Path, repeats: int) -> float:
    """CPU seconds to quantise, mask and pack a vector in a cohort of ``n``; the packed vector is in ``spool`` then."""
    delta = np.random.default_rng(0).normal(0, 0.01, size).astype(np.float32)
    quantizer, engine = quantizer_of(size, n), engine_for(size, n, BITS)
    plus, minus = keys(n - n // 2), keys(n // 2)

    def work() -> None:
        with spool.open("wb") as file:
            tiles = quantizer.tiles(delta, WEIGHT, {"weight": WEIGHT})
            for block in masked_blocks(tiles, plus, minus, BITS, engine):
                file.write(block)

    return _median_cpu(work, repeats)


def coordinator_cpu(size: int, n: int, streams: Streams, spool: Path, repeats: int) -> float:
    """CPU seconds to fold the uploads of all but one of ``n`` members, a few at a time, and to unmask the sum."""
    length = quantizer_of(size, n).total_size
    generations = [spool.with_name(f"sum-{i}.bin") for i in range(2)]
    total = spool.with_name("total.bin")

    def work() -> None:
        total.unlink(missing_ok=True)
        base: Path | None = None
        for number, first in enumerate(range(0, n - 1, FOLD)):
            target = generations[number % 2]
            fold(base, [spool] * min(FOLD, n - 1 - first), target, length, BITS)
            base = target
        assert base is not None
        unmask(base, total, streams, length, BITS, Threads(), {}, lambda _first, _hashes: None)

    return _median_cpu(work, repeats)


def exponents(seconds: Mapping[tuple[int, int], float]) -> tuple[float, float]:
    """(p, q) of the least-squares fit seconds = a * d**p * n**q, on logarithms; keys are (d, n)."""
    left = [[1.0, math.log(d), math.log(n)] for d, n in seconds]
    found = np.linalg.lstsq(np.array(left), np.log(list(seconds.values())), rcond=None)[0]
    return float(found[1]), float(found[2])


def measure_cells(scale: Scale, sizes: Sequence[int], members: Sequence[int]) -> tuple[Seconds, Seconds]:
    """CPU seconds of one participant and of the coordinator for every (d, n)."""
    ours: Seconds = {}
    theirs: Seconds = {}
    repeats = 1 if scale.quick else 3
    with tempfile.TemporaryDirectory(dir=scale.scratch) as directory:
        spool = Path(directory) / "spool.bin"
        for n in members:
            driver = RoundDriver(n)
            member_s, coordinator_s = protocol_cpu(driver.run())
            for size in sizes:
                ours[size, n] = participant_cpu(size, n, spool, repeats) + member_s
                theirs[size, n] = coordinator_cpu(size, n, driver.streams, spool, repeats) + coordinator_s
    return ours, theirs


def growth(scale: Scale) -> list[Row]:
    """One row for each (d, n) and side, and the fitted exponents."""
    sizes = (1 << 16, 1 << 17) if scale.quick else (1_000_000, 4_000_000, 16_000_000)
    members = (4, 6) if scale.quick else (5, 10, 20, 40)
    sides = dict(zip(("participant", "coordinator"), measure_cells(scale, sizes, members), strict=True))
    notes = {
        "participant": "quantise, mask, pack, and the cryptography of a round at one member",
        "coordinator": "fold all uploads but one, unmask, and the cryptography of a round",
    }
    found = []
    for side, cells in sides.items():
        by_d, by_n = exponents(cells)
        about = f"{min(sizes):,} to {max(sizes):,} coordinates, {min(members)} to {max(members)} members: {notes[side]}"
        largest = {"n": max(members), "d": max(sizes)}
        linear_in_n = Bar("value", most=LINEAR) if side == "participant" else None
        found += [
            row(
                f"growth_{side}_d",
                by_d,
                "exponent",
                bar=Bar("value", 2 - LINEAR, LINEAR),
                note=f"of d; {about}",
                **largest,
            ),
            row(f"growth_{side}_n", by_n, "exponent", bar=linear_in_n, note=f"of n; {about}", **largest),
        ]
        found += [row(f"growth_{side}", s, "CPU s", n=n, d=d, note=notes[side]) for (d, n), s in cells.items()]
    return found


def shamir_128(scale: Scale) -> list[Row]:
    """Shamir, signatures, sealing and every other check of a whole round, at one of 128 members."""
    n = scale.members(128)
    driver = RoundDriver(n)
    seconds, _ = protocol_cpu(driver.run())
    bar, d = Bar("value", most=2.0), driver.context.upload_length * 8 // BITS
    note = "all cryptography of a round at one member but its vector's: Shamir, signatures, sealing, the transcript"
    return [row("shamir_128", seconds, "CPU s", n=n, d=d, bar=bar, note=note)]
