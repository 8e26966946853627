"""Where an evaluation starts, and what its totals release: unit tests of ``privacy/stages.py`` without any process."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from privacy.adapter import Tensors, start_digest
from privacy.errors import ProtocolError
from privacy.evaluation import Counts, encode_counts
from privacy.job import Job
from privacy.outcome import Total, VerifiedCohort, combine
from privacy.plan import parse_plan
from privacy.secagg.masking import pack
from privacy.stages import Start, candidates_digest, each_candidate, first_start, next_start, release_of, start_of
from tests.test_end_to_end import toy_plan
from tests.test_outcome import whole

RATES = (0.5, 1.0, 2.0)
SECTION = b"\n[evaluation]\nholdout = 0.2\nserver_lr = [0.5, 1.0, 2.0]\n"


def judged(tmp_path: Path, stages: int = 1) -> tuple[Job, VerifiedCohort]:
    """A plan with an evaluation after so many trainings, and a verified cohort of a training."""
    job, cohort = whole(tmp_path)
    raw = toy_plan().replace(b'task = "classification"', b'task = "classification"\nstages = %d' % stages)
    return Job.of(parse_plan(raw + SECTION), job.roster_file), cohort


def same(one: Tensors, other: Tensors) -> bool:
    return start_digest(one) == start_digest(other)


def counted(job: Job, tmp_path: Path, *correct: int, loss: float = 3.0, records: int = 10) -> VerifiedCohort:
    """A cohort of two sites of an evaluation, each with so many right answers of each candidate."""
    quantizer = job.at(job.plan.last).quantizer
    extras = encode_counts(records, [Counts(c, loss + k) for k, c in enumerate(correct)])
    vector = quantizer.quantize(np.empty(0, np.float32), records, extras).astype(np.uint32)
    path = tmp_path / "counts"
    path.write_bytes(pack(vector + vector, quantizer.bits))
    return VerifiedCohort(4, (1, 3), bytes(32), bytes(32), Total(path, quantizer), certified=True)


def test_an_evaluation_starts_from_the_base_and_the_release_at_each_rate(tmp_path: Path) -> None:
    job, cohort = judged(tmp_path)
    first = first_start(job)
    found = next_start(job, 2, first, [cohort])
    assert found.candidate is not None
    assert found.cohorts == ((cohort.number, cohort.total),)
    assert same(found.tensors, first.tensors)
    expected = [first.tensors, *(combine(job, [cohort], first.tensors, rate).tensors for rate in RATES)]
    assert len({start_digest(tensors) for tensors in expected}) == 4
    assert same(expected[2], combine(job, [cohort], first.tensors).tensors)
    for number, tensors in enumerate(expected):
        assert same(found.candidate(number), tensors)
    names = ["base", "server_lr 0.5", "server_lr 1", "server_lr 2"]
    assert [(name, start_digest(tensors)) for name, tensors in each_candidate(job, found)] == [
        (name, start_digest(tensors)) for name, tensors in zip(names, expected, strict=True)
    ]
    label = b"veilsum/1/candidates\0"
    assert found.digest == hashlib.sha256(label + b"".join(map(start_digest, expected))).digest()
    assert candidates_digest(job, found.candidate) == found.digest


def test_what_the_last_of_several_stages_started_from_is_a_candidate(tmp_path: Path) -> None:
    job, cohort = judged(tmp_path, stages=2)
    second = next_start(job, 2, first_start(job), [cohort])
    assert second.candidate is None
    third = next_start(job, 3, second, [cohort])
    assert third.candidate is not None
    assert same(third.candidate(0), first_start(job).tensors)
    assert same(third.candidate(1), second.tensors)
    assert same(third.candidate(3), combine(job, [cohort], second.tensors, 1.0).tensors)
    asked: list[tuple[int, bytes]] = []

    def cohorts(stage: int, start: Start) -> list[VerifiedCohort]:
        asked.append((stage, start.digest))
        return [cohort]

    assert start_of(job, 3, cohorts).digest == third.digest
    assert asked == [(1, first_start(job).digest), (2, second.digest)]


def test_totals_of_counts_release_the_candidate_that_they_elect(tmp_path: Path) -> None:
    job, cohort = judged(tmp_path)
    start = next_start(job, 2, first_start(job), [cohort])
    assert start.candidate is not None
    counts = counted(job, tmp_path, 9, 4, 7, 6)
    found = release_of(job, 2, [counts], start)
    assert same(found.tensors, start.candidate(2))
    assert (found.weight, found.loss) == (20, 0.5)
    names, right = ("base", "server_lr 0.5", "server_lr 1", "server_lr 2"), (18, 8, 14, 12)
    shown = [
        {"candidate": name, "records": 20, "correct": c, "accuracy": c / 20, "loss": (3.0 + k) / 10}
        for k, (name, c) in enumerate(zip(names, right, strict=True))
    ]
    assert found.facts == {"evaluation": {"elected": "server_lr 1", "candidates": shown}}
    third = release_of(job, 2, [counted(job, tmp_path, 1, 1, 1, 1, loss=1.0, records=3)], start)
    told = third.facts["evaluation"]["candidates"][0]
    assert (told["accuracy"], told["loss"]) == (0.333333, 0.333333)
    with pytest.raises(ProtocolError, match="a member twice or none at all"):
        release_of(job, 2, [counts, counts], start)


def test_a_training_releases_its_mean(tmp_path: Path) -> None:
    job, cohort = judged(tmp_path, stages=2)
    first = first_start(job)
    second = next_start(job, 2, first, [cohort])
    for stage, start in ((1, first), (2, second)):
        found = release_of(job, stage, [cohort], start)
        assert same(found.tensors, combine(job, [cohort], start.tensors).tensors)
        assert "evaluation" not in found.facts
    assert not same(found.tensors, second.tensors)
