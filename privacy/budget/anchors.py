"""What is known of a ledger besides its lines: others' memory of its head, and whose it says it is."""

from __future__ import annotations

from dataclasses import dataclass

from privacy.budget.checkpoint import read_checkpoint, split_notes, verify_checkpoint
from privacy.budget.entries import Register, parse_line
from privacy.errors import ProtocolError


@dataclass(frozen=True)
class Anchor:
    """What somebody else remembers of a ledger: its size and root; at what time, where that is known."""

    size: int
    root: bytes
    source: str
    time: str = ""


def read_anchors(raw: bytes, site_key: bytes, dataset: str, source: str) -> list[Anchor]:
    """The notes of an anchor file that are about this data set; those about others are passed over.

    Raises:
        ProtocolError: no anchor file, or a note about this data set that its site did not sign.
    """
    about = [note for note in split_notes(raw) if read_checkpoint(note).dataset == dataset]
    checked = [verify_checkpoint(note, site_key, dataset) for note in about]
    return [Anchor(one.size, one.root, source) for one in checked]


def claimed_site(raw: bytes) -> bytes | None:
    """The key that the first line names as its site's, unverified; ``None`` if there is no such line."""
    try:
        entry = parse_line(raw.partition(b"\n")[0])
    except ProtocolError:
        return None
    return bytes.fromhex(entry.site) if isinstance(entry.facts, Register) else None
