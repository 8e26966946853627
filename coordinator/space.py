"""Is there room on the disk for a round? Asked before it opens: half-way it is too late for somebody."""

from __future__ import annotations

import shutil
from pathlib import Path

from privacy.job import Job
from privacy.secagg.masking import packed_length


def space_needed(job: Job, members: int) -> int:
    """Bytes a round takes at most: every upload until the outcome is certified, two generations of the running sum,
    the total with its copy in the release, and the adapter."""
    packed, size = packed_length(job.quantizer.total_size, job.rules.bits), 4 * job.quantizer.total_size
    return (members + 2) * packed + 3 * size


def missing_space(job: Job, members: int, directory: Path) -> str:
    """One line if the disk is too full for a round of so many members, else nothing."""
    needed, free = space_needed(job, members), shutil.disk_usage(directory).free
    if free >= needed:
        return ""
    return f"expected {needed / 1e6:,.1f} MB free for the uploads of {members} members, found {free / 1e6:,.1f} MB"
