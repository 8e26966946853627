"""The tables in docs/endings.md, from privacy/advice.py; ``python -m scripts.reference`` writes them."""

from __future__ import annotations

import re

from privacy.advice import ENDINGS

#: Commands that the advice names, with their words.
COMMANDS = ("doctor", "status", "show", "plans", "fetch", "approve PLAN", "roster show", "dataset policy", "transcript")
HEAD = ("| cause | what happened | the operator | the site |", "|---|---|---|---|")


def table(kind: str) -> str:
    """All entries of one kind."""
    rows = [f"| `{e.code}` | {e.means} | {filled(e.operator)} | {filled(e.site)} |" for e in ENDINGS if e.kind == kind]
    return "\n".join([*HEAD, *rows])


def filled(advice: str) -> str:
    """Advice for the page: no names yet, and commands as code."""
    text = advice.format(members="the sites named")
    return re.sub(rf"(veilsum-\w+ (?:{'|'.join(COMMANDS)}))", r"`\1`", text)
