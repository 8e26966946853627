"""A federation of real processes under a supervisor: who dies is started again, and what was lost is written down."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import grpc

from demo.federation import BIN, Federation
from privacy.faults import Fault, parse_fault
from privacy.plan import PlanFile
from privacy.wire import federation_pb2 as pb
from privacy.wire.federation_pb2_grpc import OperatorStub
from tests.chaos.disk import last_joined
from tests.chaos.proxy import Proxies
from tests.chaos.toy import SITE, Shape, put_trained

COORDINATOR = "coordinator"
START_S = 60.0
WATCH_S = 0.1
#: The coordinator comes back within seconds, so the driver's channel asks often.
OPERATOR_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GRPC_VERBOSITY": "NONE"}


def mount_small(path: Path, megabytes: int) -> bool:
    """Make ``path`` a small file system of its own; False where this account may not."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


class World:
    """One coordinator, its sites behind proxies, and what happened to them."""

    def __init__(
        self,
        directory: Path,
        shape: Shape,
        plans: list[PlanFile],
        seed: int,
        disk_mb: int | None = None,
        *,
        keep_uploads: bool = False,
    ) -> None:
        self.directory, self.shape = directory, shape
        self.faults: Counter[str] = Counter()
        self.failures: list[str] = []
        #: (plan digest, round) -> members that a fault took out of it.
        self.lost: defaultdict[tuple[bytes, int], set[str]] = defaultdict(set)
        self.lock = threading.RLock()
        self.federation = Federation(directory, shape.names, shape.policy, dict.fromkeys(shape.names, SITE))
        self.federation.coordinator.mkdir(parents=True)
        self.small_disk = disk_mb is not None and mount_small(self.federation.coordinator, disk_mb)
        self.federation.create()
        self.port = self._port()
        if keep_uploads:
            with (self.federation.coordinator / "coordinator.toml").open("a") as file:
                file.write("keep_uploads = true\n")
        self.proxies = Proxies(self.port, shape.names, self.count)
        for name in shape.names:
            self._redirect(name)
        for plan in plans:
            put_trained(self.federation, plan, seed)
        #: (role, point) of the kills at points that struck.
        self.struck: list[tuple[str, str]] = []
        self._armed: dict[str, Fault] = {}
        self._disarmed: dict[str, Fault] = {}
        self._asked: set[str] = set()
        self._held: set[str] = set()
        self._away: set[str] = set()
        self._plan = b""
        self._down_since: float | None = None
        #: Seconds that the coordinator was away at the longest, since :meth:`begin`.
        self.outage_s = 0.0
        self._torn: set[str] = set()
        self._buried: set[int] = set()
        self._closing = threading.Event()
        self._timers: list[threading.Timer] = []
        self._channel = self._connect()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)

    # --- set-up ------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return [COORDINATOR, *self.shape.names]

    def _port(self) -> int:
        text = (self.federation.coordinator / "coordinator.toml").read_text()
        return int(text.rpartition(":")[2].partition('"')[0])

    def _redirect(self, name: str) -> None:
        path = self.federation.site(name) / "participant.toml"
        path.write_text(path.read_text().replace(f":{self.port}", f":{self.proxies.by_name[name].port}"))

    def _connect(self) -> grpc.Channel:
        return grpc.insecure_channel(f"unix:{self.federation.coordinator / 'operator.sock'}", OPERATOR_OPTIONS)

    def start(self) -> None:
        """Start everything; returns when the coordinator answers."""
        for name in self.names:
            self._launch(name)
        self._supervisor.start()
        self.wait_for_coordinator()

    def wait_for_coordinator(self) -> None:
        deadline = time.monotonic() + START_S
        while self.report() is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the coordinator does not answer: {self.tail(COORDINATOR)}")
            time.sleep(0.1)

    def close(self) -> None:
        """Stop everything."""
        self._closing.set()
        for timer in self._timers:
            timer.cancel()
        self._kill_all()
        if self._supervisor.is_alive():
            self._supervisor.join()
        self._kill_all()  # what the supervisor was just starting
        self._channel.close()
        self.proxies.close()
        if self.small_disk:
            subprocess.run(["umount", "-l", str(self.federation.coordinator)], check=False)

    def _kill_all(self) -> None:
        # One list for both: the supervisor may start another process between them, which nobody would have killed.
        processes = list(self.federation.processes.values())
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()

    def count(self, kind: str) -> None:
        """One fault took effect."""
        with self.lock:
            self.faults[kind] += 1

    def tail(self, name: str, lines: int = 12) -> str:
        return self.federation.log_tail(name, lines)

    # --- processes ---------------------------------------------------------------------------------------------------

    def _launch(self, name: str) -> None:
        if name == COORDINATOR:
            command = [str(BIN / "veilsum-coordinator"), "serve", "--dir", str(self.federation.coordinator)]
        else:
            command = [str(BIN / "veilsum-participant"), "run", "--dir", str(self.federation.site(name))]
        fault, trace = self.fault_file(name), self.trace_file(name)
        points = {"VEILSUM_FAULT_FILE": str(fault), "VEILSUM_FAULT_TRACE": str(trace)}
        with (self.directory / f"{name}.log").open("ab") as log:
            self.federation.processes[name] = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT, **points},
            )

    def fault_file(self, name: str) -> Path:
        return self.directory / f"{name}.fault"

    def trace_file(self, name: str) -> Path:
        return self.directory / f"{name}.trace"

    def trace(self, name: str) -> list[str]:
        """Points a process passed since :meth:`begin`."""
        path = self.trace_file(name)
        return path.read_text().splitlines() if path.exists() else []

    def begin(self, plan: PlanFile) -> None:
        """A new plan begins; what was counted for the one before is forgotten."""
        self._plan = plan.digest
        self.outage_s = 0.0
        self._disarmed.clear()
        self.failures.clear()
        self.struck.clear()
        for name in self.names:
            with contextlib.suppress(FileNotFoundError):
                os.truncate(self.trace_file(name), 0)

    def arm(self, name: str, fault: str) -> None:
        """Ask a process for a fault; :meth:`disarm` takes it back."""
        parsed = parse_fault(fault)
        if parsed is None:
            raise ValueError("expected a fault, found none")
        with self.lock:
            self._armed[name] = parsed
            self._disarmed.pop(name, None)
            self.fault_file(name).write_text(fault)

    def disarm(self, name: str) -> None:
        with self.lock:
            if fault := self._armed.pop(name, None):
                self._disarmed[name] = fault  # it may strike while the process has not seen that it shall not
            self.fault_file(name).write_text("")

    def armed(self) -> list[str]:
        """Processes whose fault has not struck yet."""
        with self.lock:
            return list(self._armed)

    def kill(self, name: str, kind: str) -> None:
        """SIGKILL now; the supervisor starts the process again."""
        with self.lock:
            process = self.federation.processes[name]
            if process.poll() is None:
                self._asked.add(name)
                process.kill()
                self.count(kind)

    def stall(self, name: str, seconds: float) -> None:
        """SIGSTOP now, SIGCONT after ``seconds``."""
        with self.lock:
            process = self.federation.processes[name]
            if process.poll() is not None:
                return
            process.send_signal(signal.SIGSTOP)
            self.count("stalled process")

        def go_on() -> None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)

        self.later(seconds, go_on)

    def later(self, seconds: float, work: Any, *arguments: object) -> None:
        """Run something after a while, unless the world ends before."""
        timer = threading.Timer(seconds, work, arguments)
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def hold(self, name: str) -> None:
        """If this process dies of its fault in a round, it stays away until :meth:`let_return`."""
        with self.lock:
            self._held.add(name)

    def tear(self, name: str) -> None:
        """The next death of this site leaves half a line behind."""
        with self.lock:
            self._torn.add(name)

    def let_return(self) -> None:
        """Everybody who stays away comes back."""
        with self.lock:
            self._held.clear()
            self._away.clear()

    def fill_disk(self, seconds: float) -> None:
        """Fill the coordinator's file system to the last byte, for a while."""
        filler = self.federation.coordinator / "filler"
        try:
            with filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 16))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.count("full file system of the coordinator")
        self.later(seconds, filler.unlink, True)

    # --- the supervisor ----------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        while not self._closing.wait(WATCH_S):
            for name in self.names:
                with self.lock:
                    self._look_at(name)

    def _look_at(self, name: str) -> None:
        process = self.federation.processes[name]
        if process.poll() is None:
            self._see_full(name)
            return
        if process.pid not in self._buried:
            self._buried.add(process.pid)
            self._bury(name, process.returncode)
        if name not in self._away and not self._closing.is_set():
            self._launch(name)

    def _bury(self, name: str, code: int) -> None:
        """Write down how a process ended and what its federation lost with it."""
        fault = self._armed.get(name) or self._disarmed.get(name)
        if name in self._asked:
            self._asked.discard(name)
        elif code == -signal.SIGKILL and fault is not None and not fault.full:
            self.count(f"kill at a point of {self.role(name)}")
            self.struck.append((self.role(name), f"{fault.name}@{fault.first}"))
            self.disarm(name)
            if name in self._held and self._has_joined(name):
                self._away.add(name)
        else:
            self.failures.append(f"{name} ended by itself with {code}: {self.tail(name)}")
        if name == COORDINATOR:
            self._down_since = self._down_since or time.monotonic()
            return
        self._lose(name)
        if name in self._torn:
            self._leave_half_a_line(name)

    def _see_full(self, name: str) -> None:
        """Did the full disk strike that this process was asked for?"""
        fault = self._armed.get(name)
        if fault is None or not fault.full:
            return
        if self.trace(name).count(fault.name) >= fault.first:
            self.count(f"full disk of {self.role(name)}")
            del self._armed[name]

    @staticmethod
    def role(name: str) -> str:
        return "the coordinator" if name == COORDINATOR else "a member"

    def _has_joined(self, name: str) -> bool:
        """Did this site join a round of the plan that runs now? Without it there might never be one."""
        found = last_joined(self.federation.site(name))
        return found is not None and found[0] == self._plan

    def _lose(self, name: str) -> None:
        found = last_joined(self.federation.site(name))
        if found is not None:
            self.lost[found].add(name)

    def _leave_half_a_line(self, name: str) -> None:
        """A power cut in mid-append: half a line, never acknowledged, at the end of records and ledger."""
        self._torn.discard(name)
        site = self.federation.site(name)
        for path in (site / "records.jsonl", site / "ledger" / "toy.jsonl"):
            if path.exists():
                with path.open("ab") as file:
                    file.write(b'{"kind": "Joi')
                self.count("torn line")

    # --- the operator ------------------------------------------------------------------------------------------------

    def report(self, plan: str = "") -> dict[str, Any] | None:
        """What ``veilsum-coordinator show PLAN --json`` would print; None while the coordinator does not answer."""
        try:
            reply = OperatorStub(self._channel).Report(pb.ReportRequest(plan=plan), timeout=5)
        except grpc.RpcError:
            return None
        with self.lock:
            if self._down_since is not None:
                self.outage_s = max(self.outage_s, time.monotonic() - self._down_since)
                self._down_since = None
        found: dict[str, Any] = json.loads(reply.json)
        return found

    def submit(self, plan: PlanFile) -> None:
        """Offer a plan, however often the coordinator dies over it."""
        self._insist(lambda stub: stub.SubmitPlan(pb.SubmitPlanRequest(toml=plan.raw), timeout=5), "again")

    def cancel(self, plan: PlanFile) -> None:
        """Withdraw a plan whose checks are done, so that nobody waits for a further cohort of it."""
        request = pb.CancelPlanRequest(name=plan.plan.name, reason="the driver is done with it")
        self._insist(lambda stub: stub.CancelPlan(request, timeout=5), "")

    def _insist(self, call: Any, done: str) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                call(OperatorStub(self._channel))
                return
            except grpc.RpcError as error:
                if done and done in (error.details() or ""):
                    return
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the operator's call failed: {error.details()}") from error
            time.sleep(0.2)
