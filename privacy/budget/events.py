"""What a job does with a data set, as facts: the mechanism that a ledger reserves and every accountant reads.

A mechanism in a ledger is written by whoever wrote the ledger, so nothing of it is believed: types are whitelisted,
numbers are decimal strings in ranges that no accountant is brought down by, and the tree of dp-accounting's events
is compared with the only tree that the plain fields allow, never interpreted.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal
from math import comb
from typing import TYPE_CHECKING, Any, Literal

from privacy.errors import ProtocolError, shown

if TYPE_CHECKING:
    from dp_accounting import dp_event

#: Accepted ranges; outside of them an answer would mean nothing, or take an accountant's memory.
MIN_SIGMA, MAX_SIGMA = Decimal("0.2"), Decimal(100)
MAX_STEPS = 10**6
MAX_DELTA = Decimal("0.01")  # exclusive
MAX_RECORDS_PER_UNIT = 64
MAX_COUNT = 1 << 40  # nominal sizes

_DECIMAL = re.compile(r"(?:0|[1-9][0-9]{0,8})(?:\.[0-9]{0,29}[1-9])?")
#: Probabilities of a mixture are exact products rounded to this many digits, the same on every machine.
_DIGITS = Context(prec=30, rounding=ROUND_HALF_EVEN)

Json = dict[str, Any]


def _refuse(field: str, expected: str, found: object) -> None:
    raise ProtocolError(f"mechanism: {field}: expected {expected}, found {shown(repr(found), 60)}")


def _number(field: str, text: object, least: Decimal, most: Decimal) -> None:
    """Insist on a canonical decimal string with least <= value <= most."""
    if type(text) is not str or not _DECIMAL.fullmatch(text):
        _refuse(field, "a decimal string without exponent and trailing zeros", text)
    elif not least <= Decimal(text) <= most:
        _refuse(field, f"{least:f} <= {field} <= {most:f}", text)


def _count(field: str, value: object, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        _refuse(field, f"a whole number of 1 to {most}", value)


def _choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if type(value) is not str or value not in allowed:
        _refuse(field, f"one of {', '.join(allowed)}", value)


@dataclass(frozen=True)
class DpSgd:
    """Poisson-sampled DP-SGD: ``steps`` times a sampled, clipped sum plus Gaussian noise.

    Attributes:
        rate: probability q with which each record is in a step's batch.
        sigma: noise multiplier; the noise has standard deviation sigma * clip.
        clip: L2 bound C on each record's gradient.
        delta: the delta at which the job's own claim is made.
        nominal_batch: public constant that the noised sum is divided by.
        nominal_size: public constant that stands for the number of records.
        max_records_per_unit: most records of one user, 1 where the unit is the record.

    Raises (on construction):
        ProtocolError: a value of another type, not canonical or out of range.
    """

    rate: str
    sigma: str
    clip: str
    delta: str
    steps: int
    nominal_batch: int
    nominal_size: int
    unit: Literal["record", "user"] = "record"
    max_records_per_unit: int = 1
    adjacency: Literal["add-remove", "zero-out"] = "add-remove"
    sampling: Literal["poisson"] = "poisson"

    def __post_init__(self) -> None:
        tiny = Decimal("1e-30")
        _number("rate", self.rate, tiny, Decimal(1))
        _number("sigma", self.sigma, MIN_SIGMA, MAX_SIGMA)
        _number("clip", self.clip, tiny, Decimal(10**6))
        _number("delta", self.delta, tiny, MAX_DELTA)
        if Decimal(self.delta) == MAX_DELTA:
            _refuse("delta", f"less than {MAX_DELTA}", self.delta)
        _count("steps", self.steps, MAX_STEPS)
        _count("nominal_batch", self.nominal_batch, MAX_COUNT)
        _count("nominal_size", self.nominal_size, MAX_COUNT)
        _choice("unit", self.unit, ("record", "user"))
        _choice("adjacency", self.adjacency, ("add-remove", "zero-out"))
        _choice("sampling", self.sampling, ("poisson",))
        _count("max_records_per_unit", self.max_records_per_unit, 1 if self.unit == "record" else MAX_RECORDS_PER_UNIT)

    def to_json(self) -> Json:
        """JSON without a float: the plain fields, and under ``event`` the tree of dp-accounting's event."""
        return {"kind": "dp-sgd", **dataclasses.asdict(self), "event": self._event_json()}

    @classmethod
    def from_json(cls, value: object) -> DpSgd:
        """The mechanism that :meth:`to_json` wrote.

        Raises:
            ProtocolError: unknown or missing keys, a value out of range, or an event other than the fields'.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        table = _table(value, {"kind", "event"} | names)
        _choice("kind", table["kind"], ("dp-sgd",))
        found = cls(**{name: table[name] for name in names})
        tree = found._event_json()
        # Python takes True and 1.0 for 1, so what is equal is compared as text too.
        if table["event"] != tree or json.dumps(table["event"], sort_keys=True) != json.dumps(tree, sort_keys=True):
            raise ProtocolError("mechanism: event: expected the event that rate, sigma, steps and unit give")
        return found

    def sampled_records(self) -> tuple[tuple[int, Decimal], ...]:
        """(number of a unit's records in a batch, its probability): binomial, rounded to 30 digits."""
        q, k = Decimal(self.rate), self.max_records_per_unit
        return tuple((i, _binomial(k, i, q)) for i in range(k + 1))

    def _event_json(self) -> Json:
        if self.max_records_per_unit == 1:
            noise: Json = {"type": "GaussianDpEvent", "noise_multiplier": self.sigma}
            step: Json = {"type": "PoissonSampledDpEvent", "sampling_probability": self.rate, "event": noise}
        else:
            step = {
                "type": "MixtureOfGaussiansDpEvent",
                "standard_deviation": self.sigma,
                "sensitivities": [i for i, _ in self.sampled_records()],
                "sampling_probs": [f"{p:f}" for _, p in self.sampled_records()],
            }
        return {"type": "SelfComposedDpEvent", "count": self.steps, "event": step}

    def event(self) -> dp_event.DpEvent:
        """The event for dp-accounting; for k records of a user the mixture of Charles et al. (arXiv:2407.07737)."""
        from dp_accounting import dp_event  # with it comes SciPy, and most who read a ledger compute no epsilon

        step: dp_event.DpEvent
        if self.max_records_per_unit == 1:
            noise = dp_event.GaussianDpEvent(float(self.sigma))
            step = dp_event.PoissonSampledDpEvent(float(self.rate), noise)
        else:
            records = self.sampled_records()
            step = dp_event.MixtureOfGaussiansDpEvent(
                float(self.sigma), [float(i) for i, _ in records], [float(p) for _, p in records]
            )
        return dp_event.SelfComposedDpEvent(step, self.steps)


def _binomial(k: int, i: int, q: Decimal) -> Decimal:
    c = _DIGITS
    stays_out = c.power(c.subtract(Decimal(1), q), k - i) if i < k else Decimal(1)
    taken = c.power(q, i) if i else Decimal(1)
    return c.multiply(Decimal(comb(k, i)), c.multiply(taken, stays_out))


@dataclass(frozen=True)
class Unprotected:
    """A job without differential privacy: what it gives away has no bound, epsilon is infinite."""

    def to_json(self) -> Json:
        """JSON of the ledger."""
        return {"kind": "unprotected", "event": {"type": "NonPrivateDpEvent"}}

    @classmethod
    def from_json(cls, value: object) -> Unprotected:
        """What :meth:`to_json` wrote; raises ProtocolError for anything else."""
        if value != cls().to_json():
            raise ProtocolError("mechanism: expected kind 'unprotected' with its event and nothing else")
        return cls()

    def event(self) -> dp_event.DpEvent:
        """The event for dp-accounting."""
        from dp_accounting import dp_event

        return dp_event.NonPrivateDpEvent()


Mechanism = DpSgd | Unprotected

_KINDS: dict[str, type[DpSgd] | type[Unprotected]] = {"dp-sgd": DpSgd, "unprotected": Unprotected}


def _table(value: object, keys: set[str]) -> Json:
    if not isinstance(value, dict):
        raise ProtocolError(f"mechanism: expected a JSON object, found {type(value).__name__}")
    if wrong := keys ^ value.keys():
        name = min(wrong, key=str)
        what = "missing" if name in keys else "unknown"
        raise ProtocolError(f"mechanism: {what} key '{shown(str(name), 60)}'")
    return value


def mechanism_from_json(value: object) -> Mechanism:
    """The mechanism of a ledger line.

    Raises:
        ProtocolError: a kind that this version does not know, or anything out of range.
    """
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ProtocolError(f"mechanism: kind: expected one of {', '.join(_KINDS)}, found {shown(repr(kind), 60)}")
    return _KINDS[kind].from_json(value)
