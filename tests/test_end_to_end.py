"""Real processes over mutual TLS on loopback: one coordinator, five sites, and the members that may be lost."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from demo.compare import secure_equals_plain
from demo.federation import BIN, Federation
from participant.prepare import PLAIN_VECTOR
from participant.store import Trained
from privacy.adapter import load_peft, start_adapter, start_digest
from privacy.budget.checkpoint import split_notes, verify_checkpoint
from privacy.budget.ledger import check_against, head_of, verify_lines
from privacy.encoding import decode
from privacy.identity import load_identity
from privacy.job import Job
from privacy.plan import parse_plan
from privacy.roster import load_roster
from privacy.secagg.keys import identity_public
from privacy.secagg.messages import Advertise, Header
from privacy.secagg.signed import Signed, has_valid_signature
from privacy.sections import Adapter

NAMES = [f"site-{i}" for i in range(1, 6)]
POLICY = {"max_colluders": 1, "min_cohort": 4, "min_survivors": 3}

SITE = """keep_plain_vector = true
[models]
tiny = "base"
[datasets.toy]
path = "data.jsonl"
format = "jsonl"
[policy]
plans = ["toy"]
min_cohort = 3
"""

PLAN = """name = "toy"
task = "classification"
[base]
name = "tiny"
digest = "{zero}"
[adapter]
rank = 2
alpha = 4.0
seed = "{zero}"
digest = "{digest}"
modules = {{ "encoder.query" = [6, 8] }}
head = {{ "classifier.weight" = [2, 8] }}
[data]
dataset = "toy"
labels = ["a", "b"]
[training]
epochs = 1
learning_rate = 0.001
batch_size = 4
[round]
max_cohort = 5
min_cohort = 4
min_survivors = 3
max_colluders = 1
bits = 24
clip = 0.5
max_weight = 1000
[deadlines]
join_s = 2
share_s = 2
upload_s = 2
sign_s = 2
unmask_s = 2
outcome_s = 2
"""


def toy_plan() -> bytes:
    """A plan with a correct start digest; no base model is needed, since nothing is trained."""
    zero = "0" * 64
    adapter = Adapter(
        rank=2,
        alpha=4.0,
        seed=zero,
        digest=zero,
        modules={"encoder.query": (6, 8)},
        head={"classifier.weight": (2, 8)},
    )
    return PLAN.format(zero=zero, digest=start_digest(start_adapter(adapter)).hex()).encode()


#: On a busy machine a site takes seconds to start again; nobody waits where all are there.
PATIENT = toy_plan().replace(b"join_s = 2", b"join_s = 30")


def put_trained(federation: Federation, name: str, raw: bytes) -> None:
    """Leave at a site what training would: these tests are about the round."""
    job = Job.of(parse_plan(raw), load_roster(federation.coordinator / "roster.toml"))
    index = NAMES.index(name)
    delta = np.linspace(-0.4, 0.4, job.quantizer.size, dtype=np.float32) * np.float32((index + 1) / 5)
    vector = job.quantizer.quantize(delta, 100 + index, {"weight": 100 + index, "loss": 1000})
    from participant.config import load_home
    from participant.store import Store

    store = Store(load_home(federation.site(name)))
    store.keep_trained(
        job.plan.name, 1, vector, Trained(job.plan_file.digest.hex(), 100 + index, 0.1, 1.0, 100 + index)
    )
    np.save(store.directory(job.plan.name, 1) / PLAIN_VECTOR, vector)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    sites = dict.fromkeys(NAMES, SITE)
    found = Federation(tmp_path, NAMES, POLICY, sites, coordinator_toml="keep_uploads = true\n")
    found.create()
    for name in NAMES:
        put_trained(found, name, PATIENT)
    (tmp_path / "plan.toml").write_bytes(PATIENT)
    yield found
    found.stop_all()


def wait_for(what: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        asked = time.monotonic()
        if what():
            return
        assert time.monotonic() < deadline, "waited too long"
        # To ask is often a process of its own, and those that are waited for need the machine in between.
        time.sleep(min(1.0, max(0.1, time.monotonic() - asked)))


def state(federation: Federation) -> str:
    return str(federation.show("toy")["state"])


def is_exact(federation: Federation) -> bool:
    return secure_equals_plain(federation, parse_plan(PATIENT))


def test_five_sites_release_one_adapter_that_every_site_verified(federation: Federation) -> None:
    federation.start_coordinator()
    for name in NAMES:
        federation.start_site(name, "--once")
    federation.operator("plan", "submit", str(federation.directory / "plan.toml"))
    for name in NAMES:
        assert federation.processes[name].wait(60) == 0, federation.log_tail(name)
    assert is_exact(federation)
    found = federation.show("toy")
    assert len(found["rounds"]) == 1
    assert set(found["rounds"][0]["receipts"]) == set(NAMES)
    released = load_peft(federation.coordinator / "releases" / "toy" / "stage-1" / "adapter")
    for name in NAMES:
        own = load_peft(federation.site(name) / "releases" / "toy" / "stage-1" / "adapter")
        assert all(np.array_equal(own[k], released[k]) for k in released)
        status = json.loads(federation.participant(name, "status", "--json"))
        assert status["plans"][0]["state"] == "released"
    wait_for(lambda: federation.show("toy")["release"]["cohorts"][0]["projection"] == "holds")
    cohort = federation.show("toy")["release"]["cohorts"][0]
    assert cohort["confirmed_by"] == NAMES
    assert cohort["certified"]
    check_comparison_bites(federation)
    check_audit(federation)
    check_witnesses(federation)


def check_witnesses(federation: Federation) -> None:
    """The coordinator's notes verify by the roster and fit each site's ledger; the peers saw the same heads in M2."""
    for name in NAMES:
        site = federation.site(name)
        key = identity_public(load_identity(site))
        entries = verify_lines((site / "ledger" / "toy.jsonl").read_bytes(), key)
        assert [e.kind for e in entries] == ["REGISTER", "RESERVE", "START", "RELEASE", "COMMIT"]
        anchor = federation.operator("witnesses", "--member", name).encode()
        noted = [verify_checkpoint(note, key, entries[0].dataset) for note in split_notes(anchor)]
        check_against(entries, noted[0].size, noted[0].root)
        assert [n.size for n in noted] == [5], "the last message of a site comes after its COMMIT"
        lines = [json.loads(line) for line in federation.participant(name, "witnesses").splitlines()]
        assert [line["member"] for line in lines] == NAMES
        seen = next(line for line in lines if line["member"] == name)
        assert (seen["size"], seen["root"]) == (3, head_of(entries, 3)[1].hex())
        signed = decode(Signed[Advertise], bytes.fromhex(seen["advertise"]))
        assert has_valid_signature(signed, key, decode(Header, bytes.fromhex(seen["header"])).hash())


def check_comparison_bites(federation: Federation) -> None:
    """One coordinate of one plain vector changed by one: the comparison must say so."""
    path = federation.site("site-3") / "work" / "toy" / "stage-1" / PLAIN_VECTOR
    vector = np.load(path)
    vector[7] += 1
    np.save(path, vector)
    assert not is_exact(federation)


def check_audit(federation: Federation) -> None:
    """The auditor needs the published files and the pin of any site, and notices one changed byte of a total."""
    stage = federation.coordinator / "releases" / "toy" / "stage-1"
    pin = (federation.site("site-1") / "roster.pin").read_text().strip()
    command = [str(BIN / "veilsum-audit"), "transcript", str(stage), "--roster", pin]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the sum was not recomputed here" in done.stdout
    recompute = [*command, "--uploads", str(federation.coordinator / "rounds")]
    done = subprocess.run(recompute, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "not recomputed" not in done.stdout
    total = stage / "rounds" / "1" / "total.bin"
    total.write_bytes(bytes([total.read_bytes()[0] ^ 1]) + total.read_bytes()[1:])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "does not have the root" in done.stderr
    assert "Traceback" not in done.stderr


def lose(federation: Federation, names: list[str], point: str) -> None:
    """Run a round in which some members die before a message; the fault point stands in the daemon."""
    federation.start_coordinator()
    federation.operator("plan", "submit", str(federation.directory / "plan.toml"))
    for name in NAMES:
        if name in names:
            federation.environment = {"VEILSUM_FAULT": point}
        federation.start_site(name)
        federation.environment = {}
    for name in names:
        assert federation.processes[name].wait(60) == -signal.SIGKILL, federation.log_tail(name)


@pytest.mark.parametrize("point", ["before-M3", "before-M5", "after-M5", "before-M9"])
def test_one_loss_of_five_still_completes(federation: Federation, point: str) -> None:
    lose(federation, ["site-2"], point)
    wait_for(lambda: state(federation) == "released")
    assert is_exact(federation)


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        ("before-M5", "expected at least 4 members with an upload, found 3"),  # retried with proof (a)
        ("before-M9", "expected at least 4 members to release shares, found 3"),  # retried with proof (c)
    ],
)
def test_two_losses_of_five_abort_with_the_reason_and_their_return_completes(
    federation: Federation, point: str, reason: str
) -> None:
    lose(federation, ["site-2", "site-4"], point)
    wait_for(lambda: bool(federation.show("toy")["rounds"][0]["state"] == "aborted"))
    assert reason in federation.show("toy")["rounds"][0]["reason"]
    assert not (federation.coordinator / "releases" / "toy").exists()
    for name in ("site-2", "site-4"):
        federation.start_site(name)
    wait_for(lambda: state(federation) == "released")
    assert len(federation.show("toy")["release"]["cohorts"][0]["survivors"]) == 5
    assert is_exact(federation)
