"""The engine on VAES instructions: the same words as pyca's cipher, or it is not used."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from privacy.secagg import masking
from privacy.secagg.masking import BLOCK, FAST_FROM, TILE, WIDTHS, MaskStreams, apply_in_threads, masked_blocks, pyca

fast = pytest.importorskip("privacy.secagg.fast", reason="the extra 'fast' is not installed")
vaes_needed = pytest.mark.skipif(bool(fast.missing()), reason=f"the processor has no {', '.join(fast.missing())}")

KEYS = st.lists(st.binary(min_size=32, max_size=32), max_size=3)
WIDE = (1 << 34) - 8  # coordinates: a few AES blocks below 2**32 of them, for words of four bytes


@pytest.fixture(autouse=True)
def _chosen_anew() -> Iterator[None]:
    masking.best_engine.cache_clear()
    yield
    masking.best_engine.cache_clear()


def noise(size: int) -> NDArray[np.uint32]:
    return np.arange(size, dtype=np.uint32) * np.uint32(2654435761)


@vaes_needed
def test_the_key_schedule_is_that_of_fips_197() -> None:
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")  # appendix A.3
    words = fast.expand(key).tobytes().hex(" ", 4).split()
    assert len(words) == 60
    assert words[:8] == key.hex(" ", 4).split()
    assert words[8:16] == [
        "9ba35411",
        "8e6925af",
        "a51a8b5f",
        "2067fcde",
        "a8b09c1a",
        "93d194cd",
        "be49846e",
        "b75d5b9a",
    ]
    assert words[56:] == ["fe4890d1", "e6188d0b", "046df344", "706c631e"]


@vaes_needed
@pytest.mark.parametrize("key", [b"", bytes(16), bytes(33)])
def test_a_key_of_another_length_is_refused(key: bytes) -> None:
    with pytest.raises(ValueError, match=f"32 bytes, found {len(key)}"):
        fast.vaes([key], [], 24, 0)


@vaes_needed
@settings(max_examples=150, deadline=None)
@given(
    plus=KEYS,
    minus=KEYS,
    bits=st.sampled_from(WIDTHS),
    start=st.integers(0, (1 << 57) - 1).map(lambda i: 8 * i),
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=6),
)
@example([bytes(32)], [], 24, WIDE, [300])  # over the bound of a 32-bit counter
@example([], [bytes(32)], 16, 2 * WIDE, [900])
@example([bytes(32)], [b"k" * 32], 24, 0, [63, 64, 65, 1, 3, 4])
@example([bytes(32)], [b"k" * 32], 16, 8, [127, 128, 129, 1, 7, 8])
@example([bytes(32)], [b"k" * 32], 32, 0, [fast.CHUNK * 64 + 64, fast.CHUNK * 64])
def test_the_words_are_those_of_pyca(
    plus: list[bytes], minus: list[bytes], bits: int, start: int, sizes: list[int]
) -> None:
    found, expected = noise(sum(sizes)), noise(sum(sizes))
    for engine, tile in ((fast.vaes, found), (pyca, expected)):
        streams, at = MaskStreams(plus, minus, bits, start, engine), 0
        for size in sizes:
            streams.apply(tile[at : at + size])
            at += size
    assert np.array_equal(found, expected)


@vaes_needed
@pytest.mark.parametrize("bits", WIDTHS)
def test_whole_vectors_are_masked_as_by_pyca(bits: int) -> None:
    vector, plus, minus = noise(TILE + 3 * BLOCK + 5).view(np.int32), [b"a" * 32, b"b" * 32], [b"c" * 32]
    assert list(masked_blocks(vector, plus, minus, bits, fast.vaes)) == list(masked_blocks(vector, plus, minus, bits))


@vaes_needed
def test_nothing_beside_the_tile_is_written() -> None:
    whole = noise(1000)
    MaskStreams([bytes(32)], [], 24, 0, fast.vaes).apply(whole[100:901])
    assert np.array_equal(whole[:100], noise(1000)[:100])
    assert np.array_equal(whole[901:], noise(1000)[901:])


@vaes_needed
def test_threads_do_what_one_stream_does() -> None:
    found, expected = noise(5 * TILE + 1), noise(5 * TILE + 1)
    apply_in_threads(found, [b"a" * 32], [b"b" * 32], 24, start=8, workers=3, engine=fast.vaes)
    MaskStreams([b"a" * 32], [b"b" * 32], 24, 8).apply(expected)
    assert np.array_equal(found, expected)


@vaes_needed
@pytest.mark.parametrize(
    "tile",
    [noise(64)[::2], noise(64).astype(np.int64), np.frombuffer(bytes(256), np.uint32)],
    ids=["with gaps", "of another type", "read-only"],
)
def test_a_tile_that_the_kernel_cannot_write_is_refused(tile: NDArray[np.uint32]) -> None:
    with pytest.raises(ValueError, match="contiguous, writable tile of uint32"):
        fast.vaes([bytes(32)], [], 24, 0)(tile)


@vaes_needed
@pytest.mark.parametrize("start", [2, -8, fast.LAST_START])
def test_a_start_that_the_counter_cannot_express_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match=f"found coordinate {start}"):
        fast.vaes([bytes(32)], [], 24, start)


# --- the choice ---


@vaes_needed
def test_it_is_chosen_where_it_works_and_only_for_work_that_repays_its_loading() -> None:
    assert masking.best_engine() == (fast.vaes, "VAES kernel, checked against pyca/cryptography")
    assert masking.engine_for(FAST_FROM) is fast.vaes
    assert masking.engine_for(FAST_FROM - 1) is pyca


def test_a_processor_without_the_instructions_gets_pyca(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast.codegen, "get_host_cpu_features", lambda: "+aes,+avx2,-vaes,+sse2")
    monkeypatch.setattr(fast, "_agrees", lambda: pytest.fail("compiled for a processor that cannot run it"))
    assert masking.best_engine() == (pyca, "pyca/cryptography; no VAES kernel: the processor has no vaes")


def test_what_numba_is_told_to_compile_for_counts_not_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast.config, "CPU_FEATURES", "+sse2")
    assert fast.missing() == ["aes", "avx2", "vaes"]


@vaes_needed
@pytest.mark.parametrize("bits", [16, 24])
@pytest.mark.parametrize("from_coordinate", [0, 1 << 34])
def test_a_kernel_that_errs_is_not_used(monkeypatch: pytest.MonkeyPatch, bits: int, from_coordinate: int) -> None:
    right = fast.vaes

    def wrong(plus: list[bytes], minus: list[bytes], of_bits: int, start: int) -> masking.Apply:
        made = right(plus, minus, of_bits, start)

        def apply(tile: NDArray[np.uint32]) -> None:
            made(tile)
            if of_bits == bits and start >= from_coordinate and len(tile) > 1000:
                tile[-1] ^= np.uint32(1)

        return apply

    monkeypatch.setattr(fast, "vaes", wrong)
    assert masking.best_engine() == (pyca, "pyca/cryptography; no VAES kernel: its self-test failed")


def test_a_compiler_that_fails_does_not_stop_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise RuntimeError("no executable memory")

    monkeypatch.setattr(fast, "objection", broken)
    assert masking.best_engine() == (
        pyca,
        "pyca/cryptography; no VAES kernel: its extra cannot be loaded: no executable memory",
    )


def test_without_the_extra_pyca_is_taken_and_the_reason_named() -> None:
    script = (
        "import sys; sys.modules['numba'] = None\n"
        "from privacy.secagg import masking\n"
        "engine, reason = masking.best_engine()\n"
        "assert engine is masking.pyca\n"
        "print(reason)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "pyca/cryptography; no VAES kernel: its extra cannot be loaded: import of numba halted"
    )


def test_where_executable_memory_is_forbidden_pyca_is_taken() -> None:
    script = (
        "import ctypes, sys\n"
        "if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0): sys.exit(77)\n"  # PR_SET_MDWE, as MemoryDenyWriteExecute
        "from privacy.secagg import masking\n"
        "sys.exit(masking.best_engine()[0] is not masking.pyca)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    if done.returncode == 77:
        pytest.skip("this kernel cannot forbid executable memory")
    assert done.returncode == 0, done.stderr.decode()


def test_importing_the_masks_does_not_import_the_compiler() -> None:
    script = (
        "import sys; from privacy.secagg.masking import masked_blocks, engine_for; import numpy as np\n"
        "list(masked_blocks(np.zeros(9, np.int32), [bytes(32)], [], 24, engine_for(9)))\n"
        "print('numba' in sys.modules, 'llvmlite' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@vaes_needed
def test_the_kernel_lets_other_threads_run() -> None:
    tile, streams = np.zeros(64 * TILE, np.uint32), fast.vaes([bytes(32)] * 64, [], 24, 0)
    streams(tile[:64])  # compiled by now
    ran, done = 0, threading.Event()

    def work() -> None:
        streams(tile)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():
        ran += 1
        done.wait(0.001)
    thread.join()
    assert ran > 10, "2 GiB of keystream in one call take longer than that"
