"""One parser under libFuzzer: ``python -m tests.fuzz.one PARSER [libFuzzer's arguments]``, started by ``run.py``."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import atheris

#: Bytes that this process may map beyond what its imports took: a larger allocation raises MemoryError, a finding.
MEMORY = 1 << 30

with atheris.instrument_imports(include=["coordinator", "participant", "privacy", "tomllib"]):
    from tests.fuzz.targets import TARGETS, check


def main() -> None:
    target = TARGETS[sys.argv.pop(1)]
    target.seeds()

    def once(data: bytes) -> None:
        check(target, data)

    atheris.Setup([*sys.argv, f"-max_len={target.longest}"], once)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, -1))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
