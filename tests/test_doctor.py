"""Both ``doctor`` commands: what each finds wrong, in one line with what to do; nothing where nothing is wrong."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import re
import shutil
import socket
import sqlite3
import tomllib
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

import coordinator.cli
import participant.cli
from coordinator import pki
from coordinator.doctor import examine as examine_coordinator
from coordinator.report import report
from coordinator.setup import Ports, create_coordinator
from demo.federation import Federation, free_port
from participant import charging, doctor
from participant.doctor import examine as examine_site
from participant.site import Site
from privacy import checks
from privacy.budget.rdp import rdp_epsilon
from privacy.checks import Check, clock, finish, needs, numbers, ok, versions
from tests.certificates import certificates_of, certify
from tests.charging import BUDGET, PRIVACY, World
from tests.connect_proxy import running_proxy
from tests.on_disk import OnDisk
from tests.test_end_to_end import NAMES, POLICY, SITE, toy_plan

NO_TORCH = 'print(\'{"torch": "0", "gpus": []}\')'


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Federation]:
    """A federation whose first site has its base model and data, with a torch that takes no time."""
    found = Federation(tmp_path, NAMES, POLICY, dict.fromkeys(NAMES, SITE))
    found.create()
    base = found.site("site-1") / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    (found.site("site-1") / "data.jsonl").write_text('{"text": "a secret record", "label": "a"}\n')
    monkeypatch.setattr(doctor, "TORCH", NO_TORCH)
    yield found
    found.stop_all()


def states(found: Sequence[Check]) -> dict[str, str]:
    """The worst state under each name."""
    order = ("ok", "warn", "fail")
    return {c.name: max((d.state for d in found if d.name == c.name), key=order.index) for c in found}


def wrong(found: Sequence[Check]) -> list[Check]:
    return [check for check in found if check.state != "ok"]


# --- nothing is wrong ------------------------------------------------------------------------------------------------


def test_where_nothing_is_wrong_nothing_is_found(federation: Federation) -> None:
    federation.start_coordinator()
    (federation.directory / "plan.toml").write_bytes(toy_plan())
    federation.operator("plan", "submit", str(federation.directory / "plan.toml"))
    assert wrong(examine_coordinator(federation.coordinator)) == []
    site = examine_site(federation.site("site-1"))
    assert wrong(site) == []
    assert "1 plans" in next(c.found for c in site if c.name == "coordinator")
    assert "a secret record" not in str(site)
    said = json.loads(federation.operator("doctor", "--json"))
    assert said["ok"]
    assert said["todo"] == []
    assert {"roster", "certificate", "clock", "database", "disk", "process", "versions"} <= {
        check["name"] for check in said["checks"]
    }


@pytest.mark.slow
def test_torch_is_asked_in_a_process_of_its_own(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    (found,) = [c for c in examine_site(federation.site("site-1")) if c.name == "training"]
    assert found.state == "ok"
    assert importlib.metadata.version("torch") in found.found


# --- the coordinator -------------------------------------------------------------------------------------------------


def expired(federation: Federation) -> None:
    with certificates_of(-1):
        pki.issue_server(federation.coordinator, ["localhost"])


def soon(federation: Federation) -> None:
    with certificates_of(10):
        pki.issue_server(federation.coordinator, ["localhost"])


def other_key(federation: Federation) -> None:
    (federation.coordinator / "tls.key").write_bytes((federation.site("site-1") / "tls.key").read_bytes())


def other_authority(federation: Federation) -> None:
    other = federation.directory / "other"
    other.mkdir()
    pki.create_authority(other, "other")
    (federation.coordinator / "ca.crt").write_bytes((other / "ca.crt").read_bytes())


def no_certificate(federation: Federation) -> None:
    (federation.coordinator / "tls.crt").unlink()


def other_identity(federation: Federation) -> None:
    key = federation.coordinator / "identity.key"
    key.write_bytes((federation.site("site-1") / "identity.key").read_bytes())


def from_the_future(federation: Federation) -> None:
    path = federation.coordinator / "state.db"
    sqlite3.connect(path).close()
    later = datetime.datetime.now().timestamp() + 86400
    os.utime(path, (later, later))


def no_database(federation: Federation) -> None:
    (federation.coordinator / "state.db").write_bytes(b"something else, long enough to be looked at" * 100)


def newer_database(federation: Federation) -> None:
    with sqlite3.connect(federation.coordinator / "state.db") as database:
        database.execute("pragma user_version=99")


def unknown_key(federation: Federation) -> None:
    (federation.coordinator / "coordinator.toml").write_text("lissten = 1")


COORDINATOR: dict[str, tuple[Callable[[Federation], None], str, str, str]] = {
    "its certificate expired": (expired, "certificate", "fail", "expired on"),
    "its certificate expires soon": (soon, "certificate", "warn", "valid until .* \\(9 days\\)"),
    "its key is another": (other_key, "certificate", "fail", "tls.key is not the key of tls.crt"),
    "its certificate is of another authority": (other_authority, "certificate", "fail", "not of the authority"),
    "it has no certificate": (no_certificate, "certificates", "fail", "expected the coordinator's TLS certificate"),
    "the roster names another": (other_identity, "roster", "fail", "expected this coordinator's key"),
    "the clock is behind": (from_the_future, "clock", "fail", "state.db is of"),
    "the database is none": (no_database, "database", "fail", "expected the coordinator's database"),
    "the database is newer": (newer_database, "database", "fail", "version 99, this veilsum knows"),
    "the configuration is wrong": (unknown_key, "configuration", "fail", "unknown key 'lissten'"),
}


@pytest.mark.parametrize("what", COORDINATOR)
def test_what_is_wrong_at_a_coordinator_has_its_line(federation: Federation, what: str) -> None:

    damage, name, state, text = COORDINATOR[what]
    damage(federation)
    found = [c for c in examine_coordinator(federation.coordinator) if (c.name, c.state) == (name, state)]
    assert any(re.search(text, c.found) for c in found), found
    assert all(c.todo for c in found)


def test_a_coordinator_that_does_not_run_says_whether_it_could(federation: Federation) -> None:
    assert states(examine_coordinator(federation.coordinator))["process"] == "warn"
    listen = (federation.coordinator / "coordinator.toml").read_text().split('"')[1]
    with socket.create_server(("127.0.0.1", int(listen.rpartition(":")[2]))):
        (found,) = [c for c in examine_coordinator(federation.coordinator) if c.name == "process"]
    assert found.state == "fail"
    assert "is taken: Address already in use" in found.found


def test_a_coordinator_that_waits_for_its_first_roster_has_nothing_wrong(tmp_path: Path) -> None:
    found = Federation(tmp_path, NAMES, {}, {})
    ports = Ports("127.0.0.1", free_port(), free_port())
    create_coordinator(found.coordinator, "toys", "localhost", ports)
    before = {check.name: check for check in examine_coordinator(found.coordinator)}
    assert (before["roster"].state, before["process"].state) == ("warn", "warn")
    found.start_coordinator()
    try:
        running = {check.name: check for check in examine_coordinator(found.coordinator)}
    finally:
        found.stop_all()
    assert [check.name for check in running.values() if check.state != "ok"] == ["roster"]
    assert running["roster"].found == "none yet"
    assert "veilsum-coordinator roster draft" in running["roster"].todo
    assert running["process"].found == "a coordinator runs here and waits for a roster"
    shut = found.coordinator / "coordinator.toml"
    shut.write_text(re.sub(r'join_listen = ".*"', 'join_listen = ""', shut.read_text()))
    assert states(examine_coordinator(found.coordinator))["roster"] == "fail"


def test_a_full_disk_is_found_with_what_the_open_plans_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = OnDisk(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 1000))
    for found in (examine_coordinator(world.federation.coordinator), examine_site(world.federation.site("site-1"))):
        (check,) = [c for c in found if c.name == "disk"]
        assert check.state == "fail"
        assert "0 MB free" in check.found


def test_a_release_without_its_adapter_is_found(tmp_path: Path) -> None:
    world = OnDisk(tmp_path)
    world.ready()
    world.run()
    assert states(examine_coordinator(world.federation.coordinator)).get("releases") is None
    shutil.rmtree(world.engine.home.releases / "toy")
    assert states(examine_coordinator(world.federation.coordinator))["releases"] == "fail"


def test_looking_changes_nothing(tmp_path: Path) -> None:
    world = OnDisk(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".db-shm"}
    examine_coordinator(world.federation.coordinator)
    after = {path: path.read_bytes() for path in before}
    assert after == before


def test_a_coordinator_that_does_not_serve_says_so(tmp_path: Path) -> None:
    assert json.loads(report(OnDisk(tmp_path).engine, "", "the disk is full"))["fault"] == "the disk is full"


# --- a site ----------------------------------------------------------------------------------------------------------


def site_expired(federation: Federation) -> None:
    certify(federation.site("site-1"), federation.coordinator, "site-1", days=-1)


def edited(name: str, old: str, new: str) -> Callable[[Federation], None]:
    def edit(federation: Federation) -> None:
        path = federation.site("site-1") / name
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, new))

    return edit


def no_model(federation: Federation) -> None:
    shutil.rmtree(federation.site("site-1") / "base")


def no_data(federation: Federation) -> None:
    (federation.site("site-1") / "data.jsonl").unlink()


def empty_data(federation: Federation) -> None:
    (federation.site("site-1") / "data.jsonl").write_text("")


def damaged_ledger(federation: Federation) -> None:
    directory = federation.site("site-1") / "ledger"
    directory.mkdir(mode=0o700)
    (directory / "toy.jsonl").write_text("{}\n")


def wants_cuda(federation: Federation) -> None:
    path = federation.site("site-1") / "participant.toml"
    path.write_text('device = "cuda"\n' + path.read_text())


def refused_plan(federation: Federation) -> None:
    Site.open(federation.site("site-1")).note("toy", "refused", "plan 'toy' has no consent here")


PLACES: dict[str, tuple[Callable[[Federation], None], str, str, str]] = {
    "its certificate expired": (site_expired, "certificate", "fail", "expired on"),
    "nobody answers": (lambda _: None, "coordinator", "fail", "connection refused"),
    "the roster was edited": (edited("roster.toml", "[policy]", "# \n[policy]"), "roster", "fail", "the pinned roster"),
    "the base model is gone": (no_model, "base models", "fail", "expected config.json and"),
    "the data set is gone": (no_data, "data set 'toy'", "fail", "expected a readable jsonl file"),
    "the data set is empty": (empty_data, "data set 'toy'", "fail", "no record"),
    "its columns are others": (
        edited("data.jsonl", '"text": "a secret record", "label"', '"lable"'),
        "data set 'toy'",
        "fail",
        "none of the columns",
    ),
    "the ledger is damaged": (damaged_ledger, "ledger of 'toy'", "fail", "line 1"),
    "there is no GPU": (wants_cuda, "training", "fail", 'no GPU, device = "cuda"'),
    "a plan was refused": (refused_plan, "plans", "warn", "'toy' is refused: plan 'toy' has no consent here"),
    "the configuration is wrong": (
        edited("participant.toml", "member =", "mamber ="),
        "configuration",
        "fail",
        "unknown key 'mamber'|missing key 'member'",
    ),
}


@pytest.mark.parametrize("what", PLACES)
def test_what_is_wrong_at_a_site_has_its_line(federation: Federation, what: str) -> None:

    damage, name, state, text = PLACES[what]
    damage(federation)
    every = examine_site(federation.site("site-1"))
    found = [c for c in every if (c.name, c.state) == (name, state)]
    assert any(re.search(text, c.found) for c in found), every
    assert all(c.todo for c in found)
    assert "a secret record" not in str(every)


def test_a_site_behind_a_proxy_says_which(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_proxy(status=403) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        url, found = proxy.url, {c.name: c for c in examine_site(federation.site("site-1"))}
    assert found["proxy"].state == "ok"
    assert f"go through {url} (https_proxy)" in found["proxy"].found
    assert "proxy refused: 403 Forbidden" in found["coordinator"].found
    monkeypatch.setenv("https_proxy", "https://localhost:1")
    found = {c.name: c for c in examine_site(federation.site("site-1"))}
    assert (found["proxy"].state, found["proxy"].found) == (
        "warn",
        "https_proxy is ignored: expected http://HOST:PORT, found scheme 'https'; connections are made directly",
    )


def test_a_torch_that_does_not_start_is_found(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    for script, text in (
        ("raise ImportError('no torch')", "ImportError: no torch"),
        ("import time; time.sleep(9)", "within 1 s"),
    ):
        monkeypatch.setattr(doctor, "TORCH", script)
        monkeypatch.setattr(doctor, "TORCH_S", 1 if "sleep" in script else 60)
        (found,) = [c for c in examine_site(federation.site("site-1")) if c.name == "training"]
        assert found.state == "fail"
        assert text in found.found


def test_a_spent_budget_is_a_warning(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charging, "bounded_pld_epsilon", rdp_epsilon)
    monkeypatch.setattr(doctor, "TORCH", NO_TORCH)
    world.configure(BUDGET.format(8))
    charging.reserve(world.site, world.job("quiet", PRIVACY), 1)
    assert states(examine_site(world.directory))["ledger of 'toy'"] == "ok"
    world.configure(BUDGET.format("0.1") + "order = 3\n")
    charging.change_policy(world.site, "toy", "")
    assert states(examine_site(world.directory))["ledger of 'toy'"] == "warn"


# --- what is common --------------------------------------------------------------------------------------------------


def test_a_failure_is_exit_code_1_and_a_warning_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    bad, poor = checks.fail("disk", "full", "free space"), checks.warn("plans", "held", "look")
    finish([ok("clock", "right"), poor], as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "ok    clock: right",
        "warn  plans: held",
        "what to do:",
        "  1. plans: look",
    ]
    with pytest.raises(SystemExit) as caught:
        finish([poor, bad], as_json=False)
    assert caught.value.code == 1
    assert capsys.readouterr().out.splitlines()[-2:] == ["  1. disk: free space", "  2. plans: look"]
    finish([ok("clock", "right")], as_json=False)
    assert capsys.readouterr().out.splitlines()[-1] == "nothing to do"
    with pytest.raises(SystemExit):
        finish([bad], as_json=True)
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize("side", ["coordinator", "participant"])
def test_the_commands_fail_where_there_is_nothing(side: str, tmp_path: Path) -> None:
    app = {"coordinator": coordinator.cli.app, "participant": participant.cli.app}[side]
    found = CliRunner().invoke(app, ["doctor", "--dir", str(tmp_path)])
    assert found.exit_code == 1
    assert f"fail  configuration: {tmp_path.resolve()}/{side}.toml: expected a readable file" in found.output
    assert "what to do:" in found.output


def test_versions_that_are_too_old_too_new_or_missing() -> None:
    here = importlib.metadata.version("numpy")
    assert [c.state for c in versions((), ["numpy>=1.0"])] == ["ok"]
    (old,) = versions((), ["numpy>=99", "numpy>=1.0,<2.0", "no-such-package>=1", "torch>=99; extra == 'participant'"])
    assert old.found.split("; ") == [
        f"numpy {here}, expected 99 or newer",
        f"numpy {here}, expected 1.0 or newer, below 2.0",
        "no-such-package is missing",
    ]
    assert needs("torch>=2.13; extra == 'participant'", ("participant",)) == ("torch", "2.13", "")
    assert needs("torch>=2.13; extra == 'participant'", ()) is None
    assert numbers("2.13.0+cpu") == (2, 13, 0)
    assert numbers("2.13.0") > (2, 9)


def test_every_requirement_of_this_distribution_is_understood() -> None:

    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(f"{p}; extra == 'x'" for p in project["optional-dependencies"]["participant"])]
    for line in lines:
        found = needs(line, ("x",))
        assert found is not None
        assert numbers(found[1]) > (0,), line


def test_a_clock_that_is_ahead_is_no_finding(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("")
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=300)
    assert clock([tmp_path / "old"], [], later).state == "ok"
    assert clock([tmp_path / "old"], [], later - datetime.timedelta(days=301)).state == "fail"
    assert clock([], [], later).state == "ok"
