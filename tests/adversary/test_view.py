"""What the coordinator sees of one masked input is uniform, and depends on the inputs through their sum alone.

Statistics cannot prove this; they find a mask left out, a stream used twice, a key that two pairs share, a bias in
the packing. The seeds are fixed, so that a result is the same in every run; limits are crossed by chance with
probability below 1e-6.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from participant.phases import Masking
from privacy.secagg.masking import MaskStreams, unpack
from tests.adversary.world import World
from tests.simulation import Simulation

SIZE = 40_000


def chi_square(counts: NDArray[np.int64]) -> float:
    """Pearson's statistic against equal probabilities."""
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def limits(cells: int) -> tuple[float, float]:
    """About five standard deviations of chi-square with ``cells - 1`` degrees of freedom."""
    freedom = cells - 1
    return freedom - 5 * (2 * freedom) ** 0.5, freedom + 6 * (2 * freedom) ** 0.5


def assert_uniform(values: NDArray[np.generic], cells: int) -> None:
    low, high = limits(cells)
    assert low < chi_square(np.bincount(values.astype(np.int64), minlength=cells)) < high


def uploads(vectors: dict[int, NDArray[np.int32]], bits: int = 24, n: int = 3) -> dict[int, NDArray[np.uint32]]:
    """The masked inputs of one round, unpacked, with the attacker's masks (those of colluders) still on."""
    world = World(n, size=SIZE, bits=bits)
    for i, vector in vectors.items():
        world.members[i].vector = vector
    world.dealt().uploaded()
    return {i: unpack(world.members[i].upload[0], SIZE, bits) for i in range(n)}


ZERO = np.zeros(SIZE, np.int32)


@pytest.mark.parametrize("bits", [16, 20, 24, 32])
def test_every_byte_of_a_masked_zero_vector_is_uniform(bits: int) -> None:
    world = World(3, size=SIZE, bits=bits)
    for member in world.members.values():
        member.vector = ZERO
    world.dealt().uploaded()
    for member in world.members.values():
        assert_uniform(np.frombuffer(member.upload[0], np.uint8), 256)


def test_masked_inputs_of_one_round_are_independent_in_pairs() -> None:
    found = uploads({0: ZERO, 1: ZERO, 2: ZERO})
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert_uniform((found[i] & 15) << 4 | found[j] & 15, 256)
        assert_uniform((found[i] + found[j]) >> 8 & 255, 256)
        assert_uniform((found[i] - found[j]) >> 8 & 255, 256)


def test_the_sum_of_all_masked_inputs_is_still_masked() -> None:
    """Pair masks cancel; self masks do not, so that nothing is learned before M9."""
    found = uploads({0: ZERO, 1: ZERO, 2: ZERO})
    assert_uniform((found[0] + found[1] + found[2]) >> 8 & 255, 256)


def test_neighbouring_coordinates_are_independent() -> None:
    found = uploads({0: ZERO})[0]
    assert_uniform((found[:-1] & 15) << 4 | found[1:] & 15, 256)


def test_a_colluder_that_takes_its_own_masks_off_learns_nothing() -> None:
    """Of five members 4 colludes: without its pair mask the inputs of 0 and 1 are still uniform, alone and together."""
    world = World(5, corrupt=[4], size=SIZE)
    for member in world.members.values():
        member.vector = ZERO
    world.dealt()
    streams = {}
    for i in range(5):
        phase_before = world.members[i].machine
        phase_before.handle(world.inbox(i))
        assert isinstance(phase_before.phase, Masking)
        streams[i] = phase_before.phase.streams
        world.members[i].mask()
    known = set(streams[4].plus) | set(streams[4].minus)
    peeled = {}
    for i in (0, 1):
        vector = unpack(world.members[i].upload[0], SIZE, 24)
        plus = [key for key in streams[i].plus if key in known]
        minus = [key for key in streams[i].minus if key in known]
        assert len(plus) + len(minus) == 1
        MaskStreams(minus, plus, 24).apply(vector)
        assert_uniform(vector >> 8 & 255, 256)
        peeled[i] = vector
    assert_uniform((peeled[0] + peeled[1]) >> 8 & 255, 256)


def histogram(vectors: dict[int, NDArray[np.int32]], mark: NDArray[np.int64]) -> NDArray[np.int64]:
    """Joint counts over coordinates: four bits each of two masked inputs and the marked half of the coordinates."""
    found = uploads(vectors)
    joint = (found[0] >> 20 & 7).astype(np.int64) << 4 | (found[1] >> 20 & 7).astype(np.int64) << 1 | mark
    return np.bincount(joint, minlength=256)


def test_equal_sums_give_equally_distributed_views() -> None:
    """Two ways to share out one sum, as different as can be: the joint view is the same, and blind to the inputs."""
    mark = np.arange(SIZE, dtype=np.int64) % 2
    big = np.where(mark == 1, 2_000_000, -2_000_000).astype(np.int32)
    one = histogram({0: big, 1: -big, 2: ZERO}, mark)
    other = histogram({0: -big, 1: big, 2: ZERO}, mark)
    used = one + other > 0
    both = one[used] + other[used]
    statistic = float(((one[used] - other[used]) ** 2 / both).sum())  # two samples of equal size
    low, high = limits(int(used.sum()))
    assert low < statistic < high
    for counts in (one, other):
        assert_uniform_cells = chi_square(counts[used])
        assert low < assert_uniform_cells < high


def test_the_same_inputs_under_other_keys_give_another_view_and_the_same_total() -> None:
    one, other = Simulation(3, size=1000).run(), Simulation(3, size=1000).run()
    assert one.total is not None
    assert other.total is not None
    assert np.array_equal(one.total & 0xFFFFFF, other.total & 0xFFFFFF)
    # Boxes are sealed with fresh randomness, so T2 differs, and with it every mask key.
    assert one.members[0].upload != other.members[0].upload
