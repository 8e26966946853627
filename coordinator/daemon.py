"""The coordinator process: starts the servers, lets deadlines pass, stops cleanly.

Correctness never depends on a clean stop: whatever was acknowledged is on disk.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial

import grpc
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator import metrics
from coordinator.config import Home, check_identity
from coordinator.counts import Counts
from coordinator.engine import Engine
from coordinator.gate import Gate
from coordinator.health import add_health, add_reflection
from coordinator.members import Members
from coordinator.membership import MembershipService, add_membership, joining_server
from coordinator.memory import give_memory_back
from coordinator.pki import is_server_due, renew_server
from coordinator.pulse import Pulse, Wellbeing
from coordinator.report import report
from coordinator.service import FederationService, OperatorService, add_federation, add_operator
from coordinator.store import Store
from coordinator.uploads import Uploads
from coordinator.web import status_page
from coordinator.witnesses import Witnesses
from coordinator.work import Worker
from privacy.errors import UserError
from privacy.exposition import metrics_page
from privacy.files import DiskError, make_private_directory, read_file, read_private
from privacy.identity import load_identity
from privacy.notify import notify, watchdog_s
from privacy.secagg.masking import best_engine
from privacy.wire.transport import SERVER_OPTIONS

log = structlog.get_logger()

TICK_S = 0.2
#: Seconds between two words to the service manager, at most.
TELL_S = 10.0
GRACE_S = 2.0
#: Seconds between two looks at how long the coordinator's certificate is valid.
LOOK_S = 3600.0
#: Threads that serve calls; most of them wait, for the disk or for each other.
THREADS = 32
#: Calls in flight of everybody together, a long poll of each member among them.
MOST_CALLS = 2048
#: Longest path of a socket file on Linux.
SOCKET_PATH_BYTES = 107


def open_engine(home: Home) -> Engine:
    """Everything the coordinator needs, from its directory; raises UserError with what is missing."""
    identity = load_identity(home.directory)
    make_private_directory(home.releases)
    engine = Engine(home, Store(home.database, home.rounds), identity, time.time)
    check_identity(home, engine.roster, identity)
    return engine


@dataclass(frozen=True)
class Rounds:
    """What a coordinator with a roster has beside its members: the engine, how it is, and what is counted."""

    engine: Engine
    wellbeing: Wellbeing
    counts: Counts

    @cached_property
    def uploads(self) -> Uploads:
        """All uploads in progress: the members' port takes them, the status page tells of them."""
        return Uploads(self.engine, self.engine.home.settings.max_uploads)

    @classmethod
    def of(cls, engine: Engine) -> Rounds:
        """Those of an engine, its numbers registered for Prometheus."""
        found = cls(engine, Wellbeing(engine), Counts())
        metrics.register(found.counts, engine, found.wellbeing)
        return found


def _pair(home: Home) -> tuple[bytes, bytes]:
    hint = "issue the coordinator's TLS certificate first"
    key = read_private(home.tls_key, "the coordinator's TLS key", hint)
    return key, read_file(home.tls_certificate, "the coordinator's TLS certificate", hint)


def _credentials(home: Home) -> grpc.ServerCredentials:
    authority = read_file(home.authority, "the authority's certificate", "put it beside the coordinator's own")
    return grpc.ssl_server_credentials([_pair(home)], authority, require_client_auth=True)


def _report(wellbeing: Wellbeing | None, engine: Engine, name: str) -> str:
    return report(engine, name, wellbeing.fault() if wellbeing else "")


async def _start_operator(home: Home, service: OperatorService, wellbeing: Wellbeing | None) -> grpc.aio.Server:
    if len(os.fsencode(home.socket)) > SOCKET_PATH_BYTES:
        raise UserError(
            f"{home.socket}: expected a path of at most {SOCKET_PATH_BYTES} bytes", hint="use a shorter one"
        )
    home.socket.unlink(missing_ok=True)
    server = grpc.aio.server()
    add_operator(server, service)
    if wellbeing is not None:
        add_health(server, wellbeing)
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{home.socket}")
        await server.start()
    finally:
        os.umask(before)
    return server


def _listen(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials, key: str) -> None:
    try:
        server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise UserError(
            f"expected to listen on {address}, found it taken or not ours",
            hint=f"choose another address under '{key}' in coordinator.toml",
        ) from error


async def _start_members(home: Home, identity: Ed25519PrivateKey, rounds: Rounds | None) -> grpc.aio.Server:
    """The members' port: all of it, or without a roster what a member needs to get one."""
    gate = Gate(counts=rounds.counts if rounds else None)
    server = grpc.aio.server(interceptors=[gate], options=SERVER_OPTIONS, maximum_concurrent_rpcs=MOST_CALLS)
    members = Members(home.members, time.time)
    add_membership(server, MembershipService(home, members, identity))
    if rounds is not None:
        engine = rounds.engine
        witnesses = Witnesses(home.witnesses, engine.roster.roster, engine.clock)
        add_federation(server, FederationService(engine, rounds.uploads, witnesses, members, rounds.counts))
        add_health(server, rounds.wellbeing)
        add_reflection(server)
    _listen(server, home.settings.listen, _credentials(home), "listen")
    await server.start()
    return server


async def _start_joining(home: Home) -> grpc.aio.Server:
    server = joining_server(home, Members(home.members, time.time))
    _listen(server, home.settings.join_listen, grpc.ssl_server_credentials([_pair(home)]), "join_listen")
    await server.start()
    log.info("sites with an invitation can join", address=home.settings.join_listen)
    return server


async def _repeat(step: Callable[[], bool], stop: asyncio.Event, pulse: Pulse) -> None:
    """Run ``step`` again and again, at once while it finds something to do, until told to stop.

    It has a thread of its own: those that serve calls may all be waiting for the disk.
    """

    def once() -> bool:
        with pulse.step():
            return step()

    with ThreadPoolExecutor(1) as thread, pulse.turning():
        while not stop.is_set():
            try:
                if await asyncio.get_running_loop().run_in_executor(thread, once):
                    continue
            except DiskError as error:  # the disk is full: what was not written is tried again
                log.error("waiting for the disk", reason=str(error), hint=error.hint)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), TICK_S)


async def _tell_manager(wellbeing: Wellbeing, stop: asyncio.Event) -> None:
    """Say to the service manager that all is well, as often as it asks; silence makes it start this process again.

    A full disk is told as status and is no silence: a restart frees nothing.
    """
    period = watchdog_s()
    while not stop.is_set():
        fault = wellbeing.fault()
        notify(STATUS=f"not serving: {fault}" if fault else "serving", **({} if wellbeing.stuck() else {"WATCHDOG": 1}))
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), min(period / 3, TELL_S) if period else TELL_S)


async def _watch_certificate(home: Home, again: asyncio.Event) -> None:
    """Have the servers start anew, with another certificate, when this one's time comes."""
    while not again.is_set():
        await asyncio.sleep(LOOK_S)
        if is_server_due(home.directory):
            again.set()


def take_all_files() -> int:
    """Raise this process's limit of open files to what the system allows; the limit.

    Each connection is one, and whoever can reach the port can open many before it has to say who it is.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


@dataclass
class Stop:
    """When the servers stop, and whether for good or to start anew with what is on disk."""

    now: asyncio.Event = field(default_factory=asyncio.Event)
    for_good: bool = False

    def end(self) -> None:
        """Stop for good."""
        self.for_good = True
        self.now.set()


async def serve(home: Home) -> None:
    """Run until SIGINT or SIGTERM."""
    take_all_files()
    give_memory_back()
    log.info("mask engine", engine=best_engine()[1])  # loaded here: it is part of what this process always needs
    stop = Stop()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "call"))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.end)
    while not stop.for_good:
        stop.now.clear()
        await _serve_once(home, stop)
    log.info("stopped")


async def _serve_once(home: Home, stop: Stop) -> None:
    """Serve what is there: rounds where there is a roster, and without one whoever joins."""
    if is_server_due(home.directory):
        log.info("this coordinator's TLS certificate is renewed")
        renew_server(home.directory)
    waiting = bool(home.settings.join_listen) and not home.roster.exists()
    rounds = None if waiting else Rounds.of(open_engine(home))
    servers, watch = [], None
    try:
        engine, wellbeing = (rounds.engine, rounds.wellbeing) if rounds else (None, None)
        operator = OperatorService(engine, partial(_report, wellbeing), stop.now.set)
        servers.append(await _start_members(home, load_identity(home.directory), rounds))
        servers.append(await _start_operator(home, operator, wellbeing))
        if home.settings.join_listen:
            servers.append(await _start_joining(home))
        watch = asyncio.create_task(_watch_certificate(home, stop.now))
        notify(READY=1)
        if rounds is None:
            log.info("waiting for a roster", hint="veilsum-coordinator roster draft, then roster publish")
            await _wait_for_roster(stop.now)
        else:
            federation = rounds.engine.roster.roster.federation
            log.info("listening", address=home.settings.listen, federation=federation)
            await _work(home, rounds, stop.now)
    finally:
        if watch is not None:
            watch.cancel()
        if rounds is not None:
            rounds.wellbeing.stopping = True
        if stop.for_good:
            notify(STOPPING=1)
        await asyncio.gather(*(server.stop(GRACE_S) for server in servers))
        home.socket.unlink(missing_ok=True)
        if rounds is not None:
            rounds.engine.store.close()


async def _wait_for_roster(stop: asyncio.Event) -> None:
    """Until there is one; the service manager hears meanwhile that this process lives."""
    period = watchdog_s()
    while not stop.is_set():
        notify(STATUS="waiting for a roster", WATCHDOG=1)
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), min(period / 3, TELL_S) if period else TELL_S)


async def _work(home: Home, rounds: Rounds, stop: asyncio.Event) -> None:
    engine, wellbeing = rounds.engine, rounds.wellbeing
    worker = Worker(engine)
    page = status_page(home, engine, rounds.uploads)
    with metrics_page(home.settings.metrics_listen, rounds.counts.registry), page:
        await asyncio.gather(
            _repeat(engine.tick, stop, wellbeing.deadlines),
            _repeat(worker.work, stop, wellbeing.work),
            _tell_manager(wellbeing, stop),
        )
