"""From the facts that ``show`` prints to what the status page says; pure. The facts hold names, counts and hashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from privacy.web.charts import bars
from privacy.web.view import Part, View, clock, counted, moment, size, text

Facts = Mapping[str, Any]

#: Seconds without an answer after which a member is called silent.
SILENT_S = 10.0
#: Releases and reasons of a plan that are shown, the newest.
MOST_RELEASES, MOST_FAULTS = 4, 8
#: The phases of a round in order, in words.
PHASES = (
    "joining",
    "sharing",
    "uploading",
    "folding",
    "signing",
    "unmasking",
    "publishing",
    "confirming",
    "projecting",
)
#: Phases that wait for members, and so have a deadline.
WAITING = frozenset(PHASES) - {"folding", "publishing"}


def view_of(federation: str, names: Sequence[str], plans: Sequence[Facts], now: float) -> View:
    """The whole page.

    Args:
        names: of the members, as in the roster.
        plans: facts of ``coordinator/web/app.py``, the newest plan first.
        now: same clock as the times in the facts.
    """
    parts = [Part(f"plan-{plan['plan']}", "plan.html", plan_of(plan, names, now)) for plan in plans]
    if not parts:
        parts = [Part("none", "none.html", {})]
    about = f"coordinator of {counted(len(names), 'site')}, {counted(len(plans), 'plan')}"
    return View(f"Federation {text(federation)}", about, said(plans), tuple(parts))


def said(plans: Sequence[Facts]) -> str:
    """What goes on, without counts: it is spoken whenever it changes."""
    running = [(plan, row) for plan in plans if (row := running_round(plan)) is not None]
    if running:
        return " ".join(
            f"{plan['plan']}: {_stage(plan, row['stage'])}round {row['round']} is {row['phase']}."
            for plan, row in running[:3]
        )
    if not plans:
        return "No plan has been offered yet."
    return f"No round is running. {plans[0]['plan']} is {plans[0]['state']}."


def running_round(plan: Facts) -> Facts | None:
    """The round of a plan that waits for its total, or has one and collects confirmations."""
    live = [row for row in plan.get("rounds", ()) if row["phase"] in PHASES]
    return live[-1] if live else None


def _stage(plan: Facts, stage: int) -> str:
    return f"stage {stage} of {plan['stages']}, " if plan["stages"] > 1 else ""


def plan_of(plan: Facts, names: Sequence[str], now: float) -> dict[str, Any]:
    """The section of one plan."""
    head = {"name": plan["plan"], "state": plan["state"]}
    head |= {"reason": text(plan["reason"]), "todo": text(plan["todo"])}
    if "rounds" not in plan:  # the disk took nothing
        return head | {"unread": True}
    row = running_round(plan)
    traffic = [counts for one in plan["rounds"] for counts in one["traffic"].values()]
    return head | {
        "unread": False,
        "digest": plan["digest"],
        "stages": stages_of(plan),
        "running": None if row is None else round_of(plan, row),
        "members": [member_of(plan, row, name, now) for name in names],
        "ready": len(plan["ready"]),
        "released": len(plan["released"]),
        "of": plan["members"],
        "received": size(sum(counts["sent"] for counts in traffic)),
        "sent": size(sum(counts["received"] for counts in traffic)),
        "shown": counted(len(plan["rounds"]), "round"),
        "rounds": [_line(one, plan) for one in reversed(plan["rounds"])],
        "releases": releases_of(plan),
        "faults": faults_of(plan),
    }


def stages_of(plan: Facts) -> list[dict[str, Any]]:
    """The stages of a plan as steps; none where there is one only."""
    if plan["stages"] == 1:
        return []
    done = {one["stage"] for one in plan["history"] if one["closed"] or len(one["released"]) == plan["members"]}
    ended = plan["state"] in ("cancelled", "aborted")
    return [
        {
            "name": "evaluation" if plan["evaluates"] and number == plan["stages"] else f"stage {number}",
            "done": number in done,
            "now": number == plan["stage"] and number not in done and not ended,
        }
        for number in range(1, plan["stages"] + 1)
    ]


def round_of(plan: Facts, row: Facts) -> dict[str, Any]:
    """The round that runs, with the deadline of its phase."""
    place = PHASES.index(row["phase"])
    waits = row["phase"] in WAITING and bool(row["waiting_for"])
    return {
        "title": f"{_stage(plan, row['stage'])}round {row['round']}".capitalize(),
        "phase": row["phase"],
        "steps": [{"name": name, "done": i < place, "now": i == place} for i, name in enumerate(PHASES)],
        "until": clock(row["deadline"]) if waits else None,
        "answered": len(row["members"]) - len(row["waiting_for"]),
        "of": len(row["members"]),
        "waits": waits,
        "shards": tuple(row["shards"]) if row["phase"] == "publishing" and row["shards"][1] else None,
    }


def member_of(plan: Facts, row: Facts | None, name: str, now: float) -> dict[str, Any]:
    """One member's line: what it does, what of its upload is here, and since when nothing came."""
    last = row if row is not None else (plan["rounds"][-1] if plan["rounds"] else None)
    counts = last["traffic"].get(name) if last is not None else None
    found: dict[str, Any] = {"name": name, "since": None, "upload": None}
    found |= {key: size(counts[key]) if counts else "" for key in ("sent", "received")}
    if row is None or name not in row["invited"]:
        return found | _outside(plan, name)
    upload = row["uploads"].get(name)
    if name in row["receipts"]:
        found["upload"] = _progress(row["receipts"][name]["bytes"], row["receipts"][name]["bytes"])
    elif upload is not None:
        found["upload"] = _progress(upload["here"], upload["of"])
    if name not in row["members"]:
        return found | {"state": "left out"}
    if name not in row["waiting_for"]:
        return found | {"state": _answered(row["phase"])}
    heard = max(row["since"], upload["last"]) if upload is not None else row["since"]
    if now - heard >= SILENT_S:
        return found | {"state": "silent", "since": clock(heard)}
    if row["phase"] == "uploading":
        return found | {"state": "uploading" if upload is not None else "waiting"}
    return found | {"state": "invited" if row["phase"] == "joining" else "waiting"}


def _outside(plan: Facts, name: str) -> dict[str, Any]:
    """A member that is in no running round."""
    if name in plan["released"]:
        return {"state": "in the release"}
    if name in plan["ready_since"]:
        return {"state": "ready", "ready": clock(plan["ready_since"][name])}
    return {"state": "not ready"}


def _answered(phase: str) -> str:
    return {"joining": "joined", "uploading": "uploaded"}.get(phase, "answered")


def _progress(here: int, of: int) -> dict[str, Any]:
    return {"here": here, "of": max(of, 1), "text": size(of) if here >= of else f"{size(here)} of {size(of)}"}


def _line(row: Facts, plan: Facts) -> dict[str, Any]:
    """One round in the table of cohorts."""
    return {
        "stage": row["stage"] if plan["stages"] > 1 else None,
        "round": row["round"],
        "opened": moment(row["opened"]),
        "state": row["state"],
        "phase": row["phase"],
        "invited": counted(len(row["invited"]), "site"),
        "uploads": len(row["receipts"]),
        "bytes": size(sum(counts["sent"] for counts in row["traffic"].values())),
    }


def releases_of(plan: Facts) -> list[dict[str, Any]]:
    """The last releases, newest first, with the way to their files."""
    found = [one for one in plan["history"] if one["release"]]
    return [_release(plan, one["stage"], one["release"]) for one in reversed(found[-MOST_RELEASES:])]


def _release(plan: Facts, stage: int, release: Facts) -> dict[str, Any]:
    where = f"/releases/{plan['plan']}/{stage}"
    judged: Facts = release.get("evaluation") or {"candidates": [], "elected": None}
    candidates = judged["candidates"]
    loss = release.get("training_loss")
    several = plan["stages"] > 1
    return {
        "stage": stage,
        "title": "Release" + (" of the evaluation" if candidates else f" of stage {stage}" if several else ""),
        "sites": sum(len(cohort["survivors"]) for cohort in release["cohorts"]),
        "certified": all(cohort["certified"] for cohort in release["cohorts"]),
        "digest": release["adapter_digest"],
        "loss": None if loss is None else f"{loss:.4f}",
        "chart": bars([(text(c["candidate"]), c["accuracy"], c["candidate"] == judged["elected"]) for c in candidates]),
        "candidates": [
            {
                "name": text(c["candidate"]),
                "right": f"{c['correct']} of {c['records']}",
                "accuracy": f"{c['accuracy']:.4f}",
                "loss": f"{c['loss']:.4f}",
                "elected": c["candidate"] == judged["elected"],
            }
            for c in candidates
        ],
        "manifest": f"{where}/manifest.json",
        "transcripts": [
            {"round": cohort["round"], "path": f"{where}/rounds/{cohort['round']}/evidence.bin"}
            for cohort in release["cohorts"]
        ],
    }


def faults_of(plan: Facts) -> list[str]:
    """Whom evidence names; sites that take no part and why; rounds that failed and why, the newest first.

    Of the last two kinds the first few, so that neither hides the other; proven cheats are never left out.
    """
    refused = [
        f"{member} {text(why)}. What to do: {text(plan['declined_todo'][member])}"
        for member, why in plan["declined"].items()
    ]
    cheats, failed = [], []
    for row in reversed(plan["rounds"]):
        where = f"{_stage(plan, row['stage'])}round {row['round']}".capitalize()
        cheats += [f"{where}: proven cheat of {one['member']} ({one['kind']})" for one in row["named"]]
        if row["reason"]:
            whose = f" (because of {row['culprit']})" if row["culprit"] else ""
            ended = "failed" if row["state"] == "aborted" else row["state"]
            todo = f". What to do: {text(row['todo'])}" if row["todo"] else ""
            failed.append(f"{where} {ended}: {text(row['reason'])}{whose}{todo}")
    return [*cheats, *_first(refused, "sites that take no part"), *_first(failed, "rounds that failed")]


def _first(lines: list[str], what: str) -> list[str]:
    """A few lines, and how many there are besides."""
    more = len(lines) - MOST_FAULTS
    return lines if more <= 0 else [*lines[:MOST_FAULTS], f"{more} more of the {what}: veilsum-coordinator show"]
