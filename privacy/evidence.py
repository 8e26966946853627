"""What a released round leaves for auditors, as files: ``evidence.bin`` beside the packed total.

rounds/NUMBER/evidence.bin   the outcome with its transcript, and the members' signatures on it
rounds/NUMBER/total.bin      the packed total
"""

from __future__ import annotations

from pathlib import Path

from privacy.encoding import decode, encode
from privacy.files import read_file, write_durably
from privacy.secagg.messages import Evidence

EVIDENCE_FILE, TOTAL_FILE = "evidence.bin", "total.bin"


def write_evidence(directory: Path, evidence: Evidence) -> None:
    """Keep the evidence of a round in canonical encoding."""
    write_durably(directory / EVIDENCE_FILE, encode(evidence), private=False)


def read_evidence(directory: Path) -> Evidence:
    """Read the evidence of a round.

    Raises:
        UserError: no such file. ProtocolError: not a canonical encoding of evidence.
    """
    return decode(Evidence, read_file(directory / EVIDENCE_FILE, "the evidence of a round"))
