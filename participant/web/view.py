"""From a site's notes, policy, accounts and curves to what its status page says; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from participant.live import NAMES, Live
from participant.web.curves import Curve
from privacy.web.charts import line
from privacy.web.view import Part, View, clock, counted, moment, size, text

Facts = Mapping[str, Any]

#: Plans, jobs of a data set, and data sets that are shown; the commands have them all.
MOST_PLANS, MOST_JOBS, MOST_DATASETS = 20, 10, 30
#: What a site demands, in words; the keys of ``[policy]``.
DEMANDS = {
    "min_cohort": "members in a round, at least",
    "min_survivors": "members in a sum, at least",
    "max_colluders": "colluders to withstand, at least",
    "allow_two_members": "a sum of two is allowed",
    "audit": "audit of the sum, at least",
    "min_class_count": "texts of a class, at least",
    "min_texts": "different texts, at least",
}


def view_of(facts: Facts) -> View:
    """The whole page."""
    plans = sorted(facts["plans"].items(), key=lambda item: item[1]["since"], reverse=True)
    parts = (
        Part("round", "round.html", {"round": _round(facts["round"]) if facts["round"] else None}),
        Part("plans", "plans.html", {"plans": [_plan(name, note, facts) for name, note in plans[:MOST_PLANS]]}),
        Part("training", "training.html", {"curves": [_curve(c, facts["plans"]) for c in facts["curves"]]}),
        Part("data", "data.html", {"sets": [_dataset(a) for a in facts["accounts"][:MOST_DATASETS]]}),
        Part("approved", "approved.html", _approved(facts["policy"])),
    )
    about = (
        f"site of federation {text(facts['federation'])} at {text(facts['coordinator'])}, "
        f"{counted(facts['rounds_joined'], 'round')} joined"
    )
    return View(text(facts["member"]), about, said(plans, facts["curves"], facts["round"]), parts)


def said(plans: Sequence[tuple[str, Facts]], curves: Sequence[Curve], live: Live | None = None) -> str:
    """What goes on, without counts: it is spoken whenever it changes."""
    if curves and _goes_on(curves[0], dict(plans)):
        return f"Training for {curves[0].plan}."
    if live is not None:
        return f"{text(live.plan)}: {_stage(live)}round {live.round} is {live.phase}."
    if not plans:
        return "No plan has been seen yet."
    name, note = plans[0]
    return f"{text(name)} is {note['state']}."


def _stage(live: Live) -> str:
    return f"stage {live.stage} of {live.stages}, " if live.stages > 1 else ""


def _round(live: Live) -> dict[str, Any]:
    """The round that this site is in: its phase, until when the coordinator waits, and how much is uploaded."""
    names = tuple(NAMES.values())
    place, upload = names.index(live.phase), None
    if live.upload is not None:
        here, of = live.upload
        upload = {"here": here, "of": max(of, 1), "text": size(of) if here >= of else f"{size(here)} of {size(of)}"}
    return {
        "title": f"{text(live.plan)}: {_stage(live)}round {live.round}",
        "phase": live.phase,
        "steps": [{"name": name, "done": i < place, "now": i == place} for i, name in enumerate(names)],
        "until": None if live.deadline is None else clock(live.deadline),
        "upload": upload,
    }


def _goes_on(curve: Curve, plans: Facts) -> bool:
    """Is there more to train? A note about the plan comes after its training, however that ended."""
    is_noted = curve.plan in plans and plans[curve.plan]["since"] >= round(curve.began)  # notes have whole seconds
    return not is_noted and curve.step < curve.steps


def _plan(name: str, note: Facts, facts: Facts) -> dict[str, Any]:
    consent = facts["policy"]["plans"]
    return {
        "name": text(name),
        "state": note["state"],
        "since": moment(note["since"]),
        "reason": text(note["reason"]),
        "todo": text(note.get("todo", "")),
        "approved": name in consent or "*" in consent,
    }


def _approved(policy: Facts) -> dict[str, Any]:
    plans = ["every plan that the policy below allows" if name == "*" else name for name in policy["plans"]]
    demands = [
        {"name": words, "value": _plain(policy[key])} for key, words in DEMANDS.items() if policy[key] is not None
    ]
    return {"plans": plans, "demands": demands}


def _plain(value: object) -> object:
    return ("no", "yes")[value] if isinstance(value, bool) else value


def _curve(curve: Curve, plans: Facts) -> dict[str, Any]:
    return {
        "plan": curve.plan,
        "stage": curve.stage,
        "began": moment(curve.began),
        "step": curve.step,
        "steps": curve.steps,
        "over": not _goes_on(curve, plans),
        "chart": line(curve.points, curve.steps),
    }


def _dataset(account: Facts) -> dict[str, Any]:
    """One data set with its budget; infinity is what a job without privacy costs."""
    if "fault" in account:
        return {"name": account["dataset"], "fault": text(account["fault"])}
    jobs = account["jobs"]
    budget, left = account["budget"], account["left"]
    return {
        "name": account["dataset"],
        "fault": "",
        "registered": account["registered"],
        "policy": account["policy"],
        "records": account["records"],
        "spent": _number(account["spent"]),
        "reserved": _number(account["reserved"]),
        "budget": budget,
        "left": left,
        "meter": None if budget is None else {"max": float(budget), "value": float(left)},
        "jobs": [
            {"id": j["job"][:8], "plan": text(j["plan"]), "stage": j["stage"], "state": j["state"]}
            for j in reversed(jobs[-MOST_JOBS:])
        ],
        "more": max(0, len(jobs) - MOST_JOBS),
    }


def _number(epsilon: str) -> str:
    return "∞" if epsilon == "inf" else epsilon
