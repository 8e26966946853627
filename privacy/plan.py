"""The plan: what to train and how to aggregate it, one TOML file for the whole federation.

The digest of a plan is taken over the bytes of its file, so everybody who agrees on the digest has read the same
text. Every field is validated here, an unknown key is an error that names the key and the file. Nothing in a plan
can weaken the pinned policy of the roster (``privacy/roster.py``) or a site's own file (``participant/policy.py``).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from privacy import aligned
from privacy.aggregation import TRAINS_A, Aggregation, Evaluation
from privacy.errors import UserError
from privacy.guarantee import Privacy, unsuitable
from privacy.sections import Adapter, Base, Data, Deadlines, Generation, Round, Task, Training, linear_head
from privacy.settings import Name, Section, parse_toml
from privacy.target import misfit

MAX_PLAN_BYTES = 1 << 20
#: Numbers in all products B A together, for the method that sums these: more is no longer a small model.
MAX_DENSE = 1 << 25
PLAN_LABEL = b"veilsum/1/plan\0"


class Plan(Section):
    """A whole plan file."""

    #: Of this plan; a federation has one of a name.
    name: Name
    #: ``"generation"``: the next token of a causal language model. ``"regression"``: a number.
    task: Task
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
    #: Without it nothing is held out, and how good a release is each site learns for itself alone.
    evaluation: Evaluation | None = None
    round: Round
    deadlines: Deadlines = Deadlines()

    @property
    def outputs(self) -> int:
        """Width of the head: one for each label, one number of a regression, none of a language model."""
        return 1 if self.task == "regression" else len(self.data.labels)

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
        if self.task != "generation" and not self.adapter.head:
            raise ValueError(f"adapter.head: a {self.task} task needs a head, found none")
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
    def _regression_is_whole(self) -> Plan:
        if fault := misfit(self):
            raise ValueError(fault)
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
    def _head_rate_fits(self) -> Plan:
        beside = bool(self.adapter.head) and self.adapter.train in ("all", "both")
        if self.training.head_learning_rate is not None and not beside:
            raise ValueError(
                "training.head_learning_rate: expected none where no head is trained beside the adapter, found one"
            )
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
        linear_head(self.adapter, self.outputs)
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
            linear_head(self.adapter, self.outputs)
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
