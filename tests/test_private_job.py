"""One private job for real: a small model, its self-test, DP-SGD, and a ledger that an auditor can follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from demo.federation import Federation
from participant import charging
from participant.drafting import draft_plan
from participant.prepare import prepare
from participant.site import Site
from privacy.budget import terms
from privacy.budget.events import mechanism_from_json
from privacy.budget.ledger import verify_lines
from privacy.errors import Refusal
from privacy.identity import load_identity
from privacy.job import Job
from privacy.plan import parse_plan
from privacy.secagg.keys import identity_public
from tests.helpers_learning import LABELS, tiny_base, word_examples

SITE = """device = "cpu"
threads = 1
[models]
tiny = "base"
[datasets.words]
path = "words.jsonl"
format = "jsonl"
[datasets.words.budget]
epsilon = "20"
delta = "1e-4"
order = 3
[policy]
plans = ["*"]
"""
PRIVACY = """
[privacy]
unit = "record"
sigma = "1.0"
delta = "1e-4"
clip = "1.0"
rate = "0.25"
steps = 12
nominal_batch = 6
nominal_size = 24
"""
RECORDS = (10, 8, 6)


def private(base: Path, name: str) -> bytes:
    about: dict[str, Any] = {"base_name": "tiny", "dataset": "words", "labels": LABELS, "rank": 4, "max_length": 8}
    return draft_plan(base=base, name=name, learning_rate=0.02, privacy=PRIVACY.strip(), **about).encode()


@pytest.fixture
def site(set_up: Federation, tmp_path: Path) -> Site:
    for path in set_up.site("site-1").iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
            (tmp_path / path.name).chmod(0o600)
    head = (tmp_path / "participant.toml").read_text().split("keep_plain_vector")[0]
    (tmp_path / "participant.toml").write_text(head + SITE)
    tiny_base(tmp_path / "base")
    examples = word_examples(RECORDS)
    lines = [
        {"text": f"{text} {i}", "label": LABELS[label]}
        for i, (text, label) in enumerate(zip(examples.texts, examples.labels, strict=True))
    ]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Site.open(tmp_path)


def test_a_private_job_is_reserved_tested_started_and_kept(site: Site) -> None:
    directory = site.home.directory
    job = Job.of(parse_plan(private(directory / "base", "quiet")), site.roster)
    trained = prepare(site, job, 1)
    assert (trained.weight, trained.loss) == (24, 0.0)
    public = identity_public(load_identity(directory))
    entries = verify_lines((directory / "ledger" / "words.jsonl").read_bytes(), public)
    assert [e.kind for e in entries] == ["REGISTER", "RESERVE", "START"]
    reserve, start = (e.facts.model_dump() for e in entries[1:])
    mechanism = terms.mechanism(job.plan)
    assert mechanism_from_json(reserve["mechanism"]) == mechanism
    assert start["selftest"]["passed"] is True
    assert 0 < float(reserve["claim"]["pld"]) < float(reserve["claim"]["rdp"])
    account: dict[str, Any] = charging.account(site, "words")
    assert account["spent"] == account["reserved"]
    assert 0 < float(account["spent"]) < 20
    assert account["records"] == sum(RECORDS)


def test_a_model_whose_self_test_fails_is_never_started(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from participant import dp_sgd

    def fails(*_: Any) -> Any:
        raise Refusal("the self-test failed")

    monkeypatch.setattr(dp_sgd, "run_self_test", fails)
    job = Job.of(parse_plan(private(site.home.directory / "base", "quiet")), site.roster)
    with pytest.raises(Refusal, match="self-test"):
        prepare(site, job, 1)
    assert [e.kind for e in site.ledger("words").entries] == ["REGISTER", "RESERVE"]
    assert site.store.trained("quiet", 1) is None
