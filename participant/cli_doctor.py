"""``veilsum-participant doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HERE = Path()


def doctor(
    directory: Annotated[
        Path, typer.Option("--dir", envvar="VEILSUM_PARTICIPANT", help="Directory of this site.", show_default=True)
    ] = HERE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Look at everything that could stop this site, and say what to do. Sends the coordinator a greeting, no more.

    Roster and key, certificates and their end, clock, coordinator, disk, ledgers, GPU, digests of base models, data
    sets, versions of libraries. Exit codes: 0 nothing failed, 1 something did.

    Example: veilsum-participant doctor --dir /var/lib/veilsum-site
    """
    from participant.doctor import examine
    from privacy.checks import finish

    finish(examine(directory), as_json=as_json)
