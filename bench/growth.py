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
#: Members that check the outcome where the protocol's cryptography is measured: a median of three.
CONFIRMING = 3


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


def slope(seconds: Mapping[int, float]) -> float:
    """p of the least-squares fit seconds = a * x**p, on logarithms; keys are x."""
    return float(np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0])


def measure_cells(scale: Scale, sizes: Sequence[int], members: Sequence[int]) -> tuple[Seconds, Seconds]:
    """CPU seconds of one participant and of the coordinator for every (d, n); d = 0 is the protocol alone."""
    ours: Seconds = {}
    theirs: Seconds = {}
    repeats = 1 if scale.quick else 3
    with tempfile.TemporaryDirectory(dir=scale.scratch) as directory:
        spool = Path(directory) / "spool.bin"
        for n in members:
            driver = RoundDriver(n, CONFIRMING)
            ours[0, n], theirs[0, n] = protocol_cpu(driver.run())
            for size in sizes:
                ours[size, n] = participant_cpu(size, n, spool, repeats)
                theirs[size, n] = coordinator_cpu(size, n, driver.streams, spool, repeats)
    return ours, theirs


def growth(scale: Scale) -> list[Row]:
    """The fitted exponents of each side, and one row for each (d, n)."""
    sizes = (1 << 16, 1 << 17) if scale.quick else (1_000_000, 4_000_000, 16_000_000)
    members = (4, 6) if scale.quick else (5, 10, 20, 40)
    ours, theirs = measure_cells(scale, sizes, members)
    masking, folding = "quantise, mask and pack", "fold all uploads but one and unmask"
    return _side("participant", ours, masking) + _side("coordinator", theirs, folding)


def _side(side: str, cells: Seconds, work: str) -> list[Row]:
    """Rows of one side. The protocol's cryptography does not depend on d, so it is fitted alone."""
    members, sizes = sorted({n for _, n in cells}), sorted({d for d, _ in cells})
    by_d, by_n = exponents({key: seconds for key, seconds in cells.items() if key[0]})
    fits = {"d": (by_d, sizes[-1], work), "n": (by_n, sizes[-1], work)}
    fits["protocol_n"] = (slope({n: cells[0, n] for n in members}), 0, "the cryptography of a round")
    found = []
    for name, (exponent, d, what) in fits.items():
        bar = Bar("value", most=LINEAR) if name == "d" or side == "participant" else None
        note = (
            f"of {name[-1]}, fitted over n = {members[0]} to {members[-1]}, d = {sizes[1]:,} to {sizes[-1]:,}: {what}"
        )
        found.append(row(f"growth_{side}_{name}", exponent, "exponent", n=members[-1], d=d, bar=bar, note=note))
    for (d, n), seconds in sorted(cells.items()):
        note = work if d else "the cryptography of a round"
        found.append(row(f"growth_{side}", seconds, "CPU s", n=n, d=d, note=note))
    return found


def shamir_128(scale: Scale) -> list[Row]:
    """Shamir, signatures, sealing and every other check of a whole round, at one of 128 members."""
    n = scale.members(128)
    driver = RoundDriver(n, CONFIRMING)
    seconds, _ = protocol_cpu(driver.run())
    bar, d = Bar("value", most=2.0), driver.context.upload_length * 8 // BITS
    note = "M1 to M11 at one member, without its vector: keys, Shamir, sealing, signatures, the transcript"
    return [row("shamir_128", seconds, "CPU s", n=n, d=d, bar=bar, note=note)]
