"""M0 to M11 (protocol section 4) as types: what cannot be said here cannot be sent.

A survivor list cannot overlap a dropout list, since only survivors are listed; a released share is of one kind or the
other (:class:`SelfMaskShare` or :class:`MaskSecretShare`), never both. Lengths and ranges are checked when a value is
made, so a decoded message is well-formed; whether it is *acceptable* the two ``round.py`` decide.

Members are named by their roster index.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Generic, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.encoding import digest, encode, label, number
from privacy.errors import ProtocolError
from privacy.secagg.keys import HPKE_OVERHEAD, HPKE_PUBLIC_BYTES, SEED_BYTES, verify_signature
from privacy.secagg.shamir import SHARE_BYTES

HASH_BYTES = 32
SIGNATURE_BYTES = 64
MAX_MEMBERS = 1000
MAX_PATH = 32
MAX_TEXT = 500
#: Two shares of 33 bytes under HPKE; the owner's own leaf seals nothing.
SEALED_SHARES = 2 * SHARE_BYTES + HPKE_OVERHEAD
SEALED_SEED = SEED_BYTES + HPKE_OVERHEAD


def _length(value: bytes, name: str, *allowed: int) -> None:
    if len(value) not in allowed:
        raise ProtocolError(f"{name}: expected {' or '.join(map(str, allowed))} bytes, found {len(value)}")


def _ascending(members: tuple[int, ...], name: str) -> None:
    if len(members) > MAX_MEMBERS or any(a >= b for a, b in pairwise(members)):
        raise ProtocolError(f"{name}: expected at most {MAX_MEMBERS} members, each once, in ascending order")


def _hashes(message: object, *except_for: str) -> None:
    """Every ``bytes`` field not named is a hash of 32 bytes."""
    for f in fields(message):  # type: ignore[arg-type]
        value = getattr(message, f.name)
        if isinstance(value, bytes) and f.name not in except_for:
            _length(value, f.name, HASH_BYTES)


@dataclass(frozen=True)
class Header:
    """What a round is about; every signature of the round covers its hash."""

    version: int
    plan: bytes  # digest of the plan file
    stage: int  # 1, 2, ...
    round: int  # rises with every attempt of this plan and stage
    roster: bytes  # H_R
    start: bytes  # digest of the start adapter
    coordinator: bytes  # Ed25519 public key

    def __post_init__(self) -> None:
        _hashes(self)

    def hash(self) -> bytes:
        return digest("header", encode(self))


# --- signatures --------------------------------------------------------------------------------------------------

B = TypeVar("B")


@dataclass(frozen=True)
class Signed(Generic[B]):
    """A body with its sender and Ed25519 signature; transcript hashes cover the body, since a signer can make many."""

    sender: int
    body: B
    signature: bytes

    def __post_init__(self) -> None:
        _length(self.signature, "signature", SIGNATURE_BYTES)

    def body_hash(self) -> bytes:
        """H(message): sender and body, without the signature."""
        return digest("body", type(self.body).__name__.encode(), number(self.sender), encode(self.body))


def signing_input(sender: int, body: object, header_hash: bytes) -> bytes:
    """The signed bytes: domain label, message type, sender, header hash, canonical encoding of the body."""
    return label("signature", type(body).__name__.encode(), number(sender), header_hash, encode(body))


def sign(key: Ed25519PrivateKey, sender: int, body: B, header_hash: bytes) -> Signed[B]:
    """Sign ``body`` as member ``sender`` in the round of this header."""
    return Signed(sender, body, key.sign(signing_input(sender, body, header_hash)))


def has_valid_signature(message: Signed[B], public: bytes, header_hash: bytes) -> bool:
    """Did the owner of ``public`` sign this body, as this sender, in the round of this header?"""
    return verify_signature(public, message.signature, signing_input(message.sender, message.body, header_hash))


# --- M0 to M11 ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Offer:
    """M0: the coordinator offers a round to a member that is ready."""

    header: Header


@dataclass(frozen=True)
class Advertise:
    """M1: fresh keys, commitments, and what proves that this disk was not rolled back."""

    share_key: bytes  # c_pk
    mask_key: bytes  # s_pk
    self_commitment: bytes  # B_i
    nonce_commitment: bytes
    rounds_joined: int  # rises with every JOINED of this site
    ledger_size: int
    ledger_root: bytes

    def __post_init__(self) -> None:
        _hashes(self, "share_key", "mask_key")
        _length(self.share_key, "share_key", HPKE_PUBLIC_BYTES)
        _length(self.mask_key, "mask_key", HPKE_PUBLIC_BYTES)


@dataclass(frozen=True)
class KeyList:
    """M2: all M1 of U1."""

    members: tuple[Signed[Advertise], ...]

    def __post_init__(self) -> None:
        _ascending(tuple(m.sender for m in self.members), "key list")


@dataclass(frozen=True)
class ShareLeaf:
    """What an owner hands one holder: sealed shares, their hashes, and for a higher id the sealed pair seed."""

    holder: int
    sealed_shares: bytes  # (b-share, z-share) under c_pk of the holder; empty in the owner's own leaf
    self_share_hash: bytes
    secret_share_hash: bytes
    sealed_seed: bytes  # r_ij under s_pk of the holder; empty unless owner < holder
    seed_hash: bytes  # H(r_ij); empty with it

    def __post_init__(self) -> None:
        _hashes(self, "sealed_shares", "sealed_seed", "seed_hash")
        _length(self.sealed_shares, "sealed_shares", 0, SEALED_SHARES)
        _length(self.sealed_seed, "sealed_seed", 0, SEALED_SEED)
        _length(self.seed_hash, "seed_hash", HASH_BYTES if self.sealed_seed else 0)


@dataclass(frozen=True)
class ShareRoot:
    """Signed part of M3: the Merkle root R_i over the leaves by holder, under the signer's T1."""

    t1: bytes
    root: bytes

    def __post_init__(self) -> None:
        _hashes(self)


@dataclass(frozen=True)
class Shares:
    """M3: one leaf for every member of U1, the owner included, and the signed root."""

    leaves: tuple[ShareLeaf, ...]
    root: Signed[ShareRoot]

    def __post_init__(self) -> None:
        _ascending(tuple(leaf.holder for leaf in self.leaves), "share leaves")


@dataclass(frozen=True)
class OwnedLeaf:
    """A leaf of some owner with its path to the owner's signed root."""

    owner: int
    leaf: ShareLeaf
    path: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if len(self.path) > MAX_PATH:
            raise ProtocolError(f"Merkle path: expected at most {MAX_PATH} hashes, found {len(self.path)}")
        for node in self.path:
            _length(node, "Merkle path", HASH_BYTES)


@dataclass(frozen=True)
class Inbox:
    """M4: U2 with everybody's signed root, and my leaf of each."""

    roots: tuple[Signed[ShareRoot], ...]
    leaves: tuple[OwnedLeaf, ...]

    def __post_init__(self) -> None:
        _ascending(tuple(r.sender for r in self.roots), "inbox roots")
        _ascending(tuple(leaf.owner for leaf in self.leaves), "inbox leaves")


@dataclass(frozen=True)
class Complaint:
    """Instead of M5: a leaf of ``accused`` did not open to what its hashes promise."""

    t1: bytes
    accused: int
    reason: str

    def __post_init__(self) -> None:
        _hashes(self)
        if len(self.reason) > MAX_TEXT:
            raise ProtocolError(f"complaint: expected at most {MAX_TEXT} characters, found {len(self.reason)}")


@dataclass(frozen=True)
class MaskedInput:
    """Signed part of M5: Merkle root over the blocks of the masked, packed vector, and its length in bytes."""

    t2: bytes
    root: bytes
    length: int

    def __post_init__(self) -> None:
        _hashes(self)


@dataclass(frozen=True)
class SurvivorList:
    """M6: U3, each with its signed M5."""

    inputs: tuple[Signed[MaskedInput], ...]

    def __post_init__(self) -> None:
        _ascending(tuple(i.sender for i in self.inputs), "survivor list")


@dataclass(frozen=True)
class SurvivorVote:
    """M7: the only survivor list this member signs in this round, as L = H(T2, sorted (id, root))."""

    t2: bytes
    survivors: bytes  # L

    def __post_init__(self) -> None:
        _hashes(self)


@dataclass(frozen=True)
class Certificate:
    """M8: at least t survivor signatures on one list."""

    votes: tuple[Signed[SurvivorVote], ...]

    def __post_init__(self) -> None:
        _ascending(tuple(v.sender for v in self.votes), "certificate")


@dataclass(frozen=True)
class SelfMaskShare:
    """A share of b of a survivor."""

    owner: int
    share: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _length(self.share, "share", SHARE_BYTES)


@dataclass(frozen=True)
class MaskSecretShare:
    """A share of z of a dropout."""

    owner: int
    share: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _length(self.share, "share", SHARE_BYTES)


Share = SelfMaskShare | MaskSecretShare


@dataclass(frozen=True)
class UnmaskShares:
    """M9: for each owner in U2 one share, of the kind that the certified list asks for."""

    t2: bytes
    survivors: bytes  # L
    shares: tuple[Share, ...]

    def __post_init__(self) -> None:
        _hashes(self)
        _ascending(tuple(s.owner for s in self.shares), "unmask shares")


@dataclass(frozen=True)
class OpenedSelfMask:
    """b of a survivor, reconstructed."""

    owner: int
    seed: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _length(self.seed, "seed", SEED_BYTES)


@dataclass(frozen=True)
class OpenedMaskSecret:
    """z of a dropout, reconstructed."""

    owner: int
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _length(self.secret, "secret", SEED_BYTES)


Opened = OpenedSelfMask | OpenedMaskSecret


@dataclass(frozen=True)
class Transcript:
    """All that was signed in a round, and the opened seeds: enough to recompute every mask of the total.

    ``pair_leaves`` are the leaves of a survivor for a dropout with a higher id: the dropout's z opens their seeds.
    """

    header: Header
    keys: tuple[Signed[Advertise], ...]  # U1
    roots: tuple[Signed[ShareRoot], ...]  # U2
    inputs: tuple[Signed[MaskedInput], ...]  # U3
    votes: tuple[Signed[SurvivorVote], ...]
    opened: tuple[Opened, ...]
    pair_leaves: tuple[OwnedLeaf, ...]

    def __post_init__(self) -> None:
        for name, listed in (("keys", self.keys), ("roots", self.roots), ("inputs", self.inputs)):
            _ascending(tuple(m.sender for m in listed), name)
        _ascending(tuple(v.sender for v in self.votes), "votes")
        _ascending(tuple(o.owner for o in self.opened), "opened seeds")


@dataclass(frozen=True)
class Outcome:
    """M10: what the total hashes to, its Merkle root by blocks, and the transcript; the total travels in chunks."""

    total: bytes  # H(total)
    root: bytes
    transcript: Transcript

    def __post_init__(self) -> None:
        _hashes(self)


@dataclass(frozen=True)
class OutcomeVote:
    """M11: this member computed with this total and checked these blocks of it."""

    t2: bytes
    total: bytes  # H(total)
    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        _hashes(self)


@dataclass(frozen=True)
class RoundAborted:
    """The coordinator says that a round ended without a total, and why."""

    header: Header
    reason: str

    def __post_init__(self) -> None:
        if len(self.reason) > MAX_TEXT:
            raise ProtocolError(f"reason: expected at most {MAX_TEXT} characters, found {len(self.reason)}")


#: What the coordinator may tell a member.
ToMember = Offer | KeyList | Inbox | SurvivorList | Certificate | Outcome | RoundAborted
#: What a member may tell the coordinator (M5's vector travels beside its signed root).
FromMember = (
    Signed[Advertise]
    | Shares
    | Signed[Complaint]
    | Signed[MaskedInput]
    | Signed[SurvivorVote]
    | Signed[UnmaskShares]
    | Signed[OutcomeVote]
)

#: The protocol's numbers of what a member says.
NUMBERS = {
    Advertise: "M1",
    ShareRoot: "M3",
    Complaint: "complaint",
    MaskedInput: "M5",
    SurvivorVote: "M7",
    UnmaskShares: "M9",
    OutcomeVote: "M11",
}


def message_name(message: FromMember) -> str:
    """M1, M3, ... of a member's message."""
    return NUMBERS[type(message.root.body if isinstance(message, Shares) else message.body)]
