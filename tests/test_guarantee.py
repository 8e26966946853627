"""The section [privacy] of a plan: public constants, each checked, and what it forbids beside it."""

from __future__ import annotations

import pytest

from privacy.adapter import flatten, layout_of, release, save_peft, start_adapter, start_digest, trained_part
from privacy.errors import UserError
from privacy.guarantee import unsuitable
from privacy.plan import parse_plan
from tests.test_plan import PLAN

PRIVACY = """
[privacy]
unit = "record"
sigma = "1.14"
delta = "1e-4"
clip = "1.0"
rate = "0.25"
steps = 40
nominal_batch = 125
nominal_size = 500
"""
PRIVATE = PLAN.replace("epochs = 2\n", "").replace("batch_size = 16\n", "") + PRIVACY


def test_a_private_plan_is_read_with_its_defaults() -> None:
    plan = parse_plan(PRIVATE.encode()).plan
    assert plan.privacy is not None
    assert (plan.privacy.adjacency, plan.privacy.max_records_per_unit, plan.privacy.prior) == ("add-remove", 1, ())
    assert (plan.training.epochs, plan.training.batch_size) == (None, None)
    assert parse_plan(PLAN.encode()).plan.privacy is None


#: Sentence -> (line of the plan, what it is replaced by, what the error says).
BAD: dict[str, tuple[str, str, str]] = {
    "more decimals than a ledger has": ("1e-4", "1.123456789012e-19", "privacy.delta: expected at most 30 decimals"),
    "neither guarantee nor noise": ('sigma = "1.14"\n', "", "exactly one of epsilon and sigma, found neither"),
    "both guarantee and noise": (
        "steps = 40",
        'steps = 40\nepsilon = "8"',
        "exactly one of epsilon and sigma, found both",
    ),
    "a float where text belongs": ('sigma = "1.14"', "sigma = 1.14", "key 'privacy.sigma'"),
    "noise that is not a number": ('sigma = "1.14"', 'sigma = "nan"', "key 'privacy.sigma'"),
    "noise too small to account for": (
        'sigma = "1.14"',
        'sigma = "0.19"',
        "privacy.sigma: expected a number from 0.2 to 100, found 0.19",
    ),
    "noise beyond a hundred": ('sigma = "1.14"', 'sigma = "100.1"', "privacy.sigma"),
    "no guarantee at all": (
        'sigma = "1.14"',
        'epsilon = "51"',
        "privacy.epsilon: expected a number from 1E-20 to 50, found 51",
    ),
    "an epsilon of nothing": ('sigma = "1.14"', 'epsilon = "0"', "privacy.epsilon"),
    "a delta that promises nothing": ('delta = "1e-4"', 'delta = "0.01"', "privacy.delta"),
    "a delta of nothing": ('delta = "1e-4"', 'delta = "0"', "privacy.delta"),
    "a delta that no ledger can hold": ('delta = "1e-4"', 'delta = "1e-40"', "privacy.delta"),
    "a negative delta": ('delta = "1e-4"', 'delta = "-1e-4"', "key 'privacy.delta'"),
    "no clipping norm": ('clip = "1.0"\n', "", "missing key 'privacy.clip'"),
    "a clipping norm of nothing": ('clip = "1.0"', 'clip = "0.0"', "privacy.clip"),
    "a rate above one": ('rate = "0.25"', 'rate = "1.01"', "privacy.rate"),
    "a rate of nothing": ('rate = "0.25"', 'rate = "0"', "privacy.rate"),
    "no step": ("steps = 40", "steps = 0", "key 'privacy.steps'"),
    "steps beyond a million": ("steps = 40", "steps = 1000001", "key 'privacy.steps'"),
    "no nominal batch": ("nominal_batch = 125\n", "", "missing key 'privacy.nominal_batch'"),
    "no nominal size": ("nominal_size = 500\n", "", "missing key 'privacy.nominal_size'"),
    "a nominal batch just too small": ("nominal_batch = 125", "nominal_batch = 62", "privacy.nominal_batch: expected"),
    "a nominal batch just too large": ("nominal_batch = 125", "nominal_batch = 251", "privacy.nominal_batch: expected"),
    "a nominal batch beside rate and size": (
        "nominal_batch = 125",
        "nominal_batch = 16",
        "privacy.nominal_batch: expected about rate * nominal_size = 125, found 16",
    ),
    "no unit": ('unit = "record"\n', "", "missing key 'privacy.unit'"),
    "an unknown unit": ('unit = "record"', 'unit = "site"', "key 'privacy.unit'"),
    "records of several records": ("steps = 40", "steps = 40\nmax_records_per_unit = 2", 'needs unit = "user"'),
    "shuffled batches": ("steps = 40", 'steps = 40\nsampling = "shuffle"', "unknown key 'privacy.sampling'"),
    "a prior for other labels": ("steps = 40", "steps = 40\nprior = [1.0]", "one number for each of 2 labels"),
    "a prior that is none": ("steps = 40", "steps = 40\nprior = [0.5, 0.6]", "sum to 1, found 1.1"),
    "a prior that names nobody": ("steps = 40", "steps = 40\nprior = [0.0, 1.0]", "key 'privacy.prior.0'"),
    "a prior that the loss does not use": (
        "learning_rate = 2e-3",
        'learning_rate = 2e-3\nloss = "cross_entropy"',
        "privacy.prior: expected none with the loss 'cross_entropy'",
    ),
    "epochs": (
        "learning_rate = 2e-3",
        "learning_rate = 2e-3\nepochs = 2",
        "training.epochs: expected none under [privacy]",
    ),
    "a batch size": (
        "learning_rate = 2e-3",
        "learning_rate = 2e-3\nbatch_size = 16",
        "training.batch_size: expected none",
    ),
    "a public order of records": (
        "learning_rate = 2e-3",
        "learning_rate = 2e-3\nseed = 1",
        "training.seed: expected none",
    ),
    "a weight beyond the round's": (
        "nominal_size = 500",
        "nominal_size = 501",
        "privacy.nominal_size: expected at most",
    ),
    "a trained expert": ('"layer.0.query"', '"layer.0.mlp.experts.0.up"', "an expert sees tokens"),
    "a trained shared expert": ('"layer.0.query"', '"layer.0.mlp.shared_expert.up"', "an expert sees tokens"),
    "a trained embedding": ('"layer.0.query"', '"model.embed_tokens"', "no per-example gradient"),
    "dropout": ("rank = 8", "rank = 8\ndropout = 0.1", "unknown key 'adapter.dropout'"),
}


@pytest.mark.parametrize(("line", "instead", "fragment"), BAD.values(), ids=BAD.keys())
def test_a_bad_guarantee_is_refused_with_its_key(line: str, instead: str, fragment: str) -> None:
    assert line in PRIVATE
    text = PRIVATE.replace("max_weight = 1000", "max_weight = 500")
    text = (text if "prior =" in instead else f"{text}prior = [0.5, 0.5]\n").replace(line, instead, 1)
    with pytest.raises(UserError) as refused:
        parse_plan(text.encode(), "plan.toml")
    assert fragment in str(refused.value)
    assert "\n" not in str(refused.value)


def test_users_and_priors_are_read() -> None:
    text = PRIVATE.replace('"record"', '"user"').replace("steps = 40", "steps = 40\nmax_records_per_unit = 4")
    privacy = parse_plan((text + "prior = [0.25, 0.75]\n").encode()).plan.privacy
    assert privacy is not None
    assert (privacy.unit, privacy.max_records_per_unit, privacy.prior) == ("user", 4, (0.25, 0.75))


@pytest.mark.parametrize(
    ("line", "edge"),
    [
        ('sigma = "1.14"', 'sigma = "0.2"'),
        ('sigma = "1.14"', 'sigma = "100"'),
        ('sigma = "1.14"', 'epsilon = "50"'),
        ('sigma = "1.14"', 'epsilon = "1e-20"'),
        ('delta = "1e-4"', 'delta = "0.009999999999"'),
        ("steps = 40", "steps = 1000000"),
        ("nominal_batch = 125", "nominal_batch = 63"),
        ("nominal_batch = 125", "nominal_batch = 250"),
        ('rate = "0.25"\nsteps = 40\nnominal_batch = 125', 'rate = "0.001"\nsteps = 1\nnominal_batch = 1'),
        ('rate = "0.25"\nsteps = 40\nnominal_batch = 125', 'rate = "1"\nsteps = 1\nnominal_batch = 500'),
        ("steps = 40", "steps = 40\nprior = [0.5009, 0.5]"),
        ("max_weight = 1000", "max_weight = 500"),
        ("max_weight = 1000", 'max_weight = 1\n[aggregation]\nweights = "uniform"'),
    ],
)
def test_the_last_value_in_range_is_taken(line: str, edge: str) -> None:
    assert line in PRIVATE
    assert parse_plan(PRIVATE.replace(line, edge, 1).encode()).plan.privacy is not None


@pytest.mark.parametrize("missing", ["epochs = 2\n", "batch_size = 16\n"])
def test_without_privacy_training_needs_its_epochs_and_batches(missing: str) -> None:
    key = missing.split(" ")[0]
    with pytest.raises(UserError, match=rf"missing key 'training\.{key}'"):
        parse_plan(PLAN.replace(missing, "").encode())


@pytest.mark.parametrize(
    ("tensor", "suits"),
    [
        ("layers.0.self_attn.q_proj", True),
        ("layers.0.mlp.experts.3.up_proj", False),
        ("layers.0.mlp.expert_gate", False),
        ("transformer.wte.weight", False),
        ("bert.embeddings.word_embeddings.weight", False),
        ("classifier.weight", True),
        ("expertise_head.weight", True),
    ],
)
def test_names_tell_what_has_no_bounded_gradient(tensor: str, suits: bool) -> None:
    assert (unsuitable(tensor) == "") == suits


# --- the head alone --------------------------------------------------------------------------------------------------

HEAD_ONLY = PLAN.replace("alpha = 16.0", 'alpha = 16.0\ntrain = "head"')


def test_the_head_alone_is_a_layout_of_the_same_adapter() -> None:
    whole, head = (parse_plan(text.encode()).plan.adapter for text in (PLAN, HEAD_ONLY))
    layout = layout_of(head)
    assert [name for name, _ in layout.trained] == ["base_model.model.classifier.bias"]
    assert layout.size == 5
    assert sorted(layout.frozen + layout.trained) == sorted(layout_of(whole).frozen + layout_of(whole).trained)
    assert start_digest(start_adapter(head)) == start_digest(start_adapter(whole))


def test_a_release_of_the_head_alone_leaves_a_and_b_as_they_start(tmp_path_factory: pytest.TempPathFactory) -> None:
    adapter = parse_plan(HEAD_ONLY.encode()).plan.adapter
    layout, start = layout_of(adapter), start_adapter(adapter)
    mean = flatten(trained_part(start, layout), layout) + 1
    released = release(start, mean, 0.5, layout)
    assert released.keys() == start.keys()
    assert (released["base_model.model.classifier.bias"] == 0.5).all()
    assert all((released[name] == start[name]).all() for name, _ in layout.frozen)
    save_peft(tmp_path_factory.mktemp("out") / "adapter", released, adapter=adapter, base_name="tiny")


def test_the_head_alone_needs_a_head() -> None:
    with pytest.raises(UserError, match=r'expected a tensor in adapter\.head for train = "head"'):
        parse_plan(HEAD_ONLY.replace('"classifier.bias" = [5]', "").encode())
