"""Known answers for a second implementation: ``python -m tests.make_vectors`` rewrites ``tests/vectors/*.json``.

All bytes are hex. Everything is deterministic but the sealed boxes, since the library takes no randomness for them: a
box is sealed once, kept in ``boxes.json`` and used again, so that a second run changes nothing. A second
implementation opens boxes and need not make the same ones. Each file says in ``comment`` what its fields mean.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable

import numpy as np

from coordinator import phases
from privacy import merkle
from privacy.encoding import digest, encode, label
from privacy.plan import parse_plan
from privacy.roster import parse_roster
from privacy.secagg import keys, projection, shamir, transcript
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.keys import HybridKey
from privacy.secagg.masking import BLOCK, WIDTHS, keystream, pack
from privacy.secagg.messages import Outcome, Shares
from privacy.secagg.quantize import Extra, Quantizer
from privacy.secagg.signed import signing_input
from tests.simulation import identity, vector_of
from tests.test_plan import PLAN
from tests.test_roster import ROSTER
from tests.vector_codec import to_json
from tests.vector_round import DIRECTORY, Json, key_seeds, recorded_round

H, T1, T2 = (digest("test", name) for name in (b"header", b"T1", b"T2"))


# --- the files ---------------------------------------------------------------------------------------------------


def message_case(comment: str, union: str, value: object) -> Json:
    kind = {"ToMember": ToMember, "FromMember": FromMember}[union]
    case = {"comment": comment, "union": union, "encoded": encode(value, kind).hex()}
    # The outcome is spelt out in round.json.
    return case if isinstance(value, Outcome) else {**case, "value": to_json(value, kind)}


def messages() -> Json:
    found = recorded_round()
    good = [
        message_case(f"{name}, as it goes to member {member}", "ToMember", message)
        for name, (member, message) in found.to_member.items()
    ] + [
        message_case(f"{name} of member {member}", "FromMember", message)
        for name, (member, message) in found.from_member.items()
    ]
    vote = encode(found.from_member["SurvivorVote"][1]).hex()
    abort = found.simulation.context.header
    bad = [
        ("ToMember", "", "truncated"),
        ("ToMember", "08", "expected one of 8 kinds, found kind 8"),
        ("FromMember", "09", "expected one of 9 kinds, found kind 9"),
        ("ToMember", "00" + encode(abort).hex() + "00" * 5, "found 1 more bytes"),
        ("ToMember", "00" + encode(abort).hex()[:-2], "truncated"),
        ("ToMember", "07" + encode(abort).hex() + "00000001ff", "UTF-8"),
        ("ToMember", "07" + encode(abort).hex() + "000001f5" + "61" * 501, "at most 500 characters"),
        ("ToMember", "04" + "00000002" + vote + vote, "ascending order"),
        ("ToMember", "04" + "ffffffff", "truncated"),
        (
            "FromMember",
            "04" + "00" * 8 + "0000001f" + "00" * 31 + "00000020" + "00" * 32 + "00000040" + "00" * 64,
            "t2: expected 32 bytes, found 31",
        ),
        (
            "FromMember",
            "04" + "00" * 8 + ("00000020" + "00" * 32) * 2 + "0000003f" + "00" * 63,
            "signature: expected 64 bytes, found 63",
        ),
        (
            "FromMember",
            "05"
            + "00" * 8
            + ("00000020" + "00" * 32) * 2
            + "00000002"
            + ("00" + "00" * 8 + "00000021" + "00" * 33)
            + ("01" + "00" * 8 + "00000021" + "00" * 33)
            + "00000040"
            + "00" * 64,
            "unmask shares: expected at most 1000 members, each once, in ascending order",
        ),
        (
            "FromMember",
            "05"
            + "00" * 8
            + ("00000020" + "00" * 32) * 2
            + "00000001"
            + ("02" + "00" * 8 + "00000021" + "00" * 33)
            + "00000040"
            + "00" * 64,
            "expected one of 2 kinds, found kind 2",
        ),
    ]
    return {
        "comment": "Canonical encoding of every message. A union is its position (one byte), then the value.",
        "good": good,
        "bad": [{"union": union, "encoded": encoded, "error": error} for union, encoded, error in bad],
    }


def signatures() -> Json:
    found, context = recorded_round(), recorded_round().simulation.context
    cases = []
    for name, (member, message) in found.from_member.items():
        signed = message.root if isinstance(message, Shares) else message
        cases.append(
            {
                "type": name,
                "sender": member,
                "identity_seed": identity(member).private_bytes_raw().hex(),
                "header_hash": context.header_hash.hex(),
                "body": encode(signed.body).hex(),
                "signing_input": signing_input(member, signed.body, context.header_hash).hex(),
                "signature": signed.signature.hex(),
                "body_hash": signed.body_hash().hex(),
            }
        )
    comment = (
        "Ed25519 over signing_input = label('signature', type, sender, header hash, body); body_hash has no signature."
    )
    return {"comment": comment, "cases": cases}


def derived() -> Json:
    secret, seed = bytes(range(32)), bytes(range(32, 64))
    hybrid = HybridKey.from_seed(bytes(range(96)))
    return {
        "comment": "Everything derived, from the inputs h, t1, t2, secret (z) and seed (b or r). HKDF-SHA256.",
        "h": H.hex(), "t1": T1.hex(), "t2": T2.hex(), "secret": secret.hex(), "seed": seed.hex(),
        "label('x', '', 'ab')": label("x", b"", b"ab").hex(),
        "hybrid_seed": bytes(range(96)).hex(),
        "hybrid_public": hybrid.public.hex(),
        "mask_key_public": keys.mask_key(secret).public.hex(),
        "pair_seed": [{"other": j, "value": keys.pair_seed(secret, j).hex()} for j in (1, 2, 300)],
        "pair_mask_key": [{"one": i, "other": j, "value": keys.pair_mask_key(seed, T2, i, j).hex()}
                          for i, j in ((0, 1), (1, 0), (7, 300))],
        "self_mask_key": [{"member": i, "value": keys.self_mask_key(seed, T2, i).hex()} for i in (0, 300)],
        "self_commitment": [{"member": i, "value": keys.self_commitment(H, i, seed).hex()} for i in (0, 300)],
        "nonce_commitment": [{"member": i, "value": keys.nonce_commitment(H, i, seed).hex()} for i in (0, 300)],
        "secret_hash": [{"kind": kind, "owner": 3, "holder": 5, "value": keys.secret_hash(kind, 3, 5, seed).hex()}
                        for kind in ("self-share", "secret-share", "pair-seed")],
        "box_info": [{"kind": kind, "sender": 3, "receiver": 5, "value": keys.box_info(kind, H, T1, 3, 5).hex()}
                     for kind in ("share", "pair")],
        "projection": {
            "total": H.hex(), "nonces": [T1.hex(), T2.hex()],
            "key": projection.challenge({0: T1, 1: T2}, H).hex(),
            "vector": [1, -1, 2**22, -(2**22)],
            "value": projection.project(projection.challenge({0: T1, 1: T2}, H), np.array([1, -1, 2**22, -(2**22)])),
            "term": [{"me": i, "other": j, "value": projection.zero_sum_term(i, {j: seed}, T1)}
                     for i, j in ((0, 1), (1, 0))],
        },
        "total_hash": {"root": H.hex(), "value": transcript.total_hash(T2, H).hex()},
    }  # fmt: skip


def boxes() -> Json:
    kem = HybridKey.from_seed(bytes(range(96)))
    keeper = recorded_round().boxes
    seeds = {**key_seeds(), kem.public: bytes(range(96))}
    info, other = keys.box_info("share", H, T1, 3, 5), keys.box_info("share", H, T1, 3, 6)
    box = keeper.seal(kem.public, b"two shares", info)
    low = [bytes(32), b"\1" + bytes(31), b"\xed" + b"\xff" * 30 + b"\x7f", bytes(31) + b"\x80"]
    opening = [
        (info, box, ""),
        (other, box, "does not open"),
        (info, box[:-1], "does not open"),
        (info, b"", "does not open"),
        (info, box[:1088] + bytes(32) + box[1120:], "does not open"),
        (info, b"\0" * 8 + box[8:], "does not open"),
    ]
    sealing = [(kem.public[: keys.MLKEM_BYTES] + point, "low-order") for point in low]
    sealing += [
        (b"\xff" * 1184 + kem.public[1184:], "modulus"),
        (kem.public[:-1], "expected a hybrid public key of 1216"),
    ]
    return {
        "comment": "HPKE base mode, KEM MLKEM768-X25519, HKDF-SHA256, AES-256-GCM, no associated data. A key is "
        "96 bytes: d and z of FIPS 203, then the X25519 key. 'opening' opens with key_seed, unless it names an error; "
        "'sealing' lists public keys that must be refused; 'boxes' are those of the round in round.json.",
        "key_seed": bytes(range(96)).hex(),
        "opening": [{"info": i.hex(), "box": b.hex(), "plaintext": "" if e else b"two shares".hex(), "error": e}
                    for i, b, e in opening],
        "sealing": [{"public": public.hex(), "error": error} for public, error in sealing],
        "boxes": [{**box, "key_seed": seeds[keeper.receiver[name]].hex()} for name, box in sorted(keeper.used.items())],
    }  # fmt: skip


def masks() -> Json:
    key = bytes(range(32))
    values = np.array([0, 1, 2**15, 2**16 + 1, 2**20 - 1, 2**23 + 5, 2**32 - 1], np.uint32)
    bad = [(16, 7, "00" * 13), (20, 7, "00" * 17), (20, 7, "00" * 17 + "10"), (24, 7, "00" * 22), (32, 7, "")]
    errors = [
        "expected a block of 14",
        "expected a block of 18",
        "zero padding",
        "expected a block of 21",
        "of 28 bytes",
    ]
    return {
        "comment": "Words of the stream of key at coordinate start; packing keeps the low bits of values, in planes.",
        "key": key.hex(),
        "streams": [
            {"bits": bits, "start": start, "words": [int(word) for word in keystream(key, bits, start)(6)]}
            for bits in WIDTHS
            for start in (0, 8, BLOCK, 5 * BLOCK + 16)
        ],
        "values": values.tolist(),
        "packed": [
            {"bits": bits, "count": count, "packed": pack(values[:count], bits).hex()}
            for bits in WIDTHS
            for count in (1, 6, 7)
        ],
        "bad": [{"bits": bits, "count": count, "packed": data, "error": error}
                for (bits, count, data), error in zip(bad, errors, strict=True)],
    }  # fmt: skip


def sharing() -> Json:
    cases = []
    for secret, t, points in ((bytes(range(32)), 3, [1, 2, 5, 9]), (b"\xff" * 32, 2, [1, 2, 3]), (bytes(32), 1, [4])):
        drawn: list[bytes] = []

        def rand(count: int, kept: list[bytes] = drawn) -> bytes:
            kept.append(hashlib.shake_256(b"coefficient %d" % len(kept)).digest(count))
            return kept[-1]

        shares = shamir.share(secret, t, points, rand)
        cases.append({"secret": secret.hex(), "threshold": t, "random": [r.hex() for r in drawn],
                      "shares": {str(x): value.hex() for x, value in shares.items()}})  # fmt: skip
    return {
        "comment": "GF(2^256 + 297); each 48 random bytes, reduced, are a coefficient, the highest power first. "
        "Any threshold shares combine to the secret; 'oversized' combine to a value of more than 32 bytes; "
        "'bad' are no shares.",
        "cases": cases,
        "oversized": {"1": (2**256).to_bytes(33, "big").hex()},
        "bad": [shamir.PRIME.to_bytes(33, "big").hex(), "ff" * 33, "00" * 32, "00" * 34, ""],
    }


def quantization() -> Json:
    cases = []
    delta = np.array([0, 0.25, -0.25, 0.125, 1.5, -7, 0.09375, -0.0625], np.float32)
    for bits, cohort, weight in ((16, 64, 10), (20, 8, 10), (24, 5, 5), (32, 3, 1)):
        rule = Quantizer(8, bits, cohort, 0.25, 10, (Extra("weight", 10), Extra("loss", 2**40)))
        key = hashlib.sha256(b"uniform %d" % bits).digest()
        extras = {"weight": weight, "loss": 123456789012}
        vector = rule.quantize(delta, weight, extras, lambda _count, key=key: key)  # type: ignore[misc]
        total = (3 * vector.astype(np.int64)) % 2**bits
        decoded = rule.decode(total.astype(np.uint32), 3)
        cases.append({
            "bits": bits, "cohort": cohort, "weight": weight, "extras": extras, "random": key.hex(),
            "qmax": rule.qmax, "limb_bits": rule.limb_bits, "vector": vector.tolist(), "total": total.tolist(),
            "total_weight": decoded.weight, "total_extras": decoded.extras, "mean": decoded.mean.tolist(),
            "garbled": [[3 * rule.qmax + 1, *total[1:].tolist()], [0] * len(total), [*total[:-1].tolist(), 2**bits - 1]]
        })  # fmt: skip
    return {
        "comment": "u is the 32-bit stream of the key 'random' over 2^32. total is the sum of three such vectors mod "
        "2^bits; 'garbled' totals must be refused.",
        "clip": 0.25, "max_weight": 10, "extras": {"weight": 10, "loss": 2**40}, "delta": delta.tolist(),
        "cases": cases,
    }  # fmt: skip


def trees() -> Json:
    leaves = [bytes([i]) * i for i in range(33)]
    hashes = [merkle.leaf_hash(leaf) for leaf in leaves]
    paths = [(1, 0), (2, 1), (3, 2), (5, 4), (7, 3), (8, 7), (33, 32), (33, 17)]
    good = [{"count": n, "index": i, "path": [p.hex() for p in merkle.path(hashes[:n], i)]} for n, i in paths]
    return {
        "comment": "RFC 6962; leaf i is i bytes of value i. 'bad' paths do not verify under the root of their count.",
        "leaf_hashes": [h.hex() for h in hashes],
        "roots": [merkle.root(hashes[:n]).hex() for n in range(34)],
        "paths": good,
        "bad": [{**good[3], "index": 3}, {**good[5], "path": []}, {**good[6], "path": [*good[6]["path"], "00" * 32]}],  # type: ignore[misc]
    }


def files() -> Json:
    return {
        "comment": "Digest of a plan file and hash of a roster file, over their very bytes.",
        "plan": {"text": PLAN, "digest": parse_plan(PLAN.encode()).digest.hex()},
        "roster": {"text": ROSTER, "hash": parse_roster(ROSTER.encode()).hash.hex()},
    }


def one_round() -> Json:
    found = recorded_round()
    simulation, context = found.simulation, found.simulation.context
    assert isinstance(simulation.phase, phases.Released)
    assert simulation.total is not None
    outcome = simulation.phase.outcome
    verified = transcript.verify_transcript(context, outcome.transcript)
    zeros = "00" * 32
    bad = [
        (["header", "round"], 2, "the transcript is of another round"),
        (["keys", 0, "body", "rounds_joined"], 7, "M1: the signature of member 0 does not verify"),
        (["keys", 0, "sender"], 9, "ascending order"),
        (["roots", 1, "body", "root"], zeros, "M3: the signature of member 1 does not verify"),
        (["inputs", 1, "signature"], zeros * 2, "M5: the signature of member 2 does not verify"),
        (["inputs", 1, "sender"], 1, "M5: the signature of member 1 does not verify"),
        (["votes"], [], "M8: expected at least 3 signatures, found 0"),
        (["opened", 0, "OpenedSelfMask", "seed"], zeros, "the opened seed of member 0 does not match its M1"),
        (["opened", 1], {"OpenedSelfMask": {"owner": 1, "seed": zeros}}, "wrong kind of seed was opened for member 1"),
        (["pair_leaves", 0, "path"], [], "a leaf of member 0 is not under its signed root"),
        (["pair_leaves"], [], "leaves of 3 survivor-dropout pairs"),
    ]
    return {
        "comment": "A round of four, no colluders, five coordinates, 24 bits; member 1 falls silent before M5. "
        "'random' is what a member drew: key seed, z, b, nonce, then 48 bytes a coefficient of b's polynomial and of "
        "z's. 'bad' replaces one field of the outcome's transcript.",
        "context": {
            "header": to_json(context.header, type(context.header)),
            "header_hash": context.header_hash.hex(),
            "identities": [key.hex() for key in context.identities],
            "rules": dataclasses.asdict(context.rules),
            "upload_length": context.upload_length,
        },
        "members": [
            {"identity_seed": identity(i).private_bytes_raw().hex(), "random": [r.hex() for r in found.drawn[i]],
             "vector": vector_of(i, 5).tolist(), "upload": [b.hex() for b in simulation.members[i].upload]}
            for i in range(4)
        ],
        "outcome": to_json(outcome, type(outcome)),
        "outcome_encoded": encode(outcome).hex(),
        "t1": verified.cohort.t1.hex(), "t2": verified.t2.hex(), "l": verified.survivors_l.hex(),
        "threshold": verified.cohort.threshold, "survivors": list(verified.survivors),
        "plus": [key.hex() for key in verified.streams.plus], "minus": [key.hex() for key in verified.streams.minus],
        "total": (simulation.total & np.uint32(2**24 - 1)).tolist(),
        "bad": [{"field": path, "value": value, "error": error} for path, value, error in bad],
    }  # fmt: skip


FILES: dict[str, Callable[[], Json]] = {
    "messages": messages,
    "signatures": signatures,
    "derived": derived,
    "round": one_round,
    "masks": masks,
    "shamir": sharing,
    "quantize": quantization,
    "merkle": trees,
    "files": files,
    "boxes": boxes,
}


def build() -> dict[str, str]:
    """File name -> its text."""
    return {f"{name}.json": json.dumps(make(), indent=1, ensure_ascii=False) + "\n" for name, make in FILES.items()}


def main() -> None:
    for name, text in build().items():
        (DIRECTORY / name).write_text(text)


if __name__ == "__main__":
    main()
