"""A few seeded rounds of ``make chaos``; its checks bite, and no write goes past the fault points."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from participant.prepare import PLAIN_VECTOR
from participant.records import Aborted, Record, Released, SignedSurvivors, Spent
from privacy.plan import PlanFile
from tests.chaos.checks import (
    Receipts,
    commits_wrong,
    openings_wrong,
    records_wrong,
    survivors_wrong,
    totals_wrong,
    unmet,
)
from tests.chaos.disk import records
from tests.chaos.proxy import Disturbance
from tests.chaos.rounds import Result, run_plan
from tests.chaos.schedule import Schedule
from tests.chaos.toy import Shape, toy_plan
from tests.chaos.world import World
from tests.test_architecture import product_files

ROOT = Path(__file__).resolve().parent.parent
#: Four sites, c = 1: t = 3, so one member may be lost.
SHAPE = Shape(4, 3, 4, 6)
SCHEDULES = (
    Schedule(
        coordinator="after-commit:events@9",
        victims=(("site-2", "saved-M9@1"),),
        network=(("site-1", Disturbance("delay", 0, 50)), ("site-3", Disturbance("cut", 0, 3000))),
        echo="site-4",
    ),
    Schedule(victims=(("site-1", "before-M9@1"), ("site-3", "before-M9@1")), torn=True),
    Schedule(
        coordinator="after-commit:uploads@3",
        victims=(("site-4", "before-fsync:records.jsonl@2@full@1"),),
        network=(("site-1", Disturbance("cut", 0, 1_500_000)), ("site-2", Disturbance("throttle", 0, 4000))),
        echo="site-3",
        size="medium",
    ),
    Schedule(stalls=(("site-1", 0.5, 1.0),), all_at_s=1.2),
)
KINDS = {
    "kill at a point of the coordinator",
    "kill at a point of a member",
    "full disk of a member",
    "cut in mid-chunk",
    "delay",
    "torn line",
    "stalled process",
    "restart of everything at once",
    "messages of a site repeated, in another order",
}


@pytest.mark.slow
def test_a_few_rounds_with_every_kind_of_fault_lose_nothing(tmp_path: Path) -> None:
    plans = [toy_plan(f"toy-{i}", SHAPE, s.size, s.bits) for i, s in enumerate(SCHEDULES, 1)]
    world = World(tmp_path, SHAPE, plans, seed=7)
    try:
        world.start()
        results = [run_plan(world, *pair, seed=7) for pair in zip(plans, SCHEDULES, strict=True)]
        check_the_checks(world, plans[1])
    finally:
        world.close()
    for result in results:
        assert problems(result) == [], result.tails
    assert KINDS - world.faults.keys() == set()
    assert [r.verdict.completed for r in results] == [1] * len(results)
    assert results[1].verdict.aborted >= 1  # two lost before M9: given up, and done again with the proof of section 6


def problems(result: Result) -> list[str]:
    verdict = result.verdict
    return [*verdict.wrong, *verdict.unmet, *result.failures, *["lost"] * verdict.lost]


def check_the_checks(world: World, plan: PlanFile) -> None:
    """Each check, on the disks of a real plan whose first round failed, with one thing made wrong."""
    report = world.report(plan.plan.name)
    assert report is not None
    *_, last = report["rounds"]
    kept = {
        name: [r for r in records(world.federation.site(name)) if r.header.plan == plan.digest]
        for name in world.shape.names
    }
    assert survivors_wrong([last]) == []
    assert survivors_wrong([last, last]) == [f"{m} is counted 2 times" for m in last["survivors"]]

    assert totals_wrong(world, plan, [last]) == []
    path = world.federation.site("site-1") / "work" / plan.plan.name / "stage-1" / PLAIN_VECTOR
    vector = np.load(path)
    np.save(path, vector + (np.arange(len(vector)) == 5))
    assert "is not the plain sum" in totals_wrong(world, plan, [last])[0]

    assert [line for name, found in kept.items() for line in records_wrong(name, found)] == []
    released = next(r for r in kept["site-2"] if isinstance(r, Released))
    assert list(records_wrong("x", [released, Aborted(released.header, "")])) == ["x: released and aborted round 1"]
    spent = [r for r in kept["site-1"] if isinstance(r, Spent)]
    assert len(spent) >= 2
    other = replace(spent[1], vector=bytes(32))
    assert list(records_wrong("x", [spent[0], other])) == ["x: two different vectors were spent in one stage"]

    assert list(openings_wrong(kept, world.shape.names)) == []  # in both rounds it is the same list
    fewer = {name: [without_last(r, last["round"]) for r in found] for name, found in kept.items()}
    assert any("can be opened in round 1 and" in line for line in openings_wrong(fewer, world.shape.names))

    assert list(commits_wrong(world, plan, report)) == []
    forgotten = {**report, "rounds": [{**row, "receipts": {}} for row in report["rounds"]]}
    assert "lost its receipt" in next(iter(commits_wrong(world, plan, forgotten)))
    receipts = Receipts()
    receipts.look(report)
    receipts.look(forgotten)
    assert len(receipts.wrong) == sum(len(row["receipts"]) for row in report["rounds"]) >= 6

    over = {**report, "state": "released"}
    assert list(unmet(world, plan, over, kept, excused=False)) == []
    world.lost.clear()  # as if nobody had died
    assert "aborted: expected at least 3 members" in next(iter(unmet(world, plan, over, kept, excused=False)))


def without_last(record: Record, number: int) -> Record:
    """The survivor list of one round, with a member fewer."""
    if isinstance(record, SignedSurvivors) and record.header.round == number:
        return replace(record, members=record.members[:-1], survivors=bytes(32))
    return record


# --- the fault points ------------------------------------------------------------------------------------------------


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """(``module.function`` or ``.method``, call) of every call that names one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            yield f"{owner}.{node.func.attr}", node


def test_no_write_goes_past_the_fault_points() -> None:
    """Only privacy/files.py makes things durable, so that every fsync, rename and truncation has its points."""
    raw = re.compile(r"os\.(fsync|fdatasync|rename|replace|truncate|ftruncate)$|\.(rename|truncate)$")
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno} {name}"
        for path in product_files()
        for name, call in calls(ast.parse(path.read_text()))
        if raw.search(name) and not name.startswith("files.") and path != ROOT / "privacy" / "files.py"
    ]
    assert found == []


def point_actions() -> set[str]:
    """The first argument of every fault point in the product; ``MESSAGE`` stands for what a name is made of."""
    found = set()
    for path in product_files():
        for name, call in calls(ast.parse(path.read_text())):
            if name == "faults.point":
                first = call.args[0]
                parts = first.values if isinstance(first, ast.JoinedStr) else [first]
                found.add("".join(str(p.value) if isinstance(p, ast.Constant) else "MESSAGE" for p in parts))
    return found


def test_the_page_lists_the_fault_points_of_the_code() -> None:
    page = (ROOT / "docs" / "durability.md").read_text()
    listed = Counter(re.findall(r"^\| `([a-z]+-[A-Za-z]+)(?::[A-Z]+)?` \|", page, re.MULTILINE))
    assert set(listed) == point_actions()
    assert max(listed.values()) == 1
