"""A federation on one machine: directories, keys, certificates and roster, and the installed commands as processes.

Set-up calls the functions that the joining commands wrap; everything else goes through the commands, as an operator and
the administrators of the sites would.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator import pki
from participant import enrol
from privacy.errors import UserError
from privacy.files import make_private_directory, write_durably
from privacy.identity import create_identity
from privacy.secagg.keys import identity_public

BIN = Path(sys.executable).parent
START_S = 60.0


#: What keeps the ports given out from other processes of this machine, as long as this one lives.
_reserved: list[socket.socket] = []


def free_port() -> int:
    """A port of the loopback interface that nobody listens on and that is given out once.

    Linux gives ports from 32768 on to whoever connects; one of those may be taken before its daemon listens. Nor does
    another process that asks here get this one meanwhile: its UDP port, which nobody else wants, is held.
    """
    while True:
        port = random.SystemRandom().randrange(16_384, 32_768)
        held = socket.socket(type=socket.SOCK_DGRAM)
        try:
            held.bind(("127.0.0.1", port))
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            held.close()
            continue
        _reserved.append(held)
        return port


@dataclass
class Federation:
    """One coordinator and its sites under one directory.

    Attributes:
        policy: the pinned policy of the roster, as TOML keys.
        site_toml: what each site's file says beyond its address and name; site name -> TOML.
        environment: variables for every process.
        coordinator_toml: what the coordinator's file says beyond its address.
    """

    directory: Path
    names: Sequence[str]
    policy: Mapping[str, object]
    site_toml: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict)
    name: str = "demo"
    coordinator_toml: str = ""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def coordinator(self) -> Path:
        return self.directory / "coordinator"

    def site(self, name: str) -> Path:
        """Directory of a site."""
        return self.directory / name

    # --- set-up ------------------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make all directories, keys, certificates and the roster, and pin it everywhere."""
        port = free_port()
        make_private_directory(self.coordinator)
        key = identity_public(create_identity(self.coordinator)).hex()
        pki.create_authority(self.coordinator, self.name)
        pki.issue_server(self.coordinator, ["localhost", "127.0.0.1"])
        write_durably(
            self.coordinator / "coordinator.toml", f'listen = "127.0.0.1:{port}"\n{self.coordinator_toml}'.encode()
        )
        keys = {name: enrol.create_site(self.site(name)) for name in self.names}
        roster = self._roster(key, keys)
        write_durably(self.coordinator / "roster.toml", roster)
        authority = (self.coordinator / pki.AUTHORITY_CERTIFICATE).read_bytes()
        for name in self.names:
            site = self.site(name)
            certificate = pki.sign_request(self.coordinator, enrol.create_request(site, name), name)
            enrol.install_certificates(site, certificate, authority)
            enrol.pin_roster(site, roster)
            head = f'coordinator = "localhost:{port}"\nmember = "{name}"\n'
            write_durably(site / "participant.toml", (head + self.site_toml[name]).encode())

    def _roster(self, coordinator: str, keys: Mapping[str, str]) -> bytes:
        lines = [f'federation = "{self.name}"', f'coordinator = "{coordinator}"', "", "[policy]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in self.policy.items()]
        for name, key in keys.items():
            lines += ["", "[[members]]", f'name = "{name}"', f'key = "{key}"']
        return ("\n".join(lines) + "\n").encode()

    # --- processes ---------------------------------------------------------------------------------------------------

    def _start(self, name: str, command: Sequence[str]) -> None:
        log = (self.directory / f"{name}.log").open("ab")
        environment = {**os.environ, **self.environment}
        self.processes[name] = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
        log.close()

    def start_coordinator(self) -> None:
        """Start the coordinator and wait until it answers.

        Raises:
            UserError: it ended or did not answer; with the end of its log.
        """
        self._start("coordinator", [str(BIN / "veilsum-coordinator"), "serve", "--dir", str(self.coordinator)])
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.processes["coordinator"].poll() is None:
            if (self.coordinator / "operator.sock").exists() and self.operator("status", "--json", check=False):
                return
            time.sleep(0.1)
        raise UserError(f"the coordinator did not start: {self.log_tail('coordinator')}")

    def start_site(self, name: str, *options: str) -> None:
        """Start a site's daemon."""
        command = [str(BIN / "veilsum-participant"), "run", "--dir", str(self.site(name)), *options]
        self._start(name, command)

    def stop(self, name: str, number: int = signal.SIGTERM) -> int:
        """Stop one process and wait for it."""
        process = self.processes[name]
        if process.poll() is None:
            process.send_signal(number)
        return process.wait(30)

    def stop_all(self) -> None:
        """Stop whatever still runs."""
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def log_tail(self, name: str, lines: int = 5) -> str:
        """The last lines of a process's log."""
        content = (self.directory / f"{name}.log").read_text(errors="replace").splitlines()
        return "\n".join(content[-lines:])

    # --- what the operator and the sites ask -------------------------------------------------------------------------

    def _command(self, command: Sequence[str], *, check: bool) -> str:
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if check and done.returncode:
            raise UserError(f"{' '.join(map(str, command[:3]))}: {done.stderr.strip()}")
        return done.stdout if not done.returncode else ""

    def operator(self, *arguments: str, check: bool = True) -> str:
        """Run ``veilsum-coordinator`` on this coordinator; its output."""
        command = [str(BIN / "veilsum-coordinator"), *arguments, "--dir", str(self.coordinator)]
        return self._command(command, check=check)

    def participant(self, name: str, *arguments: str, check: bool = True) -> str:
        """Run ``veilsum-participant`` at a site; its output."""
        command = [str(BIN / "veilsum-participant"), *arguments, "--dir", str(self.site(name))]
        return self._command(command, check=check)

    def show(self, plan: str) -> dict[str, Any]:
        """What ``veilsum-coordinator show`` says of a plan."""
        found: dict[str, Any] = json.loads(self.operator("show", plan, "--json"))
        return found
