"""Which records a site has registered, under which name: the same data under a new name would be a new budget.

A data set's identity is an HMAC, under a secret that never leaves the site, over a manifest of what was registered;
outsiders learn nothing from it. Beside the manifest lie the keyed hashes of the normalised records, 16 bytes each,
sorted: with them a second registration of the same records is found, and nothing can be read from them without the
secret. Both grow with the data set and never shrink: what was once trained on stays charged.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from participant.config import DataSet, Home
from privacy.budget.entries import canonical
from privacy.encoding import label
from privacy.errors import Refusal, UserError
from privacy.files import exclusively, make_private_directory, read_private, write_durably

SECRET_BYTES, HASH_BYTES = 32, 16
SECRET_FILE, LOCK_FILE = "secret", "lock"
LOST = "restore the directory 'registry' from your backup: without it the same records cannot be recognised"

#: Sorted, distinct, 16 bytes each.
Hashes = NDArray[np.void]


@dataclass(frozen=True)
class Growth:
    """What registering did: records known now, and how many of them were new."""

    records: int
    added: int


def normalised(text: str) -> str:
    """One text for all that look alike: Unicode NFKC, case folded, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class Registry:
    """The registered data sets of one site."""

    def __init__(self, home: Home) -> None:
        self._directory = make_private_directory(home.registry)
        self._secret_path, self._lock_path = self._directory / SECRET_FILE, self._directory / LOCK_FILE

    def _secret(self) -> bytes:
        """The site's secret, made at the first registration.

        Raises:
            UserError: it is gone while data sets are registered, open to others, or damaged.
        """
        if not self._secret_path.exists():
            if self.names():
                raise UserError(f"{self._secret_path}: expected the site's registry secret, found none", hint=LOST)
            write_durably(self._secret_path, os.urandom(SECRET_BYTES))
        secret = read_private(self._secret_path, "the site's registry secret", LOST)
        if len(secret) != SECRET_BYTES:
            raise UserError(f"{self._secret_path}: expected {SECRET_BYTES} bytes, found {len(secret)}", hint=LOST)
        return secret

    def _manifest_path(self, name: str) -> Path:
        return self._directory / f"{name}.json"

    def _hashes_path(self, name: str) -> Path:
        return self._directory / f"{name}.records"

    def names(self) -> list[str]:
        """Names of all registered data sets, sorted."""
        found = {path.stem for suffix in ("json", "records") for path in self._directory.glob(f"[!.]*.{suffix}")}
        return sorted(found)

    # --- identity ----------------------------------------------------------------------------------------------------

    def identity(self, name: str) -> str | None:
        """The identity of a registered data set, hex; ``None`` for one that has no manifest yet.

        Raises:
            UserError: the manifest or the secret is damaged or gone.
        """
        path = self._manifest_path(name)
        if not path.exists():
            return None
        try:
            manifest = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path}: expected a manifest in JSON, found something else", hint=LOST) from error
        return self._identity_of(manifest)

    def _identity_of(self, manifest: dict[str, Any]) -> str:
        return hmac.digest(self._secret(), label("dataset", canonical(manifest)), "sha256").hex()

    def register(self, name: str, data: DataSet, site: str, time: str) -> str:
        """The identity of a data set; writes its manifest if there is none, durable when this returns."""
        with exclusively(self._lock_path):
            return self._registered(name, data, site, time)

    def _registered(self, name: str, data: DataSet, site: str, time: str) -> str:
        known = self.identity(name)
        if known is not None:
            return known
        hashes = self._load(name)
        manifest = {
            "name": name,
            "site": site,
            "time": time,
            "format": data.format,
            "columns": [data.text, data.label],
            "records": len(hashes),
            "digest": hashlib.sha256(hashes.tobytes()).hexdigest(),
        }
        self._secret()  # made before the first file that depends on it
        write_durably(self._manifest_path(name), canonical(manifest))
        return self._identity_of(manifest)

    # --- records -----------------------------------------------------------------------------------------------------

    def _load(self, name: str) -> Hashes:
        path = self._hashes_path(name)
        raw = path.read_bytes() if path.exists() else b""
        if len(raw) % HASH_BYTES:
            raise UserError(f"{path}: expected whole hashes of {HASH_BYTES} bytes, found {len(raw)} bytes", hint=LOST)
        return np.frombuffer(raw, f"V{HASH_BYTES}")

    def records(self, name: str) -> int:
        """How many distinct records a data set has had in all."""
        return len(self._load(name))

    def hashes(self, texts: Iterable[str]) -> Hashes:
        """Keyed hashes of records, sorted, each once."""
        secret = self._secret()
        found = {hmac.digest(secret, label("record", normalised(t).encode()), "sha256")[:HASH_BYTES] for t in texts}
        return np.frombuffer(b"".join(sorted(found)), f"V{HASH_BYTES}")

    def overlaps(self, name: str, found: Hashes) -> dict[str, int]:
        """Other data set -> how many of these records it has registered."""
        shared = {other: len(_both(found, self._load(other))) for other in self.names() if other != name}
        return {other: count for other, count in shared.items() if count}

    def take(self, name: str, texts: Iterable[str]) -> Growth:
        """Register the records a data set has now, beside those it had before; durable when this returns.

        Raises:
            Refusal: some of them are registered under another name.
        """
        with exclusively(self._lock_path):  # or two names could take the same records at the same time
            return self._taken(name, texts)

    def _taken(self, name: str, texts: Iterable[str]) -> Growth:
        found, known = self.hashes(texts), self._load(name)
        if overlaps := self.overlaps(name, found):
            shared = ", ".join(f"{count} under '{other}'" for other, count in overlaps.items())
            raise Refusal(
                f"data set '{name}': of its {len(found)} records these are registered already: {shared}; use that name "
                "in plans, so that its budget is charged, or take the records out of this data set"
            )
        union = np.union1d(known, found) if len(known) else found
        if len(union) > len(known):
            write_durably(self._hashes_path(name), union.tobytes())
        return Growth(len(union), len(union) - len(known))


def _both(one: Hashes, other: Hashes) -> Hashes:
    return np.intersect1d(one, other, assume_unique=True)
