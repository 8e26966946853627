"""The tables in docs/endings.md, written from privacy/advice.py: ``python -m scripts.endings``."""

from __future__ import annotations

import re
from pathlib import Path

from privacy.advice import ENDINGS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "endings.md"
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


def page(before: str) -> str:
    """The page with fresh tables between its marks."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n\n).*?(\n\n<!-- end -->)",
        lambda m: f"{m[1]}{table(m[2])}{m[3]}",
        before,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
