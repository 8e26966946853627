"""What a service manager is told: ready, well, stopping. systemd's protocol, some lines of text in one datagram.

Without ``NOTIFY_SOCKET`` in the environment nothing is sent, so a daemon in a terminal behaves the same.
"""

from __future__ import annotations

import os
import socket

import structlog

from privacy.errors import shown

log = structlog.get_logger()

#: Longest text that ``systemctl status`` shows.
MOST_STATUS = 300


def notify(**state: str | int) -> None:
    """Send one message, as ``READY=1``; a manager that does not hear is no reason to stop."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    text = "\n".join(f"{name}={shown(str(value), MOST_STATUS)}" for name, value in state.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.setblocking(False)  # its queue is short, and the daemon does not wait for it
            manager.connect("\0" + address[1:] if address.startswith("@") else address)
            manager.sendall(text.encode())
    except OSError as error:
        log.warning("service manager not told", reason=error.strerror or str(error))


def watchdog_s() -> float | None:
    """Seconds within which the manager wants to hear ``WATCHDOG=1``; ``None`` where it does not ask this process."""
    period, process = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not period.isdigit() or int(period) == 0 or process not in ("", str(os.getpid())):
        return None
    return int(period) / 1e6
