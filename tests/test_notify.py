"""What the service manager hears, and that the units it gets are ones: systemd's own tool reads them where it is."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

from coordinator import daemon, pulse
from coordinator.pulse import Wellbeing
from demo.federation import BIN, Federation
from privacy.notify import notify, watchdog_s
from tests.on_disk import OnDisk
from tests.test_end_to_end import NAMES, POLICY, SITE, wait_for

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


class Manager:
    """The socket that systemd would listen on."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self.path = path

    def heard(self) -> list[str]:
        """All lines since the last look."""
        lines: list[str] = []
        while True:
            try:
                lines += self._socket.recv(4096).decode().splitlines()
            except BlockingIOError:
                return lines

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    found = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(found.path))
    yield found
    found.close()


def test_one_message_is_one_datagram_of_lines(manager: Manager) -> None:
    notify(READY=1, STATUS="plan 'a' is waiting\nREADY=0")
    assert manager.heard() == ["READY=1", "STATUS=plan 'a' is waiting\\nREADY=0"]


def test_without_a_manager_or_with_one_that_is_gone_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify(READY=1)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify(READY=1)
    assert "service manager not told" in capsys.readouterr().out


def test_a_manager_that_does_not_listen_keeps_nobody_waiting(manager: Manager) -> None:
    for number in range(2000):
        notify(STATUS=number)
    assert manager.heard()[0] == "STATUS=0"


def test_an_abstract_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0veilsum-test-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@veilsum-test-{os.getpid()}")
        notify(STOPPING=1)
        assert listening.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize(
    ("period", "process", "expected"),
    [("", "", None), ("0", "", None), ("x", "", None), ("3000000", "1", None), ("3000000", "", 3.0)],
)
def test_the_watchdog_is_for_the_process_that_it_names(
    period: str, process: str, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", period)
    monkeypatch.setenv("WATCHDOG_PID", process)
    assert watchdog_s() == expected
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_s() == (3.0 if period == "3000000" else None)


def test_a_hanging_loop_is_silence_and_a_full_disk_is_not(
    tmp_path: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    wellbeing = Wellbeing(OnDisk(tmp_path / "w").engine)
    monkeypatch.setenv("WATCHDOG_USEC", "150000")

    async def told() -> list[str]:
        manager.heard()
        stop = asyncio.Event()
        telling = asyncio.create_task(daemon._tell_manager(wellbeing, stop))
        await asyncio.sleep(0.2)
        stop.set()
        await telling
        return manager.heard()

    lines = asyncio.run(told())
    assert lines.count("WATCHDOG=1") >= 2
    assert "STATUS=serving" in lines
    wellbeing.work.waits_for_disk = True
    lines = asyncio.run(told())
    assert "WATCHDOG=1" in lines
    assert "STATUS=not serving: the loop 'work' waits for the disk" in lines
    now = [0.0]
    wellbeing.deadlines.clock = lambda: now[0]
    with wellbeing.deadlines.step():
        now[0] = pulse.STUCK_S + 1
        lines = asyncio.run(told())
    assert "WATCHDOG=1" not in lines
    assert any(line.startswith("STATUS=not serving: the loop 'deadlines' has been") for line in lines)


def test_both_daemons_say_ready_and_stopping(tmp_path: Path) -> None:
    managers = {name: Manager(tmp_path / name) for name in ("c", "s")}
    federation = Federation(tmp_path, NAMES, POLICY, dict.fromkeys(NAMES, SITE))
    federation.create()
    try:
        federation.environment = {"NOTIFY_SOCKET": str(managers["c"].path), "WATCHDOG_USEC": "600000"}
        federation.start_coordinator()
        federation.environment = {"NOTIFY_SOCKET": str(managers["s"].path)}
        federation.start_site("site-1")
        heard: dict[str, list[str]] = {name: [] for name in managers}

        def has(name: str, line: str) -> bool:
            heard[name] += managers[name].heard()
            return line in heard[name]

        wait_for(lambda: has("c", "READY=1") and has("c", "WATCHDOG=1") and has("s", "READY=1"))
        assert federation.stop("coordinator") == 0
        assert federation.stop("site-1", signal.SIGTERM) == 130
        wait_for(lambda: has("c", "STOPPING=1") and has("s", "STOPPING=1"))
        assert "WATCHDOG=1" not in heard["s"]
    finally:
        federation.stop_all()
        for one in managers.values():
            one.close()


# --- the units -------------------------------------------------------------------------------------------------------


def unit(path: Path) -> ConfigParser:
    found = ConfigParser(strict=False, interpolation=None)
    found.optionxform = str  # type: ignore[assignment, method-assign]
    found.read(path)
    return found


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_runs_a_command_that_exists_as_an_account_that_is_made(path: Path) -> None:
    service = unit(path)["Service"]
    program, *words = service["ExecStart"].split()
    asked = subprocess.run([BIN / Path(program).name, *words, "--help"], capture_output=True, check=False)
    assert asked.returncode == 0
    assert re.search(rf"^u {service['User']} ", (DEPLOY / "systemd" / "veilsum.sysusers").read_text(), re.MULTILINE)
    assert service["Type"] == "notify"
    assert ("WatchdogSec" in service) == ("coordinator" in path.name)


def test_systemd_finds_nothing_wrong_with_the_units_and_little_exposed(tmp_path: Path) -> None:
    """Where systemd is not installed, the test above has looked at what matters most."""
    assert len(UNITS) == 2
    tool = shutil.which("systemd-analyze")
    for path in UNITS if tool else ():
        copy = tmp_path / path.name
        copy.write_text(path.read_text().replace("/opt/veilsum/bin", str(BIN)))
        found = subprocess.run([str(tool), "verify", str(copy)], capture_output=True, text=True, check=False)
        assert (found.returncode, found.stderr) == (0, "")
        exposed = [str(tool), "security", "--offline=true", "--threshold=20", str(copy)]
        found = subprocess.run(exposed, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout
