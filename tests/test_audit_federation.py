"""A federation's ledgers against what others remember: a real round on disk, then everything that could be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from participant import charging as site_ledger
from participant.site import Site
from privacy.budget.audit import Terms
from privacy.budget.checkpoint import sign_checkpoint
from privacy.budget.federation import FederationReport, audit_federation
from privacy.budget.findings import Code
from privacy.budget.ledger import Ledger, Stamp, head_of
from privacy.cli import app
from privacy.errors import UserError
from tests.audits import SELF_TEST, bodies, rewritten
from tests.charging import BUDGET, PRIVACY, plan
from tests.ledgers import OTHER_KEY
from tests.on_disk import OnDisk
from tests.test_end_to_end import SITE

TOML = SITE.replace("[policy]", BUDGET.format(8) + "[policy]")


@dataclass(frozen=True)
class Released:
    """A world whose round is over, and a directory for the auditor made from it."""

    world: OnDisk
    directory: Path

    def site(self, member: int) -> Site:
        return self.world.site(member)

    def ledger(self, member: int) -> Ledger:
        return self.site(member).ledger("toy")


def witness(site: Site, ledger: Ledger, time: str, **more: str) -> str:
    """What a coordinator keeps when it sees a ledger as it is now."""
    name = site.roster.roster.name(site.me)
    line = {"member": name, "dataset": ledger.book.dataset, "checkpoint": ledger.checkpoint().decode(), "time": time}
    return json.dumps(line | more, sort_keys=True) + "\n"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    """Five sites with private jobs, one of which dropped out before it uploaded, and what an auditor is given."""
    base = tmp_path_factory.mktemp("federation")
    (base / "world").mkdir()
    world = OnDisk(base / "world", plan=plan("toy", PRIVACY), site_toml=TOML)
    for i in range(5):
        texts = [json.dumps({"text": f"text {i} {k}", "label": "ab"[k % 2]}) for k in range(20)]
        (world.federation.site(world.names[i]) / "data.jsonl").write_text("\n".join(texts) + "\n")
        job = site_ledger.reserve(world.site(i), world.job, 1)
        site_ledger.start(world.site(i), world.job, job, dict(SELF_TEST))
    world.ready()
    world.run()
    directory = base / "audit"
    shutil.copytree(world.engine.home.releases, directory / "releases")
    (directory / "roster.toml").write_bytes(world.job.roster_file.raw)
    lines = ""
    for i, name in enumerate(world.names):
        folder = directory / "ledgers" / name
        folder.mkdir(parents=True)
        site = world.site(i)
        shutil.copy(site.ledger("toy").path, folder)
        shutil.copy(site.home.witnesses, folder)
        lines += witness(site, site.ledger("toy"), Stamp.now().time)
    (directory / "witnesses.jsonl").write_text(lines)
    return Released(world, directory)


@pytest.fixture
def given(released: Released, tmp_path: Path) -> Path:
    """A copy to be spoiled."""
    return Path(shutil.copytree(released.directory, tmp_path / "audit"))


def audit(directory: Path) -> FederationReport:
    return audit_federation(directory, None, Terms(with_opacus=False))


def found(report: FederationReport) -> list[tuple[Code, str]]:
    return [(f.code, f.text) for f in (*report.found, *(one for ledger in report.ledgers for one in ledger.found))]


def ledger_file(directory: Path, member: int) -> Path:
    return directory / "ledgers" / f"site-{member}" / "toy.jsonl"


def test_an_honest_federation(given: Path) -> None:
    report = audit(given)
    assert found(report) == []
    assert len(report.ledgers) == 5
    assert all(ledger.anchored == len(ledger.entries) for ledger in report.ledgers)
    assert report.rounds == [
        "toy/stage-1/rounds/1: 5 of 5 members in the sum have its RELEASE line: site-0, site-1, site-2, site-3, site-4"
    ]


def spoil_tail(directory: Path, _: Released) -> None:
    path = ledger_file(directory, 2)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def spoil_all_memory(directory: Path, _: Released) -> None:
    """The coordinator forgot, the peers gave nothing: what remains is the transcript of the round itself."""
    (directory / "witnesses.jsonl").unlink()
    for path in directory.glob("ledgers/*/witnesses.jsonl"):
        path.unlink()
    path = ledger_file(directory, 2)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))


def spoil_whole_ledger(directory: Path, _: Released) -> None:
    ledger_file(directory, 2).unlink()


def other_history(directory: Path, released: Released, change: Callable[[dict[str, object]], None]) -> None:
    """A ledger of member 2 that its site wrote and signed anew, with no memory of the first one but the transcript."""
    site = released.site(2)
    lines = bodies(site.ledger("toy"))
    for line in lines:
        change(line)
    ledger_file(directory, 2).write_bytes(rewritten(lines, site.identity))


def spoil_fork(directory: Path, released: Released) -> None:
    def change(line: dict[str, object]) -> None:
        if line["kind"] == "RESERVE":
            line["code"] = {"veilsum": "another"}

    other_history(directory, released, change)


def spoil_release(directory: Path, released: Released) -> None:
    def change(line: dict[str, object]) -> None:
        if line["kind"] == "RELEASE":
            line["t2"] = "00" * 32

    spoil_witnesses_of(directory, 2)
    other_history(directory, released, change)


def spoil_upload(directory: Path, released: Released) -> None:
    def change(line: dict[str, object]) -> None:
        if line["kind"] == "COMMIT":
            line["root"] = "00" * 32

    spoil_witnesses_of(directory, 2)
    other_history(directory, released, change)


def spoil_witnesses_of(directory: Path, member: int) -> None:
    path = directory / "witnesses.jsonl"
    lines = [line for line in path.read_text().splitlines(keepends=True) if f'"site-{member}"' not in line]
    path.write_text("".join(lines))


def spoil_other_site(directory: Path, _: Released) -> None:
    shutil.copy(ledger_file(directory, 1), ledger_file(directory, 2))


def spoil_twice(directory: Path, _: Released) -> None:
    shutil.copy(ledger_file(directory, 2), ledger_file(directory, 2).with_name("again.jsonl"))


def spoil_clock(directory: Path, released: Released) -> None:
    """The last line of a ledger is dated before the coordinator saw the lines before it."""
    site = released.site(2)
    path = directory / "witnesses.jsonl"

    entries = site.ledger("toy").entries
    note = sign_checkpoint(site.identity, entries[0].dataset, *head_of(entries, 3))

    late = datetime.fromisoformat(entries[-1].time) + timedelta(minutes=6)
    line = {"member": "site-2", "dataset": entries[0].dataset, "checkpoint": note.decode()}
    path.write_text(path.read_text() + json.dumps(line | {"time": late.strftime("%Y-%m-%dT%H:%M:%SZ")}) + "\n")


def spoil_plan(directory: Path, released: Released) -> None:
    """A site reserved less than the plan says it did."""

    def change(line: dict[str, object]) -> None:
        if line["kind"] == "RESERVE":
            mechanism = dict(line["mechanism"])  # type: ignore[call-overload]
            mechanism["clip"] = "0.25"
            line["mechanism"] = mechanism

    spoil_witnesses_of(directory, 2)
    other_history(directory, released, change)


def spoil_evidence(directory: Path, released: Released) -> None:
    """The coordinator kept evidence: a second history of the same length, signed by the member."""
    site, path = released.site(2), directory / "witnesses.jsonl"
    ledger = site.ledger("toy")
    other = sign_checkpoint(site.identity, ledger.book.dataset, len(ledger.entries), bytes(32))
    line = {
        "member": "site-2",
        "dataset": ledger.book.dataset,
        "checkpoint": other.decode(),
        "fork": ledger.checkpoint().decode(),
        "time": Stamp.now().time,
    }
    path.write_text(path.read_text() + json.dumps(line) + "\n")


def spoil_forged_witness(directory: Path, released: Released) -> None:
    path = directory / "witnesses.jsonl"
    dataset = released.ledger(2).book.dataset
    note = sign_checkpoint(OTHER_KEY, dataset, 99, bytes(32)).decode()
    line = {"member": "site-2", "dataset": dataset, "checkpoint": note, "time": Stamp.now().time}
    path.write_text(path.read_text() + json.dumps(line) + "\n")


def spoil_transcript(directory: Path, _: Released) -> None:
    path = next(directory.glob("releases/*/*/rounds/*/evidence.bin"))
    raw = bytearray(path.read_bytes())
    raw[-200] ^= 1
    raw[300] ^= 1
    path.write_bytes(bytes(raw))


Spoil = Callable[[Path, Released], None]
SPOILED: dict[str, tuple[Spoil, Code, str]] = {
    "a line is missing at the end": (spoil_tail, Code.TRUNCATED, "the coordinator"),
    "all witnesses forgot, and lines are missing": (spoil_all_memory, Code.TRUNCATED, "no ledger has a RELEASE line"),
    "a ledger is missing": (spoil_whole_ledger, Code.TRUNCATED, "no ledger here has it"),
    "a second history": (spoil_fork, Code.FORK, "M1"),
    "a release for another cohort": (spoil_release, Code.FORK, "another cohort"),
    "another upload": (spoil_upload, Code.FORK, "another upload"),
    "the ledger of another site": (spoil_other_site, Code.TRUNCATED, "expected a line of site"),
    "one ledger under two names": (spoil_twice, Code.REPLAY, "stands in 2 ledgers"),
    "a clock that was set back": (spoil_clock, Code.CLOCK, "but the coordinator"),
    "another mechanism than the plan's": (spoil_plan, Code.FORK, "another mechanism"),
    "a fork that the coordinator kept": (spoil_evidence, Code.FORK, "both signed"),
    "a forged witness": (spoil_forged_witness, Code.BROKEN, "expected a signature by the site's identity key"),
    "a transcript with two bits changed": (spoil_transcript, Code.BROKEN, "toy/stage-1/rounds/1"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_wrong_in_a_federation(case: str, given: Path, released: Released) -> None:
    spoil, code, text = SPOILED[case]
    spoil(given, released)
    report = audit(given)
    assert report.code == code, found(report)
    assert any(text in said for _, said in found(report)), found(report)


def test_an_old_note_that_comes_again_convicts_nobody(given: Path, released: Released) -> None:
    """A coordinator that replays what it once saw can write "rollback" beside it: the ledger has the lines of both."""
    site, path = released.site(2), given / "witnesses.jsonl"
    ledger = site.ledger("toy")
    old = sign_checkpoint(site.identity, ledger.book.dataset, *head_of(ledger.entries, 2))
    line = {
        "member": "site-2",
        "dataset": ledger.book.dataset,
        "checkpoint": old.decode(),
        "rollback": ledger.checkpoint().decode(),
        "time": Stamp.now().time,
    }
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    assert found(audit(given)) == []


def test_the_command(given: Path, tmp_path: Path, released: Released) -> None:
    pin, page = released.world.job.roster_file.hash.hex(), tmp_path / "audit.html"
    run = CliRunner().invoke(app, ["federation", str(given), "--pin", pin, "--html", str(page), "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.output)["rounds"][0].startswith("toy/stage-1/rounds/1: 5 of 5")
    assert "site-4/toy" in page.read_text(encoding="utf-8")
    assert CliRunner().invoke(app, ["federation", str(given), "--pin", "00" * 32]).exit_code == 1


def test_a_stranger_among_the_ledgers_is_the_users_mistake(given: Path) -> None:
    (given / "ledgers" / "stranger").mkdir()
    run = CliRunner().invoke(app, ["federation", str(given)])
    assert run.exit_code == 1
    assert isinstance(run.exception, UserError)
    assert "found 'stranger'" in str(run.exception)


def test_a_directory_without_ledgers_is_no_clean_audit(given: Path) -> None:
    """Nothing looked at must not read as nothing found; but what misses a ledger is worse than a mistake."""
    shutil.rmtree(given / "ledgers")
    assert audit(given).code == Code.TRUNCATED
    (given / "witnesses.jsonl").unlink()
    shutil.rmtree(given / "releases")
    with pytest.raises(UserError, match=r"expected ledgers/MEMBER/NAME\.jsonl, found no ledger"):
        audit(given)


def test_members_without_a_ledger_are_named(given: Path) -> None:
    assert not any("no ledger here" in line for line in audit(given).rounds)
    shutil.rmtree(given / "ledgers" / "site-3")
    assert "note: no ledger here is of site-3" in audit(given).rounds


def test_a_ledger_beyond_all_patience_is_not_read(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privacy.budget.ledger.MAX_LEDGER_BYTES", 100)
    with pytest.raises(UserError, match=r"\.jsonl: expected a ledger of at most 100 bytes, found"):
        audit(given)
