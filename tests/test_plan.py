"""Plan files: every field is checked, and an error names key and file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from privacy.errors import UserError
from privacy.plan import MAX_PLAN_BYTES, load_plan, parse_plan

PLAN = f"""\
name = "news-1"
task = "classification"

[base]
name = "all-MiniLM-L6-v2"
digest = "{"a" * 64}"

[adapter]
rank = 8
alpha = 16.0
seed = "{"b" * 64}"
digest = "{"c" * 64}"

[adapter.modules]
"layer.0.query" = [384, 384]

[adapter.head]
"classifier.bias" = [5]

[data]
dataset = "news"
labels = ["sport", "tech"]

[training]
epochs = 2
learning_rate = 2e-3
batch_size = 16

[round]
max_cohort = 5
min_cohort = 4
min_survivors = 3
max_colluders = 1
clip = 0.25
max_weight = 1000
"""


def test_a_plan_is_read_with_its_defaults() -> None:
    plan = parse_plan(PLAN.encode()).plan
    assert (plan.stages, plan.round.bits, plan.round.audit) == (1, 24, "divided")
    assert (plan.training.loss, plan.training.seed, plan.data.max_length) == ("logit_adjusted", 0, 128)
    assert (plan.aggregation.weights, plan.aggregation.server_lr) == ("examples", 1.0)
    assert plan.deadlines.upload_s == plan.deadlines.stage_s == 86400
    assert plan.adapter.modules == {"layer.0.query": (384, 384)}


def test_the_digest_is_over_the_label_and_the_very_bytes() -> None:
    file = parse_plan(PLAN.encode())
    assert file.digest == hashlib.sha256(b"veilsum/1/plan\0" + PLAN.encode()).digest()
    assert parse_plan((PLAN + "\n").encode()).digest != file.digest


#: Sentence -> (line of the plan, what it is replaced by, what the error says).
BAD: dict[str, tuple[str, str, str]] = {
    "an unknown key at the top": ('task = "classification"', 'task = "classification"\nfoo = 1', "unknown key 'foo'"),
    "an unknown key in a table": ("max_cohort = 5", "max_cohort = 5\nmin_kohort = 2", "unknown key 'round.min_kohort'"),
    "an unknown table": ("[round]", "[extras]\n[round]", "unknown key 'extras'"),
    "a missing key": ("epochs = 2\n", "", "missing key 'training.epochs'"),
    "a missing table": ('[data]\ndataset = "news"\nlabels = ["sport", "tech"]\n', "", "missing key 'data'"),
    "a key twice": ("epochs = 2", "epochs = 2\nepochs = 3", "expected a TOML file"),
    "no TOML at all": ("[round]", "<round>", "expected a TOML file"),
    "text where a number belongs": ("epochs = 2", 'epochs = "2"', "key 'training.epochs'"),
    "a fraction where an integer belongs": ("epochs = 2", "epochs = 2.5", "key 'training.epochs'"),
    "a truth value where an integer belongs": ("epochs = 2", "epochs = true", "key 'training.epochs'"),
    "a date where text belongs": ('dataset = "news"', "dataset = 2024-01-01", "expected a TOML file"),
    "a learning rate that is not a number": ("2e-3", "nan", "training.learning_rate"),
    "an infinite clipping range": ("clip = 0.25", "clip = inf", "round.clip"),
    "a clipping range of nothing": ("clip = 0.25", "clip = 0.0", "key 'round.clip'"),
    "a negative clipping range": ("clip = 0.25", "clip = -1.0", "key 'round.clip'"),
    "a clipping range beyond a million": ("clip = 0.25", "clip = 1.1e6", "key 'round.clip'"),
    "a word of 25 bits": ("clip = 0.25", "clip = 0.25\nbits = 25", "key 'round.bits'"),
    "a learning rate of nothing": ("2e-3", "0.0", "key 'training.learning_rate'"),
    "a rate of the head above one": ("2e-3", "2e-3\nhead_learning_rate = 2.0", "key 'training.head_learning_rate'"),
    "a learning rate above one": ("2e-3", "1.5", "key 'training.learning_rate'"),
    "no epochs": ("epochs = 2", "epochs = 0", "key 'training.epochs'"),
    "no batch": ("batch_size = 16", "batch_size = 0", "key 'training.batch_size'"),
    "rank nothing": ("rank = 8", "rank = 0", "key 'adapter.rank'"),
    "alpha nothing": ("alpha = 16.0", "alpha = 0.0", "key 'adapter.alpha'"),
    "a module without outputs": ("[384, 384]", "[0, 384]", "key 'adapter.modules.layer.0.query.0'"),
    "a module with one side": ("[384, 384]", "[384]", "key 'adapter.modules.layer.0.query.1'"),
    "no module": ('"layer.0.query" = [384, 384]', "", "key 'adapter.modules'"),
    "a digest in capitals": ("a" * 64, "A" * 64, "key 'base.digest'"),
    "a digest that is too short": ("b" * 64, "b" * 63, "key 'adapter.seed'"),
    "a digest with a line break": (f'"{"b" * 64}"', f'"{"b" * 64}\\n"', "key 'adapter.seed'"),
    "a name that climbs out of its directory": ('"news-1"', '"../news"', "key 'name'"),
    "a name in capitals": ('"news-1"', '"News"', "key 'name'"),
    "an unknown task": ('"classification"', '"poetry"', "key 'task'"),
    "a classifier without a head": ('"classifier.bias" = [5]', "", "adapter.head: a classification task needs a head"),
    "no stage": ('task = "classification"', 'task = "classification"\nstages = 0', "key 'stages'"),
    "seventeen stages": ('task = "classification"', 'task = "classification"\nstages = 17', "key 'stages'"),
    "no time to wait in a stage": ("[round]", "[deadlines]\nstage_s = 0\n[round]", "key 'deadlines.stage_s'"),
    "one label": ('["sport", "tech"]', '["sport"]', "at least two labels"),
    "a label twice": ('["sport", "tech"]', '["sport", "sport"]', "labels must be distinct"),
    "a cohort of one": ("max_cohort = 5", "max_cohort = 1", "key 'round.max_cohort'"),
    "a cohort beyond the complete graph": ("max_cohort = 5", "max_cohort = 129", "key 'round.max_cohort'"),
    "fewer joiners than survivors": ("min_survivors = 3", "min_survivors = 5", "min_survivors <= min_cohort"),
    "more joiners than places": ("min_cohort = 4", "min_cohort = 6", "min_survivors <= min_cohort <= max_cohort"),
    "a survivor alone": ("min_survivors = 3", "min_survivors = 1", "key 'round.min_survivors'"),
    "colluders below none": ("max_colluders = 1", "max_colluders = -1", "key 'round.max_colluders'"),
    "no weight": ("max_weight = 1000", "max_weight = 0", "key 'round.max_weight'"),
    "a weight beyond 2**40": ("max_weight = 1000", f"max_weight = {2**40 + 1}", "key 'round.max_weight'"),
    "an unknown audit": ("clip = 0.25", 'clip = 0.25\naudit = "maybe"', "key 'round.audit'"),
    "a deadline of nothing": ("[round]", "[deadlines]\njoin_s = 0\n[round]", "key 'deadlines.join_s'"),
    "a server rate of nothing": ("[round]", "[aggregation]\nserver_lr = 0.0\n[round]", "key 'aggregation.server_lr'"),
    "an unknown method": ("[round]", '[aggregation]\nmethod = "best"\n[round]', "key 'aggregation.method'"),
    "both factors, one of them frozen": (
        "[round]",
        '[aggregation]\nmethod = "both"\n[round]',
        "adapter.train: expected",
    ),
    "a method without its section": (
        "[round]",
        '[aggregation]\nmethod = "core"\n[round]',
        "core: expected this section",
    ),
    "a factors' digest that is too short": (
        "[round]",
        '[aggregation]\nmethod = "core"\ncore = { factors = "ab" }\n[round]',
        "key 'aggregation.core.factors'",
    ),
    "an unknown loss": ("epochs = 2", 'epochs = 2\nloss = "best"', "key 'training.loss'"),
}


@pytest.mark.parametrize(("line", "instead", "fragment"), BAD.values(), ids=BAD.keys())
def test_a_bad_plan_is_refused_with_key_and_file(line: str, instead: str, fragment: str) -> None:
    assert line in PLAN
    with pytest.raises(UserError) as refused:
        parse_plan(PLAN.replace(line, instead, 1).encode(), "plan.toml")
    assert str(refused.value).startswith("plan.toml: ")
    assert fragment in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_plan_that_is_not_text_is_refused() -> None:
    with pytest.raises(UserError, match="plan: expected a TOML file"):
        parse_plan(b"\xff")


def test_a_plan_beyond_four_mebibytes_is_refused_unread() -> None:
    with pytest.raises(UserError, match=f"expected at most {MAX_PLAN_BYTES} bytes"):
        parse_plan(PLAN.encode() + b"#" * MAX_PLAN_BYTES)
    largest = PLAN.encode() + b"#" * (MAX_PLAN_BYTES - len(PLAN))
    assert parse_plan(largest).raw == largest


def test_a_plan_cannot_be_changed_once_it_is_read() -> None:
    plan = parse_plan(PLAN.encode()).plan
    with pytest.raises(ValueError, match="frozen"):
        plan.round.clip = 1.0  # type: ignore[misc]


def test_a_plan_is_loaded_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    assert load_plan(tmp_path / "plan.toml") == parse_plan(PLAN.encode())


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN.replace("epochs = 2", "epochs = 0"))
    with pytest.raises(UserError, match=r"plan\.toml: key 'training\.epochs'"):
        load_plan(tmp_path / "plan.toml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"plan\.toml: expected a plan file, found: No such file"):
        load_plan(tmp_path / "plan.toml")


# --- stages -----------------------------------------------------------------------------------------------------------


def staged(stages: int, plan: str = PLAN) -> str:
    return plan.replace('task = "classification"', f'task = "classification"\nstages = {stages}')


@pytest.mark.parametrize("stages", [1, 2, 16])
def test_a_site_trains_once_in_each_stage_that_is_left(stages: int) -> None:
    plan = parse_plan(staged(stages).encode()).plan
    assert plan.stages == stages
    assert [plan.trainings_from(stage) for stage in range(1, stages + 1)] == list(range(stages, 0, -1))


@pytest.mark.parametrize("audit", ["spot", "none"])
def test_several_stages_demand_the_divided_audit(audit: str) -> None:
    text = PLAN.replace("clip = 0.25", f'clip = 0.25\naudit = "{audit}"')
    with pytest.raises(UserError) as refused:
        parse_plan(staged(2, text).encode())
    said = f'round.audit: expected "divided" with 2 stages, found "{audit}": a stage starts from totals that members'
    assert f"{said} recomputed" in str(refused.value)
    parse_plan(staged(1, text).encode())


def test_the_sum_of_products_is_for_small_models() -> None:
    text = PLAN.replace("[round]", '[aggregation]\nmethod = "dense"\n[round]').replace(
        "rank = 8", 'rank = 8\ntrain = "both"'
    )
    parse_plan(text.replace("[384, 384]", "[8192, 4096]").encode())
    with pytest.raises(
        UserError, match=r'expected at most 33554432 numbers in the modules for "dense", found 33558528'
    ):
        parse_plan(text.replace("[384, 384]", "[8193, 4096]").encode())
