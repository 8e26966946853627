"""Keys, boxes and everything derived: each value is bound to all it depends on, and secrets never print."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.errors import ProtocolError
from privacy.secagg import keys
from privacy.secagg.keys import HPKE_OVERHEAD, HPKE_PUBLIC_BYTES, MLKEM_BYTES, HybridKey, RoundSecrets
from tests.simulation import seeded

KEY = HybridKey.from_seed(bytes(range(96)))
BOX = keys.seal(KEY.public, b"plaintext", b"info")

#: Every X25519 point of low order, and the same ones in encodings that are not reduced (RFC 7748, section 7).
LOW_ORDER = {
    "zero": "00" * 32,
    "one": "01" + "00" * 31,
    "order eight, first": "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "order eight, second": "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "p - 1": "ec" + "ff" * 30 + "7f",
    "p, which is zero": "ed" + "ff" * 30 + "7f",
    "p + 1, which is one": "ee" + "ff" * 30 + "7f",
    "zero with the unused top bit": "00" * 31 + "80",
    "p - 1 with the unused top bit": "ec" + "ff" * 31,
}


def test_a_box_opens_with_its_key_and_info() -> None:
    assert keys.unseal(KEY, BOX, b"info") == b"plaintext"
    assert len(BOX) == len(b"plaintext") + HPKE_OVERHEAD


def test_the_same_plaintext_is_sealed_to_different_bytes_each_time() -> None:
    assert keys.seal(KEY.public, b"plaintext", b"info") != BOX


CLOSED: dict[str, Callable[[], bytes]] = {
    "another info": lambda: keys.unseal(KEY, BOX, b"other"),
    "another key": lambda: keys.unseal(HybridKey.from_seed(bytes(96)), BOX, b"info"),
    "the same ML-KEM key with another X25519 key": lambda: keys.unseal(
        HybridKey.from_seed(bytes(range(64)) + bytes(range(32))), BOX, b"info"
    ),
    "the same X25519 key with another ML-KEM key": lambda: keys.unseal(
        HybridKey.from_seed(bytes(64) + bytes(range(64, 96))), BOX, b"info"
    ),
    "an empty box": lambda: keys.unseal(KEY, b"", b"info"),
    "a box cut short": lambda: keys.unseal(KEY, BOX[:-1], b"info"),
    "a box that ends after the encapsulation": lambda: keys.unseal(KEY, BOX[: 1088 + 32], b"info"),
    "a box with a byte more": lambda: keys.unseal(KEY, BOX + b"\0", b"info"),
    "a bit changed in the ML-KEM ciphertext": lambda: keys.unseal(KEY, bytes([BOX[0] ^ 1]) + BOX[1:], b"info"),
    "a bit changed in the tag": lambda: keys.unseal(KEY, BOX[:-1] + bytes([BOX[-1] ^ 1]), b"info"),
    "an ephemeral key of low order": lambda: keys.unseal(KEY, BOX[:1088] + bytes(32) + BOX[1120:], b"info"),
}


@pytest.mark.parametrize("opening", CLOSED.values(), ids=CLOSED.keys())
def test_a_box_does_not_open_otherwise(opening: Callable[[], bytes]) -> None:
    with pytest.raises(ProtocolError, match="a sealed box does not open"):
        opening()


@pytest.mark.parametrize("point", LOW_ORDER.values(), ids=LOW_ORDER.keys())
def test_nothing_is_sealed_to_an_x25519_key_of_low_order(point: str) -> None:
    with pytest.raises(ProtocolError, match="low-order"):
        keys.seal(KEY.public[:MLKEM_BYTES] + bytes.fromhex(point), b"secret", b"info")


def test_nothing_is_sealed_to_an_ml_kem_key_beyond_the_modulus() -> None:
    with pytest.raises(ProtocolError, match="modulus"):
        keys.seal(b"\xff" * MLKEM_BYTES + KEY.public[MLKEM_BYTES:], b"secret", b"info")


@pytest.mark.parametrize("length", [0, HPKE_PUBLIC_BYTES - 1, HPKE_PUBLIC_BYTES + 1])
def test_a_public_key_has_one_length(length: int) -> None:
    with pytest.raises(ProtocolError, match=f"expected a hybrid public key of 1216 bytes, found {length}"):
        keys.seal((KEY.public * 2)[:length], b"secret", b"info")


@pytest.mark.parametrize("sign", [0, 1 << 255])
@pytest.mark.parametrize("y", sorted(keys.LOW_ORDER_Y))
def test_a_point_of_low_order_is_known_by_its_whole_y_and_no_other_bit(y: int, sign: int) -> None:
    assert keys.is_low_order((y + sign).to_bytes(32, "little"))
    for neighbour in {y + 1, y ^ 1} - keys.LOW_ORDER_Y - {keys._P, keys._P + 1}:
        assert not keys.is_low_order((neighbour + sign).to_bytes(32, "little"))


H, T1, T2 = b"h" * 32, b"1" * 32, b"2" * 32
S, OTHER = b"s" * 32, b"o" * 32

#: Sentence -> values that must all differ from one another: the first one, then one change each.
BOUND: dict[str, list[bytes]] = {
    "B_i binds header, member and seed": [
        keys.self_commitment(H, 1, S),
        keys.self_commitment(T1, 1, S),
        keys.self_commitment(H, 2, S),
        keys.self_commitment(H, 1, OTHER),
        keys.nonce_commitment(H, 1, S),
    ],
    "the pair seed binds the secret and the other member": [
        keys.pair_seed(S, 1),
        keys.pair_seed(OTHER, 1),
        keys.pair_seed(S, 2),
    ],
    "the pair mask key binds seed, T2 and both members": [
        keys.pair_mask_key(S, T2, 1, 2),
        keys.pair_mask_key(OTHER, T2, 1, 2),
        keys.pair_mask_key(S, T1, 1, 2),
        keys.pair_mask_key(S, T2, 1, 3),
        keys.pair_mask_key(S, T2, 0, 2),
    ],
    "the self mask key binds seed, T2 and member, and is no pair key": [
        keys.self_mask_key(S, T2, 1),
        keys.self_mask_key(OTHER, T2, 1),
        keys.self_mask_key(S, T1, 1),
        keys.self_mask_key(S, T2, 2),
        keys.pair_mask_key(S, T2, 1, 1),
    ],
    "the info of a box binds use, header, T1, sender and receiver": [
        keys.box_info("share", H, T1, 1, 2),
        keys.box_info("pair", H, T1, 1, 2),
        keys.box_info("share", T2, T1, 1, 2),
        keys.box_info("share", H, T2, 1, 2),
        keys.box_info("share", H, T1, 2, 1),
        keys.box_info("share", H, T1, 1, 3),
    ],
    "the hash of a secret binds kind, owner and holder": [
        keys.secret_hash("self-share", 1, 2, S),
        keys.secret_hash("secret-share", 1, 2, S),
        keys.secret_hash("self-share", 2, 1, S),
        keys.secret_hash("self-share", 1, 3, S),
        keys.secret_hash("self-share", 1, 2, OTHER),
    ],
}


@pytest.mark.parametrize("values", BOUND.values(), ids=BOUND.keys())
def test_derived_values_are_bound_to_all_they_depend_on(values: list[bytes]) -> None:
    assert len(set(values)) == len(values)


def test_both_members_of_a_pair_derive_one_key() -> None:
    assert keys.pair_mask_key(S, T2, 4, 9) == keys.pair_mask_key(S, T2, 9, 4)


def test_the_mask_secret_determines_the_mask_key() -> None:
    assert keys.mask_key(S).public == keys.mask_key(S).public
    assert keys.mask_key(S).public != keys.mask_key(OTHER).public
    box = keys.seal(keys.mask_key(S).public, b"seed", b"info")
    assert keys.unseal(keys.mask_key(S), box, b"info") == b"seed"


def test_a_fresh_round_has_fresh_secrets() -> None:
    one, other = RoundSecrets.generate(), RoundSecrets.generate()
    values = [one.mask_secret, one.self_seed, one.nonce, other.mask_secret, other.self_seed, other.nonce]
    assert len(set(values)) == 6
    assert all(len(value) == 32 for value in values)
    assert one.share_key.public != other.share_key.public


def test_secrets_of_a_round_never_print() -> None:
    secrets = RoundSecrets.generate(seeded("print"))
    shown = repr(secrets) + repr(secrets.share_key)
    for value in (secrets.mask_secret, secrets.self_seed, secrets.nonce):
        assert repr(value)[2:-1] not in shown
        assert value.hex() not in shown
    assert "mask_secret" not in shown
    assert "private" not in shown


def test_a_signature_verifies_for_its_key_and_message_only() -> None:
    key, other = Ed25519PrivateKey.from_private_bytes(S), Ed25519PrivateKey.from_private_bytes(OTHER)
    public, signature = keys.identity_public(key), key.sign(b"message")
    assert keys.verify_signature(public, signature, b"message")
    assert not keys.verify_signature(public, signature, b"massage")
    assert not keys.verify_signature(keys.identity_public(other), signature, b"message")
    assert not keys.verify_signature(public, signature[:-1], b"message")
    assert not keys.verify_signature(public[:-1], signature, b"message")


def test_nobody_but_the_signer_can_make_a_second_signature_from_a_first() -> None:
    """S + L would verify under a lax check: the classic malleability of Ed25519 (RFC 8032, section 5.1.7)."""
    key = Ed25519PrivateKey.from_private_bytes(S)
    signature = key.sign(b"message")
    order = 2**252 + 27742317777372353535851937790883648493
    moved = int.from_bytes(signature[32:], "little") + order
    assert not keys.verify_signature(
        keys.identity_public(key), signature[:32] + moved.to_bytes(32, "little"), b"message"
    )
