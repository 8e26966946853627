"""``veilsum-coordinator doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HERE = Path()


def doctor(
    directory: Annotated[
        Path,
        typer.Option("--dir", envvar="VEILSUM_COORDINATOR", help="Directory of the coordinator.", show_default=True),
    ] = HERE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Look at everything that could stop this coordinator, running or not, and say what to do. Changes nothing.

    Roster and key, certificates and their end, clock, database, disk, process and port, versions of libraries. Exit
    codes: 0 nothing failed, 1 something did.

    Example: veilsum-coordinator doctor --dir /var/lib/veilsum
    """
    from coordinator.doctor import examine
    from privacy.checks import finish

    finish(examine(directory), as_json=as_json)
