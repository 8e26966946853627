"""What an audit can find, one class and one exit code each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from privacy.budget.book import Finding, LedgerError
from privacy.errors import shown


class Code(IntEnum):
    """Exit codes of ``veilsum-audit ledger`` and ``federation``; 1 and 2 are a user's mistakes."""

    OK = 0
    OVER_BUDGET = 10
    OPEN_TOO_LONG = 11
    BROKEN = 20  # a line's form, signature, chain or place
    TRUNCATED = 21  # shorter than an anchor, or a line is missing that a witness or transcript proves
    FORK = 22
    REPLAY = 23
    CLOCK = 24
    DIFFERS = 30  # recomputed and claimed do not agree
    UNSUPPORTED = 31
    SELF_TEST = 32
    NO_ANCHOR = 40


class Meaning(NamedTuple):
    """What a class of findings is, and examples; Markdown."""

    means: str
    examples: str = ""


#: docs/audit.md shows it.
MEANINGS = {
    Code.OK: Meaning("nothing found"),
    Code.OVER_BUDGET: Meaning("over budget"),
    Code.OPEN_TOO_LONG: Meaning("open reservation too old", "open for more than `--open-days`, 30 by default"),
    Code.BROKEN: Meaning(
        "a line, signature, chain or order is broken",
        "an edited, reordered or deleted line; a repeated key; NaN; 2^60; a release without a start; a forged anchor",
    ),
    Code.TRUNCATED: Meaning(
        "truncated",
        "lines cut off, an old backup restored, a ledger not given that was witnessed, a round without its RELEASE",
    ),
    Code.FORK: Meaning(
        "fork", "a second history of a witnessed length; a RELEASE about another cohort than the transcript"
    ),
    Code.REPLAY: Meaning(
        "replay",
        "a line of another site or data set; a job reserved or started twice; one ledger under two names",
    ),
    Code.CLOCK: Meaning("clock regress"),
    Code.DIFFERS: Meaning(
        "recomputation differs",
        "a claim too low, a divergence too low, another mechanism than the plan gives",
    ),
    Code.UNSUPPORTED: Meaning(
        "unsupported mechanism",
        "sigma = 0.01, shuffling, an unknown kind; an accountant without an answer; terms weaker than the budget's",
    ),
    Code.SELF_TEST: Meaning("self-test missing or failed"),
    Code.NO_ANCHOR: Meaning("no anchor: completeness unproven"),
}

#: The most serious first: it decides the exit code. A history that is not the written one makes all else
#: moot, and an epsilon that nobody can compute is worse than one that is too high.
SEVERITY = (
    Code.BROKEN,
    Code.FORK,
    Code.TRUNCATED,
    Code.REPLAY,
    Code.UNSUPPORTED,
    Code.OVER_BUDGET,
    Code.SELF_TEST,
    Code.DIFFERS,
    Code.CLOCK,
    Code.OPEN_TOO_LONG,
    Code.NO_ANCHOR,
    Code.OK,
)

_OF_LEDGER = {
    Finding.TRUNCATED: Code.TRUNCATED,
    Finding.FORK: Code.FORK,
    Finding.REPLAY: Code.REPLAY,
}


@dataclass(frozen=True)
class Found:
    """One finding: its class, and one line for people; parts of the text were written by the audited."""

    code: Code
    text: str

    @classmethod
    def of(cls, error: LedgerError) -> Found:
        """What is wrong with a ledger's lines."""
        return cls(_OF_LEDGER.get(error.finding, Code.BROKEN), str(error))

    def to_json(self) -> dict[str, object]:
        """For machines."""
        return {"code": int(self.code), "class": self.code.name.lower(), "text": shown(self.text, 500)}


def worst(found: Iterable[Found]) -> Code:
    """The most serious class, which is the exit code."""
    return min((one.code for one in found), key=SEVERITY.index, default=Code.OK)
