"""Where fuzzing starts from: the known answers of ``tests/vectors``, and small good files of every kind."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from participant.records import Joined, PeersSeen, Released, Spent
from privacy.encoding import decode, encode, field_types, is_a, union_members
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.messages import Evidence, Header, Outcome
from tests.vector_codec import from_json

VECTORS = Path(__file__).resolve().parent.parent / "vectors"
UNIONS: dict[str, Any] = {"ToMember": ToMember, "FromMember": FromMember}


@cache
def vectors(name: str) -> Any:
    """One file of known answers."""
    return json.loads((VECTORS / f"{name}.json").read_text())


def parts(value: Any, kind: Any) -> Iterator[tuple[Any, Any]]:
    """(value, declared type) of a message and of every message inside it."""
    members = union_members(kind)
    if members:
        yield value, kind
        yield from parts(value, next(m for m in members if is_a(value, m)))
    elif typing.get_origin(kind) is tuple:
        for item in value:
            yield from parts(item, typing.get_args(kind)[0])
    elif dataclasses.is_dataclass(typing.get_origin(kind) or kind):
        yield value, kind
        for name, hint in field_types(kind):
            yield from parts(getattr(value, name), hint)


@cache
def messages() -> tuple[tuple[Any, Any], ...]:
    """(value, declared type) of every message in the vectors, whole and in parts."""
    found: list[tuple[Any, Any]] = []
    for case in vectors("messages")["good"]:
        union = UNIONS[case["union"]]
        found += parts(decode(union, bytes.fromhex(case["encoded"])), union)
    found += parts(Evidence(outcome(), (), ()), Evidence)
    return tuple(found)


@cache
def outcome() -> Outcome:
    """The outcome of the round in the vectors."""
    found: Outcome = from_json(vectors("round")["outcome"], Outcome)
    return found


def bad_encodings() -> list[bytes]:
    """Encodings that the vectors say must be refused."""
    return [bytes.fromhex(case["encoded"]) for case in vectors("messages")["bad"]]


def uploads() -> list[bytes]:
    """Packed vectors of five coordinates of 24 bits."""
    return [bytes.fromhex(m["upload"][0]) for m in vectors("round")["members"] if m["upload"]]


def plans() -> list[bytes]:
    """Plan files."""
    return [vectors("files")["plan"]["text"].encode()]


def rosters() -> list[bytes]:
    """Roster files."""
    return [vectors("files")["roster"]["text"].encode()]


COORDINATOR_TOML = b'listen = "127.0.0.1:7443"\nmax_uploads = 4\n'
PARTICIPANT_TOML = b"""coordinator = "localhost:7443"
member = "north"
device = "cpu"
threads = 2
[models]
"all-MiniLM-L6-v2" = "base"
[datasets.news]
path = "news.jsonl"
format = "jsonl"
text = "body"
label = "desk"
[policy]
plans = ["news-1"]
min_cohort = 3
allow_two_members = false
audit = "spot"
"""


def record_lines() -> list[bytes]:
    """The file of a site's once-only records."""
    header: Header = outcome().transcript.header
    h = bytes(32)
    kept = (
        Joined(header, 1),
        PeersSeen(header, (0, 2), (1, 1)),
        Spent(header, "news-1", "news", h, h, (0, 1, 2), 0, 2, h, h),
        Released(header, h),
    )
    lines = [json.dumps({"kind": type(r).__name__, "record": encode(r).hex()}).encode() + b"\n" for r in kept]
    return [b"".join(lines), *lines]


def adapters() -> list[bytes]:
    """Weights files: good, of another type, and with a tensor of no size."""
    tensors = {"base_model.model.q.lora_A.weight": np.ones((2, 3), np.float32), "b": np.zeros((0, 4), np.float32)}
    return [
        safetensors.numpy.save(tensors, metadata={"format": "pt"}),
        safetensors.numpy.save({"a": np.ones(3, np.float16), "b": np.ones((), np.int64)}),
        safetensors.numpy.save({}),
    ]


@cache
def requests() -> tuple[bytes, ...]:
    """Certificate requests in DER: on the curve of the federation's certificates, and on another."""
    found = []
    for curve in (ec.SECP256R1(), ec.SECP384R1()):
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "north")])
        request = x509.CertificateSigningRequestBuilder().subject_name(subject)
        found.append(request.sign(ec.generate_private_key(curve), hashes.SHA256()).public_bytes(Encoding.DER))
    return tuple(found)
