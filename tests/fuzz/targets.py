"""The table of parsers: what each is fed, what must hold of whatever it accepts, and where fuzzing starts.

A parser may refuse, with one of the project's own errors in one printable line. It must never raise anything else,
never hang, and never ask for memory out of proportion to its input; and what it accepts must be the only way to say it.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import coordinator.config
import participant.config
from coordinator import pki
from coordinator.proofs import OfferTable
from participant import records
from participant.config import DataSet
from participant.data import load_examples
from participant.measured import load_measured
from participant.store import Store
from participant.text_data import load_records
from privacy import audit, vectors
from privacy.adapter import WEIGHTS_FILE, check_tensors, load_peft, start_adapter
from privacy.budget import entries
from privacy.budget.checkpoint import read_checkpoint, sign_checkpoint, split_notes, verify_checkpoint
from privacy.budget.entries import parse_line
from privacy.budget.ledger import Ledger
from privacy.encoding import decode, encode
from privacy.errors import VeilsumError
from privacy.evidence import EVIDENCE_FILE, read_evidence
from privacy.invitation import Invitation, read_token
from privacy.job import Job
from privacy.plan import parse_plan
from privacy.roster import Rules, parse_roster
from privacy.secagg import keys, messages, naming, transcript
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.keys import HybridKey
from privacy.secagg.masking import BLOCK, WIDTHS, pack, packed_bytes, unpack
from privacy.secagg.messages import Evidence, Header, MaskedInput
from privacy.secagg.signed import Signed, sign
from privacy.secagg.transcript import RoundContext
from privacy.settings import parse_toml
from privacy.wire.convert import parse, to_wire
from privacy.wire.transport import MOST_CHUNK_BYTES, chunk_reply, put_chunk, read_chunk, read_chunk_reply
from tests.fuzz import budget, seeds
from tests.simulation import identity

#: Longest text of a refusal: it goes into logs and onto terminals, and much of it was written by others.
MAX_TEXT = 1000


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        run: feeds it; returns, raises a VeilsumError, or shows a bug by raising anything else.
        seeds: inputs to start from.
        longest: bytes of the longest input worth trying.
    """

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    longest: int


def refusal(target: Target, data: bytes) -> str | None:
    """The text of the refusal of one input, ``None`` where it is accepted; any other error is a bug and goes on up."""
    try:
        target.run(data)
    except VeilsumError as error:
        return str(error)
    return None


def check(target: Target, data: bytes) -> bool:
    """Feed one input and see that a refusal is fit for logs and terminals; was the input accepted?"""
    text = refusal(target, data)
    if text is None:
        return True
    assert text.isprintable(), f"expected one printable line, found {text!r}"
    assert 0 < len(text) <= MAX_TEXT, f"expected a line, found {len(text)} characters: {text[:200]}"
    return False


# --- messages ------------------------------------------------------------------------------------------------------

WIRE_KINDS: tuple[Any, ...] = (ToMember, FromMember, Signed[MaskedInput], Evidence)
KINDS: tuple[Any, ...] = (
    *WIRE_KINDS,
    *(k for k in vars(messages).values() if isinstance(k, type) and dataclasses.is_dataclass(k) and k is not Signed),
    *records.Record.__args__,
    naming.Accusation,
    OfferTable,
)


def _encoding(data: bytes) -> None:
    kind: Any = KINDS[data[0] % len(KINDS)] if data else Header
    value: Any = decode(kind, data[1:])
    assert encode(value, kind) == data[1:], "one value has two encodings"


def _encoding_seeds() -> list[bytes]:
    known = [bytes([KINDS.index(kind)]) + encode(v, kind) for v, kind in seeds.messages() if kind in KINDS]
    return sorted({*known, *(bytes([i]) + bad for i in range(2) for bad in seeds.bad_encodings())})


def _wire(data: bytes) -> None:
    kind: Any = WIRE_KINDS[data[0] % len(WIRE_KINDS)] if data else ToMember
    value = parse(data[1:], kind)
    assert decode(kind, encode(value, kind)) == value
    assert parse(to_wire(value, kind).SerializeToString(), kind) == value


def _wire_seeds() -> list[bytes]:
    known = ((v, kind) for v, kind in seeds.messages() if kind in WIRE_KINDS)
    return [bytes([WIRE_KINDS.index(kind)]) + to_wire(v, kind).SerializeToString() for v, kind in known]


@cache
def round_context() -> RoundContext:
    """Of the round in the vectors."""
    found = seeds.vectors("round")["context"]
    identities = tuple(map(bytes.fromhex, found["identities"]))
    return RoundContext(seeds.outcome().transcript.header, identities, Rules(**found["rules"]), found["upload_length"])


def _evidence(data: bytes) -> None:
    (scratch() / EVIDENCE_FILE).write_bytes(data)
    transcript.verify_transcript(round_context(), read_evidence(scratch()).outcome.transcript)


def _accusation(data: bytes) -> None:
    naming.accused(round_context(), decode(naming.Accusation, data))


def _accusation_seeds() -> list[bytes]:
    """One that proves something: a share that its sender signed and its dealer did not deal; and two that do not."""
    found = seeds.outcome().transcript
    leaf, vote = found.pair_leaves[0], found.votes[0].body
    root = next(r for r in found.roots if r.sender == leaf.owner)
    opened = next(o for o in found.opened if isinstance(o, messages.OpenedMaskSecret))
    shares = messages.UnmaskShares(vote.t2, vote.survivors, (messages.SelfMaskShare(leaf.owner, bytes(33)),))
    release = sign(identity(leaf.leaf.holder), leaf.leaf.holder, shares, found.header.hash())
    evidence = (
        naming.BadShare(release, root, leaf),
        naming.BadSeed(root, leaf, opened),
        naming.BadDealer(root, (leaf,), ()),
    )
    return [encode(naming.Accusation(found.header, found.keys, found.roots, e)) for e in evidence]


# --- packed vectors and chunks -------------------------------------------------------------------------------------


def _unpack(data: bytes) -> None:
    """Width, then the count, or 0 for the count that fits the length; then the block."""
    head = data[:4].ljust(4, b"\0")
    bits, count = WIDTHS[head[0] % 4], int.from_bytes(head[1:4], "big") % (BLOCK + 1)
    if count == 0:
        count = next((n for n in (len(data[4:]) * 8 // bits, len(data[4:]) * 8 // bits - 1) if n > 0), 0)
        count = count if packed_bytes(count, bits) == len(data[4:]) else count + 1
    block = unpack(data[4:], count, bits)
    assert block.shape == (count,)
    assert not (block >> np.uint32(bits - 1) >> np.uint32(1)).any()
    assert pack(block, bits) == data[4:]


def _unpack_seeds() -> list[bytes]:
    packed = seeds.vectors("masks")["packed"]
    heads = [(WIDTHS.index(c["bits"]), c["count"], bytes.fromhex(c["packed"])) for c in packed]
    return [bytes([w]) + n.to_bytes(3, "big") + block for w, count, block in heads for n in (0, count)]


def _vector_file(data: bytes) -> None:
    path = scratch() / "upload"
    path.write_bytes(data)
    assert len(vectors.file_root(path, 5, 24)) == 32
    assert vectors.read_total(path, 5, 24).shape == (5,)


def _chunk(data: bytes) -> None:
    if data[:1] == b"r":
        assert chunk_reply(read_chunk_reply(data[1:])) == data[1:]
        return
    round_id, offset, payload = read_chunk(data)
    assert put_chunk(round_id, offset, bytes(payload)) == data


def _chunk_seeds() -> list[bytes]:
    whole = [put_chunk(bytes(32), offset, b"payload") for offset in (0, MOST_CHUNK_BYTES, 1, 2**64 - 1)]
    return [*whole, b"r" + chunk_reply(4)]


# --- files that people or peers write ------------------------------------------------------------------------------


@cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None)


def scratch() -> Path:
    """A directory for the parsers that read files, in memory where the system has that."""
    return Path(_directory().name)


def _invitation(data: bytes) -> None:
    found = read_token(data.decode("utf-8", errors="replace"))
    assert read_token(found.token()) == found


def _invitation_seeds() -> list[bytes]:
    return [Invitation("f", "north", 1 << 31, b"certificate", bytes(32)).token().encode()]


@cache
def _roster() -> Any:
    return parse_roster(seeds.rosters()[0])


def _plan(data: bytes) -> None:
    plan_file = parse_plan(data)
    job = Job.of(plan_file, _roster())
    assert job.context(job.header(1, 1, bytes(32))).upload_length > 0
    adapter = plan_file.plan.adapter
    if sum(adapter.rank * inputs for _, inputs in adapter.modules.values()) + job.layout.size <= 1 << 12:
        check_tensors(start_adapter(adapter), job.layout)


def _settings(data: bytes) -> None:
    model = participant.config.Settings if data[:1] == b"p" else coordinator.config.Settings
    parse_toml(model, data[1:], "settings.toml")


@cache
def _identity() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(32))


def _ledger(data: bytes) -> None:
    path = scratch() / "ledger.jsonl"
    path.write_bytes(data)
    path.with_suffix(".checkpoint").unlink(missing_ok=True)
    ledger = Ledger(path, _identity())
    assert [parse_line(line).line for line in path.read_bytes().splitlines()] == [e.line for e in ledger.entries]
    if ledger.entries and ledger.entries[-1].kind == "REGISTER":
        ledger.append(entries.PolicyChange(policy=ledger.book.policy, reason="once more"))
    assert len(Ledger(path, _identity()).entries) == ledger.head()[0] == len(ledger.entries)


def _ledger_seeds() -> list[bytes]:
    path = scratch() / "seed.jsonl"
    path.unlink(missing_ok=True)
    path.with_suffix(".checkpoint").unlink(missing_ok=True)
    ledger, job = Ledger(path, _identity()), "5a" * 16
    policy = entries.Policy(delta="0.00001", epsilon="8", order=3)
    ledger.append(entries.Register(name="news", policy=policy), dataset="ab" * 32)
    claim = entries.Claim(pld="1.5", rdp="inf", accountant="none", version="0")
    about: dict[str, Any] = {"plan": "news-1", "plan_digest": "cd" * 32, "stage": 1, "mechanism": {"n": 1}}
    ledger.append(entries.Reserve(job=job, rdp={"3": "0.25"}, claim=claim, code={}, model={}, **about))
    ledger.append(entries.Start(job=job, selftest={"passed": True}))
    whole = path.read_bytes()
    return [whole, whole[:-9], whole.splitlines(keepends=True)[0], b'{"signature": "00", "seq": NaN}\n']


def _checkpoint(data: bytes) -> None:
    found = verify_checkpoint(data, keys.identity_public(_identity()))
    assert found == read_checkpoint(data)
    assert split_notes(data) == [data]


def _checkpoint_seeds() -> list[bytes]:
    note = sign_checkpoint(_identity(), "ab" * 32, 3, bytes(32))
    return [note, note + note.split(b"\n\n")[1].replace(b"veilsum", b"another")]


def _records(data: bytes) -> None:
    settings = parse_toml(participant.config.Settings, seeds.PARTICIPANT_TOML, "participant.toml")
    home = participant.config.Home(scratch(), settings)
    home.records.write_bytes(data)
    store = Store(home)
    header = seeds.outcome().transcript.header
    store.peer_counts()
    store.highest_round(header.plan, header.stage)
    count = store.rounds_joined()
    store.keep(records.Joined(header, count + 1 & 2**64 - 1))
    assert len(Store(home).all_records()) == len(store.all_records())


def _adapter(data: bytes) -> None:
    (scratch() / WEIGHTS_FILE).write_bytes(data)
    load_peft(scratch())


def _manifest(data: bytes) -> None:
    (scratch() / "manifest.json").write_bytes(data)
    job = Job.of(parse_plan(seeds.plans()[0]), _roster())
    audit._named(job, scratch())


def _manifest_seeds() -> list[bytes]:
    evidence = _accusation_seeds()[0].hex()
    entries = [{"round": 1, "member": "north", "kind": "BadSeed", "evidence": evidence}]
    return [json.dumps({"named": named}).encode() for named in ([], entries)]


@cache
def _authority() -> Path:
    directory = scratch() / "authority"
    directory.mkdir()
    pki.create_authority(directory, "newsrooms")
    return directory


def _request(data: bytes) -> None:
    pem = b"-----BEGIN CERTIFICATE REQUEST-----\n%s\n-----END CERTIFICATE REQUEST-----\n" % base64.b64encode(data[1:])
    pki.sign_request(_authority(), pem if data[:1] == b"d" else data[1:], "north")


def _examples(data: bytes) -> None:
    """Format, then the file."""
    path = scratch() / "data"
    path.write_bytes(data[1:])
    if data[:1] == b"r":
        talks = load_records(path, DataSet(path="data", format="jsonl"))
        assert all(text.encode().strip() for text in talks.texts)
        return
    if data[:1] == b"n":
        numbers = load_measured(path, "jsonl", "text", "target", (0.0, 5.0)).targets
        assert all(0 <= number <= 5 for number in numbers)
        return
    found = load_examples(path, "csv" if data[:1] == b"c" else "jsonl", "text", "label", ("a", "b"))
    assert set(found.labels) <= {0, 1}
    assert all(found.texts)


def _examples_seeds() -> list[bytes]:
    turns = b'[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]'
    talks = b'r{"messages": ' + turns + b'}\n{"prompt": "x", "response": "y"}\n{"text": "x"}\n'
    return [b'ctext,label\n"x, y",a\n', b'j{"text": "x", "label": "b"}\n', talks, b'n{"text": "x", "target": 1e0}\n']


@cache
def _hybrid() -> HybridKey:
    return HybridKey.from_seed(bytes(96))


def _keys(data: bytes) -> None:
    """A public key to seal to, a box to open, a signature to check: whichever the first byte says."""
    rest = data[1:]
    if data[:1] == b"k":
        keys.seal(rest, b"secret", b"info")
    elif data[:1] == b"b":
        keys.unseal(_hybrid(), rest, b"info")
    else:
        assert not keys.verify_signature(rest[:32], rest[32:96], b"never signed") or keys.is_low_order(rest[:32])


def _keys_seeds() -> list[bytes]:
    box = keys.seal(_hybrid().public, b"secret", b"info")
    return [b"k" + _hybrid().public, b"b" + box, b"s" + keys.identity_public(_identity()) + bytes(64)]


TARGETS: dict[str, Target] = {
    "encoding": Target(_encoding, _encoding_seeds, 1 << 15),
    "wire": Target(_wire, _wire_seeds, 1 << 15),
    "evidence": Target(_evidence, lambda: [encode(Evidence(seeds.outcome(), (), ()))], 1 << 15),
    "accusation": Target(_accusation, _accusation_seeds, 1 << 15),
    "unpack": Target(_unpack, _unpack_seeds, 1 << 10),
    "vector-file": Target(_vector_file, seeds.uploads, 64),
    "chunk": Target(_chunk, _chunk_seeds, 128),
    "plan": Target(_plan, seeds.plans, 1 << 12),
    "roster": Target(lambda data: void(parse_roster(data)), seeds.rosters, 1 << 12),
    "invitation": Target(_invitation, _invitation_seeds, 1 << 10),
    "settings": Target(_settings, lambda: [b"p" + seeds.PARTICIPANT_TOML, b"c" + seeds.COORDINATOR_TOML], 1 << 12),
    "ledger": Target(_ledger, _ledger_seeds, 1 << 12),
    "checkpoint": Target(_checkpoint, _checkpoint_seeds, 1 << 10),
    "mechanism": Target(budget.run_mechanism, budget.mechanism_seeds, 1 << 11),
    "witnesses": Target(budget.run_witnesses, budget.witness_seeds, 1 << 11),
    "records": Target(_records, seeds.record_lines, 1 << 13),
    "adapter": Target(_adapter, seeds.adapters, 1 << 12),
    "manifest": Target(_manifest, _manifest_seeds, 1 << 15),
    "request": Target(_request, lambda: [b"d" + der for der in seeds.requests()], 1 << 11),
    "keys": Target(_keys, _keys_seeds, 1 << 11),
    "examples": Target(_examples, _examples_seeds, 1 << 10),
}


def void(_: object) -> None:
    """What a parser returns, where nothing more is to be asked of it."""
