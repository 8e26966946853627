"""What the two daemons show to Prometheus: the numbers, who may read them, and that docs/metrics.md has all of them."""

from __future__ import annotations

import asyncio
import http.client
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import pytest
import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

import participant.counts
import participant.metrics
from coordinator import phases
from coordinator.engine import Engine
from coordinator.service import FederationService
from participant.daemon import Daemon
from participant.site import Site
from privacy import exposition
from privacy.endings import stored
from privacy.errors import ProtocolError, Refusal, UserError
from privacy.exposition import metrics_page, split_address
from privacy.wire import federation_pb2 as pb
from scripts.reference import FAMILIES
from tests.charging import BUDGET, Silent, World, offered, spend
from tests.hostile import ANSWER_S, Hostile
from tests.on_disk import OnDisk

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
COORDINATOR, PARTICIPANT = FAMILIES["coordinator"], FAMILIES["participant"]


def test_the_page_of_the_docs_lists_every_family() -> None:
    shown = re.findall(r"^\| `(veilsum_\w+)`", PAGE, re.MULTILINE)
    assert shown == [f.name for f in (*COORDINATOR, *PARTICIPANT)]


def test_names_follow_the_conventions() -> None:
    for side, families in (("coordinator", COORDINATOR), ("participant", PARTICIPANT)):
        assert len({f.name for f in families}) == len(families)
        for f in families:
            assert re.fullmatch(rf"veilsum_{side}_[a-z_]+", f.name)
            assert f.name.endswith("_total") == (f.kind == "counter")
            assert f.kind != "histogram" or f.name.endswith("_seconds")
            assert f.help.endswith(".")
            assert set(f.labels) <= {
                *("plan", "member", "phase", "reason", "state", "method", "dataset", "unit", "version", "federation")
            }


def test_a_block_that_a_member_audits_is_among_what_it_received(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes as the totals themselves, where there are many sites."""
    engine = mock.create_autospec(Engine, instance=True, rounds={b"x": None}, store=mock.Mock(), roster=mock.Mock())
    engine.upload_block.return_value = (b"block", [b"p" * 32])

    async def fetched() -> pb.UploadBlock:
        service = FederationService(engine, mock.Mock(), mock.Mock(), mock.Mock(), mock.Mock())
        monkeypatch.setattr(service, "_member", mock.AsyncMock(return_value=3))
        return await service.FetchBlock(pb.FetchBlockRequest(round=b"x", member=1, block=0), mock.Mock())

    block = asyncio.run(fetched())
    engine.store.count_traffic.assert_called_once_with(b"x", 3, received=block.ByteSize())


def test_every_name_in_the_alerts_exists() -> None:
    named = set(re.findall(r"\bveilsum_[a-z_]+", PAGE))
    shown = {f.name for f in (*COORDINATOR, *PARTICIPANT)}
    shown |= {f"{f.name}{end}" for f in (*COORDINATOR, *PARTICIPANT) for end in ("_bucket", "_count", "_sum")}
    assert named <= shown


# --- the page --------------------------------------------------------------------------------------------------------


def read(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
        return str(reply.read().decode())


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (s.name, frozenset(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def shown(registry: CollectorRegistry) -> Callable[..., float | None]:
    """Looks a number up on the page of a registry, as Prometheus would read it."""
    with metrics_page("0", registry) as port:
        found = samples(read(port))
    return lambda name, **labels: found.get((name, frozenset(labels.items())))


def test_a_port_alone_is_for_this_machine_only() -> None:
    assert split_address("9464") == ("127.0.0.1", 9464)
    assert split_address("0.0.0.0:9464") == ("0.0.0.0", 9464)
    assert split_address("[::1]:9464") == ("::1", 9464)
    with metrics_page("0", CollectorRegistry()) as port, socket.socket() as other:
        other.settimeout(5)
        with pytest.raises(OSError):
            other.connect(("127.0.0.2", port))


def test_nothing_listens_unless_the_file_says_so() -> None:
    with metrics_page("", CollectorRegistry()) as port:
        assert port == 0


def test_an_address_that_is_taken_is_one_line() -> None:
    with metrics_page("0", CollectorRegistry()) as port:
        page = metrics_page(str(port), CollectorRegistry())
        with pytest.raises(UserError, match=f"expected to show metrics at {port}, found") as caught, page:
            pass
    assert "metrics_listen" in caught.value.hint


def test_only_metrics_are_there_and_only_to_be_read() -> None:
    with metrics_page("0", CollectorRegistry()) as port:
        with pytest.raises(urllib.error.HTTPError) as caught:
            read(port, "/")
        assert caught.value.code == 404
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("POST", "/metrics", b"x")
        assert connection.getresponse().status == 501


def test_a_reader_that_says_nothing_does_not_keep_the_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition._Page, "timeout", 0.5)
    with metrics_page("0", CollectorRegistry()) as port, socket.create_connection(("127.0.0.1", port)):
        started = time.monotonic()
        assert read(port) == ""
        assert time.monotonic() - started < 5


def test_numbers_that_cannot_be_read_are_a_failed_scrape_and_not_the_end() -> None:
    class Broken:
        def collect(self) -> Iterator[Any]:
            raise RuntimeError("gone")

    registry = CollectorRegistry()
    registry.register(Broken())
    structlog.configure(processors=[lambda *_: (_ for _ in ()).throw(structlog.DropEvent)])
    with metrics_page("0", registry) as port:
        for _ in range(2):
            with pytest.raises((http.client.HTTPException, urllib.error.URLError, ConnectionError)):
                read(port)


# --- the coordinator -------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Hostile]:
    found = Hostile(tmp_path / "h", large=False)
    structlog.configure(processors=[found.log])
    yield found
    found.close()


def test_the_coordinator_shows_the_round_from_upload_to_release(hostile: Hostile) -> None:
    at = shown(hostile.counts.registry)
    assert at("veilsum_coordinator_round_phase", plan="toy", phase="uploading") == 1
    assert at("veilsum_coordinator_round_phase", plan="toy", phase="released") == 0
    assert at("veilsum_coordinator_plan_state", plan="toy", state="open") == 1
    assert at("veilsum_coordinator_members_ready", plan="toy") == 5
    assert at("veilsum_coordinator_members") == 5
    assert at("veilsum_coordinator_member_awaited", plan="toy", member="site-3") == 1
    assert at("veilsum_coordinator_healthy") == 1
    assert (at("veilsum_coordinator_phase_deadline_timestamp_seconds", plan="toy") or 0) > time.time() - 3600
    assert (at("veilsum_coordinator_certificate_expiry_timestamp_seconds") or 0) > time.time() + 86400
    assert (at("process_resident_memory_bytes") or 0) > 1e6
    for member, upload in hostile.uploads.items():
        hostile.caller(member).upload(upload)
    hostile.world.run(until=phases.Released)
    hostile.world.engine.tick()
    at = shown(hostile.counts.registry)
    assert at("veilsum_coordinator_round_phase", plan="toy", phase="released") == 1
    assert at("veilsum_coordinator_rounds", plan="toy", state="released") == 1
    assert at("veilsum_coordinator_members_released", plan="toy") == 5
    assert at("veilsum_coordinator_member_awaited", plan="toy", member="site-3") is None
    assert at("veilsum_coordinator_phase_deadline_timestamp_seconds", plan="toy") is None
    assert at("veilsum_coordinator_phase_seconds_count", phase="uploading") == 1
    chunks = sum(len(chunk) for chunk in hostile.uploads[3].chunks())
    assert at("veilsum_coordinator_member_upload_bytes_total", plan="toy", member="site-3") == chunks
    assert (at("veilsum_coordinator_member_sent_bytes_total", plan="toy", member="site-3") or 0) > chunks
    assert at("veilsum_coordinator_call_seconds_count", method="FinishUpload") == 5


def test_the_coordinator_counts_refusals_by_member_and_class(hostile: Hostile) -> None:
    caller = hostile.caller(1)
    for method, request, code in (
        ("Ready", pb.ReadyRequest(plan=b"?"), grpc.StatusCode.FAILED_PRECONDITION),
        ("Send", pb.SendRequest(round=b"?"), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            getattr(caller.stub, method)(request, timeout=ANSWER_S)
        assert caught.value.code() == code
    with pytest.raises(grpc.RpcError):
        caller.raw("Send", b"\xff\xff")
    at = shown(hostile.counts.registry)
    for reason in ("policy", "protocol", "malformed"):
        assert at("veilsum_coordinator_refusals_total", member="site-1", reason=reason) == 1
    hostile.counts.refused("anybody\n", "stranger")
    assert shown(hostile.counts.registry)("veilsum_coordinator_refusals_total", member="other", reason="stranger") == 1


def test_a_plan_that_cannot_open_a_round_is_held(hostile: Hostile) -> None:
    hostile.world.engine.held[hostile.world.digest] = stored("no space")
    hostile.wellbeing.stopping = True
    at = shown(hostile.counts.registry)
    assert at("veilsum_coordinator_plan_held", plan="toy") == 1
    assert at("veilsum_coordinator_healthy") == 0


# --- a site ----------------------------------------------------------------------------------------------------------


def test_a_site_shows_its_rounds(tmp_path: Path) -> None:
    world = OnDisk(tmp_path)
    world.ready()
    world.run()
    site = world.site(2)
    site.counts.refused(Refusal("no"))
    site.counts.refused(ProtocolError("no"))
    participant.metrics.register(site)
    at = shown(site.counts.registry)
    assert at("veilsum_participant_rounds_joined_total") == 1
    assert at("veilsum_participant_plan_state", plan="toy", state="ready") == 1
    assert at("veilsum_participant_plan_state", plan="toy", state="released") == 0
    assert at("veilsum_participant_refusals_total", reason="policy") == 1
    assert at("veilsum_participant_refusals_total", reason="protocol") == 1
    assert (at("veilsum_participant_certificate_expiry_timestamp_seconds") or 0) > time.time() + 86400
    assert at("veilsum_participant_jobs", dataset="toy", state="committed") == 1


def test_a_site_shows_its_budget_as_the_ledger_has_it(world: World) -> None:
    world.configure(BUDGET.format(8))
    spend(world, 2)
    site = world.site
    participant.metrics.register(site)
    at = shown(site.counts.registry)
    from participant.charging import account

    found, about = account(world.site, "toy"), {"dataset": "toy", "unit": "record"}
    assert f"{at('veilsum_participant_epsilon_spent', **about):.4f}" == found["spent"]
    assert f"{at('veilsum_participant_epsilon_reserved', **about):.4f}" == found["reserved"]
    assert f"{at('veilsum_participant_epsilon_left', **about):.4f}" == found["left"]
    assert at("veilsum_participant_epsilon_budget", **about) == 8
    assert at("veilsum_participant_jobs", dataset="toy", state="started") == 2
    spend(world, 3)
    after = shown(site.counts.registry)
    assert (after("veilsum_participant_epsilon_spent", **about) or 0) > float(found["spent"])


def test_a_ledger_that_did_not_change_is_not_read_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.configure(BUDGET.format(8))
    spend(world)
    participant.metrics.register(site := world.site)
    first = shown(site.counts.registry)("veilsum_participant_epsilon_spent", dataset="toy", unit="record")
    monkeypatch.setattr(participant.metrics, "verify_lines", lambda *_: pytest.fail("read again"))
    assert shown(site.counts.registry)("veilsum_participant_epsilon_spent", dataset="toy", unit="record") == first


def test_a_ledger_that_does_not_verify_has_no_numbers_and_says_so(world: World) -> None:
    world.configure(BUDGET.format(8))
    spend(world)
    participant.metrics.register(site := world.site)
    path = site.home.ledgers / "toy.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"sigma":"1.5"', b'"sigma":"9.5"'))
    at = shown(site.counts.registry)
    assert at("veilsum_participant_ledger_readable", dataset="toy") == 0
    assert at("veilsum_participant_epsilon_spent", dataset="toy", unit="record") is None


def test_progress_of_a_training_is_a_share(world: World) -> None:
    said: list[int] = []
    site, job = world.site, world.job()
    report = site.counts.watching(lambda *_: lambda step, _steps, _loss: said.append(step))(job, 1)
    report(3, 12, 0.5)
    participant.metrics.register(site)
    assert said == [3]
    assert shown(site.counts.registry)("veilsum_participant_training_progress_ratio", plan="toy") == 0.25


def test_a_refused_plan_counts_once_however_often_it_is_looked_at(world: World) -> None:
    world.configure(BUDGET.format("0.01"))
    daemon = Daemon(world.site, Silent())
    for _ in range(3):
        assert daemon._consider(offered("quiet")) == "refused"
    participant.metrics.register(daemon.site)
    at = shown(daemon.site.counts.registry)
    assert at("veilsum_participant_refusals_total", reason="policy") == 1
    assert at("veilsum_participant_plan_state", plan="quiet", state="refused") == 1


def test_a_site_counts_calls_and_bytes(hostile: Hostile) -> None:
    site = Site.open(hostile.world.federation.site("site-1"))
    client = site.client()
    client.hello()
    participant.metrics.register(site)
    at = shown(site.counts.registry)
    assert at("veilsum_participant_call_seconds_count", method="Hello") == 1
    assert (at("veilsum_participant_sent_bytes_total") or 0) > 32
    assert (at("veilsum_participant_received_bytes_total") or 0) > 64
    assert (at("veilsum_participant_last_answer_timestamp_seconds") or 0) > time.time() - 60
    with pytest.raises(Refusal):
        client.ready(b"?", 1)
    client.close()
    assert shown(site.counts.registry)("veilsum_participant_calls_failed_total") == 1
