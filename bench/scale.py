"""How large a run is: the sizes that the bars are about, or tiny ones which only show that the scripts work."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-peers" / "bin" / "python"


@dataclass(frozen=True)
class Scale:
    """Sizes of one run.

    Attributes:
        scratch: where vectors, spools and directories of federations go; a disk on which fsync means something.
    """

    scratch: Path
    quick: bool = False

    @property
    def size(self) -> int:
        """d of most rows."""
        return 1 << 17 if self.quick else 10_000_000

    def members(self, full: int, quick: int = 4) -> int:
        """n of a row."""
        return quick if self.quick else full

    @property
    def repeats(self) -> int:
        """Alternations of which the median counts."""
        return 1 if self.quick else 5


def run_text(command: list[str]) -> str:
    """Output of a command; with its error output in the exception if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout
