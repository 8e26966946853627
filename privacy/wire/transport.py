"""Numbers and bytes that both ends of the transport share; gRPC options and the header of an upload chunk."""

from __future__ import annotations

from privacy.errors import ProtocolError
from privacy.secagg.masking import BLOCK, packed_bytes

SERVICE = "veilsum.v1.Federation"
PUT_CHUNK = f"/{SERVICE}/PutChunk"

#: Payload of one chunk at most: whole packed blocks that come near to it, so that each chunk can be hashed alone.
MOST_CHUNK_BYTES = 1 << 20
CHUNK_HEADER = 32 + 8  # round id, offset
#: Chunks in flight of one upload at most: 40 MiB, as fast as one stream at 200 ms round trip.
WINDOW = 40
#: Seconds a chunk may take on a slow line, with others beside it (19 kB/s for all of them together).
CHUNK_S = 900.0
MAX_REQUEST = MOST_CHUNK_BYTES + (64 << 10)
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
    # Else two coordinators of one account can listen on one address, and each gets some of the other's calls.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_REQUEST),
    ("grpc.max_send_message_length", MAX_REPLY),
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    # Whoever connects and does not say who it is, or says it and then nothing, does not keep a connection for ever.
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_connection_idle_ms", 600_000),
    # Else every connection that once carried an upload keeps a large buffer.
    ("grpc.experimental.tcp_max_read_chunk_size", 64 << 10),
)
CLIENT_OPTIONS = (
    *KEEPALIVE,
    ("grpc.max_receive_message_length", MAX_REPLY),
    ("grpc.max_send_message_length", MAX_REQUEST),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 10_000),
)


def chunk_bytes(bits: int) -> int:
    """Payload of every chunk but the last, in bytes: a number of whole blocks."""
    return MOST_CHUNK_BYTES // packed_bytes(BLOCK, bits) * packed_bytes(BLOCK, bits)


def put_chunk(round_id: bytes, offset: int, payload: bytes) -> bytes:
    """One upload chunk on the wire."""
    return round_id + offset.to_bytes(8, "big") + payload


def read_chunk(data: bytes) -> tuple[bytes, int, memoryview]:
    """(round id, offset, payload) of a chunk; where chunks begin depends on the round and is checked there.

    Raises:
        ProtocolError: too short or too long.
    """
    if not CHUNK_HEADER < len(data) <= CHUNK_HEADER + MOST_CHUNK_BYTES:
        raise ProtocolError(
            f"expected a chunk of 1 to {MOST_CHUNK_BYTES} bytes behind its header of {CHUNK_HEADER}, found {len(data)}"
        )
    return data[:32], int.from_bytes(data[32:CHUNK_HEADER], "big"), memoryview(data)[CHUNK_HEADER:]


def chunk_reply(window: int) -> bytes:
    """What answers a chunk: how many chunks this upload may have in flight from now on."""
    return bytes([window])


def read_chunk_reply(data: bytes) -> int:
    """The window in the reply to a chunk.

    Raises:
        ProtocolError: not one byte from 1 to the largest window.
    """
    if len(data) != 1 or not 1 <= data[0] <= WINDOW:
        raise ProtocolError(f"expected a window of 1 to {WINDOW} in answer to a chunk, found {data[:8].hex()!r}")
    return data[0]
