"""Two stages with real processes, mutual TLS and real training; a site and the coordinator are killed on the way."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from demo.compare import secure_equals_plain
from demo.federation import BIN, Federation
from participant.drafting import draft_plan
from participant.prepare import PLAIN_VECTOR
from participant.training import train
from privacy.adapter import Tensors, flatten, load_peft, start_adapter, start_digest, trained_part
from privacy.budget.ledger import verify_lines
from privacy.identity import load_identity
from privacy.job import Job
from privacy.plan import PlanFile, parse_plan
from privacy.roster import load_roster
from privacy.secagg.keys import identity_public
from tests.helpers_learning import LABELS, tiny_base, word_examples
from tests.test_end_to_end import wait_for

NAMES = ["site-1", "site-2", "site-3"]
POLICY = {"max_colluders": 0, "min_cohort": 3, "min_survivors": 3}
COUNTS = {"site-1": (8, 6, 4), "site-2": (4, 8, 6), "site-3": (6, 4, 8)}
SITE = """device = "cpu"
threads = 1
keep_plain_vector = true
[models]
tiny = "base"
[datasets.words]
path = "words.jsonl"
format = "jsonl"
[policy]
plans = ["words"]
"""


def two_stages(base: Path) -> bytes:
    about = {"base": base, "base_name": "tiny", "name": "words", "dataset": "words", "labels": LABELS, "rank": 4}
    numbers = {"max_length": 8, "epochs": 2, "batch_size": 8, "learning_rate": 0.02, "seed": bytes(32)}
    cohort = {"max_cohort": 3, "min_cohort": 3, "max_colluders": 0}
    arguments: dict[str, Any] = about | numbers | cohort
    text = draft_plan(**arguments)
    assert text.count("stages = 1") == 1
    return text.replace("stages = 1", "stages = 2").encode()


def with_words(directory: Path, counts: Mapping[str, tuple[int, ...]]) -> Federation:
    """Three sites with so many records of each class, and the tiny base model."""
    found = Federation(directory, NAMES, POLICY, dict.fromkeys(NAMES, SITE))
    found.create()
    for name in NAMES:
        examples = word_examples(counts[name])
        pairs = zip(examples.texts, examples.labels, strict=True)
        lines = [json.dumps({"text": text, "label": LABELS[label]}) + "\n" for text, label in pairs]
        (found.site(name) / "words.jsonl").write_text("".join(lines))
        tiny_base(found.site(name) / "base")
    return found


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    found = with_words(tmp_path, COUNTS)
    (tmp_path / "plan.toml").write_bytes(two_stages(found.site("site-1") / "base"))
    yield found
    found.stop_all()


def stage_of(federation: Federation, number: int) -> Path:
    return federation.coordinator / "releases" / "words" / f"stage-{number}"


def flat(job: Job, tensors: Tensors) -> NDArray[np.float32]:
    return flatten(trained_part(tensors, job.layout), job.layout)


def plain_release(federation: Federation, job: Job, number: int, start: NDArray[np.float32]) -> NDArray[np.float32]:
    """start + weighted mean of what the sites quantised, by the formula of the specification in plain numpy."""
    size, rules = job.quantizer.size, job.plan.round
    vectors = [
        np.load(federation.site(name) / "work" / "words" / f"stage-{number}" / PLAIN_VECTOR).astype(np.int64)[:size]
        for name in NAMES
    ]
    weight = sum(sum(COUNTS[name]) for name in NAMES)
    mean = np.sum(vectors, axis=0) * (rules.clip * rules.max_weight / (job.quantizer.qmax * weight))
    return np.asarray(start + mean.astype(np.float32), np.float32)


def check_training(federation: Federation, job: Job, number: int, start: Tensors) -> None:
    """What a site trained in a stage is what the same training gives from that stage's start in this process."""
    site = federation.site("site-2")
    examples = word_examples(COUNTS["site-2"])
    result = train(plan=job.plan, base=site / "base", start=start, examples=examples, device="cpu", threads=1)
    local = load_peft(site / "work" / "words" / f"stage-{number}" / "local")
    assert np.abs(flat(job, local) - (flat(job, start) + result.delta)).max() < 1e-6
    assert np.abs(result.delta).max() > 0.01


def check_audit(federation: Federation) -> None:
    pin = (federation.site("site-1") / "roster.pin").read_text().strip()
    command = [str(BIN / "veilsum-audit"), "transcript", str(stage_of(federation, 2)), "--roster", pin]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "stage 2 starts from what the totals of stage 1 give: " in done.stdout


def check_federation(federation: Federation) -> None:
    """All ledgers beside the releases of both stages and what the others remember: nothing is found but no budget."""
    place = federation.directory / "audit"
    place.mkdir()
    for name in ("roster.toml", "witnesses.jsonl"):
        shutil.copyfile(federation.coordinator / name, place / name)
    shutil.copytree(federation.coordinator / "releases", place / "releases")
    for name in NAMES:
        (place / "ledgers" / name).mkdir(parents=True)
        for path in (federation.site(name) / "ledger" / "words.jsonl", federation.site(name) / "witnesses.jsonl"):
            shutil.copyfile(path, place / "ledgers" / name / path.name)
    pin = (federation.site("site-1") / "roster.pin").read_text().strip()
    command = [str(BIN / "veilsum-audit"), "federation", str(place), "--pin", pin]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def check_ledgers(federation: Federation, starts: list[str]) -> None:
    """Each stage is a job of its own in every site's ledger, from the start that this stage had."""
    for name in NAMES:
        key = identity_public(load_identity(federation.site(name)))
        entries = verify_lines((federation.site(name) / "ledger" / "words.jsonl").read_bytes(), key)
        assert [e.kind for e in entries] == ["REGISTER", *["RESERVE", "START", "RELEASE", "COMMIT"] * 2]
        reserved = [e.facts.model_dump() for e in entries if e.kind == "RESERVE"]
        assert [(r["stage"], r["model"]["start"]) for r in reserved] == list(enumerate(starts, 1))


@pytest.mark.slow
def test_two_stages_equal_the_plain_computation_although_both_ends_are_killed(federation: Federation) -> None:
    plan: PlanFile = parse_plan((federation.directory / "plan.toml").read_bytes())
    job = Job.of(plan, load_roster(federation.coordinator / "roster.toml"))
    federation.start_coordinator()
    federation.operator("plan", "submit", str(federation.directory / "plan.toml"))
    for name in NAMES:
        federation.environment = {"VEILSUM_FAULT": "before-M1@2"} if name == "site-3" else {}
        federation.start_site(name, "--once")
    federation.environment = {}
    assert federation.processes["site-3"].wait(120) == -signal.SIGKILL, federation.log_tail("site-3")
    found = federation.show("words")
    assert (found["stage"], found["stages"], found["history"][0]["closed"]) == (2, 2, True)
    federation.stop("coordinator", signal.SIGKILL)
    federation.start_coordinator()
    federation.start_site("site-3", "--once")
    for name in NAMES:
        assert federation.processes[name].wait(120) == 0, federation.log_tail(name)
    wait_for(lambda: bool(federation.show("words")["history"][1]["release"]["cohorts"][0]["certified"]))

    start, starts = start_adapter(job.plan.adapter), []
    for number in (1, 2):
        assert secure_equals_plain(federation, plan, number)
        starts.append(start_digest(start).hex())
        check_training(federation, job, number, start)
        released = load_peft(stage_of(federation, number) / "adapter")
        plain = plain_release(federation, job, number, flat(job, start))
        assert np.abs(flat(job, released) - plain).max() < 1e-6
        for name in NAMES:
            own = load_peft(federation.site(name) / "releases" / "words" / f"stage-{number}" / "adapter")
            assert start_digest(own) == start_digest(released)
        start = released
    check_audit(federation)
    check_federation(federation)
    check_ledgers(federation, starts)
    fetched = json.loads(federation.participant("site-1", "fetch", "words", "--stage", "1", "--json"))
    assert fetched["adapter"] == str(federation.site("site-1") / "releases" / "words" / "stage-1" / "adapter")
