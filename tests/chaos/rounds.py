"""One plan under its schedule: offered, disturbed, watched to its end, checked; and one batch of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privacy.plan import PlanFile
from tests.chaos.checks import Receipts, Report, Verdict, check_plan
from tests.chaos.echo import Echo
from tests.chaos.schedule import Batch, Schedule
from tests.chaos.toy import Shape, toy_plan
from tests.chaos.world import COORDINATOR, World

POLL_S = 0.25
#: With everybody back and no fault left, a plan that is open for longer hangs.
PATIENCE_S = 150.0
#: Sites get so long to bring the release home before the next plan.
SETTLE_S = 4.0
#: After a longer outage a member's next try may come later than a phase waits (``participant/patience.py``): a round
#: that failed so is excused, and counted as that. On an idle machine the coordinator is back in two seconds.
OUTAGE_S = 7.0


@dataclass
class Result:
    """What one plan came to."""

    plan: str
    schedule: str
    seconds: float
    verdict: Verdict
    faults: dict[str, int]
    failures: list[str] = field(default_factory=list)
    tails: dict[str, str] = field(default_factory=dict)
    #: (role, point) of the kills at points.
    struck: list[tuple[str, str]] = field(default_factory=list)
    #: Points that the coordinator passed, and that a site passed, with how often (the site that did so most often).
    passed: tuple[dict[str, int], dict[str, int]] = field(default_factory=lambda: ({}, {}))


def begin(world: World, schedule: Schedule) -> None:
    """Ask for everything the schedule says; it strikes from now on."""
    if schedule.coordinator:
        world.arm(COORDINATOR, schedule.coordinator)
    for name, fault in schedule.victims:
        if schedule.away:
            world.hold(name)
        world.arm(name, fault)
    for name, disturbance in schedule.network:
        world.later(disturbance.at_s, world.proxies.disturb, name, disturbance)
    for name, at_s, for_s in schedule.stalls:
        world.later(at_s, world.stall, name, for_s)
    for name, at_s in schedule.kills:
        world.later(at_s, world.kill, name, f"kill of {world.role(name)} at a random time")
    for name in (world.shape.names if schedule.all_at_s else dict(schedule.victims)) if schedule.torn else ():
        world.tear(name)
    if schedule.all_at_s:
        for name in world.names:
            world.later(schedule.all_at_s, world.kill, name, "restart of everything at once")
    if schedule.full_at_s and world.small_disk:
        world.later(schedule.full_at_s, world.fill_disk, 3.0)
    elif schedule.full_at_s:
        world.count("skipped: no small file system may be mounted here")


def watch(world: World, plan: PlanFile, receipts: Receipts) -> Report:
    """Follow a plan until it is released or given up and its last round is over; the last report.

    Victims that stay away come back when a round ended without them.
    """
    deadline = time.monotonic() + PATIENCE_S
    report: Report = {"rounds": [], "state": "unknown", "reason": "the coordinator never answered"}
    while time.monotonic() < deadline:
        found = world.report(plan.plan.name)
        if found is not None:
            report = found
            receipts.look(report)
            if any(row["state"] in ("aborted", "released") for row in report["rounds"]):
                world.let_return()
            if is_over(report, world.shape):
                break
        time.sleep(POLL_S)
    world.let_return()
    return report


def is_over(report: Report, shape: Shape) -> bool:
    """The plan has an outcome, no round of it waits for anything, and too few members are left for another cohort."""
    over = all(row["phase"] in ("released", "aborted") for row in report["rounds"])
    if report["state"] == "released":
        return over and shape.sites - len(report["released"]) < shape.smallest
    return over and report["state"] in ("aborted", "cancelled")


def settle(world: World, plan: PlanFile, report: Report) -> None:
    """Let the survivors bring the release home; whoever still waits for a further cohort of it is started again."""
    survivors = {m for row in report["rounds"] for m in row.get("survivors", [])}
    deadline = time.monotonic() + SETTLE_S
    while survivors and time.monotonic() < deadline:
        if all(note(world, name, plan) == "released" for name in survivors) and not world.armed():
            break
        time.sleep(POLL_S)
    for name in world.names:
        world.disarm(name)
    world.proxies.calm()
    world.wait_for_coordinator()
    world.cancel(plan)
    for name in world.shape.names:
        if note(world, name, plan) != "released":
            world.kill(name, "kill of a member that waits")


def note(world: World, name: str, plan: PlanFile) -> str:
    """What a site notes about a plan."""
    path = world.federation.site(name) / "plans.json"
    notes: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    return str(notes.get(plan.plan.name, {}).get("state", ""))


def run_plan(world: World, plan: PlanFile, schedule: Schedule, seed: int) -> Result:
    """One plan from offer to verdict."""
    started, before = time.monotonic(), Counter(world.faults)
    receipts = Receipts(repeated={schedule.echo} if schedule.echo else set())
    world.begin(plan)
    echo = Echo(world, schedule.echo, plan.plan, seed) if schedule.echo else None
    begin(world, schedule)
    world.submit(plan)
    if echo is not None:
        echo.start()
    report = watch(world, plan, receipts)
    if echo is not None:
        echo.stop()
    settle(world, plan, report)
    final = world.report(plan.plan.name) or report
    slow = world.outage_s > OUTAGE_S
    excused = bool(schedule.full_at_s) or "@full" in schedule.coordinator or slow
    verdict = check_plan(
        world, plan, {**final, "state": report["state"], "reason": report["reason"]}, receipts, excused
    )
    verdict.slow = int(slow and verdict.aborted > 0)
    result = Result(
        plan.plan.name,
        repr(schedule),
        round(time.monotonic() - started, 1),
        verdict,
        dict(Counter(world.faults) - before),
        list(world.failures),
        struck=list(world.struck),
        passed=(dict(Counter(world.trace(COORDINATOR))), most_passed(world)),
    )
    if verdict.wrong or verdict.lost or verdict.unmet or result.failures:
        result.tails = {name: world.tail(name, 60) for name in world.names}
    return result


def most_passed(world: World) -> dict[str, int]:
    """Point -> how often a site passed it at most."""
    passed: Counter[str] = Counter()
    for name in world.shape.names:
        passed |= Counter(world.trace(name))
    return dict(passed)


def leave_with_the_driver(world: World) -> None:
    """If this is a worker and its driver dies, no process of the federation stays behind."""
    driver = multiprocessing.parent_process()

    def watch_driver() -> None:
        if driver is not None:
            driver.join()
            world.close()
            os._exit(1)

    threading.Thread(target=watch_driver, daemon=True).start()


def run_batch(batch: Batch, seed: int, done: Callable[[Result], None]) -> None:
    """A fresh federation goes through all plans of a batch; ``done`` hears of each."""
    plans = [
        toy_plan(f"toy-{batch.number}-{i}", batch.shape, schedule.size, schedule.bits)
        for i, schedule in enumerate(batch.plans, 1)
    ]
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        world = World(Path(directory), batch.shape, plans, seed, batch.disk_mb, keep_uploads=batch.number % 2 == 1)
        leave_with_the_driver(world)
        try:
            world.start()
            for number, (plan, schedule) in enumerate(zip(plans, batch.plans, strict=True)):
                done(run_plan(world, plan, schedule, seed + number))
        finally:
            world.close()
