"""M5 at the coordinator: chunks into a spool file, and a receipt once the whole upload is verified and durable.

An upload is admitted (a place, and its space on disk), then its chunks may come in any order and any number of times.
What is on disk without a gap is noted every 32 MiB, so that a restarted coordinator goes on from there. Every block is
hashed as it comes; the Merkle root must be the signed one before the upload is counted.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from coordinator import phases
from coordinator.engine import Engine
from coordinator.running import Running
from privacy import merkle
from privacy.encoding import decode, encode
from privacy.errors import ProtocolError, UserError
from privacy.files import DiskError, disk_errors, fsync_file, replace_durably, reserve
from privacy.receipt import sign_receipt
from privacy.secagg import transcript
from privacy.secagg.masking import BLOCK, packed_bytes, unpack
from privacy.secagg.messages import MaskedInput
from privacy.secagg.signed import Signed
from privacy.wire.transport import WINDOW, chunk_bytes

#: Chunks in flight of all uploads together (about 40 MiB): what bounds the memory for uploads.
SLOTS = 40
#: An upload from which nothing came for so long gives its place to whoever waits; what is on disk stays.
IDLE_S = 120.0
#: Bytes that a crash of this machine may cost an upload.
SYNC_BYTES = 32 << 20
AGAIN = "nothing is lost: begin again shortly, it goes on where it stopped"


@dataclass
class Spool:
    """One admitted upload: its file, and which chunks are in it."""

    input: Signed[MaskedInput]
    part: Path
    bits: int
    used: float  # monotonic time of the last chunk
    lock: threading.RLock = field(default_factory=threading.RLock)
    #: Chunk number -> leaf hashes of its blocks.
    hashes: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    chunks: int = 0  # without a gap, from the start
    durable: int = 0
    syncing: bool = False
    #: Between its opening and the loss of its place; written only with ``lock`` held, or a late chunk could still
    #: change a file that a later spool has hashed.
    opened: bool = False

    @property
    def length(self) -> int:
        return self.input.body.length

    @property
    def prefix(self) -> int:
        """Bytes received without a gap, from the start."""
        return min(self.chunks * chunk_bytes(self.bits), self.length)

    def take(self, number: int, hashes: tuple[bytes, ...]) -> None:
        """A chunk is in the file."""
        self.hashes[number] = hashes
        while self.chunks in self.hashes:
            self.chunks += 1

    def root(self) -> bytes:
        """Merkle root over the blocks of a whole upload."""
        return merkle.root([leaf for number in range(self.chunks) for leaf in self.hashes[number]])


def block_hashes(payload: bytes | memoryview, bits: int) -> tuple[bytes, ...]:
    """Leaf hashes of the blocks in one chunk."""
    step = packed_bytes(BLOCK, bits)
    return tuple(merkle.leaf_hash(payload[at : at + step]) for at in range(0, len(payload), step))


@dataclass(frozen=True)
class Receipt:
    """What the coordinator signed for one upload."""

    root: bytes
    length: int
    signature: bytes


class Uploads:
    """All uploads in progress; safe for many threads."""

    def __init__(self, engine: Engine, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._store, self._most, self._clock = engine, engine.store, most, clock
        self._lock = threading.Lock()
        self._running: dict[tuple[bytes, int], Spool] = {}

    def receipt(self, round_id: bytes, member: int) -> Receipt | None:
        """The receipt given for a member's upload, if any."""
        found = self._store.receipts(round_id).get(member)
        return Receipt(*found) if found else None

    def window(self) -> int:
        """How many chunks each upload may have in flight now."""
        return max(1, min(WINDOW, SLOTS // max(1, len(self._running))))

    def progress(self, round_id: bytes) -> dict[int, tuple[int, int, float]]:
        """member -> (bytes here without a gap, of how many, seconds since the last) of the uploads on their way."""
        with self._lock:
            found = {member: spool for (place, member), spool in self._running.items() if place == round_id}
            return {member: (s.prefix, s.length, self._clock() - s.used) for member, s in found.items()}

    # --- admission ---------------------------------------------------------------------------------------------------

    def begin(self, round_id: bytes, message: Signed[MaskedInput]) -> int:
        """Admit an upload, or say how much of it is here; bytes received without a gap.

        Raises:
            ProtocolError: the signed root does not fit the round, or another upload was begun.
            UserError: all places are taken, or the disk is full; come back.
        """
        running = self._engine.running(round_id)
        if self._counted(running, message):
            return message.body.length
        self._check(running, message)
        with self._lock:
            spool = self._running.get((round_id, message.sender)) or self._admit(running, message)
        if spool.input.body != message.body:
            raise ProtocolError(f"member {message.sender} begins a second, different upload")
        with spool.lock:
            if self._counted(running, message):  # a finish overtook this call: the file is never touched again
                self._give_up(round_id, spool)
                return message.body.length
            if not spool.opened:
                self._open_in_place(running, spool)
        return spool.prefix

    def _open_in_place(self, running: Running, spool: Spool) -> None:
        """Open a spool that has its place still; without it another spool may have hashed the same file."""
        with self._lock:
            if self._running.get((running.row.id, spool.input.sender)) is not spool:
                raise _begin_first(spool.input.sender)
        try:
            self._open(running, spool)
        except DiskError:
            self._give_up(running.row.id, spool)
            raise

    def _admit(self, running: Running, message: Signed[MaskedInput]) -> Spool:
        """A place for an upload."""
        self._forget_closed()
        if len(self._running) >= self._most and not self._evict():
            raise UserError(f"expected at most {self._most} uploads at once, all places are taken", hint=AGAIN)
        part = self._store.part(running.row.id, message.sender)
        spool = Spool(message, part, running.job.rules.bits, self._clock())
        self._running[running.row.id, message.sender] = spool
        return spool

    def _evict(self) -> bool:
        """Take the place of an upload from which nothing comes; was there one?"""
        for key, spool in sorted(self._running.items(), key=lambda item: item[1].used):
            if self._clock() - spool.used < IDLE_S:
                return False
            if spool.lock.acquire(blocking=False):  # busy is not idle
                spool.opened = False
                spool.lock.release()
                del self._running[key]
                return True
        return False

    def _forget_closed(self) -> None:
        """Uploads of rounds that take none any more give their places back."""
        for key in list(self._running):
            if not isinstance(self._engine.running(key[0]).machine.phase, phases.Uploading):
                self._running.pop(key)

    def _give_up(self, round_id: bytes, spool: Spool) -> None:
        with self._lock:
            if self._running.get((round_id, spool.input.sender)) is spool:
                del self._running[round_id, spool.input.sender]

    def _open(self, running: Running, spool: Spool) -> None:
        """Take the space, and what an earlier process or an earlier place left of this very upload."""
        round_id, member = running.row.id, spool.input.sender
        encoded = encode(spool.input)
        noted = self._store.uploads(round_id).get(member)
        final = self._store.upload(round_id, member)
        durable = 0
        if noted is not None and decode(Signed[MaskedInput], noted[0]).body == spool.input.body:
            if final.exists():  # verified, durable and renamed, but a crash came before it was counted
                replace_durably(final, spool.part)
                durable = spool.length
            elif spool.part.exists():
                durable = min(noted[1], spool.part.stat().st_size)
        reserve(spool.part, spool.length)
        self._store.set_upload(round_id, member, encoded, durable)
        size = chunk_bytes(spool.bits)
        with spool.part.open("rb") as file:
            for number in range(-(-durable // size) if durable == spool.length else durable // size):
                spool.take(number, block_hashes(file.read(size), spool.bits))
        spool.durable, spool.opened = spool.prefix, True

    def _counted(self, running: Running, message: Signed[MaskedInput]) -> bool:
        """Is this very upload in the round already, with or without its receipt?

        Raises:
            ProtocolError: another one is; its file must never be replaced.
        """
        with self._engine.lock:
            phase = self._engine.running(running.row.id).machine.phase  # the machine of now, not one a full disk undid
            if isinstance(phase, phases.Uploading):
                taken = phase.inputs.get(message.sender)
            else:
                closed = getattr(phase, "closed", None)
                taken = next((i for i in closed.inputs if i.sender == message.sender), None) if closed else None
        if taken is not None and taken != message:
            raise ProtocolError(f"member {message.sender} begins a second, different upload")
        return taken is not None

    def _check(self, running: Running, message: Signed[MaskedInput]) -> None:
        with self._engine.lock:
            phase = self._engine.running(running.row.id).machine.phase
            if not isinstance(phase, phases.Uploading):
                raise ProtocolError(f"M5 of member {message.sender} in phase {type(phase).__name__}: too late")
            transcript.check_input(phase.cohort, phase.sharers, phase.t2, message)

    # --- chunks ------------------------------------------------------------------------------------------------------

    def put(self, round_id: bytes, member: int, offset: int, payload: memoryview) -> int:
        """Write one chunk into the spool; the window this upload has from now on.

        The first chunk at an offset stands: a repeat is compared by its hashes and not written again, so that nobody
        can change bytes that were hashed already.

        Raises:
            ProtocolError: not at the start of a chunk, another length, or other bytes than before.
            UserError: no place (any more), or the disk is full; begin again.
        """
        with self._lock:
            spool = self._running.get((round_id, member))
            if spool is not None:
                spool.used = self._clock()
        if spool is None:
            raise _begin_first(member)
        size = chunk_bytes(spool.bits)
        expected = min(size, spool.length - offset)
        if offset % size or len(payload) != expected:
            raise ProtocolError(
                f"chunk of member {member} at {offset}: expected {max(expected, 0)} bytes at k * {size}"
            )
        _check_padding(payload, spool.bits)
        hashes = block_hashes(payload, spool.bits)
        with spool.lock:
            if not spool.opened:
                raise _begin_first(member)
            known = spool.hashes.get(offset // size)
            if known is not None and known != hashes:
                raise ProtocolError(f"chunk of member {member} at {offset}: expected the same bytes as before")
            if known is None:
                _write_chunk(spool.part, offset, payload)
                spool.take(offset // size, hashes)
        self._note_progress(round_id, member, spool)
        return self.window()

    def _note_progress(self, round_id: bytes, member: int, spool: Spool) -> None:
        """Every 32 MiB without a gap: make them durable, and note that they are."""
        with spool.lock:
            prefix = spool.prefix
            if spool.syncing or prefix - spool.durable < SYNC_BYTES:
                return
            spool.syncing = True
        try:
            self._sync(round_id, spool)
            self._store.set_upload(round_id, member, encode(spool.input), prefix)
            spool.durable = prefix
        finally:
            spool.syncing = False

    def _sync(self, round_id: bytes, spool: Spool) -> None:
        """Make the spool durable; where that fails the system may have dropped what it could not write."""
        try:
            with disk_errors(spool.part):
                descriptor = os.open(spool.part, os.O_RDWR)
                try:
                    fsync_file(descriptor, spool.part)
                finally:
                    os.close(descriptor)
        except DiskError:
            with spool.lock:
                spool.opened = False  # its member begins again, from what was noted
                self._give_up(round_id, spool)
            raise

    # --- the whole upload --------------------------------------------------------------------------------------------

    def finish(self, round_id: bytes, message: Signed[MaskedInput]) -> Receipt:
        """Compare the spool with the signed root, make it durable, count it, and sign the receipt.

        Raises:
            ProtocolError: the root differs, or the phase is over. A repeat gets the same receipt.
            UserError: chunks are missing, or the disk is full; begin again.
        """
        given = self.receipt(round_id, message.sender)
        if given:
            return given
        running = self._engine.running(round_id)
        with self._lock:
            spool = self._running.get((round_id, message.sender))
        if spool is None:
            if not self._counted(running, message):
                raise _begin_first(message.sender)
        else:
            with spool.lock:
                if not self._counted(running, message):
                    self._check(running, message)
                    self._verify(round_id, spool, message)
                    self._engine.receive(round_id, message)
        root, length = message.body.root, message.body.length
        signature = sign_receipt(self._engine.identity, round_id, message.sender, root, length)
        self._store.add_receipt(round_id, message.sender, root, length, signature)
        if spool is not None:
            self._give_up(round_id, spool)
        return Receipt(root, length, signature)

    def _verify(self, round_id: bytes, spool: Spool, message: Signed[MaskedInput]) -> None:
        if not spool.opened:
            raise _begin_first(message.sender)
        if spool.prefix != message.body.length:
            raise UserError(
                f"upload of member {message.sender}: expected {message.body.length} bytes, found {spool.prefix}",
                hint=AGAIN,
            )
        if spool.root() != message.body.root:
            spool.opened = False
            self._give_up(round_id, spool)
            self._store.drop_upload(round_id, message.sender)
            spool.part.unlink(missing_ok=True)
            raise ProtocolError(
                f"upload of member {message.sender} does not have its signed root", culprit=message.sender
            )
        if spool.part.exists():  # renamed already where the disk failed after that
            self._sync(round_id, spool)
            with disk_errors(spool.part):
                replace_durably(spool.part, self._store.upload(round_id, message.sender))


def _check_padding(payload: memoryview, bits: int) -> None:
    """Refuse the one thing that no unpacking takes, a half byte of padding that is not zero (``bits`` is 20).

    Found while folding it would end the round, for everybody.

    Raises:
        ProtocolError: the padding is not zero.
    """
    rest = len(payload) % packed_bytes(BLOCK, bits)
    if bits == 20 and rest:
        unpack(payload[-rest:], 2 * rest // 5, bits)


def _begin_first(member: int) -> UserError:
    return UserError(f"upload of member {member}: expected BeginUpload first", hint=AGAIN)


def _write_chunk(part: Path, offset: int, payload: memoryview) -> None:
    with disk_errors(part):
        descriptor = os.open(part, os.O_WRONLY)
        try:
            if os.pwrite(descriptor, payload, offset) != len(payload):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
