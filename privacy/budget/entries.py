"""The lines of a ledger as types: strict parsing of what may be an attacker's file, and the bytes that are signed.

A line is one JSON object: keys sorted, no spaces, ASCII, ``signature`` last. There are no floating-point numbers in
it; what matters as a number is a decimal string. Facts are kept and no epsilon alone: the mechanism, the plan, the
code. Parsing takes no line that these types would not write, byte for byte.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal, NoReturn

from pydantic import Field, ValidationError, model_validator

from privacy.encoding import label
from privacy.errors import ProtocolError
from privacy.settings import Section, explain

VERSION = 1
MAX_LINE_BYTES = 1 << 16
#: Whole numbers up to here are the same in every JSON reader.
MAX_INTEGER = (1 << 53) - 1

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Job = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Short = Annotated[str, Field(min_length=1, max_length=200)]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
#: A number >= 0 that is never a float: no exponent, no sign, no leading zeros.
Amount = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,17})(\.[0-9]{1,60})?$")]
AmountOrInfinite = Annotated[str, Field(pattern=r"^(inf|(0|[1-9][0-9]{0,17})(\.[0-9]{1,60})?)$")]
Time = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$")]

Unit = Literal["record", "user"]
Adjacency = Literal["add-remove", "zero-out"]

_SIGNATURE = re.compile(rb',"signature":"([0-9a-f]{128})"\}\Z')


class Policy(Section):
    """What a site allows to be done with a data set; ``epsilon`` is ``None`` where there is no budget."""

    unit: Unit = "record"
    max_records_per_unit: Annotated[int, Field(ge=1, le=64)] = 1
    adjacency: Adjacency = "add-remove"
    delta: Amount
    epsilon: Amount | None
    #: The one order of the RDP filter, fixed before the first job.
    order: Annotated[int, Field(ge=2, le=256)]
    #: ``False``: the site declares that these records need no protection.
    protected: bool = True

    @model_validator(mode="after")
    def _is_possible(self) -> Policy:
        if not 0 < Decimal(self.delta) < Decimal("0.01"):
            raise ValueError(f"delta: expected 0 < delta < 0.01, found {self.delta}")
        if self.epsilon is not None and not 0 < Decimal(self.epsilon) <= 50:
            raise ValueError(f"epsilon: expected 0 < epsilon <= 50, found {self.epsilon}")
        if self.epsilon is not None and not self.protected:
            raise ValueError("epsilon: a data set that is not protected has no budget")
        if self.unit == "record" and self.max_records_per_unit != 1:
            raise ValueError("max_records_per_unit: expected 1 where the unit is the record")
        return self


class Register(Section):
    """The first line of every ledger."""

    name: Short
    policy: Policy


class PolicyChange(Section):
    """A changed policy; a weaker one carries its reason."""

    policy: Policy
    reason: Annotated[str, Field(max_length=500)]


class Claim(Section):
    """What the site computed for this job alone, at the mechanism's delta; an auditor recomputes it."""

    pld: AmountOrInfinite
    rdp: AmountOrInfinite
    accountant: Short
    version: Short


class Reserve(Section):
    """A job is charged in full; from here on it counts."""

    job: Job
    plan: Short
    plan_digest: Hash
    stage: Count
    #: JSON of ``privacy/budget/events.py``.
    mechanism: dict[str, Any]
    #: Order -> Renyi divergence; empty for a job without privacy.
    rdp: dict[str, Amount]
    claim: Claim
    code: dict[str, str]
    model: dict[str, str]


class Start(Section):
    """From here on records are read, and nothing is refunded."""

    job: Job
    selftest: dict[str, Any] | None


class Release(Section):
    """A round is about to see the masked vector; a second round of the same job adds a line, and no charge."""

    job: Job
    round: Count
    t2: Hash
    vector_digest: Hash
    coordinator: Hash


class Commit(Section):
    """The coordinator has the whole upload of a round; ``steps`` as planned, 0 for a job without privacy."""

    job: Job
    steps: Count
    round: Count
    root: Hash


class Abort(Section):
    """The job ends; the charge is given back only if it never started."""

    job: Job
    reason: Annotated[str, Field(max_length=500)]


Facts = Register | PolicyChange | Reserve | Start | Release | Commit | Abort

KINDS: dict[str, type[Facts]] = {
    "REGISTER": Register,
    "POLICY": PolicyChange,
    "RESERVE": Reserve,
    "START": Start,
    "RELEASE": Release,
    "COMMIT": Commit,
    "ABORT": Abort,
}
NAMES = {kind: name for name, kind in KINDS.items()}


class Common(Section):
    """What every line carries beside its facts."""

    v: Literal[1]
    seq: Count
    previous: Hash  # SHA-256 of the line before, without its newline; zeros for the first
    kind: Literal["REGISTER", "POLICY", "RESERVE", "START", "RELEASE", "COMMIT", "ABORT"]
    dataset: Hash
    site: Hash  # identity key
    time: Time
    boot: Annotated[str, Field(pattern=r"^[0-9a-f-]{1,64}$")]
    monotonic: Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,19})$")]  # ns since boot


@dataclass(frozen=True)
class Entry:
    """One line, parsed; its signature is not verified yet."""

    seq: int
    previous: str
    kind: str
    dataset: str
    site: str
    time: str
    boot: str
    monotonic: int
    facts: Facts
    line: bytes  # as stored, without the newline
    signature: bytes
    signed: bytes  # what the signature covers


def canonical(value: dict[str, Any]) -> bytes:
    """The one JSON text of a line's body."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def signed_bytes(body: bytes) -> bytes:
    """What is signed: the stored bytes of a line before its signature, closed, under a label of their own."""
    return label("ledger", body)


def line_of(body: bytes, signature: bytes) -> bytes:
    """The stored line: the body, then its signature as the last key."""
    return body[:-1] + b',"signature":"' + signature.hex().encode() + b'"}'


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _no_float(text: str) -> NoReturn:
    raise ValueError(f"expected no floating-point number, found {text[:40]}")


def _whole(text: str) -> int:
    if len(text) > 17 or abs(value := int(text)) > MAX_INTEGER:
        raise ValueError(f"expected whole numbers below 2**53, found {text[:40]}")
    return value


def strict_json(raw: bytes) -> dict[str, Any]:
    """One JSON object without repeated keys, floats, NaN or integers from 2**53 on.

    Raises:
        ValueError: anything else; RecursionError is one too.
    """
    try:
        found = json.loads(
            raw, object_pairs_hook=_no_twins, parse_float=_no_float, parse_constant=_no_float, parse_int=_whole
        )
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object")
    return found


def parse_line(line: bytes) -> Entry:
    """Parse one stored line, without its newline; the chain and the signature are the caller's to check.

    Raises:
        ProtocolError: not a line that a ledger of this version writes, byte for byte.
    """
    if len(line) > MAX_LINE_BYTES:
        raise ProtocolError(f"expected a line of at most {MAX_LINE_BYTES} bytes, found {len(line)}")
    match = _SIGNATURE.search(line)
    if match is None:
        raise ProtocolError("expected a ledger line that ends with its signature")
    body = line[: match.start()] + b"}"
    try:
        values = strict_json(body)
        if canonical(values) != body:
            raise ValueError("expected the canonical form: keys sorted, no spaces, ASCII")
        common = Common.model_validate({k: values.pop(k) for k in Common.model_fields if k in values})
        facts = KINDS[common.kind].model_validate(values)
    except ValidationError as error:
        raise ProtocolError(explain(error)) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ProtocolError(f"expected a ledger line, found: {error}") from error
    about = (common.seq, common.previous, common.kind, common.dataset, common.site, common.time, common.boot)
    return Entry(*about, int(common.monotonic), facts, line, bytes.fromhex(match[1].decode()), signed_bytes(body))


def decimal_text(value: float) -> str:
    """A float as an :data:`Amount`, exactly as Python prints it but without an exponent; ``inf`` stays ``inf``."""
    if value == float("inf"):
        return "inf"
    text = format(Decimal(repr(value)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
