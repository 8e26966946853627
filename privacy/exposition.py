"""Metrics for Prometheus: what a family of numbers is called, and the one HTTP address where both daemons show theirs.

Every process makes a registry of its own and hands it on; nothing is global. The page is plain HTTP without a login:
whoever reaches the address reads it, so an address without a host means this machine only.
"""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Literal

import structlog
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from privacy.errors import UserError

log = structlog.get_logger()

#: Address of an entry without a host: nobody else can reach it.
HERE = "127.0.0.1"
#: Seconds that one reader may take for its request and its answer; the next waits so long.
READ_S = 5.0
#: Upper ends of the intervals in which durations are counted, seconds.
BUCKETS = (0.01, 0.1, 1.0, 10.0, 60.0, 300.0, 1800.0, 7200.0, 43200.0, 259200.0)


@dataclass(frozen=True)
class Family:
    """One name of the page: numbers of one kind that differ by their labels."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ()

    def gauge(self, *values: tuple[Sequence[str], float]) -> GaugeMetricFamily:
        """The family with a number for each combination of labels."""
        found = GaugeMetricFamily(self.name, self.help, labels=self.labels)
        for labels, value in values:
            found.add_metric(list(labels), value)
        return found

    def total(self, *values: tuple[Sequence[str], float]) -> CounterMetricFamily:
        """As :meth:`gauge`, for numbers that were counted elsewhere and never fall."""
        found = CounterMetricFamily(self.name, self.help, labels=self.labels)
        for labels, value in values:
            found.add_metric(list(labels), value)
        return found

    def counter(self, registry: CollectorRegistry) -> Counter:
        """A counter of this process."""
        return Counter(self.name, self.help, self.labels, registry=registry)

    def histogram(self, registry: CollectorRegistry) -> Histogram:
        """Durations, counted in this process."""
        return Histogram(self.name, self.help, self.labels, registry=registry, buckets=BUCKETS)


def split_address(text: str) -> tuple[str, int]:
    """(host, port) of ``host:port`` or of a port alone."""
    host, _, port = text.rpartition(":")
    return host.strip("[]") or HERE, int(port)


class _Server(HTTPServer):
    """One reader at a time, so that no number of them costs more than one; without a name look-up at its start."""

    registry: CollectorRegistry

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: object, client_address: object) -> None:
        """A reader that went away, or numbers that could not be read; the next one is answered all the same."""
        del request
        log.warning("metrics not read", reader=str(client_address), exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Page(BaseHTTPRequestHandler):
    server: _Server
    timeout = READ_S

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "expected /metrics")
            return
        content = generate_latest(self.server.registry)
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Reading is no event."""


@contextmanager
def metrics_page(listen: str, registry: CollectorRegistry) -> Iterator[int]:
    """Show the numbers of ``registry`` at ``listen`` while the context lasts; nothing where it is empty.

    Yields:
        The port, 0 without a page.

    Raises:
        UserError: the address is taken or not ours.
    """
    if not listen:
        yield 0
        return
    address = split_address(listen)
    try:
        server = (_Server6 if ":" in address[0] else _Server)(address, _Page)
    except OSError as error:
        raise UserError(
            f"expected to show metrics at {listen}, found: {error.strerror or error}",
            hint="choose another address under 'metrics_listen', or leave it empty",
        ) from error
    server.registry = registry
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    log.info("metrics", address=f"{address[0]}:{server.server_port}")
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
