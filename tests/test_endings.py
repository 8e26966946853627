"""Every way to end or to wait has its line: what happened, which sites it is about, and what to do next."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

import coordinator.cli
import participant.cli
from coordinator import phases, report
from coordinator.operator import Operator
from participant.client import OfferedPlan
from participant.web.view import _plan
from privacy import endings
from privacy.advice import ENDINGS, Kind
from privacy.endings import Reason, find, told, told_at_site
from privacy.errors import ProtocolError, Refusal, UserError
from tests.on_disk import OnDisk

ROOT = Path(__file__).resolve().parent.parent
#: The fallbacks: a reason of our own that ends here has no advice.
FALLBACKS = {"other-round", "other-held", "other-refusal"}
NAMES = ("north", "east", "south", "west", "centre")


def name(member: int) -> str:
    return NAMES[member] if member < len(NAMES) else f"member {member}"


# --- every reason of the code has its entry --------------------------------------------------------------------------

SAMPLES: dict[str, tuple[Kind, Callable[[], Reason]]] = {
    **{f"too_few {step}": ("round", partial(endings.too_few, step, 3, 1, (0, 2))) for step in get_args(endings.Step)},
    "wrong_shares": ("round", lambda: endings.wrong_shares(ValueError("the shares dealt by member 2 give no secret"))),
    "not_published": ("round", lambda: endings.not_published(ValueError("x"))),
    "plan_cancelled": ("round", lambda: endings.plan_cancelled("wrong labels")),
    "cancelled": ("plan", lambda: endings.cancelled("wrong labels")),
    "gave_up": ("plan", lambda: endings.gave_up(6, endings.too_few("to join", 3, 1, (1,)))),
    "roster_changed": ("plan", endings.roster_changed),
    "pause": ("held", lambda: endings.pause(6, "x")),
    "uncertified": ("held", lambda: endings.uncertified(1)),
    "stage_blocked": ("held", lambda: endings.stage_blocked(2, ValueError("x"))),
    "no_space": ("held", lambda: endings.no_space(10**9, 5, 10)),
    "no_adapter": ("held", lambda: endings.no_adapter("toy")),
    "unconfirmed": ("held", lambda: endings.unconfirmed((1,))),
    "site_failed": ("site", endings.site_failed),
    "works_on": ("site", lambda: endings.works_on("second")),
    "offer_refused": ("site", lambda: endings.offer_refused(3, Refusal("x"))),
    "total_wrong": ("site", lambda: endings.total_wrong(3, ValueError("x"))),
    "complained": ("site", lambda: endings.complained(3, "the shares of member 1 do not open")),
    "not_uploaded": ("site", lambda: endings.not_uploaded(3, Refusal("too late"))),
    "upload_lost": ("site", lambda: endings.upload_lost(3)),
    "round_aborted": ("site", lambda: endings.round_aborted(3, "x")),
}


def makers() -> set[str]:
    """The functions of privacy/endings.py that make a reason, but for what only reads a stored one."""
    functions = inspect.getmembers(endings, inspect.isfunction)
    return {n for n, f in functions if inspect.get_annotations(f).get("return") == "Reason"} - {"stored"}


def test_every_reason_that_the_code_can_make_has_advice_of_its_own() -> None:
    assert {sample.split()[0] for sample in SAMPLES} == makers()
    codes = [find(kind, make()).code for kind, make in SAMPLES.values()]
    assert not set(codes) & FALLBACKS
    assert len(set(codes)) == len(codes)


def test_reasons_are_made_in_one_place() -> None:
    """mypy sees that rounds and plans end with a Reason; that nobody else makes one is seen here."""
    for side in ("coordinator", "participant", "privacy"):
        for path in (ROOT / side).rglob("*.py"):
            made = re.findall(r"\bReason\(|\bcast\((?:endings\.)?Reason", path.read_text("utf-8"))
            assert not made or path.name == "endings.py", path
    for module, function in (("round", "abort"), ("engine", "abort"), ("store", "set_plan_state")):
        source = (ROOT / "coordinator" / f"{module}.py").read_text("utf-8")
        assert re.search(rf"def {function}\([^)]*reason: (?:endings\.)?Reason[,)]", source), (module, function)
    stored = [p for p in (ROOT / "coordinator").rglob("*.py") if "endings.stored(" in p.read_text("utf-8")]
    assert [p.name for p in stored] == ["running.py"], "only the replay of an event reads a stored one"


def text_of(node: ast.expr) -> str:
    """A text as the code makes it, with 7 in the place of what it fills in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join("7" if isinstance(part, ast.FormattedValue) else text_of(part) for part in node.values)
    return "7"


def refusals() -> Iterator[tuple[str, str]]:
    """(place, text) of all refusals that may become the state of a plan at a site."""
    #: What only commands, calls and rosters refuse.
    elsewhere = {"participant/client.py", "participant/rosters.py", "participant/daemon.py", "privacy/vectors.py"}
    for path in [*(ROOT / "participant").rglob("*.py"), ROOT / "privacy/roster.py"]:
        place = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else None
            if (
                isinstance(node, ast.Raise)
                and isinstance(call, ast.Call)
                and getattr(call.func, "id", "") in ("Refusal", "Waits")
            ):
                text = text_of(call.args[0])
                passed_on = re.fullmatch(
                    r"(plan )?'?7'? 7|plan '7': 7|7 7", text
                )  # the texts are those of objections()
                if place not in elsewhere and not passed_on and "is not a member of" not in text:
                    yield f"{place}:{node.lineno}", text


def objections() -> Iterator[tuple[str, str]]:
    """What the budget says against a plan."""
    tree = ast.parse((ROOT / "privacy/budget/filter.py").read_text("utf-8"))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name in ("objection", "mismatch"):
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and isinstance(node.value, ast.Constant | ast.JoinedStr):
                    text = text_of(node.value)
                    if text not in ("None", "has 7"):
                        yield f"filter.py:{node.lineno}", f"plan '7' has {text}"


EVERY = dict([*refusals(), *objections()])


@pytest.mark.parametrize("place", EVERY)
def test_every_refusal_of_a_site_has_advice_of_its_own(place: str) -> None:
    assert find("site", EVERY[place]).code not in FALLBACKS, EVERY[place]


def test_the_refusals_were_found() -> None:
    assert len(EVERY) >= 35
    assert any("would cost epsilon" in text for text in EVERY.values())


def test_every_entry_is_complete_and_the_last_of_its_kind_takes_the_rest() -> None:
    assert len({e.code for e in ENDINGS}) == len(ENDINGS)
    for kind in get_args(Kind):
        of_kind = [e for e in ENDINGS if e.kind == kind]
        assert [e.pattern for e in of_kind].index("") == len(of_kind) - 1
    for entry in ENDINGS:
        for text in (entry.means, entry.operator, entry.site):
            assert text
            assert set(re.findall(r"{(\w*)}", text)) <= {"members"}, text


def test_the_page_shows_the_table() -> None:
    page = (ROOT / "docs" / "endings.md").read_text("utf-8")
    assert all(f"`{entry.code}`" in page for entry in ENDINGS)


# --- names, and whose matter it is -----------------------------------------------------------------------------------


def test_sites_are_named() -> None:
    found = told("round", endings.too_few("to join", 3, 1, (0, 2)), name)
    assert found.reason == "expected at least 3 members to join, found 1; silent: north, south"
    assert found.concerns == ("north", "south")
    assert found.operator.startswith("start the daemon at north, south; a round opens by itself")
    shares = told("round", endings.wrong_shares(ValueError("the shares dealt by member 3 give none")), name, ("west",))
    assert shares.reason.endswith("the shares dealt by 'west' give none")
    assert shares.concerns == ("west",)
    nobody = told("round", endings.too_few("to join", 3, 1, ()), name)
    assert "at the sites that did not answer" in nobody.operator
    assert nobody.reason.endswith("silent: none")


def test_what_an_operator_wrote_stays_as_it_is() -> None:
    text = "member 2 asked for it; silent: 1"
    assert told("plan", endings.cancelled(text), name).reason == text
    assert told("round", endings.plan_cancelled(text), name).concerns == ()
    assert told_at_site("cancelled", text, name).reason == text


def test_a_number_that_is_nobody_stays_a_number() -> None:
    assert told("round", endings.too_few("to join", 3, 1, (9,)), name).concerns == ("member 9",)


@pytest.mark.parametrize(
    "text", ["{members}", "{0.__class__}", "}", "x" * 100_000, "silent: 1, ", "round 9 was aborted: "]
)
def test_a_hostile_reason_is_only_text(text: str) -> None:
    for state in ("cancelled", "aborted", "refused", "failed", "ready", "waiting", "released"):
        found = told_at_site(state, text, name)
        assert "class" not in found.operator + found.site
        assert "__class__" not in found.site
    told("round", text, name)


# --- at the two sides, from a real round -----------------------------------------------------------------------------


@pytest.fixture
def aborted(tmp_path: Path) -> OnDisk:
    """Five sites, of which two take the offer and three are gone."""
    world = OnDisk(tmp_path)
    world.ready()
    running = next(iter(world.engine.rounds.values()))
    assert isinstance(running.machine.phase, phases.Joining)
    for member in (0, 1):
        world.tell(member)
    late = running.deadline + 1
    world.engine.clock = lambda: late
    world.engine.tick()
    running = next(iter(world.engine.rounds.values()))
    assert type(running.machine.phase) is phases.Aborted
    return world


def names_of(world: OnDisk, *members: int) -> list[str]:
    return [world.names[m] for m in members]


def test_the_operator_sees_state_reason_sites_and_what_to_do(aborted: OnDisk) -> None:
    silent = names_of(aborted, 2, 3, 4)
    found = json.loads(report.report(aborted.engine, "toy"))
    row = found["rounds"][0]
    assert (row["state"], row["cause"], row["concerns"]) == ("aborted", "too-few-joined", silent)
    assert row["reason"].endswith(f"silent: {', '.join(silent)}")
    assert (
        row["todo"] == f"start the daemon at {', '.join(silent)}; a round opens by itself once enough sites are ready"
    )
    assert found["state"] == "open"
    assert found["cause"] == "too-few-joined"
    assert found["reason"] == f"round 1 was aborted: {row['reason']}"
    assert found["todo"] == row["todo"]


def test_the_commands_of_the_operator_print_it(aborted: OnDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    aborted.engine.declined[aborted.digest, 4] = "refused: plan 'toy' would cost epsilon 4.0 alone"
    monkeypatch.setattr(Operator, "report", lambda _, plan="": json.loads(report.report(aborted.engine, plan)))
    directory = str(aborted.federation.coordinator)
    for command in (["status"], ["show", "toy"]):
        shown = CliRunner().invoke(coordinator.cli.app, [*command, "--dir", directory]).output
        assert f"what to do: start the daemon at {', '.join(names_of(aborted, 2, 3, 4))}" in shown
        assert "what to do: cancel the plan and draft one with a lower epsilon" in shown


def test_a_plan_that_is_over_says_what_comes_next(aborted: OnDisk) -> None:
    aborted.engine.cancel_plan("toy", "wrong labels")
    found = json.loads(report.report(aborted.engine, "toy"))
    assert (found["state"], found["reason"], found["cause"]) == ("cancelled", "wrong labels", "cancelled")
    assert "as a plan of another name" in found["todo"]


def test_a_site_sees_it_by_name_too(aborted: OnDisk) -> None:
    daemon = aborted.daemons[0]
    aborted.tell(0)
    note = daemon.site.notes()["toy"]
    silent = names_of(aborted, 2, 3, 4)
    assert (note["state"], note["cause"], note["concerns"]) == ("ready", "too-few-joined", silent)
    assert note["reason"].startswith("round 1 was aborted: expected at least")
    assert f"silent: {', '.join(silent)}; 1 of 5 members are ready" in note["reason"]
    assert note["todo"].startswith("nothing, unless this site is named")
    shown = CliRunner().invoke(participant.cli.app, ["status", "--dir", str(daemon.site.home.directory)]).output
    assert f"what to do: {note['todo']}" in shown
    page = _plan("toy", note, {"policy": {"plans": ()}})
    assert page["todo"] == note["todo"]


def test_an_upload_that_is_not_taken_is_told_until_the_next_round(tmp_path: Path) -> None:
    world = OnDisk(tmp_path)
    world.ready()
    world.run(until=phases.Uploading)
    daemon = world.daemons[0]

    def too_late(*_: object) -> None:
        raise ProtocolError("M5 of member 0 in phase Signing: too late")

    daemon.client.upload = too_late  # type: ignore[assignment,method-assign]
    world.tell(0)
    note = daemon.site.notes()["toy"]
    assert (note["state"], note["cause"], note["concerns"]) == ("ready", "not-uploaded", [world.names[0]])
    assert note["reason"] == f"the upload of round 1 was not taken: M5 of '{world.names[0]}' in phase Signing: too late"
    assert "a faster line" in note["todo"]
    daemon._ready(world.job, 1)
    assert daemon.site.notes()["toy"]["reason"].startswith("the upload of round 1 was not taken: ")
    assert daemon.site.notes()["toy"]["cause"] == "not-uploaded"


def test_a_release_says_nothing_and_one_without_its_files_is_no_release(tmp_path: Path) -> None:
    world = OnDisk(tmp_path)
    world.ready()
    world.run()
    found = json.loads(report.report(world.engine, "toy"))
    assert (found["state"], found["reason"], found["todo"]) == ("released", "", "")
    shutil.rmtree(world.engine.home.releases / "toy" / "stage-1" / "adapter")
    found = json.loads(report.report(world.engine, "toy"))
    assert found["cause"] == "no-adapter"
    assert found["reason"] == "expected an adapter in releases/toy, found none"
    assert found["todo"].startswith("start the coordinator again")
    world.open()
    world.run()
    world.work()
    assert json.loads(report.report(world.engine, "toy"))["todo"] == "", "and so it is"


def test_what_failed_at_a_site_is_told_without_its_details(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = OnDisk(tmp_path)
    daemon = world.daemons[0]

    def prepare(*_: object) -> None:
        raise UserError("data.jsonl:7: expected a label of the plan, found 'a secret'")

    monkeypatch.setattr("participant.daemon.prepare", prepare)
    daemon._consider(OfferedPlan(world.plan, "open", "", 1))
    note = daemon.site.notes()["toy"]
    assert (note["state"], note["cause"]) == ("failed", "other-refusal")
    assert "a secret" in note["reason"]
    assert note["todo"].startswith("mend what the reason says")
    said = world.engine.declined[world.digest, 0]
    assert said == "waiting: this site cannot go on: its administrator sees why"


def test_a_plan_of_several_stages_that_is_cancelled_is_not_called_released() -> None:
    told_there = told_at_site("cancelled", "wrong labels; the release of stage 1 of 3 stays: there", name)
    assert told_there.cause == "cancelled"


def test_json_of_both_sides_has_the_same_keys(aborted: OnDisk) -> None:
    keys = {"state", "reason", "cause", "concerns", "todo"}
    found: dict[str, Any] = json.loads(report.report(aborted.engine, "toy"))
    assert keys <= set(found)
    assert keys <= set(found["rounds"][0])
    daemon = aborted.daemons[0]
    daemon.site.note("toy", "refused", "plan 'toy' would cost epsilon 4.0")
    shown = CliRunner().invoke(participant.cli.app, ["status", "--json", "--dir", str(daemon.site.home.directory)])
    (plan,) = json.loads(shown.output)["plans"]
    assert keys <= set(plan)
    assert plan["cause"] == "budget"


def test_a_log_line_of_what_went_well_has_no_empty_words() -> None:
    assert endings.told("plan", "").logged("site") == {}
    seen = endings.told("round", endings.too_few("to join", 3, 2, [1]), ["north", "south"].__getitem__)
    assert seen.logged("operator") == seen.facts("operator"), "nothing is left out of what went wrong"
    assert seen.logged("operator")["concerns"] == ["south"]
