"""The evaluation as a stage of its own, on a real engine with real sites: counts in, totals out, and who is elected."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import participant.evaluation
import participant.patience
from coordinator.publish import verified
from coordinator.report import report
from participant.data import Examples
from participant.evaluation import Evaluation
from participant.fetch import fetch_release, start_of
from participant.judging import judge
from participant.running import join
from privacy.adapter import Tensors, load_peft, save_peft, start_adapter, start_digest
from privacy.audit import audit_release
from privacy.errors import ProtocolError, Refusal, UserError
from privacy.evaluation import candidates_of
from privacy.outcome import combine
from privacy.secagg.messages import Offer
from privacy.stages import first_start, next_start
from tests.on_disk import OnDisk, full_disk
from tests.staged import manifest, released, run_stage, staged
from tests.test_end_to_end import toy_plan

RATES = (0.5, 1.0, 2.0)
SECTION = b"[evaluation]\nholdout = 0.2\nserver_lr = [0.5, 1.0, 2.0]\n"
#: Right answers of each candidate: the base, the start of the last stage if there are several, and each rate.
CORRECT = {"base": 2, "previous": 3, "server_lr 0.5": 5, "server_lr 1": 4, "server_lr 2": 7}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(participant.patience, "BACKOFF_S", (0.0,))


class Judges:
    """Stands for the model: knows each candidate by its digest, and how many of a site's records it gets right."""

    def __init__(self, world: OnDisk) -> None:
        self.world = world
        self.seen: list[str] = []
        self.expected = {start_digest(tensors): name for name, tensors in candidates(world).items()}

    def accuracy(self, *, adapter: Mapping[str, Any], examples: Examples, **_: Any) -> Evaluation:
        name = self.expected[start_digest(adapter)]
        self.seen.append(name)
        return Evaluation(min(len(examples), CORRECT[name]), len(examples), 0.5 + CORRECT[name] / 10)


def candidates(world: OnDisk) -> dict[str, Tensors]:
    """What the sites must judge, from plain totals at the coordinator."""
    job, engine = world.job, world.engine
    last = job.plan.stages
    start = first_start(job)
    for stage in range(1, last):
        start = next_start(job, stage + 1, start, verified(job, stage, start, engine.released(world.digest, stage)))
    cohorts = verified(job, last, start, engine.released(world.digest, last))
    found = {"base": start_adapter(job.plan.adapter)}
    if last > 1:
        found["previous"] = start.tensors
    return found | {f"server_lr {rate:g}": combine(job, cohorts, start.tensors, rate).tensors for rate in RATES}


def evaluate(world: OnDisk, patch: pytest.MonkeyPatch, *members: int) -> Judges:
    """The stage of the evaluation up to where everybody is ready; member i holds out 10 + i records."""
    last = world.job.plan.stages
    judges = Judges(world)
    patch.setattr(participant.evaluation, "accuracy", judges.accuracy)
    world.begin(last + 1)
    for i in members or range(world.n):
        site, client = world.site(i), world.daemons[i].client
        start = start_of(site, client, world.job, last + 1)
        texts = tuple(f"{i}-{k}" for k in range(10 + i))
        judge(site, world.job, last + 1, start, Examples(texts, (0,) * len(texts)))
    world.ready(*(members or range(world.n)))
    return judges


def plan(stages: int = 1) -> bytes:
    return (toy_plan() + b"stage_s = 100000\n" if stages == 1 else staged(stages)) + SECTION


@pytest.fixture(name="world")
def trained(tmp_path: Path) -> OnDisk:
    found = OnDisk(tmp_path, plan=plan())
    run_stage(found, 1)
    return found


def test_totals_of_counts_elect_a_release_and_everybody_computes_it(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    judges = evaluate(world, monkeypatch)
    assert judges.seen == ["base", "server_lr 0.5", "server_lr 1", "server_lr 2"] * 5
    world.run()
    facts = manifest(world, 2)
    records = sum(10 + i for i in range(5))
    found = {c["candidate"]: (c["records"], c["correct"], c["accuracy"]) for c in facts["evaluation"]["candidates"]}
    assert found == {
        name: (records, 5 * CORRECT[name], round(5 * CORRECT[name] / records, 6))
        for name in ("base", "server_lr 0.5", "server_lr 1", "server_lr 2")
    }
    assert facts["evaluation"]["elected"] == "server_lr 2"
    assert (facts["total_weight"], facts["coordinates"]) == (records, 0)
    assert "training_loss" not in json.dumps(facts)
    adapter = load_peft(released(world, 2) / "adapter")
    assert start_digest(adapter) == start_digest(candidates(world)["server_lr 2"])
    audit_release(released(world, 2), world.job.roster_file.hash)
    for i in range(5):
        daemon = world.daemons[i]
        assert fetch_release(daemon.site, daemon.client, world.job, 2)
        own = load_peft(daemon.site.release_directory("toy", 2) / "adapter")
        assert start_digest(own) == start_digest(adapter)
    shown = json.loads(report(world.engine, "toy"))
    assert shown["release"]["evaluation"] == facts["evaluation"]
    assert world.engine.stage(world.digest) == 2
    world.wait(1e6)
    assert world.engine.stage(world.digest) == 2


def test_the_start_of_the_last_of_several_stages_is_judged_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = OnDisk(tmp_path, plan=plan(2))
    for stage in (1, 2):
        run_stage(world, stage)
    judges = evaluate(world, monkeypatch)
    assert judges.seen[:5] == ["base", "previous", "server_lr 0.5", "server_lr 1", "server_lr 2"]
    world.run()
    found = [c["candidate"] for c in manifest(world, 3)["evaluation"]["candidates"]]
    assert found == list(CORRECT)


def test_a_second_cohort_of_judges_counts_with_the_first(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    world.away = {4}
    evaluate(world, monkeypatch, 0, 1, 2, 3)
    world.wait(100.0)
    world.run()
    assert manifest(world, 2)["evaluation"]["candidates"][0]["records"] == 10 + 11 + 12 + 13


def test_a_site_starts_again_from_the_candidates_on_its_disk(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(world, monkeypatch)
    site = world.site(0)
    before = start_of(site, world.daemons[0].client, world.job, 2)
    world.restart(0)
    monkeypatch.setattr(type(world.daemons[0].client), "releases", lambda *_: pytest.fail("asked for totals again"))
    again = start_of(world.site(0), world.daemons[0].client, world.job, 2)
    assert (again.digest, again.cohorts) == (before.digest, before.cohorts)
    assert again.candidate is not None
    names = [c.name for c in candidates_of(world.job.plan)]
    for number, name in enumerate(names):
        assert start_digest(again.candidate(number)) == start_digest(candidates(world)[name])


def test_a_damaged_candidate_is_noticed(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(world, monkeypatch)
    place = world.site(0).store.directory("toy", 2)
    weights = place / "candidate-1" / "adapter_model.safetensors"
    weights.write_bytes((place / "candidate-2" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"expected the start .* found another"):
        start_of(world.site(0), world.daemons[0].client, world.job, 2)


def test_sites_that_judge_other_candidates_meet_in_no_round(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that shows one site other totals of the training gives it other candidates, so another header."""
    evaluate(world, monkeypatch)
    site, client = world.site(0), world.daemons[0].client
    real = start_of(site, client, world.job, 2)
    monkeypatch.setattr(type(site), "start_digest", lambda *_: bytes(32))
    round_id, offer = world.message_for(0)
    assert isinstance(offer, Offer)
    assert offer.header.start == real.digest
    with pytest.raises(Refusal, match="start"):
        join(site, client, world.job.at(2), 2, round_id, offer)


def test_counts_are_spent_once(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(world, monkeypatch)
    world.run()
    assert all(len(world.site(i).spent(world.job, 2)) == 1 for i in range(5))
    with pytest.raises(Refusal, match="is in a release of this stage already"):
        world.ready(0)


def test_a_total_of_the_training_without_certificate_is_no_candidate(world: OnDisk) -> None:
    cohorts = verified(world.job, 1, first_start(world.job), world.engine.released(world.digest, 1))
    forged = [type(c)(c.number, c.survivors, c.t2, c.total, c.sums, certified=False) for c in cohorts]
    with pytest.raises(ProtocolError, match="has no outcome certificate"):
        next_start(world.job, 2, first_start(world.job), forged)


def test_an_auditor_notices_another_election(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(world, monkeypatch)
    world.run()
    loser = candidates(world)["server_lr 1"]
    save_peft(released(world, 2) / "adapter", loser, adapter=world.job.plan.adapter, base_name="tiny")
    with pytest.raises(ProtocolError, match="the adapter is not the one that the totals give"):
        audit_release(released(world, 2), world.job.roster_file.hash)


def test_the_vector_is_counts_alone(world: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(world, monkeypatch)
    quantizer = world.job.at(2).quantizer
    kept = world.site(3).store.quantised("toy", 2)
    extras = quantizer.decode_extras(np.concatenate([tile.astype(np.int64) for tile in kept]), 1)
    assert extras["weight"] == 13
    assert [extras[f"correct-{k}"] for k in range(4)] == [2, 5, 4, 7]
    assert extras["loss-0"] == round(13 * 0.7 * 65536)


def test_a_full_disk_costs_the_counts_and_no_second_look_at_the_records(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    judges = Judges(world)
    monkeypatch.setattr(participant.evaluation, "accuracy", judges.accuracy)
    world.begin(2)
    site = world.site(0)
    start = start_of(site, world.daemons[0].client, world.job, 2)
    full_disk(monkeypatch, "before-write:quantised.i#", times=2)
    judge(site, world.job, 2, start, Examples(("one", "two"), (0, 1)))
    assert len(judges.seen) == 4
    assert site.store.trained("toy", 2) is not None
