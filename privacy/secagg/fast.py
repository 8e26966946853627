"""The mask streams of ``privacy/secagg/masking.py`` on VAES instructions, the add fused in (extra ``fast``).

Two AES blocks a register, eight registers in flight, and the words go from the cipher into the sum without being
written anywhere: about one and a half times OpenSSL's own speed. The code is built as LLVM's intermediate language,
which numba compiles for this processor when it is first asked for. With the import that takes 0.7 s of CPU and 48 MB of
private memory. It is not cached on disk, where another program could replace code that handles secret seeds.

The round keys come from AESKEYGENASSIST, so no table is indexed by key bytes and seeds that stay secret may use it
(FIPS 197, section 5.2). Whoever uses this module goes through ``masking.best_engine``, which imports it where numba is
installed and takes pyca's cipher wherever there is an :func:`objection`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, codegen, config, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from privacy.secagg.masking import Apply, MaskStreams, pyca, word_bytes

FLAGS = ("aes", "avx2", "vaes")
ROUNDS = 14  # of AES-256
KEY_BYTES = 16 * (ROUNDS + 1)  # one expanded key
GROUP = 256  # bytes of keystream at a time: eight registers of two AES blocks
#: Groups that all streams run over before the next: 16 KiB, so the sum stays in the first-level cache.
CHUNK = 64
#: Below it the 128-bit counter needs only its low half.
LAST_START = 1 << 60

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
PAIR, QUAD = ir.VectorType(I64, 2), ir.VectorType(I64, 4)
KEY_WORDS = ir.VectorType(I32, 4)


def _declare(builder: Any, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _shuffle(builder: Any, first: Any, second: Any, places: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(I32, len(places)), list(places))
    return builder.shuffle_vector(first, second, mask)


def _at(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    """A pointer to a value of type ``kind`` at an address, an i64."""
    return builder.inttoptr(builder.add(address, ir.Constant(I64, offset)), kind.as_pointer())


def _load(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    value = builder.load(_at(builder, address, offset, kind))
    value.align = 1
    return value


def _store(builder: Any, value: Any, address: Any, offset: int) -> None:
    builder.store(value, _at(builder, address, offset, value.type)).align = 1


# --- the key schedule -------------------------------------------------------------------------------------------------


def _next_key(builder: Any, before: Any, last: Any, constant: int) -> Any:
    """Four more words of the schedule: ``before`` are the eighth to fifth words back, ``last`` the four before them.

    With a round constant (FIPS 197, 5.2: i mod Nk = 0) the assist word is RotWord(SubWord) ^ Rcon, else SubWord alone.
    """
    name = "llvm.x86.aesni.aeskeygenassist"
    made = builder.call(
        _declare(builder, name, PAIR, [PAIR, I8]), [builder.bitcast(last, PAIR), ir.Constant(I8, constant)]
    )
    words = builder.bitcast(made, KEY_WORDS)
    word = 3 if constant else 2
    found = builder.xor(before, _shuffle(builder, words, words, [word] * 4))
    zero = ir.Constant(KEY_WORDS, [0] * 4)
    for places in ([4, 0, 1, 2], [4, 4, 0, 1], [4, 4, 4, 0]):  # before, moved up by one, two and three words
        found = builder.xor(found, _shuffle(builder, before, zero, places))
    return found


def _key_schedule(_context: Any, _key: Any, _target: Any) -> Any:
    """(address of 32 bytes, address of KEY_BYTES): AES-256 key expansion."""

    def build(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        key, target = arguments
        low, high = _load(builder, key, 0, KEY_WORDS), _load(builder, key, 16, KEY_WORDS)
        found = [low, high]
        for i in range(ROUNDS - 1):
            constant = 0 if i % 2 else 1 << i // 2
            found.append(_next_key(builder, found[-2], found[-1], constant))
        for i, words in enumerate(found):
            _store(builder, words, target, 16 * i)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


_expand = intrinsic(_key_schedule)

# --- the cipher and the sum -------------------------------------------------------------------------------------------


def _round_keys(builder: Any, key: Any) -> list[Any]:
    """The round keys at an address, each twice in a register."""
    halves = [_load(builder, key, 16 * i, PAIR) for i in range(ROUNDS + 1)]
    return [_shuffle(builder, half, half, [0, 1, 0, 1]) for half in halves]


def _keystream(builder: Any, keys: Sequence[Any], counter: Any) -> list[Any]:
    """GROUP bytes of AES-CTR from a 64-bit block counter on, in eight registers."""
    encrypt = _declare(builder, "llvm.x86.aesni.aesenc.256", QUAD, [QUAD, QUAD])
    finish = _declare(builder, "llvm.x86.aesni.aesenclast.256", QUAD, [QUAD, QUAD])
    swap = _declare(builder, "llvm.bswap.v4i64", QUAD, [QUAD])
    first = builder.insert_element(ir.Constant(QUAD, [0] * 4), counter, ir.Constant(I32, 1))
    first = builder.insert_element(first, counter, ir.Constant(I32, 3))
    blocks = []
    for i in range(8):  # a counter block is big-endian: its high half is zero, its low half the counter
        counters = builder.add(first, ir.Constant(QUAD, [0, 2 * i, 0, 2 * i + 1]))
        blocks.append(builder.xor(builder.call(swap, [counters]), keys[0]))
    for key_of_round in keys[1:ROUNDS]:
        blocks = [builder.call(encrypt, [block, key_of_round]) for block in blocks]
    return [builder.call(finish, [block, keys[ROUNDS]]) for block in blocks]


def _combine(builder: Any, blocks: Sequence[Any], tile: Any, width: int, operation: str) -> None:
    """Add or subtract a group's words, ``width`` bytes each, to or from the uint32 at ``tile``."""
    count = 32 // width  # words in a register
    wide = ir.VectorType(I32, count)
    for i, block in enumerate(blocks):
        words = builder.bitcast(block, ir.VectorType(ir.IntType(8 * width), count))
        if width == 2:
            words = builder.zext(words, wide)
        before = _load(builder, tile, 4 * count * i, wide)
        _store(builder, getattr(builder, operation)(before, words), tile, 4 * count * i)


def _times(builder: Any, value: Any, factor: int) -> Any:
    return builder.mul(value, ir.Constant(I64, factor))


def _over(builder: Any, width: int, operation: str, tile: Any, counter: Any, key: Any, groups: tuple[Any, Any]) -> None:
    """One stream, over groups low to high - 1 of a tile whose first AES block is ``counter``."""
    keys = _round_keys(builder, key)
    low, high = groups
    with cgutils.for_range(builder, high, low) as group:
        blocks = _keystream(builder, keys, builder.add(counter, _times(builder, group.index, GROUP // 16)))
        target = builder.add(tile, _times(builder, group.index, GROUP // width * 4))
        _combine(builder, blocks, target, width, operation)


def _all_streams(builder: Any, width: int, arguments: Sequence[Any]) -> None:
    """All streams over CHUNK groups, then over the next."""
    tile, groups, keys, plus, minus, counter = arguments
    one = ir.Constant(I64, CHUNK)
    chunks = builder.sdiv(builder.add(groups, ir.Constant(I64, CHUNK - 1)), one)
    with cgutils.for_range(builder, chunks) as chunk:
        low = _times(builder, chunk.index, CHUNK)
        beyond = builder.add(low, one)
        bounds = low, builder.select(builder.icmp_signed("<", beyond, groups), beyond, groups)
        for operation, first, count in (("add", ir.Constant(I64, 0), plus), ("sub", plus, minus)):
            with cgutils.for_range(builder, count) as stream:
                key = builder.add(keys, _times(builder, builder.add(first, stream.index), KEY_BYTES))
                _over(builder, width, operation, tile, counter, key, bounds)


# --- compiled ---------------------------------------------------------------------------------------------------------


@cache
def _schedule() -> Any:
    """(address of a key, address of KEY_BYTES): the key schedule."""

    def expand_key(key: int, target: int) -> None:
        _expand(key, target)

    return numba.njit("void(int64, int64)", nogil=True)(expand_key)


@cache
def _kernel(width: int) -> Any:
    """(address of a tile, groups in it, address of expanded keys, how many to add, to subtract, first AES block)."""

    def streams(_context: Any, _tile: Any, _groups: Any, _keys: Any, _plus: Any, _minus: Any, _counter: Any) -> Any:
        def build(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            _all_streams(builder, width, arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), build

    run = intrinsic(streams)

    def kernel(tile: int, groups: int, keys: int, plus: int, minus: int, counter: int) -> None:
        run(tile, groups, keys, plus, minus, counter)

    return numba.njit("void(int64, int64, int64, int64, int64, int64)", nogil=True)(kernel)


def expand(key: bytes) -> NDArray[np.uint8]:
    """The expanded key (FIPS 197, section 5.2) of an AES-256 key, (KEY_BYTES,) uint8."""
    if len(key) != 32:
        raise ValueError(f"expected an AES-256 key of 32 bytes, found {len(key)}")
    source, target = np.frombuffer(key, np.uint8), np.empty(KEY_BYTES, np.uint8)
    _schedule()(source.ctypes.data, target.ctypes.data)
    return target


# --- the engine -------------------------------------------------------------------------------------------------------


class _Vaes:
    """All streams of one vector; ``at`` is the byte of the keystream that comes next."""

    def __init__(self, plus: Sequence[bytes], minus: Sequence[bytes], bits: int, start: int) -> None:
        self.width = word_bytes(bits)
        self.at = start * self.width
        self.counts = len(plus), len(minus)
        self.keys = np.array([expand(key) for key in (*plus, *minus)], np.uint8)
        self.kernel = _kernel(self.width)
        self.few: NDArray[np.uint32] = np.empty(GROUP // self.width, np.uint32)

    def __call__(self, tile: NDArray[np.uint32]) -> None:
        if tile.dtype != np.uint32 or not (tile.flags.c_contiguous and tile.flags.writeable):
            raise ValueError(f"expected a contiguous, writable tile of uint32, found {tile.dtype}")
        group = GROUP // self.width
        head = min(len(tile), -self.at % 16 // self.width)  # what an AES block begun before still holds
        groups = (len(tile) - head) // group
        body = head + groups * group
        self._ends(tile[:head])
        self._run(tile[head:body], groups)
        self._ends(tile[body:])

    def _run(self, tile: NDArray[np.uint32], groups: int) -> None:
        if groups:
            self.kernel(tile.ctypes.data, groups, self.keys.ctypes.data, *self.counts, self.at // 16)
            self.at += groups * GROUP

    def _ends(self, tile: NDArray[np.uint32]) -> None:
        """A part too short, or not placed, for the kernel: a whole group goes to a buffer, and part of it is used."""
        if not len(tile):
            return
        self.few[:] = 0
        self.kernel(self.few.ctypes.data, 1, self.keys.ctypes.data, *self.counts, self.at // 16)
        skipped = self.at % 16 // self.width
        tile += self.few[skipped : skipped + len(tile)]
        self.at += len(tile) * self.width


def vaes(plus: Sequence[bytes], minus: Sequence[bytes], bits: int, start: int) -> Apply:
    """The engine on VAES instructions; the same words as :func:`privacy.secagg.masking.pyca`."""
    if start * word_bytes(bits) % 16 or not 0 <= start < LAST_START:
        raise ValueError(f"expected a start on an AES block below {LAST_START}, found coordinate {start}")
    return _Vaes(plus, minus, bits, start)


# --- whether it may be used -------------------------------------------------------------------------------------------


def missing() -> list[str]:
    """Instruction sets that the kernel needs and that numba does not compile for here."""
    features = codegen.get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    return [flag for flag in FLAGS if f"+{flag}" not in features.split(",")]


def objection() -> str:
    """Why the engine must not be used here, or nothing."""
    if missing():  # asked before anything is compiled: LLVM ends the process over an instruction it may not use
        return f"the processor has no {', '.join(missing())}"
    return "" if _agrees() else "its self-test failed"


def _agrees() -> bool:
    """Compare with pyca: both widths, starts about the bounds of 32-bit counters, tails, addition and subtraction."""
    keys = [bytes(range(i, i + 32)) for i in (0, 77, 131, 224)]
    for bits in (16, 24):
        for start in (0, 8, (1 << 34) - 40, (1 << 36) + 16):
            found = np.arange(2 * CHUNK * GROUP // 4, dtype=np.uint32)
            expected = found.copy()
            for engine, tile in ((vaes, found), (pyca, expected)):
                streams = MaskStreams(keys[:3], keys[3:], bits, start, engine)
                for low, high in ((0, 1), (1, 7), (7, 131), (131, 4099), (4099, len(tile))):
                    streams.apply(tile[low:high])
            if not np.array_equal(found, expected):
                return False
    return True
