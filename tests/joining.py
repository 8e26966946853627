"""A real coordinator in this process that takes sites in, and serves members about membership."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import grpc

from coordinator import daemon, rosters
from coordinator.config import load_home
from coordinator.members import Members
from coordinator.pki import authority_certificate
from coordinator.setup import Ports, create_coordinator
from demo.federation import free_port
from participant.joining import Joined, Membership, join
from privacy.identity import load_identity
from privacy.invitation import Invitation


class Coordinator:
    """Made by ``init``, without rounds: the joining port and the members' port."""

    def __init__(self, directory: Path, federation: str = "newsrooms") -> None:
        self.directory, self.federation = directory, federation
        ports = Ports("127.0.0.1", free_port(), free_port())
        create_coordinator(directory / "coordinator", federation, "localhost", ports)
        self.home = load_home(directory / "coordinator")
        self.members = Members(self.home.members, time.time)
        self.url, self.address = f"https://localhost:{ports.joining}", f"localhost:{ports.members}"
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        identity = load_identity(self.home.directory)
        self.servers: list[grpc.aio.Server] = [
            self.on_loop(daemon._start_joining(self.home)),
            self.on_loop(daemon._start_members(self.home, identity, None)),
        ]

    def on_loop(self, work: Any) -> Any:
        """Run a coroutine where the servers run."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def close(self) -> None:
        for server in self.servers:
            self.on_loop(server.stop(0))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def invite(self, name: str, seconds: int = 600) -> str:
        """A token for a new member."""
        secret, expires = name.encode().ljust(32, b"\0"), int(time.time()) + seconds
        self.members.invite(name, secret, expires)
        return Invitation(self.federation, name, expires, authority_certificate(self.home.directory), secret).token()

    def join(self, name: str) -> Joined:
        """A site that has joined, in a directory of its name."""
        return join(self.site(name), self.url, self.invite(name))

    def site(self, name: str) -> Path:
        return self.directory / name

    def membership(self, name: str) -> Membership:
        return Membership(self.site(name), self.address)

    def publish(self, change: tuple[str, str] = ("", "")) -> None:
        """Put a roster of all members in force, after a change to its text."""
        text = rosters.draft(self.home).replace(*change)
        self.home.roster.write_text(text)
