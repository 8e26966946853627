"""Uploads at the coordinator: places, chunks, restarts, and what a full disk or a cheat can and cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import coordinator.uploads
import participant.patience
from coordinator import phases
from coordinator.running import Running
from coordinator.uploads import IDLE_S, SLOTS, Uploads
from privacy import merkle
from privacy.errors import ProtocolError, Refusal, UserError
from privacy.files import DiskError
from privacy.secagg.masking import BLOCK, packed_bytes
from privacy.secagg.messages import MaskedInput
from privacy.secagg.signed import Signed, sign
from privacy.wire import transport
from privacy.wire.transport import WINDOW, chunk_bytes, chunk_reply, read_chunk_reply
from tests.hostile import large_plan
from tests.on_disk import Direct, OnDisk, full_disk
from tests.test_end_to_end import toy_plan

BITS = 24
#: 33 coordinates of 20 bits: the last half byte is padding.
ODD = toy_plan().replace(b"bits = 24", b"bits = 20").replace(b"max_weight = 1000", b"max_weight = 100000")


@dataclass(frozen=True)
class Held:
    """An upload that its site has made and that has not left it."""

    round_id: bytes
    message: Signed[MaskedInput]
    content: bytes

    def chunk(self, number: int) -> tuple[int, memoryview]:
        size = chunk_bytes(BITS)
        return number * size, memoryview(self.content)[number * size : (number + 1) * size]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnDisk]:
    """A round that takes uploads of thirteen chunks, one block each."""
    monkeypatch.setattr(participant.patience, "BACKOFF_S", (0.0,))
    monkeypatch.setattr(transport, "MOST_CHUNK_BYTES", packed_bytes(BLOCK, BITS))
    found = OnDisk(tmp_path, plan=large_plan())
    found.ready()
    found.run(phases.Uploading)
    yield found
    found.engine.store.close()


def held(world: OnDisk, member: int, monkeypatch: pytest.MonkeyPatch) -> Held:
    with monkeypatch.context() as patch:
        patch.setattr(Direct, "put", lambda *_: None)
        world.tell(member)
    (message,) = [m for m in world.sent(member) if isinstance(m, Signed) and isinstance(m.body, MaskedInput)]
    header = world.rounds[-1].machine.context.header
    return Held(header.hash(), message, world.site(member).store.spool("toy", header).read_bytes())


def send(world: OnDisk, upload: Held, numbers: range) -> None:
    for number in numbers:
        world.uploads.put(upload.round_id, upload.message.sender, *upload.chunk(number))


def finish_round(world: OnDisk) -> None:
    world.run()
    assert isinstance(world.phase, phases.Released)
    world.assert_exact()


def test_chunks_may_come_in_any_order_and_any_number_of_times(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = held(world, 4, monkeypatch)
    count = -(-len(upload.content) // chunk_bytes(BITS))
    assert count == 13
    assert world.uploads.begin(upload.round_id, upload.message) == 0
    for numbers in (range(12, -1, -2), range(5, 13), range(5)):
        send(world, upload, numbers)
    receipt = world.uploads.finish(upload.round_id, upload.message)
    assert world.uploads.finish(upload.round_id, upload.message) == receipt
    assert world.engine.store.upload(upload.round_id, 4).read_bytes() == upload.content
    finish_round(world)


def test_a_restarted_coordinator_asks_only_for_what_it_had_not_made_durable(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator.uploads, "SYNC_BYTES", 3 * chunk_bytes(BITS))
    upload = held(world, 4, monkeypatch)
    world.uploads.begin(upload.round_id, upload.message)
    send(world, upload, range(8))
    assert world.uploads.begin(upload.round_id, upload.message) == 8 * chunk_bytes(BITS)
    world.open()
    assert world.uploads.begin(upload.round_id, upload.message) == 6 * chunk_bytes(BITS)
    send(world, upload, range(6, 13))
    world.uploads.finish(upload.round_id, upload.message)
    finish_round(world)


def test_a_verified_upload_is_not_sent_again_if_the_crash_came_before_it_was_counted(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator.uploads, "SYNC_BYTES", chunk_bytes(BITS))
    upload = held(world, 4, monkeypatch)
    world.uploads.begin(upload.round_id, upload.message)
    send(world, upload, range(13))
    with monkeypatch.context() as patch:
        patch.setattr(world.engine, "receive", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            world.uploads.finish(upload.round_id, upload.message)
    assert not world.engine.store.part(upload.round_id, 4).exists()
    world.open()
    assert world.uploads.begin(upload.round_id, upload.message) == len(upload.content)
    world.uploads.finish(upload.round_id, upload.message)
    finish_round(world)


def test_bytes_that_were_hashed_are_never_replaced(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a member could have one vector counted and another one shown to the auditors."""
    upload = held(world, 4, monkeypatch)
    world.uploads.begin(upload.round_id, upload.message)
    send(world, upload, range(13))
    offset, payload = upload.chunk(3)
    changed = memoryview(bytes([payload[0] ^ 1]) + payload[1:])
    with pytest.raises(ProtocolError, match="expected the same bytes as before"):
        world.uploads.put(upload.round_id, 4, offset, changed)
    world.uploads.finish(upload.round_id, upload.message)
    assert world.engine.store.upload(upload.round_id, 4).read_bytes() == upload.content


@pytest.mark.parametrize(
    ("offset", "length"),
    [(1, 196_608), (196_608, 196_607), (0, 1), (0, 200_000), (12 * 196_608, 196_608), (13 * 196_608, 1), (1 << 62, 1)],
)
def test_a_chunk_that_is_no_chunk_is_refused(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch, offset: int, length: int
) -> None:
    upload = held(world, 4, monkeypatch)
    world.uploads.begin(upload.round_id, upload.message)
    with pytest.raises(ProtocolError, match=f"chunk of member 4 at {offset}: expected"):
        world.uploads.put(upload.round_id, 4, offset, memoryview(bytes(length)))
    assert world.uploads.begin(upload.round_id, upload.message) == 0


def test_places_are_bounded_and_an_idle_one_goes_to_whoever_waits(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    world.uploads = Uploads(world.engine, 1, lambda: now[0])
    first, second = held(world, 3, monkeypatch), held(world, 4, monkeypatch)
    world.uploads.begin(first.round_id, first.message)
    send(world, first, range(2))
    with pytest.raises(UserError, match="expected at most 1 uploads at once"):
        world.uploads.begin(second.round_id, second.message)
    now[0] += IDLE_S
    assert world.uploads.begin(second.round_id, second.message) == 0
    with pytest.raises(UserError, match="upload of member 3: expected BeginUpload first"):
        send(world, first, range(2, 3))
    with pytest.raises(UserError, match="expected BeginUpload first"):
        world.uploads.finish(first.round_id, first.message)
    send(world, second, range(13))
    world.uploads.finish(second.round_id, second.message)
    send_all = world.uploads.begin(first.round_id, first.message)
    send(world, first, range(send_all // chunk_bytes(BITS), 13))
    world.uploads.finish(first.round_id, first.message)
    finish_round(world)


def test_a_late_chunk_of_a_lost_place_does_not_touch_the_file(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunk was on its way to the file when the place was lost and the upload begun again."""
    upload = held(world, 4, monkeypatch)
    world.uploads.begin(upload.round_id, upload.message)
    lost = world.uploads._running[upload.round_id, 4]
    hashes = coordinator.uploads.block_hashes

    def meanwhile(payload: memoryview, bits: int) -> tuple[bytes, ...]:
        if lost.opened:
            lost.opened = False
            del world.uploads._running[upload.round_id, 4]
            world.uploads.begin(upload.round_id, upload.message)
        return hashes(payload, bits)

    with monkeypatch.context() as patch:
        patch.setattr(coordinator.uploads, "block_hashes", meanwhile)
        with pytest.raises(UserError, match="expected BeginUpload first"):
            world.uploads.put(upload.round_id, 4, 0, memoryview(bytes(chunk_bytes(BITS))))
    assert not any(world.engine.store.part(upload.round_id, 4).read_bytes())


def test_all_uploads_together_have_so_many_chunks_in_flight(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.uploads.window() == WINDOW
    for member in range(5):
        upload = held(world, member, monkeypatch)
        world.uploads.begin(upload.round_id, upload.message)
        assert world.uploads.window() * (member + 1) <= max(SLOTS, WINDOW)
    assert world.uploads.window() == SLOTS // 5


@pytest.mark.parametrize("reply", [b"", b"\0", bytes([WINDOW + 1]), b"\1\1"])
def test_a_reply_to_a_chunk_that_is_no_window_is_refused(reply: bytes) -> None:
    assert read_chunk_reply(chunk_reply(WINDOW)) == WINDOW
    with pytest.raises(ProtocolError, match=f"expected a window of 1 to {WINDOW}"):
        read_chunk_reply(reply)


@pytest.mark.parametrize(
    "point",
    [
        "before-reserve:upload-#.part",
        "before-fsync:upload-#.part",
        "before-rename:upload-#.bin",
        "before-commit:events",
    ],
)
def test_a_full_disk_costs_an_upload_nothing_but_time(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setattr(coordinator.uploads, "SYNC_BYTES", 4 * chunk_bytes(BITS))
    upload = held(world, 4, monkeypatch)
    full_disk(monkeypatch, point)
    failed = 0
    for _ in range(3):
        try:
            low = world.uploads.begin(upload.round_id, upload.message) // chunk_bytes(BITS)
            send(world, upload, range(low, 13))
            world.uploads.finish(upload.round_id, upload.message)
            break
        except DiskError:
            failed += 1
            assert world.uploads.receipt(upload.round_id, 4) is None
    assert failed == 1
    assert world.uploads.receipt(upload.round_id, 4) is not None
    finish_round(world)


def test_uploads_are_deleted_once_the_outcome_is_certified(world: OnDisk) -> None:
    world.run(phases.Confirming)
    round_id = world.rounds[-1].row.id
    assert len(list(world.engine.store.round_directory(round_id).glob("upload-*.bin"))) == 5
    finish_round(world)
    while world.work():
        pass
    with pytest.raises(Refusal, match="is certified: its uploads were deleted"):
        world.engine.upload_block(round_id, 0, 0)
    left = [path.name for path in world.engine.store.round_directory(round_id).iterdir()]
    assert left == ["total.bin"]
    assert world.engine.store.shards(round_id) == {}


def test_the_operator_can_keep_them_for_an_auditor(world: OnDisk) -> None:
    with (world.federation.coordinator / "coordinator.toml").open("a") as file:
        file.write("keep_uploads = true\n")
    world.open()
    finish_round(world)
    while world.work():
        pass
    directory = world.engine.store.round_directory(world.rounds[-1].row.id)
    assert sorted(p.name for p in directory.iterdir()) == ["total.bin", *(f"upload-{i}.bin" for i in range(5))]


def test_a_member_that_crashed_in_mid_upload_is_in_the_sum(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its secrets are gone, so it signs nothing; the spool is on its disk, and t others open its self mask."""
    upload = held(world, 4, monkeypatch)
    world.uploads.begin(upload.round_id, upload.message)
    send(world, upload, range(6))
    world.restart(4)
    world.tell(4)
    assert world.sent(4) == [upload.message]
    assert world.uploads.receipt(upload.round_id, 4) is not None
    finish_round(world)
    assert world.totals()[0][0] == (0, 1, 2, 3, 4)


def test_a_begin_that_its_own_finish_overtook_leaves_the_counted_upload_alone(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member's calls run side by side. Begin looked at the round before finish counted the upload, and goes on when a
    repeated chunk, whose file was renamed meanwhile, has given the place up."""
    upload = held(world, 4, monkeypatch)
    world.uploads.begin(upload.round_id, upload.message)
    send(world, upload, range(13))
    final, check = world.engine.store.upload(upload.round_id, 4), Uploads._check
    overtaken: list[Signed[MaskedInput]] = []

    def overtake(self: Uploads, running: Running, message: Signed[MaskedInput]) -> None:
        check(self, running, message)
        if overtaken:
            return
        overtaken.append(message)
        full_disk(monkeypatch, "before-commit:receipts")  # counted, and its receipt is not stored yet
        with pytest.raises(DiskError):
            self.finish(upload.round_id, message)
        monkeypatch.setattr(coordinator.uploads, "SYNC_BYTES", chunk_bytes(BITS))
        with pytest.raises(DiskError):
            send(world, upload, range(1))

    monkeypatch.setattr(Uploads, "_check", overtake)
    assert world.uploads.begin(upload.round_id, upload.message) == len(upload.content)
    assert final.exists(), "the upload is in the round, and its file is gone"
    world.uploads.finish(upload.round_id, upload.message)
    finish_round(world)


def test_a_spool_that_lost_its_place_is_not_opened_again(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its late chunks could change a file that the next spool has hashed."""
    upload = held(world, 4, monkeypatch)
    world.uploads.begin(upload.round_id, upload.message)
    lost = world.uploads._running[upload.round_id, 4]
    counted, lose = Uploads._counted, [True]

    def meanwhile(self: Uploads, running: Running, message: Signed[MaskedInput]) -> bool:
        if (upload.round_id, 4) in self._running and lose and lost.lock._is_owned():  # type: ignore[attr-defined]
            lose.clear()
            lost.opened = False
            self._give_up(upload.round_id, lost)
        return counted(self, running, message)

    monkeypatch.setattr(Uploads, "_counted", meanwhile)
    with pytest.raises(UserError, match="expected BeginUpload first"):
        world.uploads.begin(upload.round_id, upload.message)
    assert not lost.opened
    assert world.uploads.begin(upload.round_id, upload.message) == 0


def test_no_receipt_is_given_for_an_upload_whose_event_was_not_stored(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second finish waited for the first, whose event the disk did not take: the machine it looked at is no more."""
    upload = held(world, 4, monkeypatch)
    world.uploads.begin(upload.round_id, upload.message)
    send(world, upload, range(13))
    counted, first = Uploads._counted, [True]

    def after_the_first(self: Uploads, running: Running, message: Signed[MaskedInput]) -> bool:
        if first:
            first.clear()
            full_disk(monkeypatch, "before-commit:events")
            with pytest.raises(DiskError):
                self.finish(upload.round_id, message)
        return counted(self, running, message)

    monkeypatch.setattr(Uploads, "_counted", after_the_first)
    world.uploads.finish(upload.round_id, upload.message)
    phase = world.phase
    assert isinstance(phase, phases.Folding) or (isinstance(phase, phases.Uploading) and 4 in phase.inputs)
    finish_round(world)
    assert world.totals()[0][0] == (0, 1, 2, 3, 4)


def test_padding_that_cannot_be_unpacked_costs_its_sender_the_round_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its root is the signed one, so only unpacking notices."""
    monkeypatch.setattr(participant.patience, "BACKOFF_S", (0.0,))
    world = OnDisk(tmp_path, plan=ODD)
    assert world.job.quantizer.total_size % 2, "the last half byte is padding"
    world.ready()
    world.run(phases.Uploading)
    upload = held(world, 4, monkeypatch)
    content = upload.content[:-1] + bytes([upload.content[-1] | 0x10])
    body = replace(upload.message.body, root=merkle.root([merkle.leaf_hash(content)]))
    message = sign(world.site(4).identity, 4, body, upload.round_id)
    world.uploads.begin(upload.round_id, message)
    with pytest.raises(ProtocolError, match="expected zero padding"):
        world.uploads.put(upload.round_id, 4, 0, memoryview(content))
    world.away = {4}
    finish_round(world)
    assert world.totals()[0][0] == (0, 1, 2, 3)
    world.engine.store.close()
