"""What the coordinator's status page reads of the engine, and the published files that it links to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from coordinator import report
from coordinator.engine import Engine
from coordinator.publish import MANIFEST
from coordinator.store import PlanRow
from coordinator.uploads import Uploads
from coordinator.web.view import view_of
from privacy.evidence import EVIDENCE_FILE
from privacy.files import DiskError
from privacy.web.page import Page

#: The newest plans, and of each its last rounds; ``veilsum-coordinator show`` has them all.
MOST_PLANS, MOST_ROUNDS = 20, 12


def gather(engine: Engine, uploads: Uploads) -> list[dict[str, Any]]:
    """The facts of the newest plans, newest first; the engine's lock is held for one plan at a time."""
    found = []
    for plan in reversed(engine.store.plans()[-MOST_PLANS:]):
        try:
            found.append(_facts(engine, uploads, plan))
        except DiskError as error:  # counts of traffic wait for the disk
            found.append({"plan": plan.name, "state": plan.state, "reason": str(error), "todo": error.hint})
    return found


def _facts(engine: Engine, uploads: Uploads, plan: PlanRow) -> dict[str, Any]:
    name, now = engine.roster.roster.name, engine.clock()
    with engine.lock:
        found = report.facts(engine, plan, MOST_ROUNDS)
        since = engine.store.ready(plan.digest, found["stage"])
    found["evaluates"] = engine.jobs[plan.digest].plan.evaluation is not None
    found["ready_since"] = {name(m): at for m, at in since.items()}
    for row in found["rounds"]:
        under_way = uploads.progress(bytes.fromhex(row["id"]))
        row["uploads"] = {name(m): {"here": p[0], "of": p[1], "last": now - p[2]} for m, p in under_way.items()}
    return found


def make_page(engine: Engine, uploads: Uploads) -> Page:
    """The status page of a coordinator."""
    roster = engine.roster.roster
    names = [member.name for member in roster.members]

    def published(request: Request) -> Response:  # in a thread: it asks the database
        """A published file of a stage; the path is built of numbers and of the name of a known plan only."""
        given = request.path_params
        known = {plan.name for plan in engine.store.plans()}
        if given["plan"] not in known:
            return PlainTextResponse("not found\n", 404)
        stage = engine.home.releases / given["plan"] / f"stage-{given['stage']}"
        found = stage / "rounds" / str(given["round"]) / EVIDENCE_FILE if "round" in given else stage / MANIFEST
        return _file(found)

    routes = [
        Route("/releases/{plan}/{stage:int}/" + MANIFEST, published),
        Route("/releases/{plan}/{stage:int}/rounds/{round:int}/" + EVIDENCE_FILE, published),
    ]
    return Page(
        "coordinator.web",
        lambda: view_of(roster.federation, names, gather(engine, uploads), engine.clock()),
        routes,
    )


def _file(path: Path) -> Response:
    if not path.is_file():
        return PlainTextResponse("not found\n", 404)
    if path.suffix == ".json":
        return FileResponse(path, media_type="application/json")
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)
