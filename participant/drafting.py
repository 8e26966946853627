"""A first plan file for a base model: the facts filled in from the model's files, the rest sensible and commented.

Whoever proposes a job drafts the plan once, edits it, and sends the same file to every site; its bytes are what all
agree on. Torch is imported when a draft is asked for, not before.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from participant.base_model import base_digest
from participant.factors import of_base
from privacy.adapter import start_digest
from privacy.aggregation import TRAINS_A, Method
from privacy.analytic import Head
from privacy.errors import UserError
from privacy.factors import first_start, keep_factors
from privacy.methods import parts_of
from privacy.plan import parse_plan
from privacy.sections import Adapter, Task, linear_head
from privacy.settings import explain

_UNSET_DIGEST = "0" * 64
#: Names of the query and value projections, as most models of each kind have them.
TARGETS = {
    "classification": ("query", "value"),
    "generation": ("q_proj", "v_proj"),
    "regression": ("query", "value"),
}

_TEMPLATE = """\
# What to train and how to aggregate it. Every site has this very file: its digest is over the bytes, comments included.
name = {name}
task = {task}
stages = {stages}  # trainings and uploads of each site, each from the release of the one before

[base]
name = {base_name}
# SHA-256 over weights, configuration and tokenizer of the model every site already has.
digest = {base_digest}

[data]
dataset = {dataset}  # the name under which each site has registered its own data
{answers}max_length = {max_length}  # tokens; what is longer is cut

{generation}[training]
{loss_comment}loss = {loss}
{sharpness}learning_rate = {learning_rate}  # {rate_is_for}
{head_rate}{schedule}
[aggregation]
method = {method}  # {says}
weights = {weights}  # sites count by their number of examples, or each the same: "uniform"
server_lr = 1.0  # released = start + server_lr * mean delta
{aggregation}
[round]
max_cohort = {max_cohort}
min_cohort = {min_cohort}
min_survivors = {min_survivors}
max_colluders = {max_colluders}
bits = {bits}
# Public range of one coordinate of a delta; what is beyond is clipped. A few times the largest you expect: a unit of
# quantisation is clip * max_weight / (examples of the site) / Qmax, with Qmax = (2^(bits-1) - 1) / max_cohort.
clip = {clip}
max_weight = {max_weight}  # most examples one site may count for
audit = "divided"

[deadlines]  # seconds
join_s = 3600
share_s = 600
upload_s = 86400
sign_s = 600
unmask_s = 600
outcome_s = 3600

[adapter]
# {coordinates} coordinates are sent.
rank = {rank}
alpha = {alpha}  # the adapter acts with alpha / rank
train = {train}  # {trains}
seed = {seed}
# SHA-256 of the start adapter that every site computes from seed, modules and head.
digest = {start_digest}

[adapter.modules]  # linear module = [out_features, in_features]
{modules}
{head}"""

#: What only a plan for classification has.
_LOSS_COMMENT = """\
# Adds the log of a {prior} class prior to the logits in training only (Menon et al. 2021): sites with different
# label mixes can then be averaged. The alternative is "cross_entropy".
"""
#: What only a plan for regression has.
_TARGET = """\
# Public range of a record's number, in its own unit; a number beyond it is refused. Models see the range as -1 to 1.
target = [{low!r}, {high!r}]
"""
_SQUARED = "# The squared error on the target as models see it, from -1 to 1.\n"
_SHARPNESS = """\
sharpness = 10.0  # logits of the loss are so many times the scores of the fixed head, which lie about 0 and 1
"""

#: What a plan with a head of its own has.
_HEAD = """
[adapter.head]  # trained beside the adapter, starting at zero
{head}
"""

#: What only a plan for text generation has.
_GENERATION = """\
[generation]
# How a conversation becomes text: "model" is the tokenizer's own chat template, "chatml" is ChatML, and with "none" a
# prompt is followed by its response as they are. What the assistant says counts in the loss; of a plain text, all.
template = {template}
# Several records of a batch in one row of max_length tokens, blind to one another: quicker where most are much shorter.
packing = {packing}

"""

#: What stands in [training] where the head has a rate of its own.
_HEAD_RATE = "head_learning_rate = {rate}  # for the head, which starts at zero and has further to go\n"

#: What stands in [training] for training without privacy; with it, [privacy] stands there instead.
_SCHEDULE = """\
epochs = {epochs}
batch_size = {batch_size}
seed = {training_seed}  # of the order of examples; not secret
"""

#: What a plan says of its method; docs/aggregation.md has more.
_SAYS: dict[Method, str] = {
    "freeze_a": "A from the public seed, B trained: the mean of B is exact",
    "both": "A and B summed apart: inexact, and the release says by how much",
    "regmean": "B weighted by what each site has seen in each direction of the frozen A",
    "fisher": "each number weighted by how much each site's records depend on it",
    "dense": "A and B trained, the products B A summed: exact up to the truncation, which the release gives",
    "core": "rank x rank numbers between frozen factors of the base model's weights: exact, and the shortest vector",
}

#: What it says of what is trained.
_TRAINS = 'B and the head: "all"; A as well: "both"; or the "head" alone, on the base model\'s features'
_TRAINS_B = "B alone, behind a head that stage 1 computes and that stays as it is from then on"

#: What a plan says of its learning rate, where A is not frozen or B not trained.
_RATES = {
    "both": "for A, B and head",
    "dense": "for A, B and head",
    "core": "for R and head; far higher than for B, since R is small and acts through unit vectors",
}

#: What stands at the end of [aggregation] for this method.
_REGMEAN = """\
[aggregation.regmean]
ridge = 0.01  # added to the diagonal of each mean Gram matrix, whose entries are at most 1; large: the plain mean
# What A says of a token is clipped to this range, coordinate by coordinate; a site logs the share that was beyond.
feature_clip = 4.0
min_texts = 20  # a site with fewer different texts sits out: the sums say more of the records than an update
"""

_FISHER = """\
[aggregation.fisher]
ridge = 0.01  # added to each weight, which is at most 1; large: the plain mean
reach = 16.0  # a weight is relative to the mean of its tensor at the site, and ends at so many times that
min_texts = 20  # a site with fewer different texts sits out: the sums say more of the records than an update
"""

_CORE = """\
[aggregation.core]
# SHA-256 of the factors, which every site computes from its base model; coordinator and auditors need the file.
factors = {factors}
"""

#: The same for a head whose rows are counted.
_COUNTED = """\
# Each row of the head counts by the records of its class, whose numbers everybody learns in total: docs/aggregation.md.
head = "counted"

[aggregation.counted]
min_class_count = 5  # a class with fewer different texts at a site has no part in its head
"""

#: What stands at the end of [aggregation] for a head that is computed from sums.
_EVALUATION = """\
[evaluation]  # one stage more: sites judge the release, in total only, on records that no stage trained on
holdout = {holdout}  # share of each site's records
server_lr = {rates}  # candidates to vote on; aggregation.server_lr alone where empty
"""
_TOLERANCE = "tolerance = {tolerance}  # an answer that is off by no more is right; in the target's own unit\n"

_ANALYTIC = """\
# The head is not trained: each site sends sums of products of the model's features, and the head is the ridge solution
# of all records together. [training] is not read. The sums say more of the records than an update: docs/analytic.md.
head = "analytic"

[aggregation.analytic]
ridge = 0.0001  # added to the diagonal of the mean Gram matrix, whose entries are at most 1
# Features are clipped to this range, coordinate by coordinate. A pooler with tanh gives at most 1; a site logs the
# share of its features that was beyond.
feature_clip = 1.0
{least}
"""
_LEAST = {
    "classification": "min_class_count = 5  # a class with fewer different texts at a site is left out there",
    "regression": "min_texts = 20  # a site with fewer different texts sits out",
}

#: The same where stages follow in which the adapter is trained.
_ALIGNED = _ANALYTIC.replace(
    "of all records together. [training] is not read. The sums",
    "of all records together. That is stage 1; in the later ones [training] applies, to B. The sums",
)


def draft_plan(
    *,
    base: Path,
    base_name: str,
    name: str,
    dataset: str,
    labels: Sequence[str] = (),
    target: tuple[float, float] | None = None,
    task: Task = "classification",
    template: Literal["model", "chatml", "none"] = "model",
    packing: bool = False,
    targets: Sequence[str] | None = None,
    rank: int = 8,
    alpha: float | None = None,
    max_length: int = 128,
    train: Literal["all", "head"] = "all",
    head: Literal["trained", "analytic", "counted"] = "trained",
    method: Method = "freeze_a",
    factors_to: Path | None = None,
    privacy: str = "",
    loss: Literal["logit_adjusted", "cross_entropy", "squared"] = "logit_adjusted",
    epochs: int = 2,
    learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    batch_size: int = 16,
    training_seed: int = 0,
    weights: Literal["examples", "uniform"] = "examples",
    max_cohort: int = 8,
    min_cohort: int = 4,
    min_survivors: int = 3,
    max_colluders: int = 1,
    clip: float | None = None,
    max_weight: int = 65536,
    stages: int = 1,
    holdout: float | None = None,
    rates: Sequence[float] = (),
    tolerance: float | None = None,
    seed: bytes | None = None,
) -> str:
    """The text of a complete plan file that :func:`privacy.plan.parse_plan` accepts.

    Args:
        base: directory of the base model, or for text generation a GGUF file.
        base_name: what people call it.
        name: the plan's name.
        dataset: name under which the sites registered their data.
        labels: the classes; their order numbers the rows of the head. Other tasks have none.
        target: range of the number that a regression learns, and only that.
        task: "generation" for a causal language model; ``template`` and ``packing`` are for it alone. ``loss`` is for
            classification alone.
        targets: linear modules to adapt, by the last part of their names; None: see :data:`TARGETS`.
        rank: of each LoRA pair.
        alpha: LoRA's scale, the adapter acts with alpha / rank; 2 * rank where None.
        seed: public 32-byte seed of the frozen A; drawn at random where None.
        head: "analytic" for a head computed from sums of statistics, see ``privacy/analytic.py``; nothing is trained
            but B, in the ``stages`` after the first.
            "counted" for a trained one whose rows count by the records of their class.
        learning_rate: 0.002 where None, and 0.05 for the method "core", whose few numbers have further to go.
        head_learning_rate: that of the head where it is another.
        clip: 0.5 where None, and 4 for the method "core".
        method: what is summed of LoRA's factors; A is trained too where the method can sum it.
        factors_to: directory for the file with the factors of the method "core", which the coordinator needs too.
        privacy: a section ``[privacy]``, see :func:`privacy.budget.presets.draft_privacy`; ``epochs``, ``batch_size``
            and ``training_seed`` have no place beside it and are left out.
        holdout: share of each site's records kept for a section ``[evaluation]``; None: no such section.
        rates: candidates for ``server_lr`` in it.
        tolerance: of a regression's answers in it.

    The other arguments are the plan's keys of the same name.

    Raises:
        UserError: the base model cannot be loaded or adapted, or a value is out of the plan's range.
    """
    aligned = head == "analytic" and stages > 1
    trained: Literal["all", "both", "head", "lora"] = "both" if method in TRAINS_A else train
    if head == "analytic":
        trained = "lora" if aligned else "head"
    outputs = 1 if task == "regression" else len(labels)
    modules, layer = _inspect(base, task, outputs, TARGETS[task] if targets is None else targets)
    if task != "classification":
        loss = "squared" if task == "regression" else "cross_entropy"
    try:
        adapter = Adapter(
            rank=rank,
            alpha=float(2 * rank if alpha is None else alpha),
            seed=(secrets.token_bytes(32) if seed is None else seed).hex(),
            digest=_UNSET_DIGEST,
            modules=modules,
            head=layer,
            train=trained,
        )
    except ValidationError as error:
        raise UserError(f"draft: {explain(error)}", hint="choose another rank or alpha") from error
    factors, core = None, ""
    if method == "core":
        if factors_to is None:
            raise UserError('draft: expected a directory for the factors of method "core", found none')
        factors = of_base(base, outputs, tuple(modules), rank, adapter.seed)
        core = _CORE.format(factors=_toml(keep_factors(factors_to, factors, private=False)))
    digest = start_digest(first_start(adapter, factors)).hex()
    # The head's comes first: it begins with a key, and the other is a table.
    statistics = (_ALIGNED if aligned else _ANALYTIC).format(least=_LEAST.get(task, ""))
    section = {"analytic": statistics, "counted": _COUNTED}.get(head, "")
    section += {"regmean": _REGMEAN, "fisher": _FISHER, "core": core}.get(method, "")
    if holdout is not None:
        section += _EVALUATION.format(holdout=holdout, rates=_toml(list(map(float, rates))))
        section += "" if tolerance is None else _TOLERANCE.format(tolerance=float(tolerance))
    rate, reach = (5e-2, 4.0) if method == "core" else (2e-3, 0.5)
    rate_is_for = _RATES.get(method, "for B and head alone; higher than usual for LoRA, since A is frozen")
    text = _TEMPLATE.format(
        name=_toml(name),
        base_name=_toml(base_name),
        base_digest=_toml(base_digest(base)),
        dataset=_toml(dataset),
        task=_toml(task),
        answers=_answers(task, labels, target),
        generation=_GENERATION.format(template=_toml(template), packing=str(packing).lower())
        if task == "generation"
        else "",
        max_length=max_length,
        loss=_toml(loss),
        loss_comment={
            "classification": _LOSS_COMMENT.format(prior="public" if privacy else "site's own"),
            "regression": _SQUARED,
        }.get(task, ""),
        sharpness=_SHARPNESS if aligned and task == "classification" else "",
        learning_rate=float(rate if learning_rate is None else learning_rate),
        head_rate="" if head_learning_rate is None else _HEAD_RATE.format(rate=float(head_learning_rate)),
        schedule="\n" + privacy
        if privacy
        else _SCHEDULE.format(epochs=epochs, batch_size=batch_size, training_seed=training_seed),
        weights=_toml(weights),
        max_cohort=max_cohort,
        min_cohort=min_cohort,
        min_survivors=min_survivors,
        max_colluders=max_colluders,
        clip=float(reach if clip is None else clip),
        max_weight=max_weight,
        coordinates=_coordinates(adapter, outputs, head, method),
        rank=rank,
        alpha=adapter.alpha,
        train=_toml(trained),
        trains=_TRAINS_B if aligned else _TRAINS,
        seed=_toml(adapter.seed),
        start_digest=_toml(digest),
        modules=_table(modules),
        head=_HEAD.format(head=_table(layer)) if layer else "",
        method=_toml(method),
        says=_SAYS[method],
        rate_is_for=rate_is_for if head_learning_rate is None else rate_is_for.replace(" and head", ""),
        stages=stages,
        aggregation="\n" + section if section else "",
        # Rounding is multiplied by an inverse or divided by a weight; entries of B A are far smaller than those of B.
        bits=32 if head != "trained" or method in ("regmean", "fisher", "dense") else 24,
    )
    parse_plan(text.encode(), "draft")
    return text


def _answers(task: str, labels: Sequence[str], target: tuple[float, float] | None) -> str:
    """What of [data] says which answers there are."""
    if target is not None:
        return _TARGET.format(low=float(target[0]), high=float(target[1]))
    return f"labels = {_toml(list(labels))}\n" if task == "classification" else ""


def _inspect(
    base: Path, task: str, outputs: int, targets: Sequence[str]
) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    """(linear modules, head tensors) of the base model, with shapes."""
    from participant.loading import inspect_causal, inspect_model  # imports torch

    if task == "generation":
        return inspect_causal(base, targets), {}
    return inspect_model(base, outputs, targets)


def _coordinates(adapter: Adapter, outputs: int, head: str, method: Method) -> str:
    trained = f"{parts_of(adapter, method, outputs if head == 'counted' else 0).size:,}"
    if head != "analytic":
        return trained
    first = f"{Head(*linear_head(adapter, outputs), outputs).size:,}"
    return f"{first} in stage 1, and then {trained}" if adapter.train == "lora" else first


def _toml(value: str | Sequence[str] | Sequence[float]) -> str:
    """A TOML string, or array; JSON's escapes are valid in TOML's basic strings, save DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _table(shapes: Mapping[str, Sequence[int]]) -> str:
    return "\n".join(f"{_toml(name)} = {list(shape)}" for name, shape in sorted(shapes.items()))
