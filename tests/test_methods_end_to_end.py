"""Real processes train by the method that needs a file beside the plan, and an auditor checks their release."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo.federation import BIN, Federation
from privacy.adapter import load_peft
from privacy.factors import factors_file
from privacy.plan import parse_plan
from tests.helpers_learning import LABELS, tiny_base, word_examples

NAMES = ["site-1", "site-2", "site-3"]
POLICY = {"max_colluders": 0, "min_cohort": 3, "min_survivors": 3}
SITE = """device = "cpu"
threads = 1
[models]
tiny = "../base"
[datasets.words]
path = "words.jsonl"
format = "jsonl"
[policy]
plans = ["*"]
"""


def federation_with(directory: Path) -> Federation:
    federation = Federation(directory, NAMES, POLICY, dict.fromkeys(NAMES, SITE))
    federation.create()
    tiny_base(directory / "base")
    for index, name in enumerate(NAMES):
        examples = word_examples((8 + index, 9, 10))
        lines = [
            {"text": f"{text} {i}", "label": LABELS[label]}
            for i, (text, label) in enumerate(zip(examples.texts, examples.labels, strict=True))
        ]
        (federation.site(name) / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return federation


def drafted(directory: Path, *arguments: str) -> str:
    """The plan that the command writes, for three sites."""
    labels = [part for label in LABELS for part in ("--label", label)]
    command = [str(BIN / "veilsum-participant"), "draft", str(directory / "base"), "--name", "words"]
    command += ["--base-name", "tiny", "--dataset", "words", "--max-length", "8", "--rank", "4", *labels, *arguments]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for old, new in (
        ("max_cohort = 8", "max_cohort = 3"),
        ("min_cohort = 4", "min_cohort = 3"),
        ("max_colluders = 1", "max_colluders = 0"),
    ):
        assert old in text
        text = text.replace(old, new)
    return text


def audited(federation: Federation, *arguments: str) -> dict[str, Any]:
    stage = federation.coordinator / "releases" / "words" / "stage-1"
    command = [str(BIN / "veilsum-audit"), "transcript", str(stage), "--json", *arguments]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


@pytest.mark.slow
def test_three_sites_and_an_auditor_agree_on_a_release_with_factors(tmp_path: Path) -> None:
    federation = federation_with(tmp_path)
    try:
        plan = tmp_path / "plan.toml"
        plan.write_text(drafted(tmp_path, "--method", "core", "--factors", str(tmp_path)))
        federation.start_coordinator()
        for name in NAMES:
            federation.start_site(name, "--once")
        federation.operator("plan", "submit", str(plan))
        for name in NAMES:
            assert federation.processes[name].wait(240) == 0, federation.log_tail(name)
        release = federation.show("words")["release"]
        facts = audited(federation)
        assert release["method"] == "core"
        assert facts["adapter_digest"] == release["adapter_digest"]
        core = parse_plan(plan.read_bytes()).plan.aggregation.core
        assert core is not None
        files = [factors_file(place / "factors", core.factors) for place in places(federation)]
        assert len({path.read_bytes() for path in files}) == 1
        released = load_peft(federation.coordinator / "releases" / "words" / "stage-1" / "adapter")
        for name in NAMES:
            mine = load_peft(federation.site(name) / "releases" / "words" / "stage-1" / "adapter")
            assert all(np.array_equal(mine[k], released[k]) for k in released)
    finally:
        federation.stop_all()


def places(federation: Federation) -> list[Path]:
    """Where the factors of a base model are to be found: at every site, the coordinator, and in the release."""
    stage = federation.coordinator / "releases" / "words" / "stage-1"
    return [*(federation.site(name) for name in NAMES), federation.coordinator, stage]
