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

import grpc
import structlog

from coordinator import metrics
from coordinator.config import Home, check_identity
from coordinator.counts import Counts
from coordinator.engine import Engine
from coordinator.gate import Gate
from coordinator.health import add_health, add_reflection
from coordinator.memory import give_memory_back
from coordinator.pulse import Pulse, Wellbeing
from coordinator.report import report
from coordinator.service import FederationService, OperatorService, add_federation, add_operator
from coordinator.store import Store
from coordinator.uploads import Uploads
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


def _credentials(home: Home) -> grpc.ServerCredentials:
    hint = "issue the coordinator's TLS certificate first"
    key = read_private(home.tls_key, "the coordinator's TLS key", hint)
    certificate = read_file(home.tls_certificate, "the coordinator's TLS certificate", hint)
    authority = read_file(home.authority, "the authority's certificate", hint)
    return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)


async def _start_operator(home: Home, engine: Engine, wellbeing: Wellbeing) -> grpc.aio.Server:
    if len(os.fsencode(home.socket)) > SOCKET_PATH_BYTES:
        raise UserError(
            f"{home.socket}: expected a path of at most {SOCKET_PATH_BYTES} bytes", hint="use a shorter one"
        )
    home.socket.unlink(missing_ok=True)
    server = grpc.aio.server()
    add_operator(server, OperatorService(engine, lambda name: report(engine, name, wellbeing.fault())))
    add_health(server, wellbeing)
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{home.socket}")
        await server.start()
    finally:
        os.umask(before)
    return server


async def _start_federation(home: Home, engine: Engine, wellbeing: Wellbeing, counts: Counts) -> grpc.aio.Server:
    gate = Gate(counts=counts)
    server = grpc.aio.server(interceptors=[gate], options=SERVER_OPTIONS, maximum_concurrent_rpcs=MOST_CALLS)
    witnesses = Witnesses(home.witnesses, engine.roster.roster, engine.clock)
    add_federation(server, FederationService(engine, Uploads(engine, home.settings.max_uploads), witnesses, counts))
    add_health(server, wellbeing)
    add_reflection(server)
    try:
        server.add_secure_port(home.settings.listen, _credentials(home))
    except RuntimeError as error:
        raise UserError(
            f"expected to listen on {home.settings.listen}, found it taken or not ours",
            hint="choose another address under 'listen' in coordinator.toml",
        ) from error
    await server.start()
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


def take_all_files() -> int:
    """Raise this process's limit of open files to what the system allows; the limit.

    Each connection is one, and whoever can reach the port can open many before it has to say who it is.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


async def serve(home: Home) -> None:
    """Run until SIGINT or SIGTERM."""
    take_all_files()
    give_memory_back()
    log.info("mask engine", engine=best_engine()[1])  # loaded here: it is part of what this process always needs
    engine = open_engine(home)
    stop = asyncio.Event()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "call"))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    wellbeing, counts = Wellbeing(engine), Counts()
    metrics.register(counts, engine, wellbeing)
    federation = await _start_federation(home, engine, wellbeing, counts)
    operator = await _start_operator(home, engine, wellbeing)
    log.info("listening", address=home.settings.listen, federation=engine.roster.roster.federation)
    notify(READY=1)
    worker = Worker(engine)
    try:
        with metrics_page(home.settings.metrics_listen, counts.registry):
            await asyncio.gather(
                _repeat(engine.tick, stop, wellbeing.deadlines),
                _repeat(worker.work, stop, wellbeing.work),
                _tell_manager(wellbeing, stop),
            )
    finally:
        wellbeing.stopping = True
        notify(STOPPING=1)
        await asyncio.gather(federation.stop(GRACE_S), operator.stop(GRACE_S))
        engine.store.close()
        home.socket.unlink(missing_ok=True)
        log.info("stopped")
