"""A federation made by the documented commands alone, and what becomes of it when its members change."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo.federation import BIN, Federation, free_port
from privacy.adapter import load_peft
from tests.test_end_to_end import put_trained, toy_plan, wait_for

NAMES = ["site-1", "site-2", "site-3", "site-4"]
PLAN = toy_plan().replace(b"min_cohort = 4", b"min_cohort = 3").replace(b"join_s = 2", b"join_s = 30")
OTHER = PLAN.replace(b'name = "toy"', b'name = "toy-2"')
DATA = '[datasets.toy]\npath = "data.jsonl"\nformat = "jsonl"\n[policy]\n'


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    found = Federation(tmp_path, NAMES, {}, {})
    ports = ["--port", str(free_port()), "--join-port", str(free_port()), "--bind", "127.0.0.1"]
    command = [str(BIN / "veilsum-coordinator"), "init", str(found.coordinator), "--federation", "toys", *ports]
    subprocess.run(command, check=True, capture_output=True)
    found.start_coordinator()
    yield found
    found.stop_all()


def join(federation: Federation, name: str) -> dict[str, Any]:
    invitation = json.loads(federation.operator("invite", name, "--json"))
    joined = federation.participant(name, "join", invitation["url"], invitation["token"], "--json")
    path = federation.site(name) / "participant.toml"
    path.write_text(path.read_text().replace("[models]\n", '[models]\ntiny = "base"\n').replace("[policy]\n", DATA))
    found: dict[str, Any] = json.loads(joined)
    return found


def publish(federation: Federation) -> str:
    """Draft and publish a roster; its words."""
    federation.operator("roster", "draft")
    found = json.loads(federation.operator("roster", "publish", "--json"))
    assert found["running"]
    federation.operator("status")
    return str(found["words"])


def show(federation: Federation, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(federation.participant(name, "roster", "show", "--json"))
    return found


def submit(federation: Federation, raw: bytes) -> None:
    path = federation.directory / "plan.toml"
    path.write_bytes(raw)
    wait_for(lambda: "plans" in federation.operator("status", "--json", check=False))
    federation.operator("plan", "submit", str(path))


def consent(federation: Federation, plan: str, names: Sequence[str]) -> None:
    """Each site looks at the plan and approves it; the operator sees who is still waited for."""
    wait_for(lambda: set(federation.show(plan)["declined"]) == set(names))
    for name in names:
        assert "has no consent here" in federation.show(plan)["declined"][name]
        listed = {p["plan"]: p for p in json.loads(federation.participant(name, "plans", "--json"))}
        assert listed[plan]["state"] == "waiting"
        federation.participant(name, "approve", plan, "--digest", listed[plan]["digest"])


@pytest.mark.slow
def test_from_nothing_to_a_release_and_on_without_a_member_that_was_removed(federation: Federation) -> None:
    joined = {name: join(federation, name) for name in NAMES}
    listed = json.loads(federation.operator("members", "--json"))["members"]
    assert {m["member"]: m["words"] for m in listed} == {n: joined[n]["identity_words"] for n in NAMES}
    words = publish(federation)
    wait_for(lambda: federation.participant(NAMES[0], "roster", "show", check=False) != "")
    for name in NAMES:
        shown = show(federation, name)
        assert shown["words"] == words
        assert {m["member"]: m["words"] for m in shown["members"]} == {n: joined[n]["identity_words"] for n in NAMES}
        federation.participant(name, "roster", "approve")
        put_trained(federation, name, PLAN)
    submit(federation, PLAN)
    for name in NAMES:
        federation.start_site(name)
    consent(federation, "toy", NAMES)
    wait_for(lambda: federation.show("toy")["state"] == "released")
    for name in NAMES:
        own = federation.site(name) / "releases" / "toy" / "stage-1" / "adapter"
        wait_for((own / "adapter_model.safetensors").exists)
        released = load_peft(federation.coordinator / "releases" / "toy" / "stage-1" / "adapter")
        assert all(np.array_equal(load_peft(own)[k], released[k]) for k in released)

    federation.participant("site-2", "renew")
    federation.operator("remove", "site-2")
    publish(federation)
    wait_for(lambda: "waiting for the approval" in federation.log_tail("site-1"))
    for name in ("site-1", "site-3", "site-4"):
        assert show(federation, name)["changes"] == ["'site-2' is no longer a member"]
        federation.participant(name, "roster", "approve")
    wait_for(lambda: federation.processes["site-2"].poll() == 3)
    assert "refused" in federation.log_tail("site-2")
    for name in ("site-1", "site-3", "site-4"):
        put_trained(federation, name, OTHER)
    submit(federation, OTHER)
    consent(federation, "toy-2", ["site-1", "site-3", "site-4"])
    wait_for(lambda: federation.show("toy-2")["state"] == "released")
    assert len(federation.show("toy-2")["release"]["cohorts"][0]["survivors"]) == 3
