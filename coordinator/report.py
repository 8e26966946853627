"""What the operator asks about plans and rounds, as one JSON document; ``status`` and ``show`` print it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from coordinator import phases
from coordinator.engine import Engine
from coordinator.publish import has_adapter
from coordinator.running import Running, names_in, phase_seconds
from coordinator.store import PlanRow
from privacy import endings
from privacy.errors import UserError


def report(engine: Engine, name: str, fault: str = "") -> str:
    """All plans in short (``name`` empty), or one with its rounds. Raises UserError for an unknown plan.

    Args:
        fault: why the coordinator does not serve now, if so; told with all plans.
    """
    with engine.lock:
        plans = engine.store.plans()
        if not name:
            return json.dumps({"fault": fault, "plans": [_short(engine, p) for p in plans]})
        for plan in plans:
            if plan.name == name:
                return json.dumps(facts(engine, plan))
    known = ", ".join(p.name for p in plans) or "none"
    raise UserError(f"expected the name of a plan, found '{name}'; known: {known}")


def facts(engine: Engine, plan: PlanRow, most: int | None = None) -> dict[str, Any]:
    """One plan with its rounds, the last ``most`` of them, and its stages. The caller holds the engine's lock."""
    rounds = [r for r in engine.rounds.values() if r.row.plan == plan.digest]
    stages = [_stage(engine, plan, number) for number in range(1, engine.stage(plan.digest) + 1)]
    released = [s["release"] for s in stages if s["release"]]
    return _short(engine, plan) | {
        "rounds": [_round(engine, r) for r in (rounds if most is None else rounds[-most:])],
        "history": stages,
        "release": released[-1] if released else None,
    }


def _short(engine: Engine, plan: PlanRow) -> dict[str, object]:
    name = engine.roster.roster.name
    stage, job = engine.stage(plan.digest), engine.jobs[plan.digest]
    done = engine.done(plan.digest, stage)
    declined = {name(m): why for (p, m), why in sorted(engine.declined.items()) if p == plan.digest}
    return {
        "plan": plan.name,
        "digest": plan.digest.hex(),
        "state": plan.state,
        **why(engine, plan, stage).facts("operator"),
        "stage": stage,
        "stages": job.plan.last,
        "ready": [name(m) for m in sorted(engine.store.ready(plan.digest, stage))],
        "released": [name(m) for m in sorted(done)],
        "declined": declined,
        "declined_todo": {
            member: endings.told("site", text.partition(": ")[2], concerns=[member]).operator
            for member, text in declined.items()
        },
        "members": len(engine.roster.roster.members),
    }


def why(engine: Engine, plan: PlanRow, stage: int) -> endings.Told:
    """Why a plan is over, why it does not go on, or how its last round failed; nothing while all is well."""
    name, rounds = engine.roster.roster.name, engine.stage_rounds(plan.digest, stage)
    if plan.state in ("cancelled", "aborted"):
        return endings.told("plan", plan.reason or "no reason given", name)
    if held := engine.held.get(plan.digest):
        return endings.told("held", held, name)
    if plan.state == "released" and not has_adapter(plan.name, engine.home.releases):
        return endings.told("held", endings.no_adapter(plan.name))
    last = rounds[-1] if rounds else None
    if last is None or not isinstance(last.machine.phase, phases.Aborted):
        return endings.Told() if last is None else last.told()
    found = last.told()
    return replace(found, reason=endings.round_aborted(last.row.number, found.reason))


def _round(engine: Engine, running: Running) -> dict[str, object]:
    row, phase, name = running.row, running.machine.phase, engine.roster.roster.name
    traffic, receipts = engine.store.traffic(row.id), engine.store.receipts(row.id)
    found: dict[str, object] = {
        "stage": row.stage,
        "round": row.number,
        "opened": row.opened,
        "id": row.id.hex(),
        "state": row.state,
        "phase": type(phase).__name__.lower(),
        **running.told().facts("operator"),
        "culprit": name(row.culprit) if row.culprit is not None else None,
        "invited": [name(m) for m in row.invited],
        "waiting_for": [name(m) for m in running.machine.missing()],
        "shards": list(running.shards),
        "members": [name(m) for m in running.machine.taking_part()],
        "since": running.deadline - phase_seconds(phase, running.job.plan.deadlines),
        "deadline": running.deadline,
        "seconds_left": max(0, round(running.deadline - engine.clock())),
        "coordinates": running.job.quantizer.total_size,
        "receipts": {name(m): {"root": r[0].hex(), "bytes": r[1]} for m, r in sorted(receipts.items())},
        "traffic": {
            name(m): {"sent": sent, "received": received, "upload": chunks}
            for m, (sent, received, chunks) in sorted(traffic.items())
        },
    }
    named = names_in(running, engine.store.round_directory(row.id))
    found["named"] = [{k: v for k, v in entry.items() if k != "evidence"} for entry in named]
    if isinstance(phase, phases.HasTotal):
        found["survivors"] = [name(m) for m in phase.closed.survivors]
        found["confirmed_by"] = [name(m) for m in sorted(phase.votes)]
        found["total"] = phase.outcome.total.hex()
    return found


def _stage(engine: Engine, plan: PlanRow, number: int) -> dict[str, object]:
    """One stage of a plan: since when, where it starts, who is in its release, and whether it is over."""
    row = engine.store.stages(plan.digest).get(number)
    return {
        "stage": number,
        "opened": plan.submitted if row is None else row.opened,
        "start": engine.start(plan.digest, number).hex(),
        "closed": number + 1 in engine.store.stages(plan.digest),
        "released": [engine.roster.roster.name(m) for m in sorted(engine.done(plan.digest, number))],
        "release": _release(engine, plan.name, number),
    }


def _release(engine: Engine, plan: str, stage: int) -> dict[str, object] | None:
    manifest = engine.home.releases / plan / f"stage-{stage}" / "manifest.json"
    if not manifest.exists():
        return None
    found: dict[str, object] = json.loads(manifest.read_bytes())
    return found
