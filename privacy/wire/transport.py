"""Numbers and bytes that both ends of the transport share; gRPC options and the header of an upload chunk."""

from __future__ import annotations

from privacy.errors import ProtocolError

SERVICE = "veilsum.v1.Federation"
PUT_CHUNK = f"/{SERVICE}/PutChunk"

#: Payload of one chunk; with its header it stays below the 8 MiB that either end receives.
CHUNK_BYTES = 4 << 20
CHUNK_HEADER = 32 + 8  # round id, offset
MAX_REQUEST = 8 << 20
#: What a member takes from the coordinator in one message: M10 of a cohort of 128 with many dropouts is about 20 MiB.
MAX_REPLY = 64 << 20

#: Both ends ping, or middleboxes forget the connection; a server tolerates what its own clients do.
KEEPALIVE = (
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
SERVER_OPTIONS = (
    *KEEPALIVE,
    ("grpc.max_receive_message_length", MAX_REQUEST),
    ("grpc.max_send_message_length", MAX_REPLY),
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
)
CLIENT_OPTIONS = (
    *KEEPALIVE,
    ("grpc.max_receive_message_length", MAX_REPLY),
    ("grpc.max_send_message_length", MAX_REQUEST),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 10_000),
)


def put_chunk(round_id: bytes, offset: int, payload: bytes) -> bytes:
    """One upload chunk on the wire."""
    return round_id + offset.to_bytes(8, "big") + payload


def read_chunk(data: bytes) -> tuple[bytes, int, memoryview]:
    """(round id, offset, payload) of a chunk.

    Raises:
        ProtocolError: too short, too long, or not at a multiple of the chunk size.
    """
    if not CHUNK_HEADER < len(data) <= CHUNK_HEADER + CHUNK_BYTES:
        raise ProtocolError(f"expected a chunk of at most {CHUNK_BYTES} bytes behind its header, found {len(data)}")
    offset = int.from_bytes(data[32:CHUNK_HEADER], "big")
    if offset % CHUNK_BYTES:
        raise ProtocolError(f"expected a chunk at a multiple of {CHUNK_BYTES}, found offset {offset}")
    return data[:32], offset, memoryview(data)[CHUNK_HEADER:]
