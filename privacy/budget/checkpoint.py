"""Signed checkpoints of a ledger: the note format and the tlog-checkpoint of C2SP, version 1 of both.

A note is text, an empty line, and signature lines (https://c2sp.org/signed-note); a checkpoint's text is an origin, a
size and a Merkle root (https://c2sp.org/tlog-checkpoint). The origin of a ledger is ``veilsum/ledger/`` and the data
set's identity in hex, and the name of its key is the same.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.errors import ProtocolError
from privacy.secagg.keys import identity_public, verify_signature

ORIGIN = "veilsum/ledger/"
MAX_NOTE_BYTES = 4096
#: Lines by other keys, which a reader must skip; more of them than this are refused.
MAX_SIGNATURES = 16
_ED25519 = b"\x01"  # signature type of signed-note

_TEXT = re.compile(rf"({ORIGIN}([0-9a-f]{{64}}))\n(0|[1-9][0-9]{{0,15}})\n([A-Za-z0-9+/]{{43}}=)\n\Z")
_SIGNATURE = re.compile(r"— ([^ +\n]{1,255}) ([A-Za-z0-9+/]{8,400}={0,2})\Z")


@dataclass(frozen=True)
class Checkpoint:
    """A verified size and root of one ledger."""

    dataset: str  # the data set's identity, hex
    size: int
    root: bytes  # 32 bytes, RFC 6962
    note: bytes  # as signed


def key_hash(name: str, public: bytes) -> bytes:
    """The key ID of signed-note, 4 bytes."""
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + public).digest()[:4]


def sign_checkpoint(key: Ed25519PrivateKey, dataset: str, size: int, root: bytes) -> bytes:
    """The signed note that says: the ledger of ``dataset`` has ``size`` lines under ``root``."""
    name = ORIGIN + dataset
    text = f"{name}\n{size}\n{base64.b64encode(root).decode()}\n"
    blob = key_hash(name, identity_public(key)) + key.sign(text.encode())
    return f"{text}\n— {name} {base64.b64encode(blob).decode()}\n".encode()


def _decoded(text: str, what: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ProtocolError(f"checkpoint: expected {what} in base64") from error
    if base64.b64encode(raw).decode() != text:
        raise ProtocolError(f"checkpoint: expected {what} in canonical base64")
    return raw


def _read(note: bytes) -> tuple[Checkpoint, str, list[tuple[str, bytes]]]:
    """(what it says, the signed text, (key name, signature) of each line)."""
    if len(note) > MAX_NOTE_BYTES:
        raise ProtocolError(f"checkpoint: expected at most {MAX_NOTE_BYTES} bytes, found {len(note)}")
    try:
        text, _, rest = note.decode("utf-8").partition("\n\n")
    except UnicodeDecodeError as error:
        raise ProtocolError("checkpoint: expected UTF-8") from error
    found = _TEXT.match(text + "\n")
    lines = rest.split("\n")
    if found is None or lines.pop() != "" or not 1 <= len(lines) <= MAX_SIGNATURES:
        raise ProtocolError("checkpoint: expected origin, size, root, an empty line and signature lines")
    said = Checkpoint(found[2], int(found[3]), _decoded(found[4], "a root"), note)
    return said, text + "\n", [_signature(line) for line in lines]


def _signature(line: str) -> tuple[str, bytes]:
    match = _SIGNATURE.match(line)
    if match is None:
        raise ProtocolError("checkpoint: expected signature lines of a name and base64")
    return match[1], _decoded(match[2], "a signature")


def read_checkpoint(note: bytes) -> Checkpoint:
    """Parse a note without believing it: says whose key must verify it.

    Raises:
        ProtocolError: not a checkpoint of a ledger.
    """
    return _read(note)[0]


def verify_checkpoint(note: bytes, public: bytes, dataset: str | None = None) -> Checkpoint:
    """Verify a note by the site's identity key; lines by other keys are skipped, as signed-note demands.

    Raises:
        ProtocolError: malformed, about another data set, not signed by this key, or with a wrong signature of it.
    """
    said, text, signatures = _read(note)
    if dataset is not None and said.dataset != dataset:
        raise ProtocolError(f"checkpoint: expected data set {dataset[:16]}…, found {said.dataset[:16]}…")
    name = ORIGIN + said.dataset
    own = [blob[4:] for who, blob in signatures if (who, blob[:4]) == (name, key_hash(name, public))]
    if not own:
        raise ProtocolError("checkpoint: expected a signature by the site's identity key, found none")
    if not all(verify_signature(public, signature, text.encode()) for signature in own):
        raise ProtocolError("checkpoint: its signature does not verify")
    return said


def split_notes(raw: bytes) -> list[bytes]:
    """The notes of a file that holds some, each followed by an empty line or the end.

    Raises:
        ProtocolError: something that is no checkpoint, or nothing at all.
    """
    parts = [part for part in re.split(rb"(?m)(?<=\n)\n?(?=" + ORIGIN.encode() + rb"[0-9a-f]{64}$)", raw) if part]
    notes = [part.rstrip(b"\n") + b"\n" for part in parts]
    for note in notes:
        read_checkpoint(note)
    if not notes:
        raise ProtocolError("checkpoint: expected at least one signed note, found none")
    return notes
