"""An evaluation with real processes, mutual TLS and a real model: totals of counts, and the release that they elect."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.federation import BIN, Federation
from participant.drafting import draft_plan
from participant.evaluation import accuracy
from participant.holdout import split
from privacy.adapter import load_peft, start_adapter, start_digest
from privacy.plan import parse_plan
from tests.helpers_learning import LABELS, word_examples
from tests.test_end_to_end import wait_for
from tests.test_end_to_end_stages import NAMES, with_words

COUNTS = {"site-1": (14, 6, 10), "site-2": (9, 12, 8), "site-3": (10, 11, 12)}
RATES = (0.25, 1.0)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    found = with_words(tmp_path, COUNTS)
    text = draft_plan(
        base=found.site("site-1") / "base",
        base_name="tiny",
        name="words",
        dataset="words",
        labels=LABELS,
        rank=4,
        max_length=8,
        epochs=2,
        batch_size=8,
        learning_rate=0.02,
        max_cohort=3,
        min_cohort=3,
        max_colluders=0,
        holdout=0.3,
        rates=RATES,
    )
    (tmp_path / "plan.toml").write_text(text)
    yield found
    found.stop_all()


@pytest.mark.slow
def test_held_out_records_of_all_sites_elect_a_release(federation: Federation) -> None:
    plan = parse_plan((federation.directory / "plan.toml").read_bytes()).plan
    federation.start_coordinator()
    federation.operator("plan", "submit", str(federation.directory / "plan.toml"))
    for name in NAMES:
        federation.start_site(name, "--once")
    for name in NAMES:
        assert federation.processes[name].wait(180) == 0, federation.log_tail(name)
    releases = federation.coordinator / "releases" / "words"
    wait_for(lambda: json.loads((releases / "stage-2" / "manifest.json").read_bytes())["cohorts"][0]["certified"])
    facts = json.loads((releases / "stage-2" / "manifest.json").read_bytes())

    # The same in this process: every site's held-out records under the start and the release as it stands.
    sides = {name: split(word_examples(COUNTS[name]), plan) for name in NAMES}
    one = load_peft(releases / "stage-1" / "adapter")
    for adapter, number in ((start_adapter(plan.adapter), 0), (one, 2)):
        base = federation.site("site-1") / "base"
        found = [accuracy(plan=plan, base=base, adapter=adapter, examples=sides[n][1], device="cpu") for n in NAMES]
        said = facts["evaluation"]["candidates"][number]
        assert (said["records"], said["correct"]) == (sum(f.total for f in found), sum(f.correct for f in found))
        assert said["loss"] == pytest.approx(sum(f.loss * f.total for f in found) / said["records"], abs=1e-4)
    first = json.loads((releases / "stage-1" / "manifest.json").read_bytes())
    assert first["total_weight"] == sum(len(sides[name][0]) for name in NAMES)

    elected = facts["evaluation"]["elected"]
    best = max(facts["evaluation"]["candidates"][1:], key=lambda c: (c["correct"], -c["loss"]))
    assert elected == best["candidate"]
    released = load_peft(releases / "stage-2" / "adapter")
    assert (start_digest(released) == start_digest(one)) == (elected == "server_lr 1")
    for name in NAMES:
        own = load_peft(federation.site(name) / "releases" / "words" / "stage-2" / "adapter")
        assert start_digest(own) == start_digest(released)
    shown = federation.operator("show", "words")
    assert f"  {elected}: {best['correct']} of {best['records']} right" in shown
    pin = (federation.site("site-1") / "roster.pin").read_text().strip()
    command = [str(BIN / "veilsum-audit"), "transcript", str(releases / "stage-2"), "--roster", pin]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
