"""Of a private job nothing leaves a site but what is noised or public: no count, no loss, no clipped share, no time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from participant import dp_sgd, prepare
from participant.training import TrainingResult
from privacy.secagg.quantize import weighted_loss
from tests.charging import PRIVACY, SelfTest, plan
from tests.on_disk import OnDisk

#: What the sites know and nobody else may: records at each site, and what training measured on them.
RECORDS, LOSS, SECONDS, CLIPPED = 1237, 2.5, 98_765.0, 0.25
NOMINAL = 100


def numbers(value: Any) -> Iterator[int]:
    """Every integer in a message, however deep."""
    if isinstance(value, bool | bytes | str) or value is None:
        return
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from numbers(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from numbers(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from numbers(getattr(value, field.name))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnDisk]:
    """A round of five sites that is over."""
    with pytest.MonkeyPatch.context() as patch:
        found = prepared(tmp_path_factory.mktemp("world"), patch)
        found.ready()
        found.run()
        yield found


def prepared(directory: Path, monkeypatch: pytest.MonkeyPatch) -> OnDisk:
    found = OnDisk(directory, n=5, plan=plan("toy", PRIVACY))

    def train_private(**about: Any) -> TrainingResult:
        assert len(about["examples"]) == RECORDS
        about["on_selftest"](SelfTest())
        delta = np.full(found.job.quantizer.size, 0.01, np.float32)
        delta[: round(CLIPPED * len(delta))] = 1.0  # beyond the public clip of 0.5
        return TrainingResult(delta, RECORDS, LOSS, SECONDS)

    monkeypatch.setattr(dp_sgd, "train_private", train_private)
    for member in range(found.n):
        site = found.site(member)
        lines = [{"text": f"text {member} {i}", "label": "ab"[i % 2]} for i in range(RECORDS)]
        (site.home.directory / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (site.store.directory("toy", 1) / "trained.json").unlink()  # left by the fixture: here sites train
        prepare.prepare(site, found.job, 1)
    return found


def test_the_sum_counts_sites_by_their_public_size_and_has_no_loss(world: OnDisk) -> None:
    ((survivors, total),) = world.totals()
    quantizer = world.job.quantizer
    extras = quantizer.decode_extras(total[quantizer.size :], len(survivors))
    assert extras == {"weight": NOMINAL * len(survivors), "loss": 0}
    assert weighted_loss(LOSS, NOMINAL) != 0


def test_no_message_and_no_ledger_line_says_what_the_records_are(world: OnDisk) -> None:
    secret = {RECORDS, round(SECONDS), weighted_loss(LOSS, NOMINAL), weighted_loss(LOSS, RECORDS)}
    for member in range(world.n):
        sent = world.sent(member)
        assert len(sent) >= 5
        assert not secret & {n for message in sent for n in numbers(message)}
        ledger = world.site(member).ledger("toy").entries
        said = [json.loads(entry.line) for entry in ledger]
        assert not secret & set(numbers(said))
        texts = [part for entry in said for part in json.dumps(entry).split('"') if len(part) < 20]
        assert not {str(n) for n in secret} & set(texts)
    assert secret & set(numbers([{"examples": RECORDS}])), "the search finds what it looks for"


def test_what_the_coordinator_shows_is_the_same_whatever_the_records_are(world: OnDisk) -> None:
    from coordinator.report import report

    found = json.loads(report(world.engine, "toy"))
    assert RECORDS not in set(numbers(found))
    assert "examples" not in json.dumps(found)
