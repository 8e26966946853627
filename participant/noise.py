"""Secret chance for private training: which records are in a batch, and the noise, from AES-256-CTR.

torch's generator on the CPU takes 32 bits of a seed, so whoever has the output can try all of them; and there is no
other cryptographic generator for torch any more (torchcsprng ended in 2021). Here each stream has a key of its own from
the system, which cannot be set, saved, copied into another process or seen.
"""

from __future__ import annotations

import math
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Numbers made at a time, which bounds the extra memory.
TILE = 1 << 16
#: Gaussians that are summed into one: more than two, so that the low bits of the result no longer tell the uniform
#: numbers it came from (Holohan & Braghin 2021, arXiv 2107.10138; attacks on the single one in Jin et al. 2021,
#: arXiv 2112.05307).
SUMMED = 4


class SecretRandom:
    """One stream of secret random numbers, under one fresh key."""

    def __init__(self) -> None:
        # The zero counter is right because the key is used for this stream only.
        self._stream = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
        self._process = os.getpid()

    def uniform(self, count: int) -> Floats:
        """(count,) float64, uniform in (0, 1): odd multiples of 2^-53, so neither end is ever reached.

        Raises:
            RuntimeError: in another process than the one that made the key; the two would share their numbers.
        """
        if os.getpid() != self._process:
            raise RuntimeError("secret randomness does not survive a fork: its numbers would be used twice")
        words = np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")
        # 52 bits, since with 53 the largest and a half would round to 1.
        return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def normal(self, count: int) -> Floats:
        """(count,) float64, standard Gaussians: each the sum of four by Box and Muller, halved."""
        found = np.empty(count)
        for low in range(0, count, TILE):
            part = found[low : low + TILE]
            part[:] = self._tile(len(part))
        return found

    def _tile(self, count: int) -> Floats:
        half = (count + 1) // 2
        total = np.zeros(2 * half)
        for _ in range(SUMMED):
            radius = np.sqrt(-2 * np.log(self.uniform(half)))
            angle = 2 * math.pi * self.uniform(half)
            total[:half] += radius * np.cos(angle)
            total[half:] += radius * np.sin(angle)
        return total[:count] / math.sqrt(SUMMED)

    def subset(self, size: int, rate: float) -> list[int]:
        """Which of ``size`` records are in a batch, ascending: each with probability ``rate``, by itself (Poisson)."""
        return [int(i) for i in np.nonzero(self.uniform(size) < rate)[0]]
