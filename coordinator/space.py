"""Is there room on the disk for a round? Asked before it opens: half-way it is too late for somebody."""

from __future__ import annotations

import shutil
from pathlib import Path

from privacy.endings import NONE, Reason, no_space
from privacy.job import Job
from privacy.secagg.masking import packed_length


def space_needed(job: Job, members: int) -> int:
    """Bytes a round takes at most: every upload until the outcome is certified, two generations of the running sum,
    the total with its copy in the release, and the adapter."""
    packed, size = packed_length(job.quantizer.total_size, job.rules.bits), 4 * job.quantizer.total_size
    return (members + 2) * packed + 3 * size


def missing_space(job: Job, members: int, directory: Path) -> Reason:
    """Why no round can open, if the disk is too full for a round of so many members."""
    needed, free = space_needed(job, members), shutil.disk_usage(directory).free
    if free >= needed:
        return NONE
    return no_space(needed, members, free)
