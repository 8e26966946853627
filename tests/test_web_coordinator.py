"""The coordinator's status page: what it says of a plan at each step, its files, and that it says no secret."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coordinator import phases
from coordinator.config import load_home
from coordinator.web import status_page
from coordinator.web.app import MOST_PLANS, MOST_ROUNDS, gather, make_page
from coordinator.web.view import PHASES, SILENT_S, member_of, plan_of, view_of
from participant.enrol import TLS_KEY
from privacy.errors import UserError
from privacy.files import DiskError
from privacy.identity import IDENTITY_FILE
from privacy.web.server import serving
from privacy.web.settings import Web
from tests.on_disk import OnDisk
from tests.test_end_to_end import toy_plan
from tests.web.reading import Answer, ask, first_event, open_stream

NAMES = [f"site-{i}" for i in range(5)]


@pytest.fixture
def world(tmp_path: Path) -> OnDisk:
    return OnDisk(tmp_path)


@contextmanager
def served(world: OnDisk) -> Iterator[int]:
    page = make_page(world.engine, world.uploads)
    page.feed.every_s = 0.0
    with serving(Web(listen="0"), page, world.directory) as port:
        yield port


def seen(world: OnDisk) -> dict[str, Any]:
    """The section of the only plan."""
    [facts] = gather(world.engine, world.uploads)
    return plan_of(facts, NAMES, world.engine.clock())


def states(world: OnDisk) -> list[str]:
    return [member["state"] for member in seen(world)["members"]]


# --- from the engine -----------------------------------------------------------------------------------------------


def test_the_words_for_phases_are_those_of_the_machine() -> None:
    over = {"released", "aborted"}
    assert [kind.__name__.lower() for kind in phases.ACCEPTS if kind.__name__.lower() not in over] == list(PHASES)


def test_a_round_from_its_offer_to_its_release(world: OnDisk) -> None:
    assert states(world) == ["not ready"] * 5
    world.ready(0, 1)
    assert states(world) == ["ready", "ready", "not ready", "not ready", "not ready"]
    world.ready(2, 3, 4)
    assert states(world) == ["invited"] * 5
    world.tell(0)
    assert states(world)[:2] == ["joined", "invited"]
    found = seen(world)["running"]
    assert (found["phase"], found["answered"], found["of"]) == ("joining", 1, 5)
    assert found["until"]["text"].endswith("UTC")
    world.run(phases.Uploading)
    assert states(world) == ["waiting"] * 5
    world.tell(1)
    member = seen(world)["members"][1]
    assert (member["state"], member["upload"]["here"], member["upload"]["of"]) == ("uploaded", 93, 93)
    world.run()
    found = seen(world)
    assert (found["state"], found["running"], found["released"]) == ("released", None, 5)
    assert states(world) == ["in the release"] * 5
    [release] = found["releases"]
    assert (release["sites"], release["certified"]) == (5, True)
    assert [row["state"] for row in found["rounds"]] == ["released"]


def test_who_says_nothing_is_silent_since_the_phase_began(world: OnDisk) -> None:
    world.away = {3}
    world.ready()
    world.run(phases.Uploading)
    facts = gather(world.engine, world.uploads)[0]
    [row] = facts["rounds"]
    early = plan_of(facts, NAMES, row["since"] + SILENT_S - 1)["members"]
    late = plan_of(facts, NAMES, row["since"] + SILENT_S)["members"]
    assert [m["state"] for m in early] == ["waiting"] * 3 + ["left out", "waiting"]
    assert [m["state"] for m in late] == ["silent"] * 3 + ["left out", "silent"]
    assert late[0]["since"] is not None
    assert row["deadline"] - row["since"] == pytest.approx(world.job.plan.deadlines.upload_s)


def test_an_upload_on_its_way_shows_how_much_is_here_and_when_the_last_came() -> None:
    plan: dict[str, Any] = {"released": [], "ready_since": {}, "rounds": []}
    row = {
        "phase": "uploading",
        "invited": NAMES,
        "members": NAMES,
        "waiting_for": NAMES,
        "since": 100.0,
        "receipts": {},
        "traffic": {NAMES[0]: {"sent": 2048, "received": 1, "upload": 0}},
        "uploads": {NAMES[0]: {"here": 1 << 20, "of": 4 << 20, "last": 140.0}},
    }
    found = member_of(plan, row, NAMES[0], 145.0)
    assert (found["state"], found["since"], found["sent"]) == ("uploading", None, "2.0 KiB")
    assert found["upload"] == {"here": 1 << 20, "of": 4 << 20, "text": "1.0 MiB of 4.0 MiB"}
    found = member_of(plan, row, NAMES[0], 140.0 + SILENT_S)
    assert (found["state"], found["since"]["text"]) == ("silent", "00:02:20 UTC")
    assert member_of(plan, row, NAMES[1], 105.0)["state"] == "waiting"


def test_uploads_say_how_far_they_are(world: OnDisk) -> None:
    world.ready()
    world.run(phases.Uploading)
    round_id = world.rounds[-1].row.id
    message: list[Any] = []
    client: Any = world.daemons[0].client
    client.upload = lambda _id, signed, _spool, _bits: message.append(signed)
    world.tell(0)
    world.uploads.begin(round_id, message[0])
    assert {m: p[:2] for m, p in world.uploads.progress(round_id).items()} == {0: (0, 93)}
    assert world.uploads.progress(bytes(32)) == {}
    assert seen(world)["members"][0]["state"] == "uploading"


def test_a_round_that_failed_says_why_and_later_sites_are_seen(world: OnDisk) -> None:
    world.away = {0, 1, 2}
    world.ready()
    world.run()
    found = seen(world)
    assert found["running"] is None
    assert "Round 1 failed: " in found["faults"][0]
    assert found["rounds"][0]["state"] == "aborted"
    view = view_of("demo", NAMES, gather(world.engine, world.uploads), 0.0)
    assert view.said == "No round is running. toy is open."


def test_faults_are_bounded_kind_by_kind_and_no_proven_cheat_is_left_out() -> None:
    row = {"stage": 1, "round": 1, "named": [], "reason": "x" * 900, "state": "aborted", "todo": "talk to site-3"}
    cheat = {"named": [{"member": "site-3", "kind": "BadShare"}]}
    rows = [row | {"round": n, "culprit": "site-3"} | (cheat if n == 0 else {}) for n in range(20)]
    plan: dict[str, Any] = {"stages": 1, "stage": 1, "rounds": rows, "declined": {}, "declined_todo": {}}
    from coordinator.web.view import MOST_FAULTS, faults_of

    found = faults_of(plan)
    assert found[0] == "Round 0: proven cheat of site-3 (BadShare)"
    assert found[1].startswith("Round 19 failed: x")
    assert found[1].endswith("… (because of site-3). What to do: talk to site-3")
    assert len(found[1]) < 600
    assert found[-1] == "12 more of the rounds that failed: veilsum-coordinator show"
    assert len(found) == 1 + MOST_FAULTS + 1
    names = [f"site-{n}" for n in range(9)]
    refused = {"declined": dict.fromkeys(names, "refused: no budget"), "declined_todo": dict.fromkeys(names, "draft")}
    both = faults_of(plan | refused)
    assert both[1] == "site-0 refused: no budget. What to do: draft"
    assert both[9] == "1 more of the sites that take no part: veilsum-coordinator show"
    assert both[10:] == found[1:]


def test_stages_and_the_evaluation_are_steps_and_the_chart_shows_the_elected_candidate() -> None:
    from coordinator.web.view import releases_of, stages_of

    counted = {"records": 50, "correct": 40, "accuracy": 0.8, "loss": 0.5}
    judged = {
        "elected": "server_lr 2",
        "candidates": [counted | {"candidate": "base", "accuracy": 0.2}, counted | {"candidate": "server_lr 2"}],
    }
    cohort = {"round": 1, "survivors": NAMES, "certified": False}
    release = {"cohorts": [cohort], "adapter_digest": "ab" * 32, "evaluation": judged}
    before = {"cohorts": [cohort], "adapter_digest": "cd" * 32}
    history = [
        {"stage": 1, "closed": True, "released": NAMES[:4], "release": None},
        {"stage": 2, "closed": True, "released": NAMES, "release": before},
        {"stage": 3, "closed": False, "released": NAMES[:3], "release": release},
    ]
    plan = {"plan": "toy", "state": "released", "stage": 3, "stages": 3, "history": history, "members": 5}
    plan["evaluates"] = True
    assert [(s["name"], s["done"], s["now"]) for s in stages_of(plan)] == [
        ("stage 1", True, False),
        ("stage 2", True, False),
        ("evaluation", False, True),
    ]
    last, before = releases_of(plan)
    assert (last["title"], before["title"]) == ("Release of the evaluation", "Release of stage 2")
    assert before["chart"] is None
    assert last["chart"]["words"] == "base 0.200, server_lr 2 0.800 (elected)"
    assert [c["elected"] for c in last["candidates"]] == [False, True]
    assert last["manifest"] == "/releases/toy/3/manifest.json"
    assert not last["certified"]


def test_a_full_disk_is_said_and_the_page_is_served_all_the_same(
    world: OnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.ready()

    def full() -> None:
        raise DiskError("state.db: expected to write, found: disk full")

    monkeypatch.setattr(world.engine.store, "flush_traffic", full)
    with served(world) as port:
        answer = ask(port, "/")
    assert answer.status == 200
    assert b"expected to write, found: disk full" in answer.body


def test_lists_are_bounded(world: OnDisk) -> None:
    for number in range(MOST_PLANS + 3):
        world.engine.submit_plan(toy_plan().replace(b'name = "toy"', f'name = "plan-{number}"'.encode(), 1))
    found = gather(world.engine, world.uploads)
    assert len(found) == MOST_PLANS
    assert found[0]["plan"] == f"plan-{MOST_PLANS + 2}"
    running = world.engine.rounds
    world.ready()
    [row] = running.values()
    running.update({bytes([n]) * 32: row for n in range(MOST_ROUNDS + 5)})
    from coordinator.report import facts

    [plan] = [p for p in world.engine.store.plans() if p.digest == world.digest]
    assert len(facts(world.engine, plan, MOST_ROUNDS)["rounds"]) == MOST_ROUNDS
    assert len(facts(world.engine, plan)["rounds"]) == MOST_ROUNDS + 6


def test_the_lock_is_free_between_two_plans_and_is_needed(world: OnDisk) -> None:
    done = threading.Event()

    def look() -> None:
        gather(world.engine, world.uploads)
        done.set()

    looking = threading.Thread(target=look)
    with world.engine.lock:
        looking.start()
        assert not done.wait(0.3), "facts are read under the engine's lock"
    looking.join(10)
    assert done.is_set()
    assert world.engine.lock.acquire(blocking=False)
    world.engine.lock.release()


# --- over HTTP -------------------------------------------------------------------------------------------------------


def test_without_an_address_there_is_no_page(world: OnDisk) -> None:
    with status_page(load_home(world.federation.coordinator), world.engine, world.uploads) as port:
        assert port == 0


def test_a_page_that_others_could_reach_without_a_login_stops_the_start(world: OnDisk) -> None:
    path = world.federation.coordinator / "coordinator.toml"
    path.write_text(path.read_text() + '[web]\nlisten = "0.0.0.0:8080"\n')
    with pytest.raises(UserError, match="expected a password_file"):
        load_home(world.federation.coordinator)


def test_the_coordinators_certificate_serves_a_page_for_the_network(world: OnDisk) -> None:
    home = world.federation.coordinator
    (home / "pw").write_text("a long enough password\n")
    (home / "pw").chmod(0o600)
    path = home / "coordinator.toml"
    path.write_text(path.read_text() + '[web]\nlisten = "0.0.0.0:0"\npassword_file = "pw"\n')
    with status_page(load_home(home), world.engine, world.uploads) as port:
        assert port > 0


def test_a_script_in_a_reason_is_text(world: OnDisk) -> None:
    world.engine.cancel_plan("toy", "<script>alert(1)</script>\x1b[31m")
    with served(world) as port:
        body = ask(port, "/").body
        with open_stream(port) as stream:
            part = first_event(stream)["parts"]["plan-toy"]
    for html in (body.decode(), part):
        assert "<script>alert" not in html
        assert "&lt;script&gt;alert(1)" in html
        assert "\x1b" not in html


def test_manifest_and_transcript_are_the_published_files(world: OnDisk) -> None:
    world.ready()
    world.run()
    stage = world.engine.home.releases / "toy" / "stage-1"
    with served(world) as port:
        body = ask(port, "/").body.decode()
        for path, file in (
            ("/releases/toy/1/manifest.json", stage / "manifest.json"),
            ("/releases/toy/1/rounds/1/evidence.bin", stage / "rounds" / "1" / "evidence.bin"),
        ):
            assert f'href="{path}"' in body
            assert ask(port, path).body == file.read_bytes()
        assert ask(port, "/releases/toy/1/manifest.json").headers["Content-Type"] == "application/json"
        found = ask(port, "/releases/toy/1/rounds/1/evidence.bin").headers
        assert found["Content-Disposition"] == 'attachment; filename="evidence.bin"'
        assert found["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/releases/other/1/manifest.json",
        "/releases/toy/2/manifest.json",
        "/releases/toy/-1/manifest.json",
        "/releases/toy/1/rounds/2/evidence.bin",
        "/releases/toy/1/rounds/1/total.bin",
        "/releases/../coordinator/1/manifest.json",
        "/releases/%2e%2e/1/manifest.json",
        "/releases/toy%2f..%2f..%2ftoy/1/manifest.json",
        "/releases/./1/manifest.json",
        "/releases/toy/1/adapter",
        "/tls.key",
    ],
)
def test_no_other_file_is_served(world: OnDisk, path: str) -> None:
    world.ready()
    world.run()
    elsewhere = world.engine.home.releases.parent / "stage-1"
    elsewhere.mkdir()
    (elsewhere / "manifest.json").write_text("{}")
    with served(world) as port:
        assert ask(port, path).status == 404


def forms(secret: bytes) -> set[bytes]:
    """How bytes might be written in a page."""
    return {secret, secret.hex().encode(), base64.b64encode(secret).rstrip(b"="), repr(secret)[2:-1].encode()}


def test_no_key_and_no_vector_in_any_page_of_a_whole_round(world: OnDisk) -> None:
    pages: list[Answer] = []
    streamed: list[str] = []
    with served(world) as port:

        def look() -> None:
            pages.append(ask(port, "/"))
            with open_stream(port) as stream:
                streamed.append(json.dumps(first_event(stream)))

        look()
        world.ready()
        for kind in (phases.Sharing, phases.Uploading, phases.Signing, phases.Unmasking, phases.Confirming):
            look()
            world.run((kind, phases.Released))
        look()
        world.run()
        look()
    assert all(page.status == 200 for page in pages)
    shown = b"".join(page.body for page in pages) + "".join(streamed).encode()
    homes = [world.federation.coordinator, *(world.federation.site(name) for name in world.names)]
    secrets = {home / IDENTITY_FILE for home in homes} | {home / TLS_KEY for home in homes}
    kept = [path.read_bytes() for path in secrets]
    kept += [world.vector_of(i).astype("<i4").tobytes()[:24] for i in range(world.n)]
    kept += [path.read_bytes()[:24] for path in world.directory.rglob("*.bin") if "rounds" in path.parts]
    assert len(kept) > 15
    for secret in kept:
        lines = [line for line in secret.split(b"\n") if len(line) >= 16 and not line.startswith(b"-----")]
        for piece in {secret, *lines}:
            assert not any(form in shown for form in forms(piece)), "a secret is shown"
    assert any(form in shown for form in forms(world.digest)), "the search finds what it looks for"
