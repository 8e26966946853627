"""A site's status page: plans and consent, the curve of a training, what is left of each budget, and no secret."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from participant import charging, phases, prepare
from participant.client import Client
from participant.counts import Counts
from participant.live import NAMES, Live, seconds_of
from participant.site import Site
from participant.web import status_page
from participant.web.app import Accounts, make_page
from participant.web.curves import MOST_CURVES, MOST_POINTS, Curve, Curves
from participant.web.view import MOST_JOBS, MOST_PLANS, view_of
from privacy.errors import UserError
from privacy.identity import IDENTITY_FILE
from privacy.web.charts import line
from privacy.web.server import serving
from privacy.web.settings import Web
from privacy.wire.transport import chunk_bytes
from tests.charging import BUDGET, PRIVACY, World, spend
from tests.hostile import Hostile
from tests.on_disk import OnDisk
from tests.web.reading import ask, first_event, open_stream

PARTS = ["round", "plans", "training", "data", "approved"]


def looked(site: Site, curves: Curves | None = None) -> dict[str, dict[str, Any]]:
    """The parts of the page by key."""
    view = make_page(site, curves or Curves()).feed.look()
    return {part.key: dict(part.data) for part in view.parts}


def trained(curves: Curves, job: Any, losses: list[float], steps: int | None = None) -> None:
    """A training that reports these losses."""
    told: list[int] = []

    def begin(*_: Any) -> Callable[..., None]:
        return lambda step, _steps, _loss: told.append(step)

    report = curves.watching(begin)(job, 1)
    for step, loss in enumerate(losses, 1):
        report(step, steps or len(losses), loss)
    assert told == list(range(1, len(losses) + 1)), "who else watches is told everything"


# --- plans and consent -----------------------------------------------------------------------------------------------


def test_an_empty_site_says_what_it_would_take_part_in(world: World) -> None:
    found = looked(world.site)
    assert list(found) == PARTS
    assert found["plans"]["plans"] == []
    assert found["approved"]["plans"] == ["every plan that the policy below allows"]
    assert {"name": "members in a round, at least", "value": 3} in found["approved"]["demands"]
    assert {"name": "colluders to withstand, at least", "value": 0} in found["approved"]["demands"]
    assert {"name": "a sum of two is allowed", "value": "no"} in found["approved"]["demands"]
    assert not found["data"]["sets"][0]["registered"]


def test_plans_say_what_became_of_them_newest_first_and_are_bounded(world: World) -> None:
    site = world.site
    notes = {f"plan-{n}": {"state": "refused", "reason": "no consent", "since": n} for n in range(MOST_PLANS + 5)}
    (site.home.directory / "plans.json").write_text(json.dumps(notes))
    plans = looked(site)["plans"]["plans"]
    assert len(plans) == MOST_PLANS
    assert plans[0]["name"] == f"plan-{MOST_PLANS + 4}"
    assert plans[0]["reason"] == "no consent"


def facts(**changes: Any) -> dict[str, Any]:
    policy = {"plans": ["toy"], "min_cohort": 3, "min_survivors": 2, "max_colluders": 0, "allow_two_members": False}
    policy |= {"audit": "none", "min_class_count": None, "min_texts": None}
    found = {"member": "north", "federation": "f", "coordinator": "c:1", "rounds_joined": 1, "policy": policy}
    return found | {"plans": {}, "accounts": [], "curves": [], "round": None} | changes


def test_consent_is_told_for_each_plan() -> None:
    note = {"state": "refused", "reason": "", "since": 0}
    view = view_of(facts(plans={"toy": note, "other": note}))
    assert {p["name"]: p["approved"] for p in view.parts[1].data["plans"]} == {"toy": True, "other": False}
    assert view.about == "site of federation f at c:1, 1 round joined"


def test_what_is_spoken_is_what_goes_on() -> None:
    note = {"state": "released", "reason": "", "since": 0}
    assert view_of(facts()).said == "No plan has been seen yet."
    assert view_of(facts(plans={"toy": note})).said == "toy is released."
    assert view_of(facts(plans={"toy": note}, curves=[Curve("toy", 1, 1.0, 3, 9)])).said == "Training for toy."
    assert view_of(facts(plans={"toy": note}, curves=[Curve("toy", 1, 0.0, 9, 9)])).said == "toy is released."


def test_a_training_that_failed_does_not_go_on() -> None:
    note = {"state": "failed", "reason": "diverged", "since": 100}
    for began, said in ((99.0, "toy is failed."), (101.0, "Training for toy.")):
        view = view_of(facts(plans={"toy": note}, curves=[Curve("toy", 1, began, 3, 9)]))
        assert view.said == said
        assert view.parts[2].data["curves"][0]["over"] is (began < 100)


# --- the round -------------------------------------------------------------------------------------------------------


def live(**changes: Any) -> Live:
    return replace(Live("toy", 1, 1, 3, "uploading", 1000.0, 2000.0, (1 << 20, 4 << 20)), **changes)


def test_a_round_is_shown_with_its_phase_deadline_and_upload() -> None:
    view = view_of(facts(round=live()))
    found = view.parts[0].data["round"]
    assert (found["title"], found["phase"]) == ("toy: round 3", "uploading")
    assert [step["name"] for step in found["steps"] if step["now"]] == ["uploading"]
    assert [step["name"] for step in found["steps"] if step["done"]] == ["joining", "sharing", "masking"]
    assert found["until"] == {"iso": "1970-01-01T00:33:20Z", "text": "00:33:20 UTC"}
    assert found["upload"] == {"here": 1 << 20, "of": 4 << 20, "text": "1.0 MiB of 4.0 MiB"}
    assert view.said == "toy: round 3 is uploading."
    assert view_of(facts(round=live(stages=3, stage=2))).said == "toy: stage 2 of 3, round 3 is uploading."
    assert view_of(facts(round=live(upload=None))).parts[0].data["round"]["upload"] is None


def test_the_page_draws_the_round(world: World) -> None:
    site = world.site
    page = make_page(site, Curves())
    assert "in no round now" in page.render(page.feed.look())["round"]
    site.counts.live = live(plan="<b>toy")
    html = page.render(page.feed.look())["round"]
    assert "&lt;b&gt;toy: round 3: uploading" in html
    assert '<progress max="4194304" value="1048576" aria-label="Upload of this site">' in html
    assert "waits for this phase until <time datetime=" in html
    assert "style=" not in html, "the policy of the headers forbids it"
    site.counts.live = live(deadline=None)
    assert "was not heard here" in page.render(page.feed.look())["round"]


def test_the_phases_of_a_real_round_are_told_until_it_is_over(tmp_path: Path) -> None:
    world = OnDisk(tmp_path)
    counts = world.daemons[0].site.counts
    seen: list[str] = []
    world.ready()
    assert counts.live is None
    for _ in range(200):
        for member in range(world.n):
            world.tell(member)
            if counts.live is not None and (not seen or seen[-1] != counts.live.phase):
                seen.append(counts.live.phase)
                since, deadlines = counts.live.since, world.job.plan.deadlines
                assert counts.live.deadline == since + seconds_of(counts.live.phase, deadlines)
        world.work()
        if counts.live is None:
            break
    assert seen[:2] == ["joining", "sharing"]
    assert seen == [name for name in NAMES.values() if name in seen], "in order"
    assert {"uploading", "signing", "unmasking", "confirming"} <= set(seen)
    assert counts.live is None, "the round is over"


def test_masking_and_uploading_share_a_deadline(world: World) -> None:
    counts, job = Counts(), world.job()
    context: Any = None
    counts.in_round(job, 1, 2, phases.Masking(context, (), b"", {}, context))
    assert counts.live is not None
    counts.live = replace(counts.live, since=5.0)
    counts.in_round(job, 1, 2, phases.Uploading(context, (), b"", {}, context))
    assert (counts.live.phase, counts.live.since) == ("uploading", 5.0)
    assert counts.live.deadline == 5.0 + job.plan.deadlines.upload_s
    counts.in_round(job, 1, 2, phases.Voting(context, (), b"", {}, (), b""))
    assert counts.live.since > 5.0
    counts.in_round(job, 1, 2, phases.Stopped("x"))
    assert counts.live is None


def test_a_real_upload_counts_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = Hostile(tmp_path)
    try:
        site, upload = hostile.world.daemons[0].site, hostile.uploads[0]
        told: list[tuple[int, int]] = []
        tell = site.counts.uploaded

        def telling(here: int, of: int) -> None:
            told.append((here, of))
            tell(here, of)

        monkeypatch.setattr(site.counts, "uploaded", telling)
        client = Client(site.home.directory, hostile.address, site.roster, 0, site.counts)
        client.upload(upload.round_id, upload.message, upload.spool, 24)
        client.close()
        size = upload.spool.stat().st_size
        assert told == [(0, size), (chunk_bytes(24), size), (size, size)]
        assert site.counts.live is not None
        assert (site.counts.live.phase, site.counts.live.upload) == ("uploading", (size, size))
    finally:
        hostile.close()


# --- the curve -------------------------------------------------------------------------------------------------------


def test_a_training_is_drawn_as_it_goes_on(world: World) -> None:
    curves = Curves()
    trained(curves, world.job(), [2.0, 1.5, 1.0], steps=10)
    [curve] = looked(world.site, curves)["training"]["curves"]
    assert (curve["plan"], curve["step"], curve["steps"], curve["over"]) == ("toy", 3, 10, False)
    assert curve["chart"]["words"] == "from 2.0000 at step 1 to 1.0000 at step 3 of 10"


def test_a_private_training_has_steps_and_no_curve(world: World) -> None:
    curves = Curves()
    trained(curves, world.job("quiet", PRIVACY), [math.nan] * 4)
    [curve] = looked(world.site, curves)["training"]["curves"]
    assert (curve["step"], curve["over"], curve["chart"]) == (4, True, None)
    html = make_page(world.site, curves).render(make_page(world.site, curves).feed.look())["training"]
    assert "private training tells none" in html


def test_a_long_training_keeps_few_points_and_its_last(world: World) -> None:
    curves = Curves()
    trained(curves, world.job(), [1 / step for step in range(1, 10 * MOST_POINTS)])
    [curve] = curves.seen()
    assert MOST_POINTS / 2 <= len(curve.points) <= MOST_POINTS
    assert curve.points[-1][0] == 10 * MOST_POINTS - 1
    steps = [step for step, _ in curve.points]
    assert steps == sorted(set(steps))
    assert all(step % curve.every == 0 for step in steps[:-1])


def test_what_was_trained_before_is_no_training(world: World) -> None:
    curves = Curves()
    curves.watching(lambda *_: lambda *_: None)(world.job(), 1)
    assert curves.seen() == []


def test_a_note_in_the_second_of_the_last_step_ends_a_training() -> None:
    note = {"state": "ready", "reason": "", "since": round(1000.4)}
    assert view_of(facts(plans={"toy": note}, curves=[Curve("toy", 1, 1000.3, 3, 9)])).said == "toy is ready."


def test_only_the_newest_trainings_are_kept(world: World) -> None:
    curves = Curves(clock=lambda: 7.0)
    for _ in range(MOST_CURVES + 3):
        trained(curves, world.job(), [1.0])
    trained(curves, world.job("last"), [1.0])
    seen = curves.seen()
    assert len(seen) == MOST_CURVES
    assert (seen[0].plan, seen[0].began) == ("last", 7.0)


def test_the_daemon_writes_while_the_page_reads(world: World) -> None:
    curves, job = Curves(), world.job()

    def write() -> None:
        for _ in range(20):
            trained(curves, job, [1.0] * 500)

    writing = threading.Thread(target=write)
    writing.start()
    while writing.is_alive():
        for curve in curves.seen():
            assert len(curve.points) <= MOST_POINTS
    writing.join()


@pytest.mark.parametrize("points", [[], [(1, 0.5)], [(1, math.nan), (2, math.inf)]])
def test_nothing_is_drawn_of_less_than_two_numbers(points: list[tuple[int, float]]) -> None:
    assert line(points, 10) is None


@pytest.mark.parametrize("values", [(0.0, 0.0), (1e-9, 2e-9), (3e5, 1.0), (0.7, 0.1)])
def test_a_curve_lies_within_its_picture(values: tuple[float, float]) -> None:
    found = line([(1, values[0]), (20, values[1])], 10)
    assert found is not None
    for pair in found["points"].split():
        x, y = map(float, pair.split(","))
        assert found["left"] <= x <= found["right"]
        assert 0 < y <= found["bottom"]
    assert 2 <= len(found["ys"]) <= 7


# --- budgets ---------------------------------------------------------------------------------------------------------


def test_epsilon_left_follows_the_ledger(world: World) -> None:
    world.configure(BUDGET.format("8"))
    site = world.site
    accounts = Accounts(site)
    assert not accounts.of("toy")["registered"]
    before = None
    for count in (1, 2):
        prepare.prepare(world.site, world.job(f"quiet-{count}", PRIVACY), 1)
        found = accounts.of("toy")
        assert found == charging.account(world.site, "toy")
        assert found["left"] != before
        before = found["left"]
    [shown] = looked(site)["data"]["sets"]
    assert (shown["left"], shown["budget"]) == (before, "8")
    assert shown["meter"] == {"max": 8.0, "value": float(str(before))}
    assert [job["plan"] for job in shown["jobs"]] == ["quiet-2", "quiet-1"]


def test_an_account_is_computed_once_for_each_change(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    spend(world)
    accounts, count = Accounts(world.site), [0]
    whole = charging.account

    def counting(site: Site, name: str) -> dict[str, Any]:
        count[0] += 1
        return whole(site, name)

    monkeypatch.setattr(charging, "account", counting)
    for _ in range(3):
        accounts.of("toy")
    assert count == [1]
    spend(world, 2)
    accounts.of("toy")
    assert count == [2]


def test_a_ledger_that_was_altered_is_a_fault_on_the_page(world: World) -> None:
    spend(world)
    path = world.site.home.ledgers / "toy.jsonl"
    site = world.site
    path.write_bytes(path.read_bytes().replace(b'"RESERVE"', b'"REZERVE"', 1))
    [shown] = looked(site)["data"]["sets"]
    assert "line 2" in shown["fault"]


def test_jobs_are_bounded_and_an_infinite_charge_is_a_sign() -> None:
    jobs = [{"job": f"{n:08}", "plan": "p", "stage": 1, "state": "started"} for n in range(MOST_JOBS + 7)]
    account = {"dataset": "toy", "registered": True, "policy": "", "budget": None, "left": None, "records": 1}
    account |= {"spent": "inf", "reserved": "inf", "jobs": jobs}
    [shown] = view_of(facts(accounts=[account])).parts[3].data["sets"]
    assert (len(shown["jobs"]), shown["more"], shown["spent"], shown["meter"]) == (MOST_JOBS, 7, "∞", None)
    assert shown["jobs"][0]["id"] == f"{MOST_JOBS + 6:08}"


# --- over HTTP -------------------------------------------------------------------------------------------------------


def test_without_an_address_there_is_no_page_and_curves_all_the_same(world: World) -> None:
    with status_page(world.site) as curves:
        assert curves.seen() == []
    assert not [t for t in threading.enumerate() if t.name == "status-page"]


def test_a_site_has_no_certificate_for_servers(world: World) -> None:
    path = world.directory / "participant.toml"
    path.write_text(path.read_text() + '\n[web]\nlisten = "0.0.0.0:0"\npassword_file = "pw"\n')
    with pytest.raises(UserError, match="expected certificate_file and key_file"), status_page(world.site):
        pass


def test_reasons_of_others_are_text_and_no_secret_is_in_page_or_stream(world: World, tmp_path: Path) -> None:
    world.configure(BUDGET.format("8"))
    spend(world)
    site, curves = world.site, Curves()
    site.note("toy", "aborted", "the plan is aborted: <script>alert(1)</script>")
    trained(curves, world.job(), [2.0, 1.0])
    with serving(Web(listen="0"), make_page(site, curves), tmp_path) as port:
        page = ask(port, "/").body.decode()
        with open_stream(port) as stream:
            told = first_event(stream)
    assert told["order"] == PARTS
    streamed = "".join(told["parts"].values())
    vector = next(site.home.work.rglob("quantised.i32")).read_bytes()
    for html in (page, streamed):
        assert "<script>alert" not in html
        assert "&lt;script&gt;alert(1)" in html
        assert "text 1" not in html, "no record"
        assert vector[:24].hex() not in html
        for name in (IDENTITY_FILE, "tls.key"):
            lines = (site.home.directory / name).read_text().splitlines()
            assert not [piece for piece in lines if len(piece) > 16 and "-----" not in piece and piece in html]


def test_records_stay_out_of_what_is_shown(world: World) -> None:
    spend(world)
    data = looked(world.site)["data"]["sets"][0]
    assert data["records"] == 20
    assert set(data) == {
        *("name", "fault", "registered", "policy", "records", "spent", "reserved", "budget", "left", "meter"),
        *("jobs", "more"),
    }
