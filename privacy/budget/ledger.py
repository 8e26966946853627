"""The site's own record of what was done with a data set: append-only, hash-chained, signed, one JSON object a line.

Every line carries its sequence number and the hash of the line before; the Merkle root over all lines (RFC 6962
hashing) stands in M1 of every round, so coordinator and peers witness how long the ledger was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy import merkle
from privacy.encoding import digest, label
from privacy.errors import UserError
from privacy.files import append_durably, cut_durably, make_private_directory
from privacy.secagg.keys import identity_public, verify_signature

GENESIS = bytes(32)


def _line_hash(line: bytes) -> bytes:
    return digest("ledger-line", line)


class Ledger:
    """The ledger of one data set, opened by the one daemon of the site."""

    def __init__(self, path: Path, key: Ed25519PrivateKey) -> None:
        """Read and verify the ledger at ``path``; an empty one if there is none.

        Raises:
            UserError: a line that is not this site's, out of order, or altered.
        """
        make_private_directory(path.parent)
        self.path, self._key = path, key
        self._lines: list[bytes] = []
        if path.exists():
            self._load(path.read_bytes())

    def _load(self, content: bytes) -> None:
        whole, _, partial = content.rpartition(b"\n")
        if partial:  # a crash in mid-append: the line was never acknowledged, nothing depended on it
            cut_durably(self.path, len(content) - len(partial))
        for number, line in enumerate(whole.split(b"\n") if whole else []):
            self._check(number, line)
            self._lines.append(line)

    def _check(self, number: int, line: bytes) -> None:
        hint = "restore the ledger from your backup and tell the other members: their witnesses know its length"
        try:
            entry = json.loads(line)
            signature = bytes.fromhex(entry.pop("signature"))
            chained = (entry["seq"], entry["previous"]) == (number, self._previous().hex())
            body = _canonical(entry)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{self.path}:{number + 1}: expected a ledger line, found something else", hint=hint
            ) from error
        if not chained or not verify_signature(identity_public(self._key), signature, label("ledger", body)):
            raise UserError(f"{self.path}:{number + 1}: expected an unbroken chain of signed lines", hint=hint)

    def _previous(self) -> bytes:
        return _line_hash(self._lines[-1]) if self._lines else GENESIS

    def append(self, kind: str, facts: dict[str, Any]) -> None:
        """Add one entry; durable when this returns.

        Raises:
            UserError: the disk is full or not writable.
        """
        body = {"seq": len(self._lines), "previous": self._previous().hex(), "kind": kind, **facts}
        signature = self._key.sign(label("ledger", _canonical(body)))
        line = _canonical(body | {"signature": signature.hex()})
        append_durably(self.path, line + b"\n")
        self._lines.append(line)

    def head(self) -> tuple[int, bytes]:
        """(size, Merkle root) over all lines."""
        return len(self._lines), merkle.root([merkle.leaf_hash(line) for line in self._lines])

    def entries(self) -> list[dict[str, Any]]:
        """All entries, oldest first."""
        return [json.loads(line) for line in self._lines]


def _canonical(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
