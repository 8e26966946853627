"""The plan: what to train and how to aggregate it, one TOML file for the whole federation.

The digest of a plan is taken over the bytes of its file, so everybody who agrees on the digest has read the same
text. Every field is validated here, an unknown key is an error that names the key and the file. Nothing in a plan
can weaken the pinned policy of the roster (``privacy/roster.py``) or a site's own file (``participant/policy.py``).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from privacy import aligned
from privacy.aggregation import TRAINS_A, Aggregation, Evaluation
from privacy.errors import UserError
from privacy.guarantee import Privacy, unsuitable
from privacy.settings import HexDigest, Positive, Section, parse_toml

MAX_PLAN_BYTES = 1 << 20
#: Numbers in all tensors of an adapter, 4 GiB as float32: no plan can make a site ask for more memory than that.
MAX_COORDINATES = 1 << 30
#: Numbers in all products B A together, for the method that sums these: more is no longer a small model.
MAX_DENSE = 1 << 25
#: Features of an analytic head: solving for it takes a number of steps that grows with their cube.
MAX_FEATURES = 4096
PLAN_LABEL = b"veilsum/1/plan\0"

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Text = Annotated[str, Field(min_length=1, max_length=200)]


class Base(Section):
    """The foundation model every site already has; weights never travel."""

    name: Text
    #: SHA-256 over weights, configuration and tokenizer, see ``participant/training.py``.
    digest: HexDigest


class Adapter(Section):
    """The LoRA adapter: its tensors, and the public seed of what is frozen."""

    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: Annotated[float, Field(gt=0)]
    #: Public 32-byte seed of the frozen A matrices.
    seed: HexDigest
    #: Digest of the whole start adapter of stage 1, see ``privacy.adapter.start_digest``.
    digest: HexDigest
    #: Linear module -> [out_features, in_features].
    modules: Annotated[dict[str, tuple[Positive, Positive]], Field(min_length=1)]
    #: Tensors trained beside the adapter -> shape; they start at zero.
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


def linear_head(adapter: Adapter, labels: int) -> tuple[str, bool, int]:
    """(module, has it a bias, features) of an adapter's head if that is one linear layer over all labels.

    Raises:
        ValueError: the head is another, or too wide for a Gram matrix.
    """
    shapes = dict(adapter.head)
    module = next((name.removesuffix(".weight") for name in shapes if name.endswith(".weight")), "")
    weight, bias = shapes.pop(f"{module}.weight", ()), shapes.pop(f"{module}.bias", None)
    if shapes or len(weight) != 2 or weight[0] != labels or bias not in (None, (labels,)):
        raise ValueError(f"adapter.head: expected one linear layer over {labels} labels, found {adapter.head}")
    if weight[1] > MAX_FEATURES:
        raise ValueError(f"adapter.head: expected at most {MAX_FEATURES} features, found {weight[1]}")
    return module, bias is not None, weight[1]


class Data(Section):
    """Which of a site's registered data sets, and what a record must look like."""

    dataset: Name
    labels: tuple[Text, ...] = ()
    max_length: Annotated[int, Field(ge=1, le=1 << 20)] = 128

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Data:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be distinct")
        return self


class Training(Section):
    """Local fine-tuning, the same at every site."""

    loss: Literal["logit_adjusted", "cross_entropy"] = "logit_adjusted"
    #: Behind a fixed analytic head, and only there: its scores are regressions on 0 and 1, and so many times them are
    #: the logits of the loss.
    sharpness: Annotated[float, Field(ge=1, le=1000)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    optimizer: Literal["adamw", "sgd"] = "adamw"
    #: These three not under [privacy], which counts steps and takes its batches by secret chance.
    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    #: Seed of the order of examples; not secret.
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0


class Generation(Section):
    """How a causal language model sees a record (``participant/tokens.py``)."""

    #: Chat template of conversations: the tokenizer's own, ChatML, or none: then a prompt is followed by its response.
    template: Literal["model", "chatml", "none"]
    #: Several records of a batch in one row of ``data.max_length`` tokens. They do not see one another: it saves time.
    packing: bool = False


class Deadlines(Section):
    """Seconds each phase stays open for members that are silent."""

    join_s: Positive = 3600
    share_s: Positive = 600
    upload_s: Positive = 86400
    sign_s: Positive = 600
    unmask_s: Positive = 600
    outcome_s: Positive = 3600
    #: Of a plan with several stages: how long after the first release of a stage late members are waited for.
    stage_s: Positive = 86400


class Round(Section):
    """Numbers of the secure-aggregation round (protocol sections 5 and 8)."""

    max_cohort: Annotated[int, Field(ge=2, le=128)]
    min_cohort: Annotated[int, Field(ge=2, le=128)]
    min_survivors: Annotated[int, Field(ge=2, le=128)]
    max_colluders: Annotated[int, Field(ge=0, le=126)]
    bits: Literal[16, 20, 24, 32] = 24
    #: Public clipping range of one coordinate of the delta; values beyond +-clip are clipped.
    clip: Annotated[float, Field(gt=0, le=1e6)]
    #: Largest weight (example count) one site may have.
    max_weight: Annotated[int, Field(ge=1, le=1 << 40)]
    audit: Literal["divided", "spot", "none"] = "divided"


class Plan(Section):
    """A whole plan file."""

    name: Name
    #: "generation": the next token of a causal language model, PEFT's CAUSAL_LM.
    task: Literal["classification", "generation"]
    #: Passes from a start adapter to a release, one upload of each site in each; the next starts from the release.
    stages: Annotated[int, Field(ge=1, le=16)] = 1
    base: Base
    adapter: Adapter
    data: Data
    training: Training
    #: With ``task = "generation"``, and only with it.
    generation: Generation | None = None
    #: Without it a site's training gives no guarantee beyond that of the masking.
    privacy: Privacy | None = None
    aggregation: Aggregation = Aggregation()
    #: Without it nothing is held out, and nobody learns how good a release is but each site for itself.
    evaluation: Evaluation | None = None
    round: Round
    deadlines: Deadlines = Deadlines()

    @property
    def last(self) -> int:
        """The last stage: that of the evaluation, or of the last training where there is none."""
        return self.stages + (self.evaluation is not None)

    @property
    def aligned(self) -> bool:
        """Does the adapter follow an analytic head, which is then fixed?"""
        return self.stages > 1 and self.aggregation.analytic is not None

    def judges(self, stage: int) -> bool:
        """Is this the stage that trains nothing and evaluates?"""
        return self.evaluation is not None and stage > self.stages

    def with_server_lr(self, rate: float) -> Plan:
        """The same plan, with the mean applied at another rate."""
        return self.model_copy(update={"aggregation": self.aggregation.model_copy(update={"server_lr": rate})})

    def trainings_from(self, stage: int) -> int:
        """How often a site trains from a stage on, that one included: all of it must be left before it begins."""
        return max(1, self.stages - stage + 1)

    @model_validator(mode="after")
    def _task_fits_labels(self) -> Plan:
        if self.task == "classification" and len(self.data.labels) < 2:
            raise ValueError("data.labels: a classification task needs at least two labels")
        if self.task == "classification" and not self.adapter.head:
            raise ValueError("adapter.head: a classification task needs a head, found none")
        return self

    @model_validator(mode="after")
    def _generation_is_whole(self) -> Plan:
        if (self.task == "generation") != (self.generation is not None):
            raise ValueError('generation: expected this section with task = "generation", and only with it')
        if self.generation is None:
            return self
        for key, found, wanted in (
            ("data.labels", list(self.data.labels), []),
            ("adapter.head", sorted(self.adapter.head), []),
            ("training.loss", self.training.loss, "cross_entropy"),
        ):
            if found != wanted:
                raise ValueError(f'{key}: expected {wanted or "none"} for task = "generation", found {found}')
        if self.privacy is not None and self.generation.packing:
            raise ValueError(
                "generation.packing: expected false under [privacy], found true: the gradient of a packed row is that "
                "of several records, and none of them could be clipped by itself"
            )
        if self.privacy is not None and self.privacy.unit != "record":
            raise ValueError(f'privacy.unit: expected "record" for task = "generation", found "{self.privacy.unit}"')
        return self

    @model_validator(mode="after")
    def _training_fits_privacy(self) -> Plan:
        given = self.training.model_fields_set
        if self.privacy is None:
            for name in ("epochs", "batch_size"):
                if name not in given:
                    raise ValueError(f"missing key 'training.{name}'")
            return self
        for name, instead in (
            ("epochs", "privacy.steps counts steps: the length of an epoch tells the number of records"),
            ("batch_size", "privacy.rate draws the batches and privacy.nominal_batch divides their sums"),
            ("seed", "batches are drawn by the system's secret randomness"),
        ):
            if name in given:
                raise ValueError(f"training.{name}: expected none under [privacy], found one; {instead}")
        return self

    @model_validator(mode="after")
    def _privacy_fits(self) -> Plan:
        if self.privacy is None:
            return self
        if self.privacy.prior and self.training.loss != "logit_adjusted":
            raise ValueError(f"privacy.prior: expected none with the loss '{self.training.loss}', found one")
        if self.privacy.prior and len(self.privacy.prior) != len(self.data.labels):
            raise ValueError(
                f"privacy.prior: expected one number for each of {len(self.data.labels)} labels, "
                f"found {len(self.privacy.prior)}"
            )
        if self.aggregation.weights == "examples" and self.privacy.nominal_size > self.round.max_weight:
            raise ValueError(
                f"privacy.nominal_size: expected at most round.max_weight = {self.round.max_weight}, "
                f"found {self.privacy.nominal_size}"
            )
        for name in (*self.adapter.modules, *self.adapter.head):
            if reason := unsuitable(name):
                raise ValueError(f"adapter: '{name}' cannot be trained under [privacy]: {reason}")
        return self

    @model_validator(mode="after")
    def _analytic_head_fits(self) -> Plan:
        if self.aggregation.analytic is None:
            return self
        if self.privacy is not None:
            raise ValueError(
                'aggregation.head: expected "trained" under [privacy]: statistics of records have no noise'
            )
        if self.stages == 1 and self.adapter.train != "head":
            raise ValueError(f'adapter.train: expected "head" beside an analytic head, found "{self.adapter.train}"')
        if self.stages == 1 and self.aggregation.server_lr != 1.0:
            raise ValueError('head: "analytic" counts every record once: expected server_lr 1.0')
        linear_head(self.adapter, len(self.data.labels))
        return self

    @model_validator(mode="after")
    def _aligned_fits(self) -> Plan:
        if fault := aligned.misfit(self):
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _evaluation_fits(self) -> Plan:
        if self.evaluation is None:
            return self
        if self.privacy is not None:
            raise ValueError("evaluation: expected none under [privacy]: counts over records have no noise")
        if self.round.audit != "divided":
            raise ValueError('evaluation: expected round.audit "divided": a vote is on certified outcomes only')
        if self.evaluation.server_lr and self.aggregation.analytic is not None and not self.aligned:
            raise ValueError("evaluation.server_lr: expected none for an analytic head, which is no mean to be scaled")
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> Plan:
        if self.stages > 1 and self.round.audit != "divided":
            raise ValueError(
                f'round.audit: expected "divided" with {self.stages} stages, found "{self.round.audit}": '
                "a stage starts from totals that members recomputed"
            )
        return self

    @model_validator(mode="after")
    def _counted_head_fits(self) -> Plan:
        if self.aggregation.counted is not None:
            if self.privacy is not None:
                raise ValueError(
                    'aggregation.head: expected "trained" under [privacy]: counts of records have no noise'
                )
            linear_head(self.adapter, len(self.data.labels))
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> Plan:
        method, train = self.aggregation.method, self.adapter.train
        if method != "freeze_a" and self.privacy is not None:
            raise ValueError(
                f'aggregation.method: expected "freeze_a" under [privacy], found "{method}": its steps train B alone'
            )
        products = sum(outputs * inputs for outputs, inputs in self.adapter.modules.values())
        if method == "dense" and products > MAX_DENSE:
            raise ValueError(
                f'aggregation.method: expected at most {MAX_DENSE} numbers in the modules for "dense", found {products}'
            )
        wanted = ("both",) if method in TRAINS_A else ("all", "head") if method == "freeze_a" else ("all",)
        if train not in wanted and not self.aligned:
            raise ValueError(
                f'adapter.train: expected {" or ".join(map(repr, wanted))} with method "{method}", found {train!r}'
            )
        return self

    @model_validator(mode="after")
    def _cohort_is_possible(self) -> Plan:
        r = self.round
        if not r.min_survivors <= r.min_cohort <= r.max_cohort:
            raise ValueError(
                "round: expected min_survivors <= min_cohort <= max_cohort, "
                f"found {r.min_survivors}, {r.min_cohort}, {r.max_cohort}"
            )
        return self


@dataclass(frozen=True)
class PlanFile:
    """A validated plan together with the very bytes its digest is taken over."""

    plan: Plan
    raw: bytes

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(PLAN_LABEL + self.raw).digest()


def parse_plan(raw: bytes, source: str = "plan") -> PlanFile:
    """Parse and validate the bytes of a plan file.

    Raises:
        UserError: not TOML, an unknown or missing key, or a value out of range; names key and file.
    """
    if len(raw) > MAX_PLAN_BYTES:
        raise UserError(f"{source}: expected at most {MAX_PLAN_BYTES} bytes, found {len(raw)}")
    return PlanFile(parse_toml(Plan, raw, source), raw)


def load_plan(path: Path) -> PlanFile:
    """Read a plan file; see :func:`parse_plan` for what it raises."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: expected a plan file, found: {error.strerror}", hint="check the path") from error
    return parse_plan(raw, str(path))
