"""What the coordinator remembers of ledgers: they only grow, and evidence against a member stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator import witnesses
from coordinator.witnesses import Witnesses, anchor_file, anchors
from privacy.budget.checkpoint import sign_checkpoint, split_notes, verify_checkpoint
from privacy.errors import ProtocolError, Refusal, UserError
from privacy.roster import Roster, parse_roster
from privacy.secagg.keys import identity_public

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in (1, 2)]
ONE, TWO = "11" * 32, "22" * 32


def roster() -> Roster:
    names = "".join(
        f'[[members]]\nname = "{name}"\nkey = "{identity_public(key).hex()}"\n'
        for name, key in zip(("north", "south"), KEYS, strict=True)
    )
    policy = "[policy]\nmax_colluders = 0\nmin_cohort = 2\nmin_survivors = 2\nallow_two_members = true\n"
    return parse_roster(f'federation = "f"\ncoordinator = "{"9" * 64}"\n{policy}{names}'.encode()).roster


def note(size: int, fill: int = 0, dataset: str = ONE, member: int = 0) -> bytes:
    return sign_checkpoint(KEYS[member], dataset, size, bytes([fill]) * 32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "witnesses.jsonl"


def opened(path: Path) -> Witnesses:
    return Witnesses(path, roster(), lambda: 1_800_000_000.0)


def kept(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_new_checkpoint_is_one_line_and_a_repeated_one_none(path: Path) -> None:
    found = opened(path)
    for taken in (note(2), note(2), note(4, 1), note(4, 1), note(9, 2, TWO)):
        found.take(0, taken)
    found.take(1, note(3, 3, ONE, 1))  # another member's data set of the same identity is another ledger
    assert [(e["member"], e["dataset"]) for e in kept(path)] == [
        ("north", ONE),
        ("north", ONE),
        ("north", TWO),
        ("south", ONE),
    ]
    assert kept(path)[0] == {
        "member": "north",
        "dataset": ONE,
        "checkpoint": note(2).decode(),
        "time": "2027-01-15T08:00:00Z",
    }
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("restart", [False, True])
def test_a_shorter_ledger_is_refused_and_both_notes_are_kept(path: Path, restart: bool) -> None:
    found = opened(path)
    found.take(0, note(5, 1))
    found = opened(path) if restart else found
    with pytest.raises(Refusal, match="ledger of 'north' has 4 lines, 5 were witnessed"):
        found.take(0, note(4, 0))
    assert kept(path)[-1]["checkpoint"] == note(4, 0).decode()
    assert kept(path)[-1]["rollback"] == note(5, 1).decode()
    found.take(0, note(6, 2))  # what was lost is back


@pytest.mark.parametrize("restart", [False, True])
def test_an_old_note_that_comes_again_is_refused_and_accuses_nobody(path: Path, restart: bool) -> None:
    found = opened(path)
    for taken in (note(3), note(5, 1)):
        found.take(0, taken)
    found = opened(path) if restart else found
    with pytest.raises(Refusal, match="ledger of 'north' has 3 lines, 5 were witnessed"):
        found.take(0, note(3))
    assert len(kept(path)) == 2
    with pytest.raises(Refusal, match="has 3 lines"):
        found.take(0, note(3, 7))  # as long, and another history
    assert kept(path)[-1]["rollback"] == note(5, 1).decode()


@pytest.mark.parametrize("restart", [False, True])
def test_as_many_lines_under_another_root_are_a_fork(path: Path, restart: bool) -> None:
    found = opened(path)
    found.take(0, note(5, 1))
    found = opened(path) if restart else found
    with pytest.raises(Refusal, match="a fork"):
        found.take(0, note(5, 2))
    assert (kept(path)[-1]["checkpoint"], kept(path)[-1]["fork"]) == (note(5, 2).decode(), note(5, 1).decode())
    with pytest.raises(Refusal, match="a fork"):
        found.take(0, note(5, 2))  # a refused one is not the last one known
    found.take(0, note(5, 1))


BAD = {
    "nothing that is a note": b"hello",
    "signed by another member": note(3, 0, ONE, 1),
    "altered": note(3).replace(b"\n3\n", b"\n4\n"),
}


@pytest.mark.parametrize("sentence", BAD)
def test_what_is_no_checkpoint_of_this_member_is_refused_and_leaves_nothing(path: Path, sentence: str) -> None:
    with pytest.raises(ProtocolError, match="checkpoint"):
        opened(path).take(0, BAD[sentence])
    assert not path.exists()


def test_m1_and_its_checkpoint_say_the_same(path: Path) -> None:
    found = opened(path)
    for size, root in ((6, bytes(32)), (5, bytes([2]) * 32)):
        with pytest.raises(ProtocolError, match="M1 states a ledger"):
            found.take(0, note(5, 1), (size, root))
    assert not path.exists()
    found.take(0, note(5, 1), (5, bytes([1]) * 32))
    found.take(0, note(7, 3), (5, bytes([1]) * 32))  # the same M1 again, after more lines
    with pytest.raises(ProtocolError, match="M1 states a ledger"):
        found.take(0, note(7, 3), (8, bytes([1]) * 32))


def test_a_member_fills_the_disk_neither_with_lines_nor_with_evidence(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(witnesses, "MOST_EVIDENCE", 2)
    monkeypatch.setattr(witnesses, "MOST_LINES", 5)
    found = opened(path)
    found.take(0, note(9, 1))
    for fill in range(2, 7):
        with pytest.raises(Refusal, match="a fork"):
            found.take(0, note(9, fill))
    assert len(kept(path)) == 3
    found.take(0, note(10))
    found.take(0, note(11))
    with pytest.raises(Refusal, match="at most 5 checkpoints of 'north'"):
        found.take(0, note(12))
    with pytest.raises(Refusal, match="at most 5"):
        opened(path).take(0, note(12))
    found.take(1, note(12, 0, ONE, 1))


def test_half_a_line_is_cut_off_and_another_one_is_named(path: Path) -> None:
    opened(path).take(0, note(5))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"member": "nor')
    opened(path).take(0, note(6))
    assert [len(split_notes(e["checkpoint"].encode())) for e in kept(path)] == [1, 1]
    path.write_bytes(whole + b"[]\n" + whole)
    with pytest.raises(UserError, match=r"witnesses\.jsonl:2: expected a witnessed checkpoint"):
        opened(path)


def test_an_anchor_file_holds_the_last_note_of_each_ledger(path: Path) -> None:
    found = opened(path)
    for taken in (note(2), note(5, 1), note(3, 0, TWO)):
        found.take(0, taken)
    found.take(1, note(8, 0, TWO, 1))
    with pytest.raises(Refusal):
        found.take(0, note(4))
    notes = split_notes(anchor_file(anchors(path)).encode())
    assert notes == [note(5, 1), note(3, 0, TWO), note(8, 0, TWO, 1)]
    assert [verify_checkpoint(n, identity_public(KEYS[0])).size for n in notes[:2]] == [5, 3]
    assert split_notes(anchor_file(anchors(path, "south")).encode()) == [note(8, 0, TWO, 1)]
    assert anchors(path.with_name("none.jsonl")) == []
