"""Float deltas <-> integers that can be summed exactly (protocol section 8).

A site scales its clipped delta by its weight, rounds stochastically and sums happen modulo 2**b; with N * Qmax <
2**(b-1) nothing ever wraps, so the centre-lifted total **is** the integer sum. Counts and losses ride along as extra
coordinates ("extras"), each cut into limbs that are as small as any other coordinate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import urandom

import numpy as np
from numpy.typing import NDArray

from privacy.errors import ProtocolError
from privacy.plan import Plan
from privacy.secagg.masking import TILE, keystream

#: Losses travel in steps of 2**-16, up to 2**8: times the weight they are an integer sum.
LOSS_SCALE = 1 << 16
MAX_LOSS = 1 << 8
#: Coordinates in float64 at a time: all that one step touches stays in cache.
STEP = 1 << 14


Words = Callable[[int], NDArray[np.unsignedinteger]]


@dataclass(frozen=True)
class Extra:
    """A masked integer beside the delta: only its sum over the survivors is learned."""

    name: str
    maximum: int  # largest value one member may send


@dataclass(frozen=True)
class Quantizer:
    """The public rule, from plan and roster alone; the same at every member.

    Attributes:
        size: d, coordinates of the delta.
        cohort: N, the largest cohort the plan allows; fixes Qmax whatever the real cohort is.
        clip: the delta is clipped to [-clip, clip] before scaling.
        max_weight: W_max; a site's weight w scales its delta by w / W_max.
    """

    size: int
    bits: int
    cohort: int
    clip: float
    max_weight: int
    extras: tuple[Extra, ...]

    @property
    def qmax(self) -> int:
        """Largest |q|: N * Qmax < 2**(b-1)."""
        return ((1 << self.bits - 1) - 1) // self.cohort

    @property
    def limb_bits(self) -> int:
        """floor(log2(Qmax + 1)): the bits of an extra that fit one coordinate."""
        return (self.qmax + 1).bit_length() - 1

    def limbs(self, extra: Extra) -> int:
        """Coordinates that one extra takes."""
        return -(-extra.maximum.bit_length() // self.limb_bits)

    @property
    def total_size(self) -> int:
        """d + extras, the length of the vector that is masked."""
        return self.size + sum(map(self.limbs, self.extras))

    def quantize(
        self,
        delta: NDArray[np.float32],
        weight: int,
        extras: Mapping[str, int],
        rand: Callable[[int], bytes] = urandom,
    ) -> NDArray[np.int32]:
        """As :meth:`tiles`, the whole vector at once: (d + extras,) int32."""
        vector = np.empty(self.total_size, np.int32)
        at = 0
        for tile in self.tiles(delta, weight, extras, rand):
            vector[at : at + len(tile)] = tile
            at += len(tile)
        return vector

    def tiles(
        self,
        delta: NDArray[np.float32],
        weight: int,
        extras: Mapping[str, int],
        rand: Callable[[int], bytes] = urandom,
    ) -> Iterator[NDArray[np.int32]]:
        """q = floor(Qmax / clip * w / W_max * clipped delta + u), u uniform in [0, 1) from AES-CTR under rand(32).

        Args:
            delta: (d,) float32.
            weight: 1 <= w <= W_max.
            extras: name -> value for every extra.

        Returns:
            The tiles of a vector (d + extras,) int32, every |q| <= Qmax, checked. The next tile overwrites the last.

        Raises:
            ValueError: not finite, wrong shape, weight or extra out of range; raised before the first tile.
        """
        if delta.shape != (self.size,):
            raise ValueError(f"expected a delta of shape ({self.size},), found {delta.shape}")
        if not all(np.isfinite(delta[low : low + TILE]).all() for low in range(0, self.size, TILE)):
            raise ValueError("expected a finite delta, found NaN or infinity")
        if not 1 <= weight <= self.max_weight:
            raise ValueError(f"expected a weight from 1 to {self.max_weight}, found {weight}")
        return self._tiles(delta, weight, np.array(self._encode_extras(extras), np.int32), keystream(rand(32), 32))

    def _tiles(
        self, delta: NDArray[np.float32], weight: int, limbs: NDArray[np.int32], uniform: Words
    ) -> Iterator[NDArray[np.int32]]:
        buffer = np.empty(min(TILE, self.total_size), np.int32)
        step = self._step(weight, uniform)
        for low in range(0, self.total_size, TILE):
            tile = buffer[: min(TILE, self.total_size - low)]
            part = delta[low : low + len(tile)]
            for at in range(0, len(part), STEP):
                step(part[at : at + STEP], tile[at : min(at + STEP, len(part))])
            first = low + len(part) - self.size  # of the limbs that stand in this tile
            tile[len(part) :] = limbs[first : first + len(tile) - len(part)]
            if max(int(tile.max()), -int(tile.min())) > self.qmax:
                raise RuntimeError("a quantised coordinate exceeds Qmax")
            yield tile

    def _step(self, weight: int, uniform: Words) -> Callable[[NDArray[np.float32], NDArray[np.int32]], None]:
        """Quantises up to STEP coordinates of a delta into a part of a tile."""
        scale = self.qmax / self.clip * (weight / self.max_weight)
        bound = self.qmax * (weight / self.max_weight)
        scaled, random = np.empty(STEP), np.empty(STEP)  # float32 has too few bits for Qmax of b = 32

        def step(delta: NDArray[np.float32], found: NDArray[np.int32]) -> None:
            x, u = scaled[: len(delta)], random[: len(delta)]
            np.multiply(delta, scale, out=x, dtype=np.float64)
            # The product is clipped, not only the delta: clip * scale may round to just above Qmax.
            np.clip(x, -bound, bound, out=x)
            np.multiply(uniform(len(delta)), 2.0**-32, out=u, dtype=np.float64)
            np.add(x, u, out=x)
            np.floor(x, out=x)
            # With few members x takes so many bits that the sum with u may round up to the next integer.
            np.minimum(x, self.qmax, out=x)
            np.copyto(found, x, casting="unsafe")

        return step

    def _encode_extras(self, values: Mapping[str, int]) -> list[int]:
        limbs: list[int] = []
        for extra in self.extras:
            value = values[extra.name]
            if not 0 <= value <= extra.maximum:
                raise ValueError(f"expected {extra.name} from 0 to {extra.maximum}, found {value}")
            limbs += [value >> k * self.limb_bits & (1 << self.limb_bits) - 1 for k in range(self.limbs(extra))]
        return limbs

    def lift(self, total: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Centre-lift a sum mod 2**b to signed integers, (d + extras,)."""
        unused = np.uint32(32 - self.bits)
        signed = (total << unused).view(np.int32)
        signed >>= unused.astype(np.int32)  # an arithmetic shift: it brings the sign down
        return signed.astype(np.int64)

    def checked(self, total: NDArray[np.uint32], survivors: int) -> NDArray[np.int64]:
        """The integer sum in an unmasked total of |U3| = ``survivors`` members, (d + extras,) int64.

        Raises:
            ProtocolError: a coordinate beyond |U3| * Qmax, which no honest sum has: the total is garbled.
        """
        if total.shape != (self.total_size,):
            raise ProtocolError(f"expected a total of {self.total_size} coordinates, found {total.shape}")
        lifted = self.lift(total)
        self.check_part(lifted, 0, survivors)
        return lifted

    def check_part(self, lifted: NDArray[np.int64], low: int, survivors: int) -> None:
        """Check the part of a lifted total that begins at coordinate ``low``; raises as :meth:`checked`."""
        largest = max(int(lifted.max(initial=0)), -int(lifted.min(initial=0)))
        if largest > survivors * self.qmax or (lifted[max(0, self.size - low) :] < 0).any():
            raise ProtocolError(f"garbled total: a coordinate lies beyond |U3| * Qmax = {survivors * self.qmax}")

    def decode(self, total: NDArray[np.uint32], survivors: int) -> Decoded:
        """Mean delta and extras of one unmasked total (d + extras,) uint32, exact; raises as :meth:`checked`."""
        return self.decode_sum(self.checked(total, survivors), survivors)

    def decode_sum(self, lifted: NDArray[np.int64], survivors: int) -> Decoded:
        """Mean delta and extras of the sum of checked totals over ``survivors`` members of one or more cohorts.

        Raises:
            ProtocolError: a total weight that so many members cannot have.
        """
        extras = self.decode_extras(lifted[self.size :], survivors)
        weight = extras["weight"]
        return Decoded(self.decode_part(lifted[: self.size], weight), weight, extras)

    def decode_extras(self, limbs: NDArray[np.int64], survivors: int) -> dict[str, int]:
        """The summed extras from the last coordinates of checked totals, ``weight`` among them; raises as
        :meth:`decode_sum`."""
        extras, at = {}, 0
        for extra in self.extras:
            count = self.limbs(extra)
            extras[extra.name] = sum(int(v) << k * self.limb_bits for k, v in enumerate(limbs[at : at + count]))
            at += count
        weight = extras["weight"]
        if not survivors <= weight <= survivors * self.max_weight:
            raise ProtocolError(f"garbled total: {survivors} members cannot have a total weight of {weight}")
        return extras

    def decode_part(self, lifted: NDArray[np.int64], weight: int) -> NDArray[np.float32]:
        """The weighted mean over any part of the delta's coordinates in a sum of checked totals."""
        # Elementwise float64 operations only, which IEEE 754 fixes: every site computes the same bits.
        mean = lifted * (self.clip * self.max_weight)
        mean /= self.qmax * float(weight)
        return mean.astype(np.float32)


@dataclass(frozen=True)
class Decoded:
    """What a total says: the weighted mean delta (d,) float32, the total weight, and the summed extras."""

    mean: NDArray[np.float32]
    weight: int
    extras: dict[str, int]

    @property
    def loss(self) -> float:
        """Weighted mean training loss of the cohort, nats per example."""
        return mean_loss(self.extras)


def mean_loss(extras: Mapping[str, int]) -> float:
    """Weighted mean training loss in summed extras, nats per example."""
    return extras["loss"] / LOSS_SCALE / extras["weight"]


def quantizer_for(plan: Plan, size: int) -> Quantizer:
    """The quantiser of a plan whose adapter has ``size`` trained coordinates."""
    r = plan.round
    max_weight = r.max_weight if plan.aggregation.weights == "examples" else 1
    extras = (Extra("weight", max_weight), Extra("loss", max_weight * MAX_LOSS * LOSS_SCALE))
    quantizer = Quantizer(size, r.bits, r.max_cohort, r.clip, max_weight, extras)
    if quantizer.cohort * quantizer.qmax >= 1 << quantizer.bits - 1:
        raise RuntimeError("N * Qmax reaches 2**(b-1)")
    return quantizer


def weighted_loss(loss: float, weight: int) -> int:
    """A mean loss in nats, times the weight, as the integer that is summed."""
    return round(min(max(loss, 0.0), float(MAX_LOSS)) * LOSS_SCALE) * weight
