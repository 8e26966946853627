"""A loss that is not told is not shown: private training reports steps and nothing else."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import structlog

from participant import progress
from privacy.job import Job


class Named:
    """As much of a job as a log line needs."""

    class plan:  # noqa: N801
        name = "news"


@pytest.mark.parametrize(("loss", "told"), [(0.12345, {"loss": 0.1235}), (math.nan, {})])
def test_a_log_line_has_the_loss_if_there_is_one(loss: float, told: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    with progress.training_progress(show=False) as reports, structlog.testing.capture_logs() as lines:
        reports(cast(Job, Named()), 2)(3, 40, loss)
    wanted = {"event": "training", "log_level": "info", "plan": "news", "stage": 2, "step": 3, "steps": 40}
    assert lines == [wanted | told]
