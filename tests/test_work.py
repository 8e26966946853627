"""The coordinator's long work: generations of the running sum, shards of the total, a full disk, room for a round."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pytest

import coordinator.engine
import coordinator.running
import coordinator.space
import coordinator.unmask
import coordinator.work
import participant.patience
from coordinator import phases
from coordinator.executor import Threads
from coordinator.publish import CohortTotal
from coordinator.running import Running
from coordinator.unmask import SHARD_BLOCKS, Shard, fold, shard_count, unmask, unmask_shard
from coordinator.work import RETRY_S, Worker
from privacy import merkle
from privacy.audit import audit_release
from privacy.errors import ProtocolError
from privacy.files import DiskError
from privacy.secagg.masking import BLOCK, MaskStreams, block_sizes, pack, packed_length, pyca
from privacy.secagg.messages import MaskedInput
from privacy.secagg.signed import Signed
from privacy.secagg.transcript import Streams
from privacy.vectors import file_root, read_total
from tests.hostile import large_plan
from tests.on_disk import Direct, OnDisk, full_disk

T = TypeVar("T")
R = TypeVar("R")
BITS = 24


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnDisk]:
    monkeypatch.setattr(participant.patience, "BACKOFF_S", (0.0,))
    found = OnDisk(tmp_path, plan=large_plan())
    found.ready()
    yield found
    found.engine.store.close()


def files(world: OnDisk, pattern: str) -> list[str]:
    return sorted(p.name for p in world.engine.store.round_directory(world.rounds[-1].row.id).glob(pattern))


def stop_at(world: OnDisk, phase: type) -> None:
    """Everybody talks until there is work for the coordinator in this phase; it is not done."""
    for _ in range(100):
        for i in range(world.n):
            if not isinstance(world.phase, phase):
                world.tell(i)
        if isinstance(world.phase, phase):
            return
        world.work()
    raise AssertionError(f"expected {phase.__name__}, found {type(world.phase).__name__}")


def put_once(client: Direct, round_id: bytes, message: Signed[MaskedInput], content: bytes) -> None:
    """An upload whose site does not come back when the disk is full."""
    try:
        whole_put(client, round_id, message, content)
    except DiskError as error:
        raise ProtocolError("its site died") from error


whole_put = Direct.put

# --- the running sum --------------------------------------------------------------------------------------------------


def test_a_fold_is_the_sum_of_its_base_and_all_uploads(tmp_path: Path) -> None:
    size, rng = 2 * BLOCK + 77, np.random.default_rng(3)
    vectors = [rng.integers(0, 1 << BITS, size, np.uint32) for _ in range(3)]
    for i, vector in enumerate(vectors):
        tiles = [vector[low : low + BLOCK] for low in range(0, size, BLOCK)]
        (tmp_path / f"u{i}").write_bytes(b"".join(pack(tile, BITS) for tile in tiles))
    fold(None, [tmp_path / "u0"], tmp_path / "sum-1.u32", size, BITS)
    fold(tmp_path / "sum-1.u32", [tmp_path / "u1", tmp_path / "u2"], tmp_path / "sum-2.u32", size, BITS)
    assert np.array_equal(np.fromfile(tmp_path / "sum-2.u32", "<u4"), np.sum(vectors, axis=0, dtype=np.uint32))
    assert np.array_equal(np.fromfile(tmp_path / "sum-1.u32", "<u4"), vectors[0])


def test_uploads_are_folded_while_others_still_come(world: OnDisk) -> None:
    world.run(phases.Uploading)
    for i in range(4):
        world.tell(i)
    round_id = world.rounds[-1].row.id
    assert world.work()
    assert not world.work()
    row = world.engine.store.sum_row(round_id)
    assert (row.generation, row.members) == (1, frozenset(range(4)))
    world.tell(4)
    assert isinstance(world.phase, phases.Folding)
    assert world.work()
    assert isinstance(world.phase, phases.Signing)
    assert world.engine.store.sum_row(round_id).members == frozenset(range(5))
    assert files(world, "sum-*") == ["sum-2.u32"]
    world.run()
    world.assert_exact()


def test_a_crash_between_a_generation_and_its_name_counts_nothing_twice(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator.work, "FOLD", 2)
    world.run(phases.Uploading)
    world.tell(0)
    world.tell(1)
    world.work()
    world.tell(2)
    world.tell(3)
    with monkeypatch.context() as patch:
        patch.setattr(world.engine.store, "name_sum", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            world.work()
    assert files(world, "sum-*") == ["sum-1.u32", "sum-2.u32"]
    world.open()
    assert files(world, "sum-*") == ["sum-1.u32"]
    assert world.engine.store.sum_row(world.rounds[-1].row.id).members == {0, 1}
    world.run()
    assert world.totals()[0][0] == tuple(range(5))
    world.assert_exact()


def test_a_sum_over_other_members_than_u3_never_gets_a_list(world: OnDisk) -> None:
    stop_at(world, phases.Folding)
    world.engine.store.name_sum(world.rounds[-1].row.id, 7, {0, 1, 2, 3, 4, 5})
    with pytest.raises(RuntimeError, match="the running sum is over"):
        world.worker.work()
    assert isinstance(world.phase, phases.Folding)


def test_an_upload_whose_event_was_not_stored_is_not_folded(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the sum is over a member that may never come back, U3 is not, and the coordinator ends at every start."""
    world.run(phases.Uploading)
    for i in range(3):
        world.tell(i)
    store, running = world.engine.store, world.rounds[-1]
    folding = threading.Thread(target=lambda: world.worker._advance(running))

    def no_space(*_: object) -> None:
        folding.start()
        folding.join(1.0)
        raise DiskError("full")

    with monkeypatch.context() as patch:
        patch.setattr(store, "add_event", no_space)
        patch.setattr(Direct, "put", put_once)
        world.tell(3)
    folding.join()
    assert store.sum_row(running.row.id).members == {0, 1, 2}
    world.away = {3}
    world.run()
    assert world.totals()[0][0] == (0, 1, 2, 4)
    world.assert_exact()


# --- shards -----------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """A sum on disk and the masks in it."""

    source: Path
    target: Path
    streams: Streams
    size: int
    plain: np.ndarray[tuple[int], np.dtype[np.uint32]]


@pytest.fixture
def masked(tmp_path: Path) -> Job:
    size, rng = (2 * SHARD_BLOCKS + 3) * BLOCK + 5, np.random.default_rng(4)
    plain = rng.integers(0, 1 << BITS, size, np.uint32)
    streams = Streams((b"a" * 32, b"b" * 32), (b"c" * 32,))
    hidden = plain.copy()
    MaskStreams(streams.plus, streams.minus, BITS).apply(hidden)
    hidden.astype("<u4").tofile(tmp_path / "sum")
    return Job(tmp_path / "sum", tmp_path / "total.bin", streams, size, plain)


def test_the_total_is_the_sum_without_its_masks_whatever_the_number_of_threads(masked: Job) -> None:
    roots, kept = set(), dict[int, bytes]()
    for workers in (1, 2, 5):
        masked.target.unlink(missing_ok=True)
        roots.add(
            unmask(
                *(masked.source, masked.target, masked.streams, masked.size, BITS),
                *(Threads(workers), {}, kept.__setitem__),
            )
        )
        assert np.array_equal(read_total(masked.target, masked.size, BITS), masked.plain)
    assert roots == {file_root(masked.target, masked.size, BITS)}
    assert len(kept) == shard_count(masked.size) == 3
    assert b"".join(kept[first] for first in sorted(kept)) == b"".join(_leaves(masked))


def _leaves(job: Job) -> list[bytes]:
    lows = range(0, job.size, BLOCK)
    return [merkle.leaf_hash(pack(job.plain[low : low + BLOCK], BITS)) for low in lows]


class Counting:
    """An executor that counts its jobs and fails before job number ``stop``."""

    def __init__(self, stop: int) -> None:
        self.stop, self.done = stop, 0

    def run(self, work: Callable[[T], R], jobs: Sequence[T]) -> Iterator[tuple[T, R]]:
        for job in jobs:
            if self.done == self.stop:
                raise DiskError("full")
            yield job, work(job)
            self.done += 1


def test_an_unmasking_that_was_cut_short_goes_on_with_the_shards_that_are_missing(masked: Job) -> None:
    kept: dict[int, bytes] = {}
    arguments = (masked.source, masked.target, masked.streams, masked.size, BITS)
    with pytest.raises(DiskError):
        unmask(*arguments, Counting(1), kept, kept.__setitem__)
    assert not masked.target.exists()
    second = Counting(99)
    root = unmask(*arguments, second, dict(kept), kept.__setitem__)
    assert second.done == shard_count(masked.size) - 1
    assert root == file_root(masked.target, masked.size, BITS)
    assert unmask(*arguments, Counting(0), kept, kept.__setitem__) == root  # a crash came before it was published


def test_shards_without_their_file_are_not_believed(masked: Job) -> None:
    arguments = (masked.source, masked.target, masked.streams, masked.size, BITS)
    executor = Counting(99)
    root = unmask(*arguments, executor, {0: bytes(32 * SHARD_BLOCKS)}, lambda *_: None)
    assert executor.done == shard_count(masked.size)
    assert root == file_root(masked.target, masked.size, BITS)


def test_a_sum_that_ends_early_is_refused(masked: Job) -> None:
    with masked.source.open("rb+") as file:
        file.truncate(4 * (masked.size - 1))
    blocks = len(block_sizes(masked.size))
    masked.target.write_bytes(bytes(packed_length(masked.size, BITS)))
    shard = Shard(masked.source, masked.target, masked.size, BITS, 2 * SHARD_BLOCKS, blocks, (), (), pyca)
    with pytest.raises(ProtocolError, match="the file ends early"):
        unmask_shard(shard)


def test_a_shard_does_not_print_its_seeds(masked: Job) -> None:
    shard = Shard(masked.source, masked.target, 1, BITS, 0, 1, (b"s" * 32,), (b"t" * 32,), pyca)
    assert "ssss" not in repr(shard)
    assert "tttt" not in repr(shard)


# --- a full disk ------------------------------------------------------------------------------------------------------

FULL = [
    ("before-fsync:sum-#.u#", phases.Folding),
    ("before-commit:sums", phases.Folding),
    ("before-reserve:total.part", phases.Publishing),
    ("before-fsync:total.part", phases.Publishing),
    ("before-commit:shards", phases.Publishing),
    ("before-rename:total.bin", phases.Publishing),
    ("before-write:adapter_model.safetensors", phases.Publishing),
    ("before-fsync:evidence.bin", phases.Publishing),
    ("before-fsync:manifest.json", phases.Publishing),
    ("before-commit:events", phases.Publishing),
]


@pytest.mark.parametrize(("point", "phase"), FULL)
def test_a_full_disk_makes_the_coordinator_wait_and_costs_no_round(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch, point: str, phase: type
) -> None:
    """Above all after the shares were released: a round given up then comes back only with the very same members."""
    stop_at(world, phase)
    full_disk(monkeypatch, point, 2)
    for _ in range(2):
        assert world.work()
        assert isinstance(world.phase, phase)
        assert not world.work()  # not before a pause
        world.later += RETRY_S + 1
    world.run()
    assert isinstance(world.phase, phases.Released)
    assert len(world.rounds) == 1
    world.assert_exact()


def test_a_full_disk_between_a_release_and_its_row_is_made_up_for(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(world, phases.Publishing)
    full_disk(monkeypatch, "before-commit:rounds")
    assert world.work()
    assert isinstance(world.phase, phases.Confirming)
    assert world.rounds[-1].row.state == "running"
    world.wait(0)
    assert world.rounds[-1].row.state == "released"
    assert world.engine.store.plans()[0].state == "released"


# --- the release ------------------------------------------------------------------------------------------------------


def test_a_plan_that_is_cancelled_while_its_release_is_written_leaves_none(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(world, phases.Publishing)
    write = Worker._write_release

    def and_cancel(worker: Worker, plan: bytes, stage: int, cohorts: list[CohortTotal]) -> None:
        write(worker, plan, stage, cohorts)
        world.engine.cancel_plan("toy", "just now")

    monkeypatch.setattr(Worker, "_write_release", and_cancel)
    assert world.work()
    assert isinstance(world.phase, phases.Aborted)
    assert not (world.engine.home.releases / "toy" / "stage-1").exists()


def test_a_cancelled_round_leaves_nothing_beside_an_earlier_cohort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = OnDisk(tmp_path, 8)
    world.ready(0, 1, 2, 3)
    world.wait(10)
    world.run()
    world.ready(4, 5, 6, 7)
    stop_at(world, phases.Publishing)
    write = Worker._write_release

    def and_cancel(worker: Worker, plan: bytes, stage: int, cohorts: list[CohortTotal]) -> None:
        write(worker, plan, stage, cohorts)
        monkeypatch.setattr(Worker, "_write_release", write)
        world.engine.cancel_plan("toy", "just now")

    monkeypatch.setattr(Worker, "_write_release", and_cancel)
    assert world.work()
    stage = world.engine.home.releases / "toy" / "stage-1"
    assert [path.name for path in (stage / "rounds").iterdir()] == ["1"]
    assert [c["round"] for c in audit_release(stage).facts["cohorts"]] == [1]


def test_signatures_that_came_before_a_crash_are_in_the_release_after_it(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            world.run()
    manifest = world.engine.home.releases / "toy" / "stage-1" / "manifest.json"
    assert '"certified": false' in manifest.read_text()
    world.open()
    while world.work():
        pass
    assert '"certified": true' in manifest.read_text()
    written = manifest.stat().st_mtime_ns
    world.open()
    while world.work():
        pass
    assert manifest.stat().st_mtime_ns == written


# --- room for a round -------------------------------------------------------------------------------------------------


def test_no_round_opens_on_a_disk_that_cannot_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = OnDisk(tmp_path, plan=large_plan())
    needed = coordinator.space.space_needed(world.job, 5)
    assert needed > 5 * packed_length(world.job.quantizer.total_size, BITS)
    free = [needed - 1]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free[0]))
    world.ready()
    assert world.rounds == []
    assert f"expected {needed / 1e6:.1f} MB free for the uploads of 5 members" in world.engine.held[world.digest]
    free[0] += 1
    world.wait(1)
    assert len(world.rounds) == 1
    assert world.engine.held[world.digest] == ""


def test_a_message_whose_evidence_was_not_kept_is_taken_anew_when_it_comes_again(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run(phases.Unmasking)
    keep, full = coordinator.running.keep_accusations, [True]

    def at_first_full(running: Running, directory: Path) -> None:
        if full:
            full.clear()
            raise DiskError("full")
        keep(running, directory)

    monkeypatch.setattr(coordinator.engine, "keep_accusations", at_first_full)
    before = len(world.events)
    world.tell(0)
    assert not full
    assert len(world.events) == before + 1, "acknowledged, and on no disk"
