"""What a plan and the pinned roster fix together: header, rules, vector layout; everybody computes it alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from privacy import PROTOCOL_VERSION
from privacy.adapter import Layout, Tensors, layout_of
from privacy.aligned import plan_at
from privacy.errors import UserError
from privacy.evaluation import counts_quantizer
from privacy.factors import first_start, load_factors
from privacy.methods import vector_size
from privacy.plan import Plan, PlanFile
from privacy.roster import Roster, RosterFile, Rules, rules_for
from privacy.secagg.masking import packed_length
from privacy.secagg.messages import Header
from privacy.secagg.quantize import Quantizer, quantizer_for
from privacy.secagg.transcript import RoundContext


@dataclass(frozen=True)
class Job:
    """One plan under one roster.

    Raises (on construction by :meth:`of`):
        Refusal: the plan asks for what the pinned policy does not allow.
    """

    plan_file: PlanFile
    roster_file: RosterFile
    rules: Rules
    #: The plan as the stage sees it, see ``privacy/aligned.py``; for no stage in particular that of the file.
    plan: Plan
    layout: Layout
    quantizer: Quantizer
    #: Where the factors of the method "core" lie on this disk; no other method has any.
    factors_directory: Path | None = None
    #: The vector is that of the evaluation: counts.
    judging: bool = False

    @classmethod
    def of(cls, plan_file: PlanFile, roster_file: RosterFile, factors_directory: Path | None = None) -> Job:
        plan = plan_file.plan
        rules = rules_for(plan, roster_file.roster.policy)
        layout, quantizer = layout_of(plan.adapter), quantizer_for(plan, vector_size(plan))
        return cls(plan_file, roster_file, rules, plan, layout, quantizer, factors_directory)

    def at(self, stage: int) -> Job:
        """The same job with plan and vector of a stage: what is summed or trained there, or the counts."""
        plan = plan_at(self.plan_file.plan, stage)
        judging = plan.judges(stage)
        if judging == self.judging and plan == self.plan:
            return self
        layout, quantizer = layout_of(plan.adapter), quantizer_for(plan, vector_size(plan))
        if judging:
            layout, quantizer = Layout((), ()), counts_quantizer(plan)
        return replace(self, plan=plan, layout=layout, quantizer=quantizer, judging=judging)

    @property
    def roster(self) -> Roster:
        return self.roster_file.roster

    def factors(self) -> Tensors | None:
        """The frozen factors that the plan pins, read from this disk; None where the method has none.

        Raises:
            UserError: they are not here, or are others.
        """
        if self.plan.aggregation.core is None:
            return None
        if self.factors_directory is None:
            raise UserError(f"plan '{self.plan.name}': expected a directory with its factors, found none")
        return load_factors(self.factors_directory, self.plan)

    def start_tensors(self) -> Tensors:
        """The whole adapter before stage 1; raises as :meth:`factors`."""
        return first_start(self.plan.adapter, self.factors())

    def header(self, stage: int, round_number: int, start: bytes) -> Header:
        """The header of a round of this job; ``start`` is the digest of the start adapter."""
        return Header(
            PROTOCOL_VERSION,
            self.plan_file.digest,
            stage,
            round_number,
            self.roster_file.hash,
            start,
            bytes.fromhex(self.roster.coordinator),
        )

    def context(self, header: Header) -> RoundContext:
        """The context of the round with this header."""
        length = packed_length(self.quantizer.total_size, self.rules.bits)
        return RoundContext(header, self.roster.keys(), self.rules, length)
