"""Sections of a plan that can be read without the others; what holds between them is in ``privacy/plan.py``."""

from __future__ import annotations

import math
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from privacy.settings import HexDigest, Name, Positive, Section
from privacy.target import Target

#: Numbers in all tensors of an adapter, 4 GiB as float32: no plan can make a site ask for more memory than that.
MAX_COORDINATES = 1 << 30
#: Features of an analytic head: solving for it takes a number of steps that grows with their cube.
MAX_FEATURES = 4096

Text = Annotated[str, Field(min_length=1, max_length=200)]
Task = Literal["classification", "generation", "regression"]
TASKS: tuple[str, ...] = get_args(Task)


class Base(Section):
    """The foundation model every site already has; weights never travel."""

    #: What sites call it in their own files.
    name: Text
    #: SHA-256 over weights, configuration and tokenizer; ``veilsum-participant doctor`` prints that of what a site has.
    digest: HexDigest


class Adapter(Section):
    """The LoRA adapter: its tensors, and the public seed of what is frozen."""

    #: r, the rows of each A.
    rank: Annotated[int, Field(ge=1, le=1024)]
    #: B A is multiplied by alpha / r.
    alpha: Annotated[float, Field(gt=0)]
    #: Public 32-byte seed of the frozen A matrices.
    seed: HexDigest
    #: Digest of the whole start adapter of stage 1, which the seed gives.
    digest: HexDigest
    #: Linear module = [out_features, in_features].
    modules: Annotated[dict[str, tuple[Positive, Positive]], Field(min_length=1)]
    #: Tensor trained beside the adapter = its shape; it starts at zero.
    head: dict[str, Annotated[tuple[Positive, ...], Field(min_length=1, max_length=8)]] = Field(default_factory=dict)
    #: B and the head ("all"); A as well ("both", for methods that can sum it); or the head alone: then A and B both
    #: stay as they start, and the model's features too. Or B alone ("lora"), behind a head that stays as it starts.
    train: Literal["all", "both", "head", "lora"] = "all"

    @model_validator(mode="after")
    def _something_is_trained(self) -> Adapter:
        if self.train == "head" and not self.head:
            raise ValueError('train: expected a tensor in adapter.head for train = "head", found none')
        return self

    @model_validator(mode="after")
    def _tensors_are_possible(self) -> Adapter:
        for module, (_, inputs) in self.modules.items():
            if self.rank > inputs:
                raise ValueError(f"modules: expected rank <= {inputs} for '{module}', found {self.rank}")
            for name in (f"{module}.lora_A.weight", f"{module}.lora_B.weight"):
                if name in self.head:
                    raise ValueError(f"head: '{name}' is a tensor of the adapter itself")
        sizes = [self.rank * (outputs + inputs) for outputs, inputs in self.modules.values()]
        total = sum(sizes) + sum(map(math.prod, self.head.values()))
        if total > MAX_COORDINATES:
            raise ValueError(f"expected an adapter of at most {MAX_COORDINATES} numbers, found {total}")
        return self


def linear_head(adapter: Adapter, outputs: int) -> tuple[str, bool, int]:
    """(module, has it a bias, features) of an adapter's head if that is one linear layer of so many outputs.

    Raises:
        ValueError: the head is another, or too wide for a Gram matrix.
    """
    shapes = dict(adapter.head)
    module = next((name.removesuffix(".weight") for name in shapes if name.endswith(".weight")), "")
    weight, bias = shapes.pop(f"{module}.weight", ()), shapes.pop(f"{module}.bias", None)
    if shapes or len(weight) != 2 or weight[0] != outputs or bias not in (None, (outputs,)):
        raise ValueError(f"adapter.head: expected one linear layer of {outputs} outputs, found {adapter.head}")
    if weight[1] > MAX_FEATURES:
        raise ValueError(f"adapter.head: expected at most {MAX_FEATURES} features, found {weight[1]}")
    return module, bias is not None, weight[1]


class Data(Section):
    """Which of a site's registered data sets, and what a record must look like."""

    #: Name of the data set in sites' files.
    dataset: Name
    #: Classes, in the order of the head's rows; a record with another label is an error.
    labels: tuple[Text, ...] = ()
    #: Public range [low, high] of the number that a regression learns; models see it as one from -1 to 1.
    target: Target | None = None
    #: Tokens of a text; the rest is cut off.
    max_length: Annotated[int, Field(ge=1, le=1 << 20)] = 128

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Data:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be distinct")
        return self


class Training(Section):
    """Local fine-tuning, the same at every site."""

    #: For classification the first, which corrects for the site's own class frequencies, or the second; for generation
    #: the second, for regression the third.
    loss: Literal["logit_adjusted", "cross_entropy", "squared"] = "logit_adjusted"
    #: Behind a fixed analytic head, and only there: its scores are regressions on 0 and 1, and so many times them are
    #: the logits of the loss. A regression has no logits.
    sharpness: Annotated[float, Field(ge=1, le=1000)] | None = None
    #: Of the optimizer.
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    #: Of a head that is trained beside the adapter, where it is another than the adapter's. A head starts at zero: in
    #: the few steps of one round it gets nowhere at a rate that is right for B.
    head_learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    #: What turns gradients into steps.
    optimizer: Literal["adamw", "sgd"] = "adamw"
    #: Passes over a site's records in each stage. Required, but not under ``[privacy]``, which counts steps.
    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    #: Records of a step. Required, but not under ``[privacy]``, which takes its batches by secret chance.
    batch_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    #: Of the order of examples; not secret, and not under ``[privacy]``.
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0


class Generation(Section):
    """How a causal language model sees a record (``participant/tokens.py``)."""

    #: Chat template of conversations: the tokenizer's own, ChatML, or none: then a prompt is followed by its response.
    template: Literal["model", "chatml", "none"]
    #: Several records of a batch in one row of ``data.max_length`` tokens. They do not see one another: it saves time.
    packing: bool = False


class Deadlines(Section):
    """Seconds each phase stays open for members that are silent."""

    #: For joining a round; also how long the first member that is ready waits for more than ``min_cohort``.
    join_s: Positive = 3600
    #: For the shares of secrets.
    share_s: Positive = 600
    #: For the masked upload.
    upload_s: Positive = 86400
    #: For signatures over the list of those who uploaded.
    sign_s: Positive = 600
    #: For the shares that open the sum, and nothing else.
    unmask_s: Positive = 600
    #: For recomputing blocks of the sum, and signatures over the outcome.
    outcome_s: Positive = 3600
    #: Of a plan with several stages: how long after the first release of a stage late members are waited for.
    stage_s: Positive = 86400


class Round(Section):
    """Numbers of the secure-aggregation round (protocol sections 5 and 8)."""

    #: Most members of a round.
    max_cohort: Annotated[int, Field(ge=2, le=128)]
    #: Members that must be ready for a round to open.
    min_cohort: Annotated[int, Field(ge=2, le=128)]
    #: Members whose updates a sum has at least, or nothing is opened.
    min_survivors: Annotated[int, Field(ge=2, le=128)]
    #: Members that may work together with the coordinator without learning anything but sums.
    max_colluders: Annotated[int, Field(ge=0, le=126)]
    #: Of one coordinate in an upload.
    bits: Literal[16, 20, 24, 32] = 24
    #: Public clipping range of one coordinate of the delta; values beyond +-clip are clipped.
    clip: Annotated[float, Field(gt=0, le=1e6)]
    #: Largest weight (example count) one site may have.
    max_weight: Annotated[int, Field(ge=1, le=1 << 40)]
    #: How members check the coordinator's sum: all blocks, divided among them; some; or none.
    audit: Literal["divided", "spot", "none"] = "divided"
