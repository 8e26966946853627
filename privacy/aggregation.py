"""The plan's ``[aggregation]`` and ``[evaluation]``: what is summed, what is made of the sum, and who judges that."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from privacy.settings import HexDigest, Positive, Section


class Analytic(Section):
    """A head that is computed, not trained (``privacy/analytic.py``); all of these are public."""

    #: lambda, added to the diagonal of the mean Gram matrix, whose entries are at most 1.
    ridge: Annotated[float, Field(ge=1e-9, le=1.0)]
    #: Features are clipped to +-feature_clip, coordinate by coordinate, and divided by it.
    feature_clip: Annotated[float, Field(gt=0, le=1e6)]
    #: A class with fewer different texts at a site is left out of that site's statistics; for classification.
    min_class_count: Positive | None = None
    #: A site with fewer different texts sits out; for regression, which has no classes.
    min_texts: Positive | None = None


class Counted(Section):
    """Rows of the head count by the records of their class."""

    #: A class with fewer different texts at a site has no part in that site's head.
    min_class_count: Positive


class Regmean(Section):
    """Sites count in each direction by what they have seen there (``privacy/methods.py``); all of these are public."""

    #: Added to the diagonal of each Gram matrix, whose entries are at most 1; a large one gives the plain mean.
    ridge: Annotated[float, Field(ge=1e-9, le=1e6)]
    #: What A says of a token is clipped to +-feature_clip, coordinate by coordinate, and divided by it.
    feature_clip: Annotated[float, Field(gt=0, le=1e6)]
    #: A site with fewer different texts sits out.
    min_texts: Positive


class Fisher(Section):
    """Each number counts by how much a site's records depend on it (``privacy/methods.py``); all of it is public."""

    #: Added to each weight, which is at most 1; a large one gives the plain mean.
    ridge: Annotated[float, Field(ge=1e-6, le=1e6)]
    #: Weights are relative to the mean of their tensor at the site, and end at so many times that.
    reach: Annotated[float, Field(ge=1, le=1e6)]
    #: A site with fewer different texts sits out.
    min_texts: Positive


class Core(Section):
    """Frozen factors of the base model's weights, of which only the core between them is trained."""

    #: Digest of the factors' file, which comes with the plan.
    factors: HexDigest


#: What is summed of LoRA's factors, see ``privacy/methods.py`` and docs/aggregation.md.
Method = Literal["freeze_a", "both", "regmean", "fisher", "core", "dense"]
Head = Literal["trained", "analytic", "counted"]
HEADS: tuple[str, ...] = get_args(Head)
METHODS: tuple[str, ...] = get_args(Method)
#: Methods under which A is trained as well.
TRAINS_A = ("both", "dense")


class Aggregation(Section):
    """What is summed and how the mean is applied."""

    #: What is summed of LoRA's factors.
    method: Method = "freeze_a"
    #: Sites count by their number of records, or all the same.
    weights: Literal["examples", "uniform"] = "examples"
    #: How far the mean is applied: 1 is the mean itself.
    server_lr: Annotated[float, Field(gt=0, le=10)] = 1.0
    #: "analytic" sums statistics of the records instead of a trained delta: off unless the plan says so.
    #: "counted" weights each row of a trained head by the records of its class, whose numbers all learn in total.
    head: Head = "trained"
    #: With ``head = "analytic"``, and only with it.
    analytic: Analytic | None = None
    #: With ``head = "counted"``, and only with it.
    counted: Counted | None = None
    #: With ``method = "regmean"``, and only with it.
    regmean: Regmean | None = None
    #: With ``method = "fisher"``, and only with it.
    fisher: Fisher | None = None
    #: With ``method = "core"``, and only with it.
    core: Core | None = None

    @property
    def min_texts(self) -> int | None:
        """Different texts that a site must have, where statistics of all its records are summed."""
        asked = [section.min_texts for section in (self.analytic, self.regmean, self.fisher) if section is not None]
        return max((least for least in asked if least is not None), default=None)

    @model_validator(mode="after")
    def _sections_are_the_methods(self) -> Aggregation:
        for name, section in (("regmean", self.regmean), ("fisher", self.fisher), ("core", self.core)):
            if (self.method == name) != (section is not None):
                raise ValueError(f'{name}: expected this section with method = "{name}", and only with it')
        return self

    @model_validator(mode="after")
    def _analytic_is_whole(self) -> Aggregation:
        if (self.head == "analytic") != (self.analytic is not None):
            raise ValueError('analytic: expected this section with head = "analytic", and only with it')
        if (self.head == "counted") != (self.counted is not None):
            raise ValueError('counted: expected this section with head = "counted", and only with it')
        if self.counted is not None and self.weights != "examples":
            raise ValueError('head: "counted" counts records: expected weights "examples"')
        if self.counted is not None and self.fisher is not None:
            raise ValueError('head: expected "trained" with method "fisher", which weights the head itself')
        if self.analytic is not None and self.weights != "examples":
            raise ValueError('head: "analytic" counts every record once: expected weights "examples"')
        return self


class Evaluation(Section):
    """One more stage after the last: every site judges the releases by records that it kept out of training."""

    #: Share of each site's records that no stage trains on.
    holdout: Annotated[float, Field(ge=0.01, le=0.5)]
    #: How far the mean is applied, to be voted on; ``aggregation.server_lr`` alone where empty.
    server_lr: Annotated[tuple[Annotated[float, Field(gt=0, le=10)], ...], Field(max_length=16)] = ()
    #: Of a regression, in the target's own unit: an answer that is off by no more is right.
    tolerance: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _rates_are_distinct(self) -> Evaluation:
        if len({f"{rate:g}" for rate in self.server_lr}) != len(self.server_lr):
            raise ValueError("server_lr: expected distinct numbers")
        return self
