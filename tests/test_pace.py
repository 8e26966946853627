"""``max_upload_rate``: one bucket for all that is sent, resumed uploads too, and no plan whose upload would be late."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import coordinator.uploads
import participant.cli
from participant.approvals import approve, consider
from participant.client import Client, OfferedPlan
from participant.doctor import _uploads
from participant.pace import Pace, UploadTime
from participant.policy import allow
from privacy.console import Unreachable
from privacy.errors import Refusal, UserError
from privacy.wire.transport import CHUNK_HEADER, MOST_CHUNK_BYTES, chunk_bytes
from tests.hostile import Hostile
from tests.on_disk import OnDisk
from tests.test_policy import job, site

CHUNK = chunk_bytes(24)


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sent: list[tuple[float, int]] = []

    def pace(self, rate: int | None) -> Pace:
        return Pace(rate, lambda: self.now, self.sleep)

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


def most(sent: list[tuple[float, int]], seconds: float) -> int:
    """Most bytes that left within any so many seconds."""
    return max(sum(n for at, n in sent if begin <= at <= begin + seconds) for begin, _ in sent)


# --- the bucket, by a clock of our own -------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0.5, 2.0, 5.0, 30.0])
def test_no_window_has_more_than_its_rate_and_one_chunk(window: float) -> None:
    clock, rate = Clock(), 2_000_000
    pace = clock.pace(rate)
    for number in range(200):
        if number % 50 == 49:
            clock.now += 60  # a broken connection: what was not sent meanwhile is not made up for
        pace.take(CHUNK)
        clock.sent.append((clock.now, CHUNK))
    assert most(clock.sent, window) <= rate * window + CHUNK
    assert clock.now == pytest.approx(4 * 60 + 200 * CHUNK / rate)


def test_small_messages_count_and_hardly_wait() -> None:
    clock = Clock()
    pace = clock.pace(1_000_000)
    pace.take(500)
    assert clock.now == pytest.approx(0.0005)
    for _ in range(1000):
        pace.take(1000)
    assert clock.now == pytest.approx(1.0005)


def test_without_a_rate_nobody_waits() -> None:
    clock = Clock()
    clock.pace(None).take(1 << 40)
    assert clock.now == 0


def test_many_threads_share_one_bucket() -> None:
    pace = Pace(1_000_000)
    began, ended = time.monotonic(), []

    def send() -> None:
        for _ in range(5):
            pace.take(10_000)
        ended.append(time.monotonic())

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(ended) - began >= 4 * 5 * 10_000 / 1_000_000


# --- a real upload over loopback -------------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Hostile]:
    found = Hostile(tmp_path)
    yield found
    found.close()


def client_of(hostile: Hostile, member: int, pace: Pace) -> Client:
    """A real client of a site of this world."""
    there = hostile.world.daemons[member].site
    return Client(there.home.directory, hostile.address, there.roster, member, pace=pace)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """When how many bytes of chunks came to the coordinator."""
    came: list[tuple[float, int]] = []
    put = coordinator.uploads.Uploads.put

    def watching(self: coordinator.uploads.Uploads, *about: object) -> int:
        came.append((time.monotonic(), len(about[3]) + CHUNK_HEADER))  # type: ignore[arg-type]
        return put(self, *about)  # type: ignore[arg-type]

    monkeypatch.setattr(coordinator.uploads.Uploads, "put", watching)
    return came


def test_an_upload_over_loopback_keeps_to_its_rate(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    came, rate, upload = watch(monkeypatch), 600_000, hostile.uploads[0]
    client = client_of(hostile, 0, Pace(rate))
    began = time.monotonic()
    client.upload(upload.round_id, upload.message, upload.spool, 24)
    took, size = time.monotonic() - began, upload.spool.stat().st_size
    client.close()
    assert sum(n for _, n in came) == size + 2 * CHUNK_HEADER
    assert took >= size / rate, "on average over the whole upload"
    assert took < size / rate + 5, "and the line is used"
    for at, count in came:
        before = sum(n for then, n in came if then <= at)
        assert before <= rate * (at - began) * 1.02, "at no time more than its rate since the beginning"
        assert count <= CHUNK_HEADER + MOST_CHUNK_BYTES


def test_without_a_rate_it_is_as_fast_as_the_line(hostile: Hostile) -> None:
    upload = hostile.uploads[0]
    client = client_of(hostile, 0, Pace(None))
    began = time.monotonic()
    client.upload(upload.round_id, upload.message, upload.spool, 24)
    client.close()
    assert time.monotonic() - began < 2


def test_what_goes_on_pays_for_the_rest_only(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    upload, clock, came = hostile.uploads[0], Clock(), watch(monkeypatch)
    pace = clock.pace(100_000)

    class Cut(Pace):
        """The connection breaks when the second chunk is to leave."""

        def take(self, count: int) -> None:
            if count > CHUNK_HEADER and clock.sent:
                while not hostile.rounds.uploads.progress(upload.round_id)[0][0]:
                    time.sleep(0.01)  # or what is still on its way would be sent again
                raise Unreachable("cut")
            pace.take(count)
            clock.sent += [(clock.now, count)] if count > CHUNK else []

    client = client_of(hostile, 0, Cut(1))
    with pytest.raises(Unreachable):
        client.upload(upload.round_id, upload.message, upload.spool, 24)
    client.close()
    first = clock.now
    assert first == pytest.approx(CHUNK / 100_000, rel=0.01)
    client = client_of(hostile, 0, pace)
    client.upload(upload.round_id, upload.message, upload.spool, 24)
    client.close()
    rest = upload.spool.stat().st_size - CHUNK
    assert sum(n for _, n in came) == upload.spool.stat().st_size + 2 * CHUNK_HEADER, "nothing was sent twice"
    assert clock.now - first == pytest.approx(rest / 100_000, rel=0.02)


# --- will it be in time? ---------------------------------------------------------------------------------------------


def test_a_plan_whose_upload_would_be_late_is_refused_before_it_trains() -> None:
    slow = job(("upload_s = 2", "upload_s = 1"), ("[2, 8]", "[2, 800000]"))
    found = UploadTime.of(slow, 200_000)
    assert (found.state, found.deadline_s) == ("late", 1)
    with pytest.raises(
        Refusal, match=r"plan 'toy' uploads 4.8 MB, which takes 24 s at max_upload_rate 200000; upload_s"
    ):
        allow(slow, site("member =", "max_upload_rate = 200000\nmember ="))
    allow(slow, site())
    allow(slow, site("member =", f"max_upload_rate = {found.least_rate}\nmember ="))
    assert UploadTime.of(slow, found.least_rate).state == "in time"
    assert UploadTime.of(slow, found.least_rate - 1).state == "tight"
    assert UploadTime.of(slow, None).state == "unknown"


@pytest.mark.parametrize("wrong", ["0", "19999", "-1", '"2 MB/s"', "1e6", "true"])
def test_a_rate_is_a_number_of_bytes_that_can_carry_a_chunk(wrong: str) -> None:
    with pytest.raises(UserError, match="max_upload_rate"):
        site("member =", f"max_upload_rate = {wrong}\nmember =")


def test_doctor_and_plans_say_how_long_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = OnDisk(tmp_path)
    here = world.daemons[0].site
    offered = [OfferedPlan(world.plan, "open", "", 1)]
    assert list(_uploads(here, offered)) == []
    path = here.home.directory / "participant.toml"
    path.write_text("max_upload_rate = 20000\n" + path.read_text())
    here = type(here).open(here.home.directory)
    (check,) = _uploads(here, offered)
    assert (check.name, check.state) == ("upload", "ok")
    assert "at max_upload_rate 20000; upload_s is" in check.found
    found = consider(here, offered[0]).upload
    assert found is not None
    assert str(found) in check.found
    for share, state in ((0.9, "warn"), (1.1, "fail")):
        monkeypatch.setattr("participant.pace.packed_length", lambda *_, s=share: int(s * found.deadline_s * 20_000))
        (check,) = _uploads(here, offered)
        assert check.state == state
        assert check.todo.startswith("set max_upload_rate to ")
    monkeypatch.setattr(type(here), "client", lambda _: Offers(offered))
    shown = CliRunner().invoke(participant.cli.app, ["plans", "--dir", str(here.home.directory)])
    assert "it would be late; set max_upload_rate to" in shown.output
    assert "refused" in shown.output


@pytest.mark.parametrize(
    ("by", "agreed"),
    [("name", True), ("approval", True), ("nobody", False), ("file", True), ("file, another data set", False)],
)
def test_doctor_looks_at_the_plans_this_site_agreed_to_whatever_by(tmp_path: Path, by: str, agreed: bool) -> None:
    world = OnDisk(tmp_path)
    home = world.daemons[0].site.home
    path = home.directory / "participant.toml"
    text = "max_upload_rate = 20000\n" + path.read_text()
    if by != "name":
        text = text.replace('plans = ["toy"]', "plans = []")
    if by.startswith("file"):
        text += '[policy.admits]\nbases = ["tiny"]\ndatasets = ["toy"]\n'
    if by == "file, another data set":  # which this site's file does not have
        text = text.replace("[datasets.toy]", "[datasets.its]") + 'max_epsilon = { toy = "1" }\n'
    path.write_text(text)
    here = type(world.daemons[0].site).open(home.directory)
    if by == "approval":
        consider(here, OfferedPlan(world.plan, "open", "", 1))
        approve(here.home, "toy")
    assert len(list(_uploads(here, [OfferedPlan(world.plan, "open", "", 1)]))) == agreed


class Offers:
    """A coordinator that offers these plans."""

    def __init__(self, offered: list[OfferedPlan]) -> None:
        self.offered = offered

    def hello(self) -> None: ...

    def plans(self) -> list[OfferedPlan]:
        return self.offered
