"""A site's side of an analytic head: a small model, its features, the classes left out, and the site's consent."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demo.analytic import PLAN, SITE_TOML
from demo.corpus import LABELS as DESKS
from demo.corpus import articles, base_model, split
from demo.federation import Federation
from participant import analytic as statistics
from participant.analytic import collect, features_of, frequent
from participant.base_model import base_digest
from participant.config import Settings
from participant.data import Examples
from participant.drafting import draft_plan
from participant.evaluation import accuracy
from participant.features import trained_head
from participant.policy import admit
from participant.prepare import kept_vector, prepare
from participant.site import Site
from participant.training import load_model, logits_of, tokenise
from privacy.adapter import check_start, load_peft, start_adapter
from privacy.aligned import plan_at
from privacy.analytic import head_of, solved, unpack
from privacy.errors import Refusal, UserError
from privacy.job import Job
from privacy.methods import vector_size
from privacy.plan import Plan, load_plan, parse_plan
from privacy.settings import parse_toml
from tests.helpers_learning import LABELS, SPELLINGS, spelled, tiny_base, tiny_plan, word_examples

SITE = """device = "cpu"
threads = 1
[models]
tiny = "base"
[datasets.words]
path = "words.jsonl"
format = "jsonl"
[policy]
plans = ["*"]
"""


def distinct(examples: Examples) -> Examples:
    """The same with a number behind each text."""
    return Examples(tuple(f"{text} {i}" for i, text in enumerate(examples.texts)), examples.labels)


#: Of the generated texts, made different from one another.
EXAMPLES = distinct(word_examples((20, 12, 2)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def the_plan(base: Path, **changes: Any) -> Plan:
    return tiny_plan(base, head="analytic", max_weight=1024, **changes)


def test_a_draft_with_an_analytic_head_is_a_plan(base: Path) -> None:
    text = draft_plan(base=base, base_name="tiny", name="p", dataset="d", labels=LABELS, head="analytic")
    plan = parse_plan(text.encode()).plan
    assert plan.aggregation.analytic is not None
    assert (plan.aggregation.head, plan.adapter.train, plan.round.bits) == ("analytic", "head", 32)
    assert head_of(plan).size == 33 * 34 // 2 + 33 * 3
    assert f"# {head_of(plan).size} coordinates are sent." in text


def test_features_are_what_the_head_sees(base: Path) -> None:
    plan = the_plan(base)
    loaded = load_model(plan, base, start_adapter(plan.adapter), "cpu")
    texts = tokenise(loaded.tokenizer, EXAMPLES.texts, 8)
    steps: list[tuple[int, int]] = []
    found = features_of(loaded, texts, lambda done, of, _: steps.append((done, of)))
    assert found.shape == (34, 32)
    assert found.dtype == torch.float32
    assert steps == [(32, 34), (34, 34)]
    head = trained_head(loaded)
    assert head is not None
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(1))
        said = torch.cat([logits_of(loaded, [text]) for text in texts])
        torch.testing.assert_close(head(found), said)


def test_the_head_of_a_sites_statistics_classifies_its_texts(base: Path) -> None:
    plan = the_plan(base)
    start, examples = start_adapter(plan.adapter), word_examples((20, 12, 9))
    result = collect(plan=plan, base=base, start=start, examples=examples, device="cpu", threads=1)
    assert (result.examples, result.loss) == (41, 0.0)
    gram, products = unpack(result.delta, head_of(plan), plan.round.clip)
    assert gram[-1, -1] == pytest.approx(1)
    np.testing.assert_allclose(products[-1] * 41, (20, 12, 9), rtol=1e-6)
    tensors, ridge = solved(start, result.delta, plan)
    assert ridge == 1e-4
    found = accuracy(plan=plan, base=base, adapter=tensors, examples=examples, device="cpu")
    assert found.accuracy > 0.9 > accuracy(plan=plan, base=base, adapter=None, examples=examples, device="cpu").accuracy


def test_what_is_beyond_the_clipping_range_is_logged(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = the_plan(base).model_dump()
    fields["aggregation"]["analytic"]["feature_clip"] = 1e-3
    plan = Plan.model_validate(fields)
    result = collect(plan=plan, base=base, start=start_adapter(plan.adapter), examples=EXAMPLES, device="cpu")
    assert "clipping" in capsys.readouterr().out
    assert np.abs(result.delta).max() <= np.float32(plan.round.clip)


def test_a_class_with_too_few_records_is_left_out(base: Path) -> None:
    plan = the_plan(base)
    kept = frequent(EXAMPLES, plan, 1)
    assert (len(kept), set(kept.labels)) == (32, {0, 1})
    assert not any(word in text for text in kept.texts for word in ("rhine", "elbe", "danube", "oder"))
    assert set(frequent(EXAMPLES, plan, 13).labels) == {0}  # the site's own minimum is stricter
    assert set(frequent(EXAMPLES, plan, 5).labels) == {0, 1}
    with pytest.raises(UserError, match="expected a class with at least 21 different texts"):
        frequent(EXAMPLES, plan, 21)


def test_copies_of_a_text_count_once(base: Path) -> None:
    copies = Examples((*EXAMPLES.texts, *["the rhine"] * 9), (*EXAMPLES.labels, *[2] * 9))
    assert set(frequent(copies, the_plan(base), 1).labels) == {0, 1}
    assert len(frequent(copies, the_plan(base), 1)) == 32


@pytest.mark.parametrize("kind", ["case", "white space"])
def test_texts_that_look_alike_count_once_where_no_tokenizer_is_at_hand(base: Path, kind: str) -> None:
    alike = Examples((*EXAMPLES.texts, *spelled(kind, 9)), (*EXAMPLES.labels, *[2] * 9))
    assert set(frequent(alike, the_plan(base), 1).labels) == {0, 1}


def test_a_model_whose_logits_are_not_linear_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = the_plan(base)
    loaded = load_model(plan, base, start_adapter(plan.adapter), "cpu")
    monkeypatch.setattr(statistics, "trained_head", lambda _: None)
    with pytest.raises(UserError, match="expected logits that are linear"):
        features_of(loaded, tokenise(loaded.tokenizer, EXAMPLES.texts, 8))


# --- at a site -------------------------------------------------------------------------------------------------------


def site_with(set_up: Federation, directory: Path, policy: str, examples: Examples = EXAMPLES) -> Site:
    for path in set_up.site("site-1").iterdir():
        if path.is_file():
            (directory / path.name).write_bytes(path.read_bytes())
            (directory / path.name).chmod(0o600)
    head = (directory / "participant.toml").read_text().split("keep_plain_vector")[0]
    (directory / "participant.toml").write_text(head + SITE + policy)
    tiny_base(directory / "base")
    lines = [
        {"text": text, "label": LABELS[label]} for text, label in zip(examples.texts, examples.labels, strict=True)
    ]
    (directory / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Site.open(directory)


def job_of(site: Site, **changes: Any) -> Job:
    about: dict[str, Any] = {"base_name": "tiny", "dataset": "words", "labels": LABELS, "max_length": 8}
    text = draft_plan(
        base=site.home.directory / "base", name="sums", head="analytic", max_weight=1024, **about | changes
    )
    return Job.of(parse_plan(text.encode()), site.roster)


def test_a_site_keeps_its_statistics_and_what_they_give_alone(set_up: Federation, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path, "min_class_count = 5\n")
    job = job_of(site)
    admit(job, site.home.settings)
    trained = prepare(site, job, 1)
    assert trained.weight == trained.examples == 32
    vector = np.concatenate(list(kept_vector(site, job, 1)))
    assert vector.shape == (job.quantizer.total_size,)
    decoded = job.quantizer.decode(vector.astype(np.uint32), 1)
    assert (decoded.weight, decoded.loss) == (32, 0.0)
    _, products = unpack(decoded.mean, head_of(job.plan), job.plan.round.clip)
    np.testing.assert_allclose(products[-1] * 32, (20, 12, 0), atol=1e-3)
    local = load_peft(site.local_directory("sums", 1))
    assert not local["base_model.model.classifier.weight"][2].any()
    assert local["base_model.model.classifier.weight"][:2].any()


@pytest.mark.parametrize("kind", SPELLINGS)
def test_spellings_that_the_model_does_not_tell_apart_count_once(kind: str, set_up: Federation, tmp_path: Path) -> None:
    """Two texts and nine spellings of a third: the sum over the class would be nearly the features of the third."""
    examples = Examples((*EXAMPLES.texts, *spelled(kind, 9)), (*EXAMPLES.labels, *[2] * 9))
    site = site_with(set_up, tmp_path, "min_class_count = 5\n", examples)
    job = job_of(site)
    assert prepare(site, job, 1).weight == 32
    decoded = job.quantizer.decode(np.concatenate(list(kept_vector(site, job, 1))).astype(np.uint32), 1)
    _, products = unpack(decoded.mean, head_of(job.plan), job.plan.round.clip)
    np.testing.assert_allclose(products[:, 2], 0, atol=1e-3)


def test_a_class_of_which_too_few_are_not_held_out_is_left_out(set_up: Federation, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path, "min_class_count = 12\n")
    job = job_of(site, holdout=0.2)
    weight = prepare(site, job, 1).weight
    assert 12 <= weight < 20  # of 20 and 12 of two classes, a fifth held out
    decoded = job.quantizer.decode(np.concatenate(list(kept_vector(site, job, 1))).astype(np.uint32), 1)
    _, products = unpack(decoded.mean, head_of(job.plan), job.plan.round.clip)
    np.testing.assert_allclose(products[-1] * weight, (weight, 0, 0), atol=1e-3)


def test_a_site_without_a_minimum_of_its_own_takes_no_such_plan(set_up: Federation, tmp_path: Path) -> None:
    site = site_with(set_up, tmp_path, "")
    with pytest.raises(Refusal, match="sums statistics of the records; this site has not opted in"):
        admit(job_of(site), site.home.settings)


def test_the_demos_plan_fits_the_demos_model_and_sites() -> None:
    plan = load_plan(PLAN).plan
    assert plan.base.digest == base_digest(base_model())
    assert plan.data.labels == DESKS
    check_start(start_adapter(plan.adapter), plan.adapter)
    assert head_of(plan).size == 385 * 386 // 2 + 385 * 5 == vector_size(plan_at(plan, 1)) == 76_230
    assert vector_size(plan_at(plan, 2)) == 12 * 384 * 8 == 36_864
    sites = split(articles()).sites
    assert plan.round.max_weight > max(len(site) for site in sites)
    settings = parse_toml(
        Settings,
        ('coordinator = "localhost:1"\nmember = "a"\n' + SITE_TOML).replace("{", "").replace("}", "").encode(),
        "participant.toml",
    )
    least = settings.policy.min_class_count
    assert least is not None
    assert min(Counter(a.label for a in site)[desk] for site in sites for desk in DESKS) >= least
