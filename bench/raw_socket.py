"""The plainest upload there is: a TLS 1.3 socket whose receiver hashes (SHA-256), writes and fsyncs what comes.

The reference of the upload rows. Certificates are the federation's own, both ends show theirs.
``python -m bench.raw_socket COORDINATOR OUT LENGTH`` is the receiver, a process of its own as the coordinator is.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PIECE = 1 << 20


def _context(purpose: int, directory: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(purpose)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    context.load_verify_locations(directory / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def send_all(sites: Sequence[Path], spool: Path, port: int, ready: Callable[[], None] = lambda: None) -> float:
    """Send one file from every site at the same time; seconds from the first byte to the last receipt.

    Every receipt is the SHA-256 of the file, given once it is durable. ``ready`` is called when all are connected.
    """
    expected = hashlib.sha256(spool.read_bytes()).digest()
    start = threading.Barrier(len(sites) + 1, ready)

    def send(site: Path) -> None:
        with (
            socket.create_connection(("127.0.0.1", port)) as plain,
            _context(ssl.PROTOCOL_TLS_CLIENT, site).wrap_socket(plain, server_hostname="localhost") as tls,
            spool.open("rb") as file,
        ):
            start.wait(60)
            while piece := file.read(PIECE):
                tls.sendall(piece)
            if _exactly(tls, 32) != expected:
                raise RuntimeError("the receiver hashed something else")

    with ThreadPoolExecutor(len(sites)) as pool:
        sending = [pool.submit(send, site) for site in sites]
        start.wait(60)
        began = time.perf_counter()
        for done in sending:
            done.result()
        return time.perf_counter() - began


def _exactly(tls: ssl.SSLSocket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        more = tls.recv(count - len(found))
        if not more:
            raise RuntimeError("the connection ended early")
        found += more
    return found


def _receive(plain: socket.socket, context: ssl.SSLContext, target: Path, length: int) -> None:
    buffer = memoryview(bytearray(PIECE))
    with context.wrap_socket(plain, server_side=True) as tls, target.open("wb", buffering=0) as file:
        digest, left = hashlib.sha256(), length
        while left:
            filled = 0
            while filled < min(left, PIECE):  # a read ends with its TLS record, of 16 KiB at most
                count = tls.recv_into(buffer[filled : min(left, PIECE)])
                if not count:
                    raise RuntimeError("the connection ended early")
                filled += count
            digest.update(buffer[:filled])
            file.write(buffer[:filled])
            left -= filled
        os.fsync(file.fileno())
        tls.sendall(digest.digest())


def main() -> None:
    """The receiver: prints its port and takes uploads until it is ended."""
    directory, out, length = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    context = _context(ssl.PROTOCOL_TLS_SERVER, directory)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            plain, _ = server.accept()
            target = out / f"raw-{secrets.token_hex(6)}.bin"
            threading.Thread(target=_receive, args=(plain, context, target, length), daemon=True).start()


if __name__ == "__main__":
    main()
