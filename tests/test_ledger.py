"""The ledger: what its lines prove to somebody with a public key, what a crash leaves, and who wins a race."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from privacy import faults, merkle
from privacy.budget.book import Book, Finding
from privacy.budget.checkpoint import verify_checkpoint
from privacy.budget.entries import Facts
from privacy.budget.ledger import Ledger, LedgerError, check_against, head_of, line_hash, verify_lines
from privacy.errors import Refusal
from privacy.files import DiskError
from privacy.secagg.keys import identity_public
from tests.ledgers import (
    KEY,
    OTHER_KEY,
    SITE,
    abort,
    commit,
    new_ledger,
    release,
    reserve,
    resigned,
    stamp,
    start,
)

WHOLE: tuple[Facts, ...] = (reserve(1), start(1), release(1), commit(1), reserve(2))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return new_ledger(tmp_path / "news.jsonl", *WHOLE)


def lines(ledger: Ledger) -> list[bytes]:
    return ledger.path.read_bytes().splitlines()


def joined(found: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in found)


def test_a_public_key_is_enough_to_verify_every_line(ledger: Ledger) -> None:
    entries = verify_lines(ledger.path.read_bytes(), SITE)
    assert [e.kind for e in entries] == ["REGISTER", "RESERVE", "START", "RELEASE", "COMMIT", "RESERVE"]
    assert [e.facts for e in entries[1:]] == list(WHOLE)
    assert [e.seq for e in entries] == list(range(6))
    assert head_of(entries) == ledger.head()
    assert ledger.head()[1] == merkle.root([merkle.leaf_hash(line) for line in lines(ledger)])


def test_the_chain_is_plain_sha256_over_stored_lines(ledger: Ledger) -> None:
    stored = lines(ledger)
    for before, after in pairwise(stored):
        done = subprocess.run(["sha256sum"], input=before, capture_output=True, check=True)
        assert json.loads(after)["previous"] == done.stdout.split()[0].decode()


def other_site(found: list[bytes]) -> list[bytes]:
    theirs = {"site": identity_public(OTHER_KEY).hex()}
    return [
        resigned({k: v for k, v in json.loads(line).items() if k != "signature"} | theirs, OTHER_KEY) for line in found
    ]


def relinked(found: list[bytes], **changes: object) -> list[bytes]:
    """The lines with their last one changed and signed again by the site itself."""
    body = {k: v for k, v in json.loads(found[-1]).items() if k != "signature"} | changes
    return [*found[:-1], resigned(body)]


ATTACKS: dict[str, tuple[Callable[[list[bytes]], list[bytes]], Finding, int]] = {
    "a number is edited": (
        lambda found: [*found[:1], found[1].replace(b'"stage":1', b'"stage":2'), *found[2:]],
        Finding.SIGNATURE,
        2,
    ),
    "two lines change places": (lambda found: [found[0], found[2], found[1], *found[3:]], Finding.CHAIN, 2),
    "a line in the middle is deleted": (lambda found: [*found[:2], *found[3:]], Finding.CHAIN, 3),
    "the first line is deleted": (lambda found: found[1:], Finding.CHAIN, 1),
    "a line stands there twice": (lambda found: [*found[:2], found[1], *found[2:]], Finding.CHAIN, 3),
    "an empty line": (lambda found: [*found[:2], b"", *found[2:]], Finding.FORMAT, 3),
    "a line of another site": (lambda found: [*found[:2], other_site(found)[2]], Finding.REPLAY, 3),
    "signed by another key": (
        lambda found: [
            *found[:1],
            resigned({k: v for k, v in json.loads(found[1]).items() if k != "signature"}, OTHER_KEY),
        ],
        Finding.SIGNATURE,
        2,
    ),
    "a line of another data set": (lambda found: relinked(found, dataset="12" * 32), Finding.REPLAY, 6),
    "a job that is reserved twice": (lambda found: relinked(found, job="0" * 31 + "1"), Finding.REPLAY, 6),
    "a hash before that is not": (lambda found: relinked(found, previous="00" * 32), Finding.CHAIN, 6),
    "a number left out": (lambda found: relinked(found, seq=6), Finding.CHAIN, 6),
    "keys in another order": (
        lambda found: [b'{"v":1,' + found[0].replace(b'"v":1,', b"")[1:], *found[1:]],
        Finding.FORMAT,
        1,
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_was_done_to_a_ledger_is_found(ledger: Ledger, attack: str) -> None:
    change, finding, line = ATTACKS[attack]
    with pytest.raises(LedgerError) as raised:
        verify_lines(joined(change(lines(ledger))), SITE)
    assert (raised.value.finding, raised.value.line) == (finding, line)


def test_a_line_without_an_end_is_partial(ledger: Ledger) -> None:
    with pytest.raises(LedgerError) as raised:
        verify_lines(ledger.path.read_bytes()[:-1], SITE)
    assert raised.value.finding == Finding.PARTIAL


def test_lines_cut_off_at_the_end_are_found_by_a_checkpoint_alone(ledger: Ledger) -> None:
    size, root = ledger.head()
    entries = verify_lines(joined(lines(ledger)[:-1]), SITE)  # the chain cannot tell
    with pytest.raises(LedgerError) as raised:
        check_against(entries, size, root)
    assert raised.value.finding == Finding.TRUNCATED


def test_a_ledger_that_goes_on_otherwise_is_a_fork(ledger: Ledger, tmp_path: Path) -> None:
    other = new_ledger(tmp_path / "other.jsonl", *WHOLE[:-1], reserve(3))
    with pytest.raises(LedgerError) as raised:
        check_against(other.entries, *ledger.head())
    assert raised.value.finding == Finding.FORK
    check_against(other.entries, *head_of(ledger.entries, 5))


def test_a_site_that_lost_lines_sees_it_by_its_own_checkpoint(ledger: Ledger) -> None:
    ledger.path.write_bytes(joined(lines(ledger)[:-1]))
    with pytest.raises(LedgerError, match="expected at least 6 lines, found 5"):
        Ledger(ledger.path, KEY)
    with pytest.raises(LedgerError, match="expected at least 6 lines, found 5"):
        ledger.append(start(2))
    ledger.path.unlink()
    with pytest.raises(LedgerError, match="expected at least 6 lines, found 0"):
        Ledger(ledger.path, KEY)


def test_a_damaged_checkpoint_is_refused_and_an_old_one_renewed(ledger: Ledger) -> None:
    old = new_ledger(ledger.path.with_name("old.jsonl"), *WHOLE[:2]).checkpoint()
    ledger.checkpoint_path.write_bytes(old)
    again = Ledger(ledger.path, KEY)
    assert again.checkpoint_path.read_bytes() == again.checkpoint() == ledger.checkpoint()
    found = verify_checkpoint(again.checkpoint(), SITE)
    assert (found.size, found.root) == ledger.head()
    ledger.checkpoint_path.write_bytes(old[:-3])
    with pytest.raises(LedgerError, match="checkpoint"):
        Ledger(ledger.path, KEY)


BAD_ORDER: dict[str, tuple[tuple[Facts, ...], str]] = {
    "a start of nothing": ((start(1),), "was never reserved"),
    "a second start": ((reserve(1), start(1), start(1)), "starts a second time"),
    "a release before the start": ((reserve(1), release(1)), "released before it started"),
    "a round released twice": ((reserve(1), start(1), release(1), release(1)), "in round 1 a second time"),
    "a commit of nothing": ((reserve(1), start(1), commit(1)), "committed without a release"),
    "a commit of another round": ((reserve(1), start(1), release(1), commit(1, 2)), "committed without a release"),
    "a second commit": ((reserve(1), start(1), release(1), commit(1), commit(1)), "committed without a release"),
    "a start after an abort": ((reserve(1), abort(1), start(1)), "aborted before"),
    "an abort after a commit": ((reserve(1), start(1), release(1), commit(1), abort(1)), "after its upload"),
}


@pytest.mark.parametrize("sentence", BAD_ORDER)
def test_a_line_that_may_not_follow_is_not_written(tmp_path: Path, sentence: str) -> None:
    facts, text = BAD_ORDER[sentence]
    ledger = new_ledger(tmp_path / "news.jsonl", *facts[:-1])
    before = ledger.path.read_bytes()
    with pytest.raises(LedgerError, match=text):
        ledger.append(facts[-1])
    assert ledger.path.read_bytes() == before
    assert Ledger(ledger.path, KEY).head() == ledger.head()


def test_a_second_round_is_one_more_release_of_the_same_job(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path / "news.jsonl", reserve(1), start(1), release(1, 1), release(1, 2), commit(1, 2))
    found = ledger.book.jobs[reserve(1).job]
    assert (found.released, found.committed, found.state) == ([1, 2], [2], "committed")


def test_only_an_abort_before_the_start_gives_a_charge_back() -> None:
    def charged(*facts: Facts) -> list[str]:
        book = Book()
        book.size, book.dataset = 1, ""
        for entry in facts:
            book._follow(entry)
        return [job.reserve.job for job in book.charged()]

    assert charged(reserve(1)) == [reserve(1).job]
    assert charged(reserve(1), abort(1)) == []
    assert charged(reserve(1), start(1), abort(1)) == [reserve(1).job]
    assert charged(reserve(1), start(1), release(1), abort(1)) == [reserve(1).job]


def test_files_are_private(ledger: Ledger) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in ledger.path.parent.glob("news.*")}
    assert modes == {"news.jsonl": 0o600, "news.checkpoint": 0o600, "news.lock": 0o600}


def test_a_line_of_another_process_is_seen_before_the_next_is_written(ledger: Ledger) -> None:
    Ledger(ledger.path, KEY, stamp).append(start(2))
    with pytest.raises(LedgerError, match="starts a second time"):
        ledger.append(start(2))
    assert ledger.append(release(2)).seq == 7
    assert line_hash(ledger.entries[6].line) == ledger.entries[7].previous


def test_what_the_check_objects_to_is_not_written(ledger: Ledger) -> None:
    def check(book: Book) -> None:
        raise Refusal(f"{len(book.jobs)} jobs are enough")

    before = ledger.path.read_bytes()
    with pytest.raises(Refusal, match="2 jobs are enough"):
        ledger.append(reserve(3), check=check)
    assert ledger.path.read_bytes() == before


# --- crashes ----------------------------------------------------------------------------------------------------------

#: Writes six lines for each request, in a fork that may die. One process for all: most of the time goes into importing.
WRITE = """
import json, os, sys
from pathlib import Path
from privacy import faults
from tests.ledgers import abort, commit, new_ledger, release, reserve, start
for request in sys.stdin:
    path, fault, faults._trace = json.loads(request)
    faults._fault, faults._on = faults.parse_fault(fault), True
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    try:
        new_ledger(Path(path), reserve(1), start(1), release(1), commit(1), reserve(2), start(2))
        os._exit(0)
    finally:
        os._exit(1)
"""


@pytest.fixture
def write() -> Iterator[Callable[..., int]]:
    """Writes a ledger; the exit status of the process that did."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", WRITE]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:

        def writing(path: Path, fault: str = "", trace: str = "") -> int:
            assert writer.stdin is not None
            assert writer.stdout is not None
            print(json.dumps([str(path), fault, trace]), file=writer.stdin, flush=True)
            return int(writer.stdout.readline())

        yield writing


def test_whenever_a_site_dies_its_ledger_opens_and_goes_on(tmp_path: Path, write: Callable[..., int]) -> None:
    trace = tmp_path / "trace"
    assert write(tmp_path / "whole" / "ledger" / "news.jsonl", trace=str(trace)) == 0
    whole = verify_lines((tmp_path / "whole" / "ledger" / "news.jsonl").read_bytes(), SITE)
    passed: dict[str, int] = {}
    for name in trace.read_text().split():
        passed[name] = passed.get(name, 0) + 1
    chosen = [(name, k) for name, times in passed.items() for k in sorted({1, 3, times}) if k <= times]
    assert {name for name, _ in chosen} >= {"before-write:news.jsonl", "before-fsync:news.jsonl", "after-fsync:ledger/"}
    for number, (name, k) in enumerate(chosen):
        path = tmp_path / f"{number}" / "ledger" / "news.jsonl"
        died = write(path, f"{name}@{k}") == -signal.SIGKILL
        assert died or "whole" in name  # the directory above has another name in each try
        ledger = Ledger(path, KEY, stamp)
        size, root = ledger.head()
        assert [e.facts for e in ledger.entries] == [e.facts for e in whole[:size]]
        assert verify_checkpoint(ledger.checkpoint_path.read_bytes(), SITE).root == root if size else True
        started = {e.facts.job for e in ledger.entries if e.kind == "START"}  # type: ignore[union-attr]
        assert started <= {job.reserve.job for job in ledger.book.charged()}


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_half_a_line_was_never_acknowledged_and_is_cut_off(ledger: Ledger, cut: int) -> None:
    whole = ledger.path.read_bytes()
    ledger.checkpoint_path.write_bytes(new_ledger(ledger.path.with_name("old.jsonl"), *WHOLE[:-1]).checkpoint())
    ledger.path.write_bytes(whole[:-cut])
    again = Ledger(ledger.path, KEY, stamp)
    assert [e.facts for e in again.entries[1:]] == list(WHOLE[:-1])
    assert ledger.path.read_bytes() == joined(whole.splitlines()[:-1])
    again.append(reserve(2))
    assert len(verify_lines(ledger.path.read_bytes(), SITE)) == 6


@pytest.mark.parametrize("point", ["before-write:news.jsonl", "before-fsync:news.jsonl"])
def test_a_full_disk_leaves_the_ledger_as_it_was(ledger: Ledger, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    before = ledger.path.read_bytes()
    monkeypatch.setattr(faults, "_on", True)
    monkeypatch.setattr(faults, "_fault", faults.Fault(point, 1, full=True))
    monkeypatch.setattr(faults, "_passed", 0)
    with pytest.raises(DiskError):
        ledger.append(start(2))
    assert ledger.path.read_bytes() == before
    assert ledger.append(start(2)).seq == 6
    assert Ledger(ledger.path, KEY).head() == ledger.head()


def test_a_checkpoint_that_the_disk_does_not_take_costs_no_line(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "_on", True)
    monkeypatch.setattr(faults, "_fault", faults.Fault("before-write:news.checkpoint", 1, full=True))
    monkeypatch.setattr(faults, "_passed", 0)
    ledger.append(start(2))
    assert verify_checkpoint(ledger.checkpoint_path.read_bytes(), SITE).size == 6
    ledger.reload()
    assert verify_checkpoint(ledger.checkpoint_path.read_bytes(), identity_public(KEY)).size == 7


# --- a race -----------------------------------------------------------------------------------------------------------

RACE = """
import sys, time
from pathlib import Path
from privacy.budget.book import Book
from privacy.budget.ledger import Ledger
from privacy.errors import Refusal
from tests.ledgers import KEY, reserve
ledger = Ledger(Path(sys.argv[1]), KEY)
def check(book: Book) -> None:
    found = len(book.charged())
    time.sleep(0.05)  # long enough for the other to look too, if it could
    if found >= 3:
        raise Refusal("spent")
sys.stdin.readline()
won = 0
for k in range(3):
    try:
        ledger.append(reserve(int(sys.argv[2]) + k), check=check)
        won += 1
    except Refusal:
        pass
print(won)
"""


def test_of_processes_that_race_for_the_last_of_a_budget_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "news.jsonl"
    new_ledger(path, reserve(1), reserve(2))
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(path), str(number)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (100, 200, 300)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    assert sum(int(racer.communicate()[0]) for racer in racers) == 1
    assert len(Ledger(path, KEY).book.charged()) == 3
