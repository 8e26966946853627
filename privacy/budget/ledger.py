"""A site's own record of what was done with a data set: append-only, hash-chained, signed, one JSON object a line.

Whoever holds the site's public key verifies the lines; only the site's daemon writes them. The check whether a line
may be written and the writing are one step under one lock, so that of two processes that race for the last of a budget
one wins. The Merkle root over all lines (RFC 6962 hashing) and their number go into every round and into a signed
checkpoint beside the file: what coordinator and peers keep of them is what a shortened or forked ledger cannot match.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy import merkle
from privacy.budget.book import Book, Finding, LedgerError
from privacy.budget.checkpoint import sign_checkpoint, verify_checkpoint
from privacy.budget.entries import NAMES, VERSION, Entry, Facts, canonical, line_of, parse_line, signed_bytes
from privacy.errors import ProtocolError, UserError
from privacy.files import (
    DiskError,
    append_durably,
    cut_durably,
    exclusively,
    make_private_directory,
    read_file,
    write_durably,
)
from privacy.secagg.keys import identity_public, verify_signature

GENESIS = bytes(32).hex()
#: A ledger of more lines than anybody's patience; it would be read into memory.
MAX_LEDGER_BYTES = 1 << 28

__all__ = ["Finding", "Ledger", "LedgerError", "Stamp", "verify_lines"]


@dataclass(frozen=True)
class Stamp:
    """When a line was written, by three clocks that are hard to set back together."""

    time: str  # UTC, ISO 8601, seconds
    boot: str
    monotonic: int  # ns since boot

    @classmethod
    def now(cls) -> Stamp:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return cls(datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), boot, time.monotonic_ns())


def line_hash(line: bytes) -> str:
    """What the next line carries as ``previous``: plain SHA-256, so that ``sha256sum`` can follow the chain."""
    return hashlib.sha256(line).hexdigest()


def read_ledger(path: Path, what: str = "a ledger") -> bytes:
    """The bytes of a file to audit; raises UserError for a missing or a huge one."""
    raw = read_file(path, what)
    if len(raw) > MAX_LEDGER_BYTES:
        raise UserError(f"{path}: expected {what} of at most {MAX_LEDGER_BYTES} bytes, found {len(raw)}")
    return raw


def _parsed(number: int, line: bytes, site_key: bytes, previous: str) -> Entry:
    where = f"line {number + 1}"
    try:
        entry = parse_line(line)
    except ProtocolError as error:
        raise LedgerError(Finding.FORMAT, f"{where}: {error}", number + 1) from error
    if entry.site != site_key.hex():
        text = f"{where}: expected a line of site {site_key.hex()[:16]}…, found one of {entry.site[:16]}…"
        raise LedgerError(Finding.REPLAY, text, number + 1)
    if not verify_signature(site_key, entry.signature, entry.signed):
        raise LedgerError(Finding.SIGNATURE, f"{where}: its signature does not verify", number + 1)
    if (entry.seq, entry.previous) != (number, previous):
        text = f"{where}: expected an unbroken chain, found sequence {entry.seq} after {entry.previous[:16]}…"
        raise LedgerError(Finding.CHAIN, text, number + 1)
    return entry


def verify_lines(raw: bytes, site_key: bytes) -> list[Entry]:
    """All lines of a ledger file, verified by the site's public identity key: format, signature, chain and order.

    Clocks are not judged here, and neither is whether lines are missing at the end: that takes a checkpoint.

    Raises:
        LedgerError: the first line that does not hold, with its class.
    """
    whole, _, partial = raw.rpartition(b"\n")
    entries: list[Entry] = []
    book, previous = Book(), GENESIS
    for number, line in enumerate(whole.split(b"\n") if whole or raw.startswith(b"\n") else []):
        entry = _parsed(number, line, site_key, previous)
        book.take(entry)
        entries.append(entry)
        previous = line_hash(line)
    if partial:
        raise LedgerError(Finding.PARTIAL, f"line {len(entries) + 1}: expected an end of line", len(entries) + 1)
    return entries


def head_of(entries: list[Entry], size: int | None = None) -> tuple[int, bytes]:
    """(size, Merkle root) of the first ``size`` lines, all of them by default."""
    first = entries[: len(entries) if size is None else size]
    return len(first), merkle.root([merkle.leaf_hash(entry.line) for entry in first])


def check_against(entries: list[Entry], size: int, root: bytes) -> None:
    """Do these lines go on from the ones a checkpoint of (size, root) was made for?

    Raises:
        LedgerError: fewer lines (truncated), or other ones (fork).
    """
    if len(entries) < size:
        raise LedgerError(Finding.TRUNCATED, f"expected at least {size} lines, found {len(entries)}")
    if head_of(entries, size)[1] != root:
        raise LedgerError(Finding.FORK, f"the first {size} lines are not those that a checkpoint was made for")


class Ledger:
    """The ledger of one data set at its site, with the key that signs it."""

    def __init__(self, path: Path, key: Ed25519PrivateKey, stamp: Callable[[], Stamp] = Stamp.now) -> None:
        """Read and verify the ledger at ``path``; an empty one if there is none.

        Raises:
            LedgerError: a line that is not this site's, out of order or altered, or fewer or other lines than the
                checkpoint beside the file says.
        """
        make_private_directory(path.parent)
        self.path, self._key, self._stamp = path, key, stamp
        self.entries: list[Entry] = []
        self.book = Book()
        self._raw = b""
        self.reload()

    @property
    def checkpoint_path(self) -> Path:
        """Where the signed checkpoint lies, beside the ledger."""
        return self.path.with_suffix(".checkpoint")

    def _locked(self) -> AbstractContextManager[None]:
        return exclusively(self.path.with_suffix(".lock"))

    def reload(self) -> None:
        """Read again what other processes may have written; raises as the constructor."""
        with self._locked():
            self._load()

    def _load(self) -> None:
        raw = self.path.read_bytes() if self.path.exists() else b""
        if raw != self._raw or not raw:
            try:
                self._take(raw)
            except LedgerError as error:
                raise LedgerError(error.finding, f"{self.path}: {error}", error.line) from error
        self._keep_checkpoint()

    def _take(self, raw: bytes) -> None:
        whole = raw[: raw.rfind(b"\n") + 1]
        entries = verify_lines(whole, identity_public(self._key))
        noted = self._noted()
        if noted is not None:
            check_against(entries, *noted)
        if len(whole) < len(raw):  # a crash in mid-append: the line was never acknowledged, nothing depended on it
            cut_durably(self.path, len(whole))
        self._raw, self.entries, self.book = whole, entries, Book(entries)

    def _noted(self) -> tuple[int, bytes] | None:
        """(size, root) of the checkpoint beside the file."""
        if not self.checkpoint_path.exists():
            return None
        try:
            found = verify_checkpoint(self.checkpoint_path.read_bytes(), identity_public(self._key))
        except ProtocolError as error:
            raise LedgerError(Finding.FORMAT, f"{self.checkpoint_path.name}: {error}") from error
        return found.size, found.root

    def _keep_checkpoint(self) -> None:
        """Make the note beside the file that of the last line, if it is not; a full disk leaves it behind."""
        note = self.checkpoint()
        if note and not (self.checkpoint_path.exists() and self.checkpoint_path.read_bytes() == note):
            with suppress(DiskError):  # the lines are what counts, and the next look writes it
                write_durably(self.checkpoint_path, note)

    def append(self, facts: Facts, *, dataset: str | None = None, check: Callable[[Book], None] | None = None) -> Entry:
        """Add one line if ``check`` does not object to the state it would follow; durable when this returns.

        Args:
            dataset: the data set's identity, for REGISTER.
            check: raises what it objects to; sees all lines that any process wrote before.

        Raises:
            LedgerError: the line may not follow, or the file is damaged. DiskError: the disk does not take it.
        """
        with self._locked():
            self._load()
            if check is not None:
                check(self.book)
            entry = self._signed(facts, dataset or self.book.dataset)
            book = Book([*self.entries, entry])
            append_durably(self.path, entry.line + b"\n")
            self._raw, self.entries, self.book = self._raw + entry.line + b"\n", [*self.entries, entry], book
            self._keep_checkpoint()
        return entry

    def _signed(self, facts: Facts, dataset: str) -> Entry:
        now = self._stamp()
        common = {
            "v": VERSION,
            "seq": len(self.entries),
            "previous": line_hash(self.entries[-1].line) if self.entries else GENESIS,
            "kind": NAMES[type(facts)],
            "dataset": dataset,
            "site": identity_public(self._key).hex(),
            "time": now.time,
            "boot": now.boot,
            "monotonic": str(now.monotonic),
        }
        body = canonical(common | facts.model_dump(mode="json"))
        return parse_line(line_of(body, self._key.sign(signed_bytes(body))))  # what cannot be read is never written

    def head(self) -> tuple[int, bytes]:
        """(size, Merkle root) over all lines read so far."""
        return head_of(self.entries)

    def checkpoint(self) -> bytes:
        """The signed note about :meth:`head`; empty for an empty ledger."""
        return sign_checkpoint(self._key, self.book.dataset, *self.head()) if self.entries else b""
