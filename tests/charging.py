"""One site whose training is replaced by one that reads nothing, to see what its ledger says when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from demo.federation import Federation
from participant import charging, prepare
from participant.client import Client, OfferedPlan, ReleasedCohort
from participant.policy import admit as admitted
from participant.site import Site
from privacy.budget.rdp import rdp_epsilon
from privacy.job import Job
from privacy.plan import parse_plan
from tests.test_end_to_end import SITE, toy_plan

if TYPE_CHECKING:
    from participant.training import TrainingResult

PRIVACY = """
[privacy]
unit = "record"
sigma = "1.5"
delta = "1e-5"
clip = "0.5"
rate = "0.04"
steps = 50
nominal_batch = 4
nominal_size = 100
"""
BUDGET = '[datasets.toy.budget]\nepsilon = "{}"\ndelta = "1e-5"\n'
POLICY = {"max_colluders": 0, "min_cohort": 3, "min_survivors": 3}


def plan(name: str = "toy", privacy: str = "") -> bytes:
    text = toy_plan().decode().replace('name = "toy"', f'name = "{name}"', 1)
    if privacy:
        text = text.replace("epochs = 1\n", "").replace("batch_size = 4\n", "") + privacy
    return text.encode()


@pytest.fixture(scope="module", name="set_up")
def set_up_federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    names = ["site-1", "site-2", "site-3"]
    found = Federation(tmp_path_factory.mktemp("f"), names, POLICY, dict.fromkeys(names, SITE))
    found.create()
    return found


class World:
    """One site with a data set, whose training is replaced by one that reads nothing."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.trained: list[tuple[str, str]] = []  # (plan, state of its job when training began)
        self.started: list[Any] = []  # the adapter that each training began from
        self.fails: list[Exception] = []
        lines = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
        (directory / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def configure(self, text: str) -> None:
        path = self.directory / "participant.toml"
        head = path.read_text().split("keep_plain_vector")[0]
        path.write_text(head + SITE.replace("[policy]", text + "[policy]").replace('["toy"]', '["*"]'))

    @property
    def site(self) -> Site:
        return Site.open(self.directory)

    def job(self, name: str = "toy", privacy: str = "") -> Job:
        return Job.of(parse_plan(plan(name, privacy)), self.site.roster)

    def kinds(self) -> list[str]:
        return [entry.kind for entry in self.site.ledger("toy").entries]

    def train(self, **about: Any) -> TrainingResult:
        from participant.training import TrainingResult  # seconds of torch, which few tests need

        self.started.append(about["start"])
        book, name = self.site.ledger("toy").book, about["plan"].name
        self.trained.append(
            (name, next(j.state for j in book.jobs.values() if j.reserve.plan == name and not j.aborted))
        )
        if self.fails:
            raise self.fails.pop()
        size = self.job(name, PRIVACY if about["plan"].privacy else "").quantizer.size
        return TrainingResult(np.zeros(size, np.float32), len(about["examples"]), 0.0, 1.0)

    def train_private(self, **about: Any) -> TrainingResult:
        about["on_selftest"](SelfTest())
        return self.train(**about)


class SelfTest:
    passed = True

    def to_json(self) -> dict[str, Any]:
        return {"sensitivity_ratio": "0.99", "passed": True}


@pytest.fixture(name="world")
def charged_site(set_up: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    from participant import dp_sgd, training

    for path in set_up.site("site-1").iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
            (tmp_path / path.name).chmod(0o600)
    found = World(tmp_path)
    monkeypatch.setattr(training, "train", found.train)
    monkeypatch.setattr(dp_sgd, "train_private", found.train_private)
    # The claim is no part of any decision, and a tight one takes a process and a second.
    monkeypatch.setattr(charging, "bounded_pld_epsilon", rdp_epsilon)
    found.configure("")
    return found


def spend(world: World, count: int = 1) -> None:
    for number in range(count):
        prepare.prepare(world.site, world.job(f"quiet-{number}", PRIVACY), 1)


def admit(world: World, job: Job) -> None:

    site = world.site
    admitted(job, site.home.settings, charging.standing(site, job, 1))


class Silent(Client):
    """A client of a coordinator that has released nothing."""

    def __init__(self) -> None:
        self.progress = 0
        self.declined: list[tuple[bool, str]] = []  # is it for now only, and why

    def decline(self, plan: bytes, reason: str, *, waiting: bool) -> None:
        assert len(plan) == 32
        self.declined.append((waiting, reason))

    def releases(self, plan: bytes, stage: int) -> list[ReleasedCohort]:
        assert plan
        assert stage
        return []


def offered(name: str, state: str = "open") -> OfferedPlan:
    return OfferedPlan(plan(name, PRIVACY), state, "wrong labels", 1)
