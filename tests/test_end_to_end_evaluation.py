"""An evaluation with real processes, mutual TLS and a real model: totals of counts, the elected release, and the logs.

One federation for the file: three daemons that load torch are most of what it takes.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from demo.federation import BIN, Federation
from participant.drafting import draft_plan
from participant.evaluation import accuracy
from participant.holdout import split
from privacy.adapter import load_peft, start_adapter, start_digest
from privacy.plan import parse_plan
from tests.helpers_learning import LABELS, word_examples
from tests.test_end_to_end import wait_for
from tests.test_end_to_end_stages import NAMES, with_words
from tests.test_logs import leaked, private_keys

COUNTS = {"site-1": (14, 6, 10), "site-2": (9, 12, 8), "site-3": (10, 11, 12)}
RATES = (0.25, 1.0)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """All sites have ended, and the coordinator still runs."""
    directory = tmp_path_factory.mktemp("federation")
    found = with_words(directory, COUNTS)
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
    (directory / "plan.toml").write_text(text)
    try:
        found.start_coordinator()
        found.operator("plan", "submit", str(directory / "plan.toml"))
        for name in NAMES:
            found.start_site(name, "--once", "--json-logs")
        for name in NAMES:
            assert found.processes[name].wait(180) == 0, found.log_tail(name)
        yield found
    finally:
        found.stop_all()


@pytest.mark.slow
def test_held_out_records_of_all_sites_elect_a_release(federation: Federation) -> None:
    plan = parse_plan((federation.directory / "plan.toml").read_bytes()).plan
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


@pytest.mark.slow
def test_four_processes_say_nothing_of_records_tokens_and_vectors(federation: Federation) -> None:
    place = federation.directory
    log = "".join(path.read_text() for path in place.glob("*.log"))
    lines = [json.loads(line) for name in NAMES for line in (place / f"{name}.log").read_text().splitlines()]
    assert {"training", "uploaded"} <= {line["event"] for line in lines}
    for line in lines:
        if line["event"] in ("training", "trained", "uploaded", "ready"):
            stages = (1, 2) if line["event"] in ("uploaded", "ready") else (1,)
            assert (line["member"] in NAMES, line["plan"], line["stage"] in stages) == (True, "words", True), line
        if line["event"] == "uploaded":
            assert line["round"] == 1
    tokenizer: Any = AutoTokenizer.from_pretrained(federation.site("site-1") / "base")
    texts = [json.loads(line)["text"] for path in place.rglob("*.jsonl") for line in _records(path)]
    assert len(texts) > 50
    assert not [text for text in texts if text in log or str(tokenizer(text)["input_ids"])[1:-1] in log]
    vectors = [p.read_bytes() for pattern in ("spool-*.bin", "quantised.i32") for p in place.rglob(pattern)]
    assert len(vectors) >= 6
    assert leaked(log, {"keys": private_keys(place), "vectors": vectors}) == []


def _records(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith('{"text"')]
