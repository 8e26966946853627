"""M5 at the coordinator: chunks into a spool file, and a receipt once the whole upload is verified and durable."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

from coordinator import phases
from coordinator.engine import Engine
from coordinator.running import Running
from privacy.errors import ProtocolError, Refusal
from privacy.files import disk_errors, fsync_directory
from privacy.receipt import sign_receipt
from privacy.secagg import transcript
from privacy.secagg.messages import MaskedInput
from privacy.secagg.signed import Signed
from privacy.vectors import file_root
from privacy.wire.transport import CHUNK_BYTES


@dataclass
class Progress:
    """One upload on its way: which chunks are in the spool."""

    input: Signed[MaskedInput]
    part: Path
    received: set[int] = field(default_factory=set)

    @property
    def prefix(self) -> int:
        """Bytes received without a gap, from the start."""
        at = 0
        while at in self.received:
            at += CHUNK_BYTES
        return min(at, self.input.body.length)


@dataclass(frozen=True)
class Receipt:
    """What the coordinator signed for one upload."""

    root: bytes
    length: int
    signature: bytes


class Uploads:
    """All uploads in progress; safe for many threads."""

    def __init__(self, engine: Engine, most: int) -> None:
        self._engine, self._most = engine, most
        self._lock = threading.Lock()
        self._running: dict[tuple[bytes, int], Progress] = {}

    def receipt(self, round_id: bytes, member: int) -> Receipt | None:
        """The receipt given for a member's upload, if any."""
        found = self._engine.store.receipts(round_id).get(member)
        return Receipt(*found) if found else None

    def begin(self, round_id: bytes, message: Signed[MaskedInput]) -> int:
        """Admit an upload, or say how much of it is here; bytes received without a gap.

        Raises:
            ProtocolError: the signed root does not fit the round, or another upload was begun.
            Refusal: too many uploads at once; come back.
        """
        running = self._engine.running(round_id)
        if self._counted(running, message):
            return message.body.length
        self._check(running, message)
        with self._lock:
            key = (round_id, message.sender)
            if key not in self._running:
                self._forget_closed()
                if len(self._running) >= self._most:
                    raise Refusal(f"expected at most {self._most} uploads at once, all are taken: try again shortly")
                part = self._engine.store.upload(round_id, message.sender).with_suffix(".part")
                part.unlink(missing_ok=True)
                self._running[key] = Progress(message, part)
            if self._running[key].input.body != message.body:
                raise ProtocolError(f"member {message.sender} begins a second, different upload")
            return self._running[key].prefix

    def _forget_closed(self) -> None:
        """Uploads of rounds that take none any more give their places back."""
        for key in list(self._running):
            if not isinstance(self._engine.running(key[0]).machine.phase, phases.Uploading):
                self._running.pop(key).part.unlink(missing_ok=True)

    def _counted(self, running: Running, message: Signed[MaskedInput]) -> bool:
        """Is this very upload in the round already, with or without its receipt?

        Raises:
            ProtocolError: another one is; its file must never be replaced.
        """
        with self._engine.lock:
            phase = running.machine.phase
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
            phase = running.machine.phase
            if not isinstance(phase, phases.Uploading):
                raise ProtocolError(f"M5 of member {message.sender} in phase {type(phase).__name__}: too late")
            transcript.check_input(phase.cohort, phase.sharers, phase.t2, message)

    def put(self, round_id: bytes, member: int, offset: int, payload: memoryview) -> None:
        """Write one chunk into the spool; a repeat writes the same bytes again."""
        with self._lock:
            progress = self._running.get((round_id, member))
        if progress is None:
            raise ProtocolError(f"chunk of member {member}: expected BeginUpload first")
        expected = min(CHUNK_BYTES, progress.input.body.length - offset)
        if offset >= progress.input.body.length or len(payload) != expected:
            raise ProtocolError(f"chunk of member {member} at {offset}: expected {max(expected, 0)} bytes")
        with disk_errors(progress.part):
            descriptor = os.open(progress.part, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                if os.pwrite(descriptor, payload, offset) != len(payload):
                    raise OSError(28, "No space left on device")
            finally:
                os.close(descriptor)
        with self._lock:
            progress.received.add(offset)

    def finish(self, round_id: bytes, message: Signed[MaskedInput]) -> Receipt:
        """Verify the spool against the signed root, make it durable, count it, and sign the receipt.

        Raises:
            ProtocolError: chunks are missing, the root differs, or the phase is over. A repeat gets the same receipt.
        """
        given = self.receipt(round_id, message.sender)
        if given:
            return given
        running, key = self._engine.running(round_id), (round_id, message.sender)
        if not self._counted(running, message):
            with self._lock:
                progress = self._running.get(key)
            if progress is None or progress.prefix != message.body.length:
                raise ProtocolError(f"upload of member {message.sender}: expected all chunks before FinishUpload")
            self._verify(running, progress)
            self._engine.receive(round_id, message)
        root, length = message.body.root, message.body.length
        signature = sign_receipt(self._engine.identity, round_id, message.sender, root, length)
        self._engine.store.add_receipt(round_id, message.sender, root, length, signature)
        with self._lock:
            self._running.pop(key, None)
        return Receipt(root, length, signature)

    def _verify(self, running: Running, progress: Progress) -> None:
        size, bits = running.job.quantizer.total_size, running.job.rules.bits
        message, final = progress.input, progress.part.with_suffix(".bin")
        with disk_errors(progress.part):
            descriptor = os.open(progress.part, os.O_RDWR)
            os.fsync(descriptor)
            os.close(descriptor)
        if file_root(progress.part, size, bits) != message.body.root:
            progress.part.unlink()
            with self._lock:
                self._running.pop((running.row.id, message.sender), None)
            raise ProtocolError(
                f"upload of member {message.sender} does not have its signed root", culprit=message.sender
            )
        progress.part.replace(final)
        fsync_directory(final.parent)
