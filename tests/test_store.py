"""What the two ends remember: a site's records, vectors and spools, and the coordinator's database."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from coordinator import phases
from coordinator import store as coordinator_store
from coordinator.schema import SCHEMA
from coordinator.store import Event, RoundRow
from participant.config import load_home
from participant.prepare import kept_vector
from participant.records import Aborted, Joined, PeersSeen, Record, Released, SignedSurvivors, Spent
from participant.store import Store, Trained
from privacy import PROTOCOL_VERSION
from privacy.encoding import decode, encode
from privacy.errors import UserError
from privacy.secagg.keys import HPKE_PUBLIC_BYTES
from privacy.secagg.masking import TILE, Engine, MaskStreams, packed_length, pyca, tiles_of, unpack
from privacy.secagg.messages import Advertise, Header
from privacy.secagg.signed import Signed
from privacy.secagg.transcript import Streams
from privacy.vectors import file_root
from tests.on_disk import OnDisk

X, Y = bytes(32), b"y" * 32
HEADER = Header(PROTOCOL_VERSION, X, 1, 3, X, X, X)

# --- a site -----------------------------------------------------------------------------------------------------------


def load(directory: Path, content: bytes = b"") -> Store:
    (directory / "participant.toml").write_text('coordinator = "localhost:1"\nmember = "site-0"\n')
    if content:
        (directory / "records.jsonl").write_bytes(content)
    return Store(load_home(directory))


def spent(header: Header = HEADER, plan: str = "toy", dataset: str = "data") -> Spent:
    return Spent(header, plan, dataset, X, Y, (0, 1, 4), 1, 3, X, Y)


RECORDS: list[Record] = [
    Joined(HEADER, 7),
    PeersSeen(HEADER, (0, 1, 4), (7, 9, 2)),
    spent(),
    SignedSurvivors(HEADER, Y, (0, 1)),
    Released(HEADER, Y),
    Aborted(replace(HEADER, round=2), "a reason with ünicode"),
]


def test_every_kind_of_record_comes_back_from_disk_in_order(tmp_path: Path) -> None:
    store = load(tmp_path)
    assert store.all_records() == []
    for record in RECORDS:
        store.keep(record)
    assert load(tmp_path).all_records() == store.all_records() == RECORDS
    assert stat.S_IMODE((tmp_path / "records.jsonl").stat().st_mode) == 0o600


def test_rounds_are_counted_over_all_plans_and_round_numbers_by_plan_and_stage(tmp_path: Path) -> None:
    store = load(tmp_path)
    assert (store.rounds_joined(), store.highest_round(X, 1)) == (0, 0)
    for plan, stage, number, count in ((X, 1, 5, 1), (X, 1, 4, 2), (Y, 1, 9, 3), (X, 2, 8, 4)):
        store.keep(Joined(replace(HEADER, plan=plan, stage=stage, round=number), count))
    again = load(tmp_path)
    assert again.rounds_joined() == 4
    assert [again.highest_round(p, s) for p, s in ((X, 1), (Y, 1), (X, 2), (Y, 2))] == [5, 9, 8, 0]


def test_the_highest_count_of_each_peer_is_remembered(tmp_path: Path) -> None:
    store = load(tmp_path)
    store.keep(PeersSeen(HEADER, (0, 1), (5, 2)))
    store.keep(PeersSeen(replace(HEADER, plan=Y), (1, 2), (1, 8)))
    assert load(tmp_path).peer_counts() == {0: 5, 1: 2, 2: 8}


def test_a_delta_is_spent_by_plan_name_data_set_and_stage_alone(tmp_path: Path) -> None:
    store = load(tmp_path)
    other = replace(HEADER, plan=Y, round=99, start=Y, roster=Y, coordinator=Y)
    for record in (spent(), spent(other), spent(dataset="more"), spent(plan="p"), spent(replace(HEADER, stage=2))):
        store.keep(record)
    again = load(tmp_path)
    assert again.spent("toy", "data", 1) == [spent(), spent(other)]
    assert again.spent("toy", "more", 1) == [spent(dataset="more")]
    assert again.spent("p", "data", 1) == [spent(plan="p")]
    assert again.spent("toy", "data", 2) == [spent(replace(HEADER, stage=2))]
    assert again.spent("toy", "data", 3) == []


def test_the_quantised_vector_comes_back_as_it_was(tmp_path: Path) -> None:
    store, vector = load(tmp_path), np.array([-511, 0, 511, -1], np.int32)
    assert store.trained("toy", 1) is None
    trained = Trained("ab" * 32, 12, 0.25, 3.5, 40)
    store.keep_trained("toy", 1, vector, trained)
    again = load(tmp_path)
    assert again.trained("toy", 1) == trained
    assert np.array_equal(np.concatenate(list(again.quantised("toy", 1))), vector)
    assert again.quantised("toy", 1).digest() == hashlib.sha256(vector.tobytes()).digest()
    assert stat.S_IMODE(again.quantised("toy", 1).path.stat().st_mode) == 0o600
    assert again.trained("toy", 2) is None
    assert again.trained("other", 1) is None


def test_a_training_that_was_cut_off_before_its_note_is_not_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import participant.store as module

    def crash(path: Path, content: bytes) -> None:
        if path.name == "trained.json":
            raise OSError("power cut")
        path.write_bytes(content)

    store = load(tmp_path)
    monkeypatch.setattr(module, "write_durably", crash)
    with pytest.raises(OSError, match="power cut"):
        store.keep_trained("toy", 1, np.zeros(4, np.int32), Trained("ab" * 32, 1, 0.0, 0.0, 1))
    assert load(tmp_path).trained("toy", 1) is None


def test_a_vector_is_kept_as_it_comes_and_read_tile_by_tile(tmp_path: Path) -> None:
    store, vector = load(tmp_path), np.arange(2 * TILE + 3, dtype=np.int32) - TILE
    store.keep_trained("toy", 1, tiles_of(vector), Trained("ab" * 32, 1, 0.0, 0.0, 1))
    kept = store.quantised("toy", 1)
    tiles = [tile.copy() for tile in kept]
    assert [len(tile) for tile in tiles] == [TILE, TILE, 3]
    assert np.array_equal(np.concatenate(tiles), vector)
    assert kept.digest() == hashlib.sha256(vector.tobytes()).digest()
    streams = Streams((b"1" * 32,), ())
    one, two = store.spool("toy", HEADER), store.spool("toy", replace(HEADER, round=9))
    assert store.write_spool(one, kept, streams, 24) == store.write_spool(two, vector, streams, 24)
    assert one.read_bytes() == two.read_bytes()


def test_the_engine_of_a_spool_is_chosen_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import participant.store as module

    asked: list[int] = []

    def engine_for(coordinates: int) -> Engine:
        asked.append(coordinates)
        return pyca

    monkeypatch.setattr(module, "engine_for", engine_for)
    store = load(tmp_path)
    store.keep_trained("toy", 1, np.zeros(77, np.int32), Trained("ab" * 32, 1, 0.0, 0.0, 1))
    streams = Streams((X, Y), (b"z" * 32,))
    store.write_spool(store.spool("toy", HEADER), store.quantised("toy", 1), streams, 24)
    assert asked == [77]


def test_a_vector_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    def tiles() -> Iterator[NDArray[np.int32]]:
        yield np.zeros(TILE, np.int32)
        raise RuntimeError("a quantised coordinate exceeds Qmax")

    store = load(tmp_path)
    with pytest.raises(RuntimeError, match="exceeds Qmax"):
        store.keep_trained("toy", 1, tiles(), Trained("ab" * 32, 1, 0.0, 0.0, 1))
    assert list(store.directory("toy", 1).iterdir()) == []


def test_the_note_of_an_earlier_training_never_stands_beside_a_new_vector(tmp_path: Path) -> None:
    def cut_off() -> Iterator[NDArray[np.int32]]:
        yield np.ones(4, np.int32)
        assert store.trained("toy", 1) is None, "the vector is about to be replaced"
        raise OSError("power cut")

    store = load(tmp_path)
    store.keep_trained("toy", 1, np.zeros(4, np.int32), Trained("ab" * 32, 1, 0.0, 0.0, 1))
    with pytest.raises(UserError, match="power cut"):
        store.keep_trained("toy", 1, cut_off(), Trained("cd" * 32, 2, 0.0, 0.0, 2))
    assert load(tmp_path).trained("toy", 1) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.unlink(),
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        lambda p: p.write_bytes(p.read_bytes() + b"\0"),
        lambda p: p.write_bytes(p.read_bytes() + X),
    ],
    ids=["missing", "short", "a byte more", "long"],
)
def test_a_kept_vector_of_another_length_is_refused(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    world = OnDisk(tmp_path)
    site = world.site(0)
    assert list(map(len, kept_vector(site, world.job, 1))) == [world.job.quantizer.total_size]
    damage(site.store.quantised(world.job.plan.name, 1).path)
    with pytest.raises(UserError, match=f"expected {world.job.quantizer.total_size} quantised coordinates"):
        kept_vector(site, world.job, 1)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_kept_vector_with_a_coordinate_beyond_qmax_is_refused(tmp_path: Path, sign: int) -> None:
    world = OnDisk(tmp_path)
    vector = world.vector_of(0)
    for beyond in (0, 1):
        vector[-1] = sign * (world.job.quantizer.qmax + beyond)
        world.put_vector(0, vector)
        if not beyond:
            kept_vector(world.site(0), world.job, 1)
            continue
        with pytest.raises(UserError, match="quantised coordinates"):
            kept_vector(world.site(0), world.job, 1)


@pytest.mark.parametrize("bits", [16, 20, 24, 32])
def test_a_spool_is_the_masked_vector_and_its_root_is_that_of_the_file(tmp_path: Path, bits: int) -> None:
    store = load(tmp_path)
    vector = np.arange(-40, 41, dtype=np.int32)
    streams = Streams((b"1" * 32, b"2" * 32), (b"3" * 32,))
    path = store.spool("toy", HEADER)
    root = store.write_spool(path, vector, streams, bits)
    assert path.stat().st_size == packed_length(len(vector), bits)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert file_root(path, len(vector), bits) == root
    tile = unpack(path.read_bytes(), len(vector), bits)
    off = streams.inverse()
    MaskStreams(off.plus, off.minus, bits).apply(tile)
    low = np.uint32((1 << bits) - 1)
    assert np.array_equal(tile & low, vector.astype(np.uint32) & low)
    assert store.write_spool(path, vector, streams, bits) == root  # again, the very same
    assert store.spool("toy", replace(HEADER, round=4)) != path


def test_what_m2_shows_of_other_ledgers_is_kept_with_the_signatures(tmp_path: Path) -> None:
    store = load(tmp_path)
    header = decode(Header, encode(HEADER))
    body = Advertise(b"k" * HPKE_PUBLIC_BYTES, b"m" * HPKE_PUBLIC_BYTES, X, Y, 4, 17, Y)
    members = [Signed(number, body, bytes([number]) * 64) for number in (0, 3)]
    store.keep_witnesses(header, members)
    with store.home.witnesses.open("ab") as file:
        file.write(b'{"member": 4, "si')  # a power cut in mid-append
    assert len(store.witnesses()) == 2
    again = load(tmp_path)
    again.keep_witnesses(header, members[:1])
    found = again.witnesses()
    assert [(line["member"], line["size"], line["root"], line["round"]) for line in found] == [
        (0, 17, Y.hex(), 3),
        (3, 17, Y.hex(), 3),
        (0, 17, Y.hex(), 3),
    ]
    assert decode(Signed[Advertise], bytes.fromhex(found[1]["advertise"])) == members[1]
    assert decode(Header, bytes.fromhex(found[1]["header"])) == HEADER
    assert store.home.witnesses.stat().st_mode & 0o777 == 0o600


# --- records.jsonl ---


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The records of a site in mid-round, line by line."""
    world = OnDisk(tmp_path_factory.mktemp("federation"))
    world.ready()
    world.run(phases.Signing)
    return world.site(0).home.records.read_bytes().splitlines(keepends=True)


def test_a_partial_last_record_is_cut_off_and_the_rest_stands(recorded: list[bytes], tmp_path: Path) -> None:
    whole = load(tmp_path, b"".join(recorded)).all_records()
    assert [type(r).__name__ for r in whole] == ["Joined", "PeersSeen", "Spent"]
    found = load(tmp_path, b"".join(recorded) + recorded[0][:40])
    assert found.all_records() == whole
    assert (tmp_path / "records.jsonl").read_bytes() == b"".join(recorded)
    found = load(tmp_path, b"".join(recorded)[:-1])  # a record that lacks only its line end was not confirmed either
    assert found.all_records() == whole[:-1]
    found.keep(whole[-1])
    assert (tmp_path / "records.jsonl").read_bytes() == b"".join(recorded)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "no JSON": lambda line: line[:-3],
    "no object": lambda _line: b"[1]",
    "an empty line": lambda _line: b"",
    "another kind": lambda line: line.replace(b"PeersSeen", b"PeersSaw"),
    "no hex": lambda line: line.replace(b'"record": "', b'"record": "zz'),
    "no record": lambda line: line.replace(b'"record"', b'"recorc"'),
    "not UTF-8": lambda line: b"\xff" + line,
    "a number for a record": lambda _line: json.dumps({"kind": "Joined", "record": 7}).encode(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_record_is_refused_with_file_and_line(
    damage: Callable[[bytes], bytes], recorded: list[bytes], tmp_path: Path
) -> None:
    first, second, *rest = recorded
    with pytest.raises(UserError, match=r"records\.jsonl:2: expected a record of this site") as caught:
        load(tmp_path, b"".join([first, damage(second.strip()) + b"\n", *rest]))
    assert "sit out the running stages" in caught.value.hint


@pytest.mark.parametrize("change", [lambda record: record[:-2], lambda record: record + "00", lambda _record: ""])
def test_a_record_of_the_wrong_length_is_refused_with_file_and_line(
    change: Callable[[str], str], recorded: list[bytes], tmp_path: Path
) -> None:
    entry = json.loads(recorded[0])
    entry["record"] = change(entry["record"])
    with pytest.raises(UserError, match=r"records\.jsonl:1: expected a record of this site"):
        load(tmp_path, json.dumps(entry).encode() + b"\n")


# --- the coordinator --------------------------------------------------------------------------------------------------


def database(directory: Path) -> coordinator_store.Store:
    return coordinator_store.Store(directory / "state.db", directory / "rounds")


OLD_PLAN = (X, "old", b"toml", "open", "", 1.0)
ROW = RoundRow(X, Y, 1, 1, b"header", (0, 2, 3), 5.5, "running", "", None)


def test_what_the_coordinator_stored_is_there_after_a_restart(tmp_path: Path) -> None:
    store = database(tmp_path)
    store.add_plan(Y, "toy", b"raw", 1.5)
    store.set_ready(Y, 1, 2, 3.0)
    store.set_ready(Y, 1, 2, 9.0)  # who was ready first stays first
    store.set_ready(Y, 1, 0, 4.0)
    events = [Event("proofs", b"p"), Event("message", b"m"), Event("message", b"m"), Event("close", b"")]
    store.add_round(ROW, events[0])
    for event in events[1:]:
        store.add_event(X, event, 6.0)
    store.add_event(Y, Event("abort", b"another round"), 6.0)
    ended = replace(ROW, state="aborted", reason="a reason", culprit=3)
    assert store.end_round(ROW, "aborted", "a reason", 3, ()) == ended
    store.count_traffic(X, 2, sent=5)
    store.count_traffic(X, 2, sent=2, received=7, chunks=1)
    store.close()
    again = database(tmp_path)
    (plan,) = again.plans()
    assert (plan.digest, plan.name, plan.toml, plan.state, plan.submitted) == (Y, "toy", b"raw", "open", 1.5)
    assert again.ready(Y, 1) == {2: 3.0, 0: 4.0}
    assert again.ready(Y, 2) == {}
    assert again.rounds() == again.rounds(Y) == [ended]
    assert again.rounds(X) == []
    assert list(again.events(X)) == events
    assert again.traffic(X) == {2: (7, 7, 1)}
    again.end_round(ROW, "released", "", None, (2, 5))
    assert again.ready(Y, 1) == {0: 4.0}
    assert [plan.state for plan in again.plans()] == ["released"]


def test_a_receipt_is_given_once_and_never_changes(tmp_path: Path) -> None:
    store = database(tmp_path)
    store.add_receipt(X, 4, b"root", 10, b"signature")
    store.add_receipt(X, 4, b"other", 11, b"another")
    store.add_receipt(Y, 4, b"round two", 10, b"signature")
    assert store.receipts(X) == {4: (b"root", 10, b"signature")}
    store.close()
    assert database(tmp_path).receipts(X) == {4: (b"root", 10, b"signature")}


def test_a_second_plan_of_the_same_name_is_refused(tmp_path: Path) -> None:
    store = database(tmp_path)
    store.add_plan(X, "toy", b"raw", 1.0)
    with pytest.raises(UserError, match="expected a new plan name, found 'toy' again") as caught:
        store.add_plan(Y, "toy", b"raw, changed", 2.0)
    assert "a name of its own" in caught.value.hint
    assert [plan.digest for plan in store.plans()] == [X]


def test_two_rounds_of_one_number_are_refused(tmp_path: Path) -> None:
    store = database(tmp_path)
    store.add_round(ROW, Event("proofs", b"p"))
    with pytest.raises(sqlite3.IntegrityError):
        store.add_round(replace(ROW, id=Y), Event("proofs", b"q"))
    assert list(store.events(Y)) == []


@pytest.mark.parametrize("version", [5, 99, -1])
def test_a_database_of_another_version_is_refused_and_left_alone(tmp_path: Path, version: int) -> None:
    database(tmp_path).close()
    raw = sqlite3.connect(tmp_path / "state.db")
    raw.execute(f"pragma user_version={version}")
    raw.close()
    with pytest.raises(UserError, match=f"expected a database of version 4 or older, found {version}") as caught:
        database(tmp_path)
    assert "run the version of veilsum that wrote it" in caught.value.hint


@pytest.mark.parametrize("version", range(len(SCHEMA)))
def test_a_database_of_an_older_version_is_brought_up_to_date_with_what_is_in_it(tmp_path: Path, version: int) -> None:
    raw = sqlite3.connect(tmp_path / "state.db")
    for statements in SCHEMA[:version]:
        raw.executescript(statements)
    if version:
        raw.execute("insert into plans (digest, name, toml, state, reason, submitted) values (?,?,?,?,?,?)", OLD_PLAN)
    raw.execute(f"pragma user_version={version}")
    raw.commit()
    raw.close()
    store = database(tmp_path)
    store.use_roster(Y)  # plans of a version that knew of one roster only are of this one
    assert [(plan.digest, plan.name, plan.toml) for plan in store.plans()] == ([OLD_PLAN[:3]] if version else [])
    store.add_plan(Y, "new", b"raw", 2.0)
    store.add_round(ROW, Event("proofs", b"p"))
    assert database(tmp_path).stages(X) == {}


def test_a_file_that_is_no_database_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"not a database at all, but long enough to look at" * 20)
    with pytest.raises(UserError, match=r"state\.db: expected the coordinator's database"):
        database(tmp_path)
