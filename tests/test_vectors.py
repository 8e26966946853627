"""Every known answer in ``tests/vectors``, good and bad, read as a second implementation would read it."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy import merkle
from privacy.encoding import decode, encode, label
from privacy.errors import ProtocolError
from privacy.plan import parse_plan
from privacy.roster import Rules, parse_roster
from privacy.secagg import keys, messages, projection, shamir, signed, transcript
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.keys import HybridKey
from privacy.secagg.masking import MaskStreams, keystream, masked_blocks, pack, unpack
from privacy.secagg.messages import Header, Outcome, Transcript
from privacy.secagg.quantize import Extra, Quantizer
from privacy.secagg.transcript import RoundContext
from tests import make_vectors
from tests.vector_codec import from_json
from tests.vector_round import DIRECTORY

UNIONS: dict[str, Any] = {"ToMember": ToMember, "FromMember": FromMember}
H = bytes.fromhex


@cache
def vectors(name: str) -> Any:
    return json.loads((DIRECTORY / f"{name}.json").read_text())


@pytest.mark.parametrize("name", make_vectors.FILES)
def test_the_files_are_what_the_generator_writes(name: str) -> None:
    found = json.loads(json.dumps(make_vectors.FILES[name]()))
    assert found == vectors(name), "run python -m tests.make_vectors"


def test_there_is_no_file_that_nobody_writes() -> None:
    assert {path.stem for path in DIRECTORY.iterdir()} == set(make_vectors.FILES)


# --- messages and signatures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", vectors("messages")["good"], ids=lambda case: case["comment"].split(" ")[0])
def test_messages_have_this_encoding(case: Any) -> None:
    union = UNIONS[case["union"]]
    value = from_json(case["value"], union) if "value" in case else decode(union, H(case["encoded"]))
    assert encode(value, union).hex() == case["encoded"]
    assert decode(union, H(case["encoded"])) == value


@pytest.mark.parametrize("case", vectors("messages")["bad"], ids=lambda case: case["error"])
def test_bad_messages_are_refused(case: Any) -> None:
    with pytest.raises(ProtocolError, match=case["error"]):
        decode(UNIONS[case["union"]], H(case["encoded"]))


@pytest.mark.parametrize("case", vectors("signatures")["cases"], ids=lambda case: case["type"])
def test_signatures(case: Any) -> None:
    key = Ed25519PrivateKey.from_private_bytes(H(case["identity_seed"]))
    body = decode(getattr(messages, case["type"]), H(case["body"]))
    assert signed.signing_input(case["sender"], body, H(case["header_hash"])) == H(case["signing_input"])
    message = signed.sign(key, case["sender"], body, H(case["header_hash"]))
    assert message.signature.hex() == key.sign(H(case["signing_input"])).hex() == case["signature"]
    assert message.body_hash().hex() == case["body_hash"]


# --- keys and boxes ----------------------------------------------------------------------------------------------


def test_derived_keys() -> None:
    v = vectors("derived")
    h, t1, t2, secret, seed = (H(v[name]) for name in ("h", "t1", "t2", "secret", "seed"))
    assert label("x", b"", b"ab").hex() == v["label('x', '', 'ab')"]
    assert HybridKey.from_seed(H(v["hybrid_seed"])).public.hex() == v["hybrid_public"]
    assert keys.mask_key(secret).public.hex() == v["mask_key_public"]
    for c in v["pair_seed"]:
        assert keys.pair_seed(secret, c["other"]).hex() == c["value"]
    for c in v["pair_mask_key"]:
        assert keys.pair_mask_key(seed, t2, c["one"], c["other"]).hex() == c["value"]
    for c in v["self_mask_key"]:
        assert keys.self_mask_key(seed, t2, c["member"]).hex() == c["value"]
    for c in v["self_commitment"]:
        assert keys.self_commitment(h, c["member"], seed).hex() == c["value"]
    for c in v["nonce_commitment"]:
        assert keys.nonce_commitment(h, c["member"], seed).hex() == c["value"]
    for c in v["secret_hash"]:
        assert keys.secret_hash(c["kind"], c["owner"], c["holder"], seed).hex() == c["value"]
    for c in v["box_info"]:
        assert keys.box_info(c["kind"], h, t1, c["sender"], c["receiver"]).hex() == c["value"]
    p = v["projection"]
    key = projection.challenge(dict(enumerate(map(H, p["nonces"]))), H(p["total"]))
    assert (key.hex(), projection.project(key, np.array(p["vector"]))) == (p["key"], p["value"])
    for c in p["term"]:
        assert projection.zero_sum_term(c["me"], {c["other"]: seed}, t1) == c["value"]
    assert transcript.total_hash(t2, H(v["total_hash"]["root"])).hex() == v["total_hash"]["value"]


def test_boxes_open_with_their_key_and_info_only() -> None:
    key = HybridKey.from_seed(H(vectors("boxes")["key_seed"]))
    for case in vectors("boxes")["opening"]:
        if case["error"]:
            with pytest.raises(ProtocolError, match=case["error"]):
                keys.unseal(key, H(case["box"]), H(case["info"]))
        else:
            assert keys.unseal(key, H(case["box"]), H(case["info"])).hex() == case["plaintext"]


def test_boxes_of_the_round_open() -> None:
    for case in vectors("boxes")["boxes"]:
        key = HybridKey.from_seed(H(case["key_seed"]))
        assert keys.unseal(key, H(case["box"]), H(case["info"])).hex() == case["plaintext"]


@pytest.mark.parametrize("case", vectors("boxes")["sealing"], ids=lambda case: case["public"][-16:])
def test_unusable_public_keys_are_refused(case: Any) -> None:
    with pytest.raises(ProtocolError, match=case["error"]):
        keys.seal(H(case["public"]), b"secret", b"info")


# --- masks, shares, quantiser, trees, files ----------------------------------------------------------------------


def test_mask_streams_and_packing() -> None:
    v = vectors("masks")
    for case in v["streams"]:
        words = keystream(H(v["key"]), case["bits"], case["start"])(len(case["words"]))
        assert words.tolist() == case["words"]
    values = np.array(v["values"], np.uint32)
    for case in v["packed"]:
        bits, count = case["bits"], case["count"]
        assert pack(values[:count], bits).hex() == case["packed"]
        assert unpack(H(case["packed"]), count, bits).tolist() == [x % 2**bits for x in v["values"][:count]]


@pytest.mark.parametrize("case", vectors("masks")["bad"], ids=lambda case: case["error"])
def test_bad_blocks_are_refused(case: Any) -> None:
    with pytest.raises(ProtocolError, match=case["error"]):
        unpack(H(case["packed"]), case["count"], case["bits"])


def test_shamir_shares() -> None:
    v = vectors("shamir")
    for case in v["cases"]:
        drawn = iter(case["random"])
        shares = {int(x): H(share) for x, share in case["shares"].items()}
        found = shamir.share(H(case["secret"]), case["threshold"], list(shares), lambda _n, d=drawn: H(next(d)))  # type: ignore[misc]
        assert found == shares
        for chosen in (sorted(shares)[: case["threshold"]], sorted(shares)[-case["threshold"] :]):
            assert shamir.combine({x: shares[x] for x in chosen}) == H(case["secret"])
    assert shamir.combine({int(x): H(share) for x, share in v["oversized"].items()}) is None
    assert not any(shamir.is_share(H(bad)) for bad in v["bad"])


@pytest.mark.parametrize("case", vectors("quantize")["cases"], ids=lambda case: f"{case['bits']} bits")
def test_quantised_vectors_and_totals(case: Any) -> None:
    v = vectors("quantize")
    extras = tuple(Extra(name, maximum) for name, maximum in v["extras"].items())
    rule = Quantizer(len(v["delta"]), case["bits"], case["cohort"], v["clip"], v["max_weight"], extras)
    assert (rule.qmax, rule.limb_bits) == (case["qmax"], case["limb_bits"])
    delta = np.array(v["delta"], np.float32)
    vector = rule.quantize(delta, case["weight"], case["extras"], lambda _count: H(case["random"]))
    assert vector.tolist() == case["vector"]
    decoded = rule.decode(np.array(case["total"], np.uint32), 3)
    assert (decoded.weight, decoded.extras) == (case["total_weight"], case["total_extras"])
    assert decoded.mean.tolist() == case["mean"]
    for garbled in case["garbled"]:
        with pytest.raises(ProtocolError, match="garbled total"):
            rule.decode(np.array(garbled, np.uint32), 3)


def test_merkle_roots_and_paths() -> None:
    v = vectors("merkle")
    hashes = [merkle.leaf_hash(bytes([i]) * i) for i in range(33)]
    assert [h.hex() for h in hashes] == v["leaf_hashes"]
    assert [merkle.root(hashes[:n]).hex() for n in range(34)] == v["roots"]
    for verifies, cases in ((True, v["paths"]), (False, v["bad"])):
        for case in cases:
            n, index, proof = case["count"], case["index"], [H(p) for p in case["path"]]
            assert merkle.verify(hashes[index], index, n, proof, H(v["roots"][n])) == verifies


def test_plan_digest_and_roster_hash() -> None:
    v = vectors("files")
    assert parse_plan(v["plan"]["text"].encode()).digest.hex() == v["plan"]["digest"]
    assert parse_roster(v["roster"]["text"].encode()).hash.hex() == v["roster"]["hash"]


# --- a whole round -----------------------------------------------------------------------------------------------


def round_context() -> RoundContext:
    c = vectors("round")["context"]
    header = from_json(c["header"], Header)
    return RoundContext(header, tuple(map(H, c["identities"])), Rules(**c["rules"]), c["upload_length"])


def outcome() -> Outcome:
    found: Outcome = from_json(vectors("round")["outcome"], Outcome)
    return found


def test_the_transcript_of_the_round_verifies() -> None:
    v = vectors("round")
    assert round_context().header_hash.hex() == v["context"]["header_hash"]
    assert encode(outcome()).hex() == v["outcome_encoded"]
    verified = transcript.verify_transcript(round_context(), outcome().transcript)
    assert verified.cohort.t1.hex() == v["t1"]
    assert verified.t2.hex() == v["t2"]
    assert verified.survivors_l.hex() == v["l"]
    assert (verified.cohort.threshold, list(verified.survivors)) == (v["threshold"], v["survivors"])
    assert [key.hex() for key in verified.streams.plus] == v["plus"]
    assert [key.hex() for key in verified.streams.minus] == v["minus"]
    assert outcome().total == transcript.total_hash(verified.t2, outcome().root)


def test_the_total_follows_from_the_uploads_and_the_opened_seeds() -> None:
    v = vectors("round")
    total = np.zeros(5, np.uint32)
    for i in v["survivors"]:
        total += unpack(H(v["members"][i]["upload"][0]), 5, 24)
    MaskStreams(list(map(H, v["minus"])), list(map(H, v["plus"])), 24).apply(total)
    assert (total % 2**24).tolist() == v["total"]
    assert [sum(v["members"][i]["vector"][e] for i in v["survivors"]) % 2**24 for e in range(5)] == v["total"]
    assert merkle.root([merkle.leaf_hash(pack(total, 24))]) == outcome().root


def test_each_upload_follows_from_what_its_member_drew() -> None:
    v = vectors("round")
    secrets = {i: H(m["random"][1]) for i, m in enumerate(v["members"])}
    for i in v["survivors"]:
        member, t2 = v["members"][i], H(v["t2"])
        seeds = {j: keys.pair_seed(secrets[min(i, j)], max(i, j)) for j in range(4) if j != i}
        streams = transcript.input_streams(i, H(member["random"][2]), seeds, t2)
        vector = np.array(member["vector"], np.int32)
        assert [b.hex() for b in masked_blocks(vector, streams.plus, streams.minus, 24)] == member["upload"]


@pytest.mark.parametrize("case", vectors("round")["bad"], ids=lambda case: case["error"])
def test_bad_transcripts_are_refused(case: Any) -> None:
    changed = copy.deepcopy(vectors("round")["outcome"]["transcript"])
    *path, last = case["field"]
    place = changed
    for step in path:
        place = place[step]
    place[last] = case["value"]
    with pytest.raises(ProtocolError, match=case["error"]):
        transcript.verify_transcript(round_context(), from_json(changed, Transcript))
