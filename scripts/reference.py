"""The tables of the reference pages, written from the code: ``python -m scripts.reference``.

A page has a mark, ``<!-- table: NAME -->``, and an end, ``<!-- end -->``; what stands between them is written here, the
rest by hand. tests/test_reference.py compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import coordinator.counts
import coordinator.metrics
import participant.counts
import participant.metrics
from privacy.budget.findings import MEANINGS, SEVERITY
from privacy.console import ENDS
from scripts import endings, keys

DOCS = Path(__file__).resolve().parent.parent / "docs"
FAMILIES = {
    "coordinator": (*coordinator.counts.FAMILIES, *coordinator.metrics.FAMILIES),
    "participant": (*participant.counts.FAMILIES, *participant.metrics.FAMILIES),
}


def metrics(side: str) -> str:
    """What one side shows to Prometheus."""
    head = ("| name | type | labels | what it says |", "|---|---|---|---|")
    rows = [f"| `{f.name}` | {f.kind} | {', '.join(f.labels)} | {f.help} |" for f in FAMILIES[side]]
    return "\n".join([*head, *rows])


def codes(which: str) -> str:
    """Exit codes of every command, or what an audit may find, the most serious first."""
    if which == "commands":
        head = ("| code | what it means | what to do |", "|---|---|---|")
        return "\n".join([*head, *(f"| {code} | {end.means} | {end.todo} |" for code, end in sorted(ENDS.items()))])
    head = ("| code | finding | what it is | examples |", "|---|---|---|---|")
    rows = [f"| {c.value} | `{c.name}` | {MEANINGS[c].means} | {MEANINGS[c].examples} |" for c in SEVERITY]
    return "\n".join([*head, *rows])


MARK = re.compile(r"<!-- table: (\w+) -->")
#: Page -> what writes the table of a name.
PAGES: dict[str, Callable[[str], str]] = {
    "endings.md": endings.table,
    "configuration.md": keys.table,
    "plan.md": keys.table,
    "metrics.md": metrics,
    "exit-codes.md": codes,
    "audit.md": codes,
}


def filled(before: str, table: Callable[[str], str]) -> str:
    """A page with fresh tables between its marks."""
    return re.sub(
        rf"({MARK.pattern}\n\n).*?(\n\n<!-- end -->)",
        lambda m: f"{m[1]}{table(m[2])}{m[3]}",
        before,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for name, table in PAGES.items():
        page = DOCS / name
        page.write_text(filled(page.read_text(encoding="utf-8"), table), encoding="utf-8")
