"""Signed notes: the format of C2SP byte by byte, and what is refused."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.budget.checkpoint import read_checkpoint, sign_checkpoint, split_notes, verify_checkpoint
from privacy.errors import ProtocolError
from privacy.secagg.keys import identity_public

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
PUBLIC = identity_public(KEY)
DATASET, ROOT = "ab" * 32, bytes(range(32))
NOTE = sign_checkpoint(KEY, DATASET, 12, ROOT)
NAME = f"veilsum/ledger/{DATASET}"


def test_a_note_is_the_text_of_c2sp() -> None:
    text = f"{NAME}\n12\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"
    key_id = hashlib.sha256(NAME.encode() + b"\n\x01" + PUBLIC).digest()[:4]
    blob = base64.b64encode(key_id + KEY.sign(text.encode())).decode()
    assert NOTE.decode() == f"{text}\n\u2014 {NAME} {blob}\n"
    found = verify_checkpoint(NOTE, PUBLIC, DATASET)
    assert (found.dataset, found.size, found.root, found.note) == (DATASET, 12, ROOT, NOTE)
    assert read_checkpoint(NOTE) == found


def by_another(note: bytes) -> bytes:
    other = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
    return sign_checkpoint(other, DATASET, 12, ROOT).split(b"\n\n")[1] + b"" if note else b""


def test_lines_of_other_keys_are_skipped() -> None:
    text, own = NOTE.split(b"\n\n")
    both = text + b"\n\n" + by_another(NOTE) + own
    assert verify_checkpoint(both, PUBLIC).size == 12
    with pytest.raises(ProtocolError, match="expected a signature by the site's identity key"):
        verify_checkpoint(text + b"\n\n" + by_another(NOTE), PUBLIC)


def changed(old: bytes, new: bytes) -> Callable[[], bytes]:
    assert old in NOTE
    return lambda: NOTE.replace(old, new)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "another size": (changed(b"\n12\n", b"\n13\n"), "does not verify"),
    "another root": (changed(b"AAECAwQF", b"AAECAwQG"), "does not verify"),
    "a size with a zero in front": (changed(b"\n12\n", b"\n012\n"), "expected origin"),
    "a size that is no number": (changed(b"\n12\n", b"\n1e1\n"), "expected origin"),
    "another origin": (changed(b"veilsum/ledger", b"example.org/log"), "expected origin"),
    "a short root": (changed(b"Hh8=", b"="), "expected origin"),
    "a root whose last bits are not zero": (changed(b"Hh8=", b"Hh9="), "canonical base64"),
    "a line more": (changed(b"=\n\n", b"=\nmore\n\n"), "expected origin"),
    "no signature": (lambda: NOTE.split(b"\n\n")[0] + b"\n\n", "expected origin"),
    "no end of line": (lambda: NOTE[:-1], "expected origin"),
    "a hyphen for the dash": (lambda: NOTE.replace("—".encode(), b"-"), "signature lines"),
    "no text at all": (lambda: b"", "expected origin"),
    "bytes that are no text": (lambda: b"\xff" + NOTE, "UTF-8"),
    "too many lines": (lambda: NOTE + NOTE.split(b"\n\n")[1] * 16, "expected"),
    "a megabyte": (lambda: NOTE + b"x" * (1 << 20), "at most 4096 bytes"),
}


@pytest.mark.parametrize("sentence", BAD)
def test_another_note_is_refused(sentence: str) -> None:
    make, text = BAD[sentence]
    with pytest.raises(ProtocolError, match=text):
        verify_checkpoint(make(), PUBLIC)


def test_the_note_of_another_data_set_or_site_is_refused() -> None:
    with pytest.raises(ProtocolError, match="expected data set cdcd"):
        verify_checkpoint(NOTE, PUBLIC, "cd" * 32)
    with pytest.raises(ProtocolError, match="identity key"):
        verify_checkpoint(NOTE, identity_public(Ed25519PrivateKey.generate()))


def test_a_file_of_notes_comes_apart() -> None:
    second = sign_checkpoint(KEY, "cd" * 32, 3, ROOT)
    assert split_notes(NOTE) == [NOTE]
    assert split_notes(NOTE + b"\n" + second) == [NOTE, second]
    assert split_notes(NOTE + second + b"\n") == [NOTE, second]
    for bad in (b"", b"hello\n", NOTE + b"\nhello\n", b"hello\n" + NOTE):
        with pytest.raises(ProtocolError):
            split_notes(bad)
