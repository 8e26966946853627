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

import grpc
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.config import Home
from coordinator.engine import Engine
from coordinator.gate import Gate
from coordinator.members import Members
from coordinator.membership import MembershipService, add_membership, joining_server
from coordinator.memory import give_memory_back
from coordinator.pki import is_server_due, renew_server
from coordinator.report import report
from coordinator.service import FederationService, OperatorService, add_federation, add_operator
from coordinator.store import Store
from coordinator.uploads import Uploads
from coordinator.witnesses import Witnesses
from coordinator.work import Worker
from privacy.errors import UserError
from privacy.files import DiskError, make_private_directory, read_file, read_private
from privacy.identity import load_identity
from privacy.secagg.keys import identity_public
from privacy.secagg.masking import best_engine
from privacy.wire.transport import SERVER_OPTIONS

log = structlog.get_logger()

TICK_S = 0.2
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
    if engine.roster.roster.coordinator != identity_public(identity).hex():
        raise UserError(
            f"{home.roster}: expected this coordinator's key {identity_public(identity).hex()[:16]}…, "
            f"found {engine.roster.roster.coordinator[:16]}…",
            hint="use the roster that was made for this coordinator",
        )
    return engine


def _pair(home: Home) -> tuple[bytes, bytes]:
    hint = "issue the coordinator's TLS certificate first"
    key = read_private(home.tls_key, "the coordinator's TLS key", hint)
    return key, read_file(home.tls_certificate, "the coordinator's TLS certificate", hint)


def _credentials(home: Home) -> grpc.ServerCredentials:
    authority = read_file(home.authority, "the authority's certificate", "put it beside the coordinator's own")
    return grpc.ssl_server_credentials([_pair(home)], authority, require_client_auth=True)


async def _start_operator(home: Home, service: OperatorService) -> grpc.aio.Server:
    if len(os.fsencode(home.socket)) > SOCKET_PATH_BYTES:
        raise UserError(
            f"{home.socket}: expected a path of at most {SOCKET_PATH_BYTES} bytes", hint="use a shorter one"
        )
    home.socket.unlink(missing_ok=True)
    server = grpc.aio.server()
    add_operator(server, service)
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


async def _start_members(home: Home, identity: Ed25519PrivateKey, engine: Engine | None) -> grpc.aio.Server:
    """The members' port: all of it, or without a roster what a member needs to get one."""
    server = grpc.aio.server(interceptors=[Gate()], options=SERVER_OPTIONS, maximum_concurrent_rpcs=MOST_CALLS)
    members = Members(home.members, time.time)
    add_membership(server, MembershipService(home, members, identity))
    if engine is not None:
        witnesses = Witnesses(home.witnesses, engine.roster.roster, engine.clock)
        add_federation(
            server, FederationService(engine, Uploads(engine, home.settings.max_uploads), witnesses, members)
        )
    _listen(server, home.settings.listen, _credentials(home), "listen")
    await server.start()
    return server


async def _start_federation(home: Home, engine: Engine) -> grpc.aio.Server:
    return await _start_members(home, engine.identity, engine)


async def _start_joining(home: Home) -> grpc.aio.Server:
    server = joining_server(home, Members(home.members, time.time))
    _listen(server, home.settings.join_listen, grpc.ssl_server_credentials([_pair(home)]), "join_listen")
    await server.start()
    log.info("sites with an invitation can join", address=home.settings.join_listen)
    return server


async def _repeat(step: Callable[[], bool], stop: asyncio.Event) -> None:
    """Run ``step`` again and again, at once while it finds something to do, until told to stop.

    It has a thread of its own: those that serve calls may all be waiting for the disk.
    """
    with ThreadPoolExecutor(1) as thread:
        while not stop.is_set():
            try:
                if await asyncio.get_running_loop().run_in_executor(thread, step):
                    continue
            except DiskError as error:  # the disk is full: what was not written is tried again
                log.error("waiting for the disk", reason=str(error), hint=error.hint)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), TICK_S)


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
    engine = None if waiting else open_engine(home)
    servers, watch = [], None
    try:
        servers.append(await _start_members(home, load_identity(home.directory), engine))
        servers.append(await _start_operator(home, OperatorService(engine, report, stop.now.set)))
        if home.settings.join_listen:
            servers.append(await _start_joining(home))
        watch = asyncio.create_task(_watch_certificate(home, stop.now))
        if engine is None:
            log.info("waiting for a roster", hint="veilsum-coordinator roster draft, then roster publish")
            await stop.now.wait()
            return
        log.info("listening", address=home.settings.listen, federation=engine.roster.roster.federation)
        worker = Worker(engine)
        await asyncio.gather(_repeat(engine.tick, stop.now), _repeat(worker.work, stop.now))
    finally:
        if watch is not None:
            watch.cancel()
        await asyncio.gather(*(server.stop(GRACE_S) for server in servers))
        home.socket.unlink(missing_ok=True)
        if engine is not None:
            engine.store.close()
