"""The mask engines beside OpenSSL, tiles of several sizes, and what one site's whole work costs; one core, CPU time.

Run ``python -m bench.engines``; it takes half a minute. Everything is measured in turn, several times over, so that a
busy machine slows all alike; figures are medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from privacy.secagg.masking import BLOCK, TILE, Engine, MaskStreams, best_engine, masked_blocks, pyca
from privacy.secagg.quantize import Extra, Quantizer

SEEDS = 16
BITS = 24
COMMAND = ["openssl", "speed", "-mr", "-evp", "aes-256-ctr", "-bytes", "16384", "-seconds", "1"]


def openssl() -> float:
    """GB/s of AES-256-CTR in 16 KiB blocks, by OpenSSL's own measure."""
    done = subprocess.run(COMMAND, capture_output=True, text=True, check=True)
    return float(next(line for line in done.stdout.splitlines() if line.startswith("+F:")).split(":")[3]) / 1e9


def rate(vector: NDArray[np.uint32], keys: list[bytes], engine: Engine, tile: int = TILE) -> float:
    """GB/s of keystream expanded and added, ``tile`` coordinates at a time."""
    streams = MaskStreams(keys, [], BITS, engine=engine)
    began = time.thread_time()
    for low in range(0, len(vector), tile):
        streams.apply(vector[low : low + tile])
    return vector.nbytes * len(keys) / (time.thread_time() - began) / 1e9


def site(delta: NDArray[np.float32], keys: list[bytes], engine: Engine) -> float:
    """CPU seconds to quantise, mask and pack a delta."""
    rule = Quantizer(len(delta), BITS, SEEDS, 0.05, 100, (Extra("weight", 100),))
    began = time.thread_time()
    for _ in masked_blocks(rule.tiles(delta, 50, {"weight": 50}), keys[::2], keys[1::2], BITS, engine):
        pass
    return time.thread_time() - began


def peak(work: Callable[[], object]) -> float:
    """MiB that a piece of work takes at most."""
    tracemalloc.start()
    work()
    found = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=10_000_000, help="coordinates")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    began = time.process_time()
    fast, reason = best_engine()
    print(f"{reason}; found in {time.process_time() - began:.2f} s of CPU")
    engines = {"pyca": pyca} | ({} if fast is pyca else {"fast": fast})
    keys, vector = [os.urandom(32) for _ in range(SEEDS)], np.ones(arguments.size, np.uint32)
    delta = np.linspace(-0.05, 0.05, arguments.size, dtype=np.float32)
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(arguments.repeats):
        found["openssl, GB/s"].append(openssl())
        for name, engine in engines.items():
            for tile in (BLOCK // 2, BLOCK, TILE):
                found[f"{name}, tiles of {tile // 256} KiB, GB/s"].append(rate(vector, keys, engine, tile))
            found[f"{name}, quantise + mask + pack, s"].append(site(delta, keys, engine))
    reference = statistics.median(found["openssl, GB/s"])
    for name, values in found.items():
        middle = statistics.median(values)
        print(f"{name:40} {middle:7.3f}" + (f"  {middle / reference:.2f} of openssl" if "GB/s" in name else ""))
    print(f"{'peak extra memory of one site, MiB':40} {peak(lambda: site(delta, keys, pyca)):7.1f}")


if __name__ == "__main__":
    main()
