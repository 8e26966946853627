"""Text generation from records on disk to a release: at a site with its commands, and a whole round of three sites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from typer.testing import CliRunner

from coordinator import phases
from demo.federation import Federation
from participant.cli import app
from participant.evaluation import Evaluation, accuracy
from participant.generation import encoded, foretell
from participant.loading import load_causal
from participant.policy import admit
from participant.prepare import kept_vector, prepare
from participant.site import Site
from participant.text_data import Record, Records
from participant.training import Loaded, train
from privacy.adapter import load_peft, save_peft, start_adapter, start_digest
from privacy.errors import UserError
from privacy.job import Job
from privacy.outcome import combine, manifest, verify_cohort
from privacy.plan import parse_plan
from privacy.roster import parse_roster
from privacy.secagg.keys import identity_public
from privacy.secagg.masking import pack
from privacy.secagg.messages import Evidence
from privacy.secagg.quantize import weighted_loss
from tests.helpers_text import conversation, pair, plain, talks, text_draft, tiny_causal
from tests.simulation import Simulation, identity
from tests.test_end_to_end import toy_plan

SITES = 3
ROUND: dict[str, Any] = {"max_cohort": 3, "min_cohort": 3, "min_survivors": 3, "max_colluders": 0, "max_weight": 1024}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal(tmp_path_factory.mktemp("base"))


# --- a round of three ------------------------------------------------------------------------------------------------


def job_for(text: str) -> Job:
    lines = ["federation = 'f'", f"coordinator = '{'9' * 64}'", "[policy]", "max_colluders = 0"]
    lines += ["min_cohort = 3", "min_survivors = 3"]
    for i in range(SITES):
        lines += ["[[members]]", f"name = 'm{i}'", f"key = '{identity_public(identity(i)).hex()}'"]
    return Job.of(parse_plan(text.encode()), parse_roster("\n".join(lines).encode()))


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_release_of_a_round_loads_in_peft_and_foretells_better(base: Path, packing: bool, tmp_path: Path) -> None:
    """Three sites train, mask and upload; from the verified total comes the adapter, and PEFT loads it bit for bit."""
    job = job_for(text_draft(base, packing=packing, max_length=192, epochs=4, **ROUND))
    plan, start, parts = job.plan, start_adapter(job.plan.adapter), [talks(8), talks(10, 8), talks(14, 18)]
    vectors = {}
    for number, records in enumerate(parts):
        found = train(plan=plan, base=base, start=start, examples=records, device="cpu")
        assert found.examples == len(records)
        extras = {"weight": len(records), "loss": weighted_loss(found.loss, len(records))}
        vectors[number] = job.quantizer.quantize(found.delta, len(records), extras)
    simulation = Simulation(SITES, 0, size=job.quantizer.total_size, bits=job.rules.bits)
    simulation.context = simulation.coordinator.context = job.context(job.header(1, 1, start_digest(start)))
    simulation.vectors = vectors
    phase = simulation.run().phase
    assert isinstance(phase, phases.Released)
    assert simulation.is_exact()
    assert simulation.total is not None
    (tmp_path / "total").write_bytes(pack(simulation.total, job.rules.bits))
    votes = tuple(phase.votes[i] for i in sorted(phase.votes))
    evidence = Evidence(phase.outcome, votes, tuple(phase.shares[i] for i in sorted(phase.shares)))
    cohort = verify_cohort(job, 1, start_digest(start), evidence, tmp_path / "total")
    combined = combine(job, [cohort])
    assert combined.weight == 32
    assert manifest(job, 1, [cohort], combined)["training_loss"] == pytest.approx(combined.loss, abs=1e-6)

    save_peft(tmp_path / "release", combined.tensors, adapter=plan.adapter, base_name="tiny")
    config = json.loads((tmp_path / "release" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", None)
    model, tokenizer, _ = load_causal(base)
    wrapped: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / "release"))
    assert isinstance(wrapped, peft.PeftModelForCausalLM)
    state = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    assert state.keys() == combined.tensors.keys()
    assert all(np.array_equal(state[name].numpy(), tensor) for name, tensor in combined.tensors.items())
    before, after = (held_out(job, base, adapter) for adapter in (None, combined.tensors))
    assert after.loss < 0.9 * before.loss
    tuned = Loaded(wrapped.eval(), tokenizer, torch.device("cpu"))
    said = foretell(tuned, encoded(tuned, plan, HELD_OUT))
    assert (said.right, said.tokens, said.nats / said.tokens) == (after.correct, after.total, after.loss)


HELD_OUT = talks(8, 32)


def held_out(job: Job, base: Path, adapter: Any) -> Evaluation:
    return accuracy(plan=job.plan, base=base, adapter=adapter, examples=HELD_OUT, device="cpu")


# --- at a site -------------------------------------------------------------------------------------------------------

SITE = """device = "cpu"
threads = 1
[models]
tiny = "base"
[datasets.talks]
path = "talks.jsonl"
format = "jsonl"
[policy]
plans = ["*"]
"""


def row_of(record: Record) -> dict[str, Any]:
    if record.kind == "conversation":
        return {"messages": [{"role": m.role, "content": m.content} for m in record.messages]}
    names = ("prompt", "response") if record.kind == "pair" else ("text",)
    return dict(zip(names, (m.content for m in record.messages), strict=True))


def lines_of(records: Records) -> str:
    rows = [row_of(record) for record in records.records]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def site(set_up: Federation, tmp_path: Path) -> Site:
    for path in set_up.site("site-1").iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
            (tmp_path / path.name).chmod(0o600)
    head = (tmp_path / "participant.toml").read_text().split("keep_plain_vector")[0]
    (tmp_path / "participant.toml").write_text(head + SITE)
    tiny_causal(tmp_path / "base")
    (tmp_path / "talks.jsonl").write_text(lines_of(talks(20)))
    return Site.open(tmp_path)


def plan_file(site: Site, **changes: Any) -> Path:
    path = site.home.directory / "plan.toml"
    path.write_text(text_draft(site.home.directory / "base", **ROUND | changes))
    return path


def run(site: Site, *arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments, "--dir", str(site.home.directory)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_site_trains_keeps_and_evaluates(site: Site) -> None:
    path = plan_file(site, epochs=4)
    job = Job.of(parse_plan(path.read_bytes()), site.roster)
    admit(job, site.home.settings)
    trained = prepare(site, job, 1)
    assert trained.weight == trained.examples == 20
    vector = np.concatenate(list(kept_vector(site, job, 1)))
    decoded = job.quantizer.decode(vector.astype(np.uint32), 1)
    assert decoded.weight == 20
    assert decoded.loss == pytest.approx(trained.loss, abs=1e-3)
    assert set(load_peft(site.local_directory(job.plan.name, 1))) == set(start_adapter(job.plan.adapter))
    test = site.home.directory / "test.jsonl"
    test.write_text(lines_of(talks(9, 20)))
    asked = ("evaluate", str(path), "--data", str(test), "--adapter", "base", "--adapter", "local")
    found = json.loads(run(site, *asked, "--json"))
    assert found["local"]["loss"] < 0.9 * found["base"]["loss"]
    assert found["local"]["total"] == found["base"]["total"] > 9
    said = run(site, *asked)
    assert f"local: loss {found['local']['loss']:.4f} nats a token, accuracy {found['local']['accuracy']:.4f}" in said
    assert "tokens)" in said


#: Sentence -> twenty records, and how many of them the model tells apart.
ALIKE: dict[str, tuple[Records, int]] = {
    "that differ in what is cut off": (Records(tuple(plain("Capital of Peru? " * 6 + str(i)) for i in range(20))), 1),
    "one as pair and as conversation": (
        Records(tuple(make("France?", "Paris") for _ in range(10) for make in (pair, conversation))),
        1,
    ),
    "that differ in who says what": (
        Records(tuple(pair(f"{'a' * i}.", f".{'a' * (19 - i)}") for i in range(20))),
        20,
    ),
}


@pytest.mark.parametrize(("records", "different"), ALIKE.values(), ids=ALIKE.keys())
def test_records_that_the_model_does_not_tell_apart_count_once(site: Site, records: Records, different: int) -> None:
    (site.home.directory / "talks.jsonl").write_text(lines_of(records))
    job = Job.of(parse_plan(plan_file(site, method="regmean", epochs=1).read_bytes()), site.roster)
    if different == 20:
        assert prepare(site, job, 1).weight == 20
        return
    with pytest.raises(UserError, match=rf"at least 20 different texts \(min_texts\), found {different}$"):
        prepare(site, job, 1)


def test_the_records_of_a_site_are_checked_before_anything_runs(site: Site) -> None:
    path = plan_file(site, max_length=64)
    assert "talks: records: 20, conversation: 20" in run(site, "dataset", "check", "talks")
    found = json.loads(run(site, "dataset", "check", "talks", "--plan", str(path), "--json"))
    assert found["records"] == found["conversation"] == 20
    assert found["tokens"] <= 20 * 64
    assert found["longest"] > 64
    assert 0 < found["cut"] <= 20
    assert 0 < found["tokens_that_count"] < found["tokens"]
    assert json.loads(run(site, "dataset", "register", "talks", "--json"))["added"] == 20
    data = site.home.directory / "talks.jsonl"
    data.write_text(data.read_text() + '{"messages": [{"role": "user", "content": "secret"}]}\n')
    with pytest.raises(UserError, match=r"talks\.jsonl, line 21: expected a message of the assistant") as caught:
        run(site, "dataset", "check", "talks")
    assert "secret" not in str(caught.value)


def test_a_check_needs_the_plans_own_data_set_and_model(site: Site) -> None:
    with pytest.raises(UserError, match="plan 'tiny-text': expected one of data set 'talks', found 'mail'"):
        run(site, "dataset", "check", "talks", "--plan", str(plan_file(site, dataset="mail")))
    with pytest.raises(UserError, match=r"expected base model 'large' in participant\.toml"):
        run(site, "dataset", "check", "talks", "--plan", str(plan_file(site, base_name="large")))
    path = plan_file(site)
    (site.home.directory / "base" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match="expected base model tiny with digest"):
        run(site, "dataset", "check", "talks", "--plan", str(path))


def test_a_check_for_classification_counts_labels(site: Site) -> None:
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(5)]
    (site.home.directory / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (site.home.directory / "toy.toml").write_bytes(toy_plan().replace(b'dataset = "toy"', b'dataset = "talks"'))
    arguments = ("dataset", "check", "talks", "--plan", str(site.home.directory / "toy.toml"))
    assert json.loads(run(site, *arguments, "--json")) == {"records": 5, "a": 3, "b": 2}
    assert "talks: records: 5, text: 5" in run(site, "dataset", "check", "talks")


def test_a_draft_of_the_command_line(base: Path) -> None:
    names = ["--name", "p", "--base-name", "b", "--dataset", "d", "--task", "generation"]
    drafted = CliRunner().invoke(
        app, ["draft", str(base), *names, "--template", "none", "--packing", "--target", "k_proj", "--max-length", "40"]
    )
    assert drafted.exit_code == 0, drafted.output
    plan = parse_plan(drafted.stdout.encode()).plan
    assert plan.generation is not None
    assert (plan.generation.template, plan.generation.packing, plan.data.max_length) == ("none", True, 40)
    assert plan.adapter.modules.keys() == {f"model.layers.{layer}.self_attn.k_proj" for layer in (0, 1)}
    for wrong, message in (
        (["--task", "translation"], "expected --task classification, generation or regression, found 'translation'"),
        (["--template", "own"], "expected --template model, chatml or none, found 'own'"),
        (["--label", "a"], "expected no --label with --task generation"),
        (["--task", "classification", "--packing"], "expected --template and --packing with --task generation only"),
    ):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(app, ["draft", str(base), *names, *wrong], catch_exceptions=False)
    private = CliRunner().invoke(app, ["draft", str(base), *names, "--epsilon", "8", "--size", "2000"])
    assert private.exit_code == 0, private.output
    assert parse_plan(private.stdout.encode()).plan.privacy is not None
