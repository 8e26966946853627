"""A site's records as the task of a plan sees them."""

from __future__ import annotations

from pathlib import Path

from participant.config import DataSet
from participant.data import Examples, load_examples
from participant.measured import Measured, load_measured
from participant.text_data import Records, load_records
from privacy.plan import Plan

TaskData = Examples | Measured | Records


def load_for(plan: Plan, path: Path, data: DataSet, *, to_train: bool = False) -> TaskData:
    """Read a data set of a site, or other records of the same format and columns.

    Args:
        to_train: keep no more records of a unit than the plan's ``[privacy]`` counts with.

    Raises:
        UserError: as the loader of the task.
    """
    if plan.task == "generation":
        return load_records(path, data)
    privacy = plan.privacy if to_train else None
    unit, most = None, None
    if privacy is not None and privacy.unit == "user":
        unit, most = data.unit, privacy.max_records_per_unit
    if plan.data.target is not None:
        place = (path, data.format, data.text, data.target, plan.data.target)
        return load_measured(*place, unit_column=unit, max_records_per_unit=most)
    columns = (data.text, data.label, plan.data.labels)
    return load_examples(path, data.format, *columns, unit_column=unit, max_records_per_unit=most)
