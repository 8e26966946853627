"""Keys of a member and of one round (protocol section 3): identity, HPKE, and everything derived.

Only primitives of pyca/cryptography. Every derived key has a label of its own and binds the transcript.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from os import urandom

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privacy.encoding import digest, label, number
from privacy.errors import ProtocolError

SEED_BYTES = 32
MLKEM_BYTES = 1184
HPKE_PUBLIC_BYTES = MLKEM_BYTES + 32  # ML-KEM-768 encapsulation key, then X25519 public key
#: What a sealed box adds to its plaintext: ML-KEM ciphertext, X25519 key, GCM tag.
HPKE_OVERHEAD = 1088 + 32 + 16

#: X25519 + ML-KEM-768 (FIPS 203) hybrid: whoever keeps today's bytes must break both, a quantum computer later.
SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)

# Labels of everything derived or sealed; a key of one use is useless for another.
LABEL_MASK_KEY = "mask-key"  # s_i from z_i
LABEL_PAIR = "pair"  # r_ij from z_i; sealed pair seeds
LABEL_SHARE = "share"  # sealed shares
LABEL_PAIR_MASK = "pair-mask"  # k_ij from r_ij
LABEL_SELF_MASK = "self-mask"  # mask key from b_i
LABEL_SELF_COMMITMENT = "b"  # B_i


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int = SEED_BYTES) -> bytes:
    """HKDF-SHA256 (RFC 5869)."""
    return HKDF(hashes.SHA256(), length, salt, info).derive(secret)


# --- identity ---------------------------------------------------------------------------------------------------


def identity_public(key: Ed25519PrivateKey) -> bytes:
    """Raw Ed25519 public key, 32 bytes."""
    return key.public_key().public_bytes_raw()


#: y coordinates of the eight Ed25519 points of order 1, 2, 4 and 8 (RFC 8032, section 5.1; p = 2**255 - 19).
_P = 2**255 - 19
_ORDER_8 = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")
LOW_ORDER_Y = frozenset({0, 1, _P - 1, _ORDER_8, _P - _ORDER_8})


def is_low_order(public: bytes) -> bool:
    """Is this Ed25519 key a point of small order, also in a non-canonical encoding? Anybody can sign for such a key."""
    return (int.from_bytes(public, "little") & (1 << 255) - 1) % _P in LOW_ORDER_Y


def verify_signature(public: bytes, signature: bytes, message: bytes) -> bool:
    """Ed25519 verification that answers instead of raising."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


# --- HPKE -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HybridKey:
    """An HPKE key pair; the private half never prints and never leaves memory."""

    private: hpke.MLKEM768X25519PrivateKey = field(repr=False)
    public: bytes  # HPKE_PUBLIC_BYTES

    @classmethod
    def from_seed(cls, seed: bytes) -> HybridKey:
        """Deterministic key pair from 96 bytes: 64 for ML-KEM (d, z of FIPS 203), 32 for X25519."""
        kem, dh = MLKEM768PrivateKey.from_seed_bytes(seed[:64]), X25519PrivateKey.from_private_bytes(seed[64:])
        public = kem.public_key().public_bytes_raw() + dh.public_key().public_bytes_raw()
        return cls(hpke.MLKEM768X25519PrivateKey(kem, dh), public)

    @classmethod
    def generate(cls, rand: Callable[[int], bytes] = urandom) -> HybridKey:
        return cls.from_seed(rand(96))


def load_public(raw: bytes) -> hpke.MLKEM768X25519PublicKey:
    """Parse a hybrid public key.

    Raises:
        ProtocolError: wrong length, or an encapsulation key that fails the modulus check of FIPS 203.
    """
    if len(raw) != HPKE_PUBLIC_BYTES:
        raise ProtocolError(f"expected a hybrid public key of {HPKE_PUBLIC_BYTES} bytes, found {len(raw)}")
    try:
        kem = MLKEM768PublicKey.from_public_bytes(raw[:MLKEM_BYTES])
        return hpke.MLKEM768X25519PublicKey(kem, X25519PublicKey.from_public_bytes(raw[MLKEM_BYTES:]))
    except ValueError as error:
        raise ProtocolError("expected an ML-KEM-768 key that passes the modulus check of FIPS 203") from error


def seal(public: bytes, plaintext: bytes, info: bytes) -> bytes:
    """HPKE base mode; the sender is authenticated by the signature over the box (base mode is anonymous).

    Raises:
        ProtocolError: a malformed key, or a low-order X25519 point (all-zero shared secret).
    """
    key = load_public(public)
    try:
        return SUITE.encrypt(plaintext, key, info=info)
    except ValueError as error:
        raise ProtocolError("expected a usable X25519 key, found a low-order point") from error


def unseal(key: HybridKey, box: bytes, info: bytes) -> bytes:
    """Open a sealed box.

    Raises:
        ProtocolError: the box was not sealed to this key under this ``info``, or is damaged.
    """
    try:
        return SUITE.decrypt(box, key.private, info=info)
    except (InvalidTag, ValueError) as error:
        raise ProtocolError("a sealed box does not open") from error


def box_info(kind: str, header_hash: bytes, t1: bytes, sender: int, receiver: int) -> bytes:
    """HPKE ``info``: pyca's ``encrypt`` takes no associated data, so everything bound goes here."""
    return label(kind, header_hash, t1, number(sender), number(receiver))


# --- round secrets and what is derived from them -----------------------------------------------------------------


@dataclass(frozen=True)
class RoundSecrets:
    """Fresh for one round of one member, only ever in memory (protocol section 3)."""

    share_key: HybridKey = field(repr=False)  # c_i: shares travel under it; never escrowed
    mask_secret: bytes = field(repr=False)  # z_i, 32 bytes
    self_seed: bytes = field(repr=False)  # b_i, 32 bytes
    nonce: bytes = field(repr=False)  # for the random projection, 32 bytes

    @classmethod
    def generate(cls, rand: Callable[[int], bytes] = urandom) -> RoundSecrets:
        return cls(HybridKey.generate(rand), rand(SEED_BYTES), rand(SEED_BYTES), rand(SEED_BYTES))


def mask_key(mask_secret: bytes) -> HybridKey:
    """s_i, the HPKE key pair that z_i determines: opening z_i later opens the pair seeds and nothing else."""
    return HybridKey.from_seed(hkdf(mask_secret, b"", label(LABEL_MASK_KEY), 96))


def self_commitment(header_hash: bytes, member: int, self_seed: bytes) -> bytes:
    """B_i = H("b", H(header), i, b_i); unsalted, since others must open it."""
    return digest(LABEL_SELF_COMMITMENT, header_hash, number(member), self_seed)


def nonce_commitment(header_hash: bytes, member: int, nonce: bytes) -> bytes:
    """H(nonce) of M1, opened only for the random projection."""
    return digest("nonce", header_hash, number(member), nonce)


def pair_seed(mask_secret: bytes, other: int) -> bytes:
    """r_ij of i < j, chosen by the lower id: HKDF(z_i, "pair", j), 32 bytes."""
    return hkdf(mask_secret, b"", label(LABEL_PAIR, number(other)))


def pair_mask_key(seed: bytes, t2: bytes, one: int, other: int) -> bytes:
    """k_ij = HKDF(r_ij, salt=T2, "pair-mask", lo, hi), an AES-256 key."""
    low, high = sorted((one, other))
    return hkdf(seed, t2, label(LABEL_PAIR_MASK, number(low), number(high)))


def self_mask_key(self_seed: bytes, t2: bytes, member: int) -> bytes:
    """HKDF(b_i, salt=T2, "self-mask", i), an AES-256 key."""
    return hkdf(self_seed, t2, label(LABEL_SELF_MASK, number(member)))


def secret_hash(kind: str, owner: int, holder: int, secret: bytes) -> bytes:
    """Hash of a share or pair seed, as it stands in the leaf of M3; the secrets have 256 bits, so no salt."""
    return digest("leaf-" + kind, number(owner), number(holder), secret)
