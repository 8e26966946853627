"""M0 to M11 (protocol section 4) as types: what cannot be said here cannot be sent.

A survivor list cannot overlap a dropout list, since only survivors are listed; a released share is of one kind or the
other (:class:`SelfMaskShare` or :class:`MaskSecretShare`), never both. Lengths and ranges are checked when a value is
made, so a decoded message is well-formed; whether it is *acceptable* the two ``round.py`` decide.

Members are named by their roster index.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from privacy.encoding import digest, encode
from privacy.errors import ProtocolError
from privacy.secagg.keys import HPKE_OVERHEAD, HPKE_PUBLIC_BYTES, SEED_BYTES
from privacy.secagg.shamir import SHARE_BYTES
from privacy.secagg.shapes import HASH_BYTES, check_ascending, check_hashes, check_length, check_text
from privacy.secagg.signed import Signed

MAX_PATH = 32
MAX_BLOCKS = 1 << 20
#: Two shares of 33 bytes under HPKE; the owner's own leaf seals nothing.
SEALED_SHARES = 2 * SHARE_BYTES + HPKE_OVERHEAD
SEALED_SEED = SEED_BYTES + HPKE_OVERHEAD


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
        check_hashes(self)

    def hash(self) -> bytes:
        return digest("header", encode(self))


# --- M0 to M11 ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AbortStatement:
    """ "In the round of this header I have not released and never will"; ABORTED was recorded first."""

    reason: str

    def __post_init__(self) -> None:
        check_text(self.reason, "abort statement")


@dataclass(frozen=True)
class AbortProof:
    """Retry proof (a): n + c - t + 1 holders of an earlier round will never release in it."""

    header: Header
    statements: tuple[Signed[AbortStatement], ...]

    def __post_init__(self) -> None:
        check_ascending(tuple(s.sender for s in self.statements), "abort certificate")


@dataclass(frozen=True)
class ListedInput:
    """A member of a survivor list with the root of its upload."""

    member: int
    root: bytes

    def __post_init__(self) -> None:
        check_hashes(self)


@dataclass(frozen=True)
class ListProof:
    """Retry proofs (b) and (c): the certified survivor list of an earlier round, without or with the receiver."""

    header: Header
    listed: tuple[ListedInput, ...]
    votes: tuple[Signed[SurvivorVote], ...]

    def __post_init__(self) -> None:
        check_ascending(tuple(i.member for i in self.listed), "certified list")
        check_ascending(tuple(v.sender for v in self.votes), "certificate of a list")


RetryProof = AbortProof | ListProof


@dataclass(frozen=True)
class Offer:
    """M0: the coordinator offers a round; a member whose delta is spent needs a proof about each earlier round."""

    header: Header
    proofs: tuple[RetryProof, ...] = ()


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
        check_hashes(self, "share_key", "mask_key")
        check_length(self.share_key, "share_key", HPKE_PUBLIC_BYTES)
        check_length(self.mask_key, "mask_key", HPKE_PUBLIC_BYTES)


@dataclass(frozen=True)
class KeyList:
    """M2: all M1 of U1."""

    members: tuple[Signed[Advertise], ...]

    def __post_init__(self) -> None:
        check_ascending(tuple(m.sender for m in self.members), "key list")


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
        check_hashes(self, "sealed_shares", "sealed_seed", "seed_hash")
        check_length(self.sealed_shares, "sealed_shares", 0, SEALED_SHARES)
        check_length(self.sealed_seed, "sealed_seed", 0, SEALED_SEED)
        check_length(self.seed_hash, "seed_hash", HASH_BYTES if self.sealed_seed else 0)


@dataclass(frozen=True)
class ShareRoot:
    """Signed part of M3: the Merkle root R_i over the leaves by holder, under the signer's T1."""

    t1: bytes
    root: bytes

    def __post_init__(self) -> None:
        check_hashes(self)


@dataclass(frozen=True)
class Shares:
    """M3: one leaf for every member of U1, the owner included, and the signed root."""

    leaves: tuple[ShareLeaf, ...]
    root: Signed[ShareRoot]

    def __post_init__(self) -> None:
        check_ascending(tuple(leaf.holder for leaf in self.leaves), "share leaves")


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
            check_length(node, "Merkle path", HASH_BYTES)


@dataclass(frozen=True)
class Inbox:
    """M4: U2 with everybody's signed root, and my leaf of each."""

    roots: tuple[Signed[ShareRoot], ...]
    leaves: tuple[OwnedLeaf, ...]

    def __post_init__(self) -> None:
        check_ascending(tuple(r.sender for r in self.roots), "inbox roots")
        check_ascending(tuple(leaf.owner for leaf in self.leaves), "inbox leaves")


@dataclass(frozen=True)
class Complaint:
    """Instead of M5: a leaf of ``accused`` did not open to what its hashes promise."""

    t1: bytes
    accused: int
    reason: str

    def __post_init__(self) -> None:
        check_hashes(self)
        check_text(self.reason, "complaint")


@dataclass(frozen=True)
class MaskedInput:
    """Signed part of M5: Merkle root over the blocks of the masked, packed vector, and its length in bytes."""

    t2: bytes
    root: bytes
    length: int

    def __post_init__(self) -> None:
        check_hashes(self)


@dataclass(frozen=True)
class SurvivorList:
    """M6: U3, each with its signed M5."""

    inputs: tuple[Signed[MaskedInput], ...]

    def __post_init__(self) -> None:
        check_ascending(tuple(i.sender for i in self.inputs), "survivor list")


@dataclass(frozen=True)
class SurvivorVote:
    """M7: the only survivor list this member signs in this round, as L = H(T2, sorted (id, root))."""

    t2: bytes
    survivors: bytes  # L

    def __post_init__(self) -> None:
        check_hashes(self)


@dataclass(frozen=True)
class Certificate:
    """M8: at least t survivor signatures on one list."""

    votes: tuple[Signed[SurvivorVote], ...]

    def __post_init__(self) -> None:
        check_ascending(tuple(v.sender for v in self.votes), "certificate")


@dataclass(frozen=True)
class SelfMaskShare:
    """A share of b of a survivor."""

    owner: int
    share: bytes = field(repr=False)

    def __post_init__(self) -> None:
        check_length(self.share, "share", SHARE_BYTES)


@dataclass(frozen=True)
class MaskSecretShare:
    """A share of z of a dropout."""

    owner: int
    share: bytes = field(repr=False)

    def __post_init__(self) -> None:
        check_length(self.share, "share", SHARE_BYTES)


Share = SelfMaskShare | MaskSecretShare


@dataclass(frozen=True)
class UnmaskShares:
    """M9: for each owner in U2 one share, of the kind that the certified list asks for."""

    t2: bytes
    survivors: bytes  # L
    shares: tuple[Share, ...]

    def __post_init__(self) -> None:
        check_hashes(self)
        check_ascending(tuple(s.owner for s in self.shares), "unmask shares")


@dataclass(frozen=True)
class OpenedSelfMask:
    """b of a survivor, reconstructed."""

    owner: int
    seed: bytes = field(repr=False)

    def __post_init__(self) -> None:
        check_length(self.seed, "seed", SEED_BYTES)


@dataclass(frozen=True)
class OpenedMaskSecret:
    """z of a dropout, reconstructed."""

    owner: int
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        check_length(self.secret, "secret", SEED_BYTES)


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
            check_ascending(tuple(m.sender for m in listed), name)
        check_ascending(tuple(v.sender for v in self.votes), "votes")
        check_ascending(tuple(o.owner for o in self.opened), "opened seeds")


@dataclass(frozen=True)
class Outcome:
    """M10: what the total hashes to, its Merkle root by blocks, and the transcript; the total travels in chunks."""

    total: bytes  # H(total)
    root: bytes
    transcript: Transcript

    def __post_init__(self) -> None:
        check_hashes(self)


@dataclass(frozen=True)
class OutcomeVote:
    """M11: this member computed with this total and checked these blocks of it; its nonce is opened here, once."""

    t2: bytes
    total: bytes  # H(total)
    blocks: tuple[int, ...]
    nonce: bytes

    def __post_init__(self) -> None:
        check_hashes(self)
        check_ascending(self.blocks, "checked blocks", MAX_BLOCKS)


@dataclass(frozen=True)
class NonceList:
    """M12: every survivor's M11, so that all know the same random projection."""

    votes: tuple[Signed[OutcomeVote], ...]

    def __post_init__(self) -> None:
        check_ascending(tuple(v.sender for v in self.votes), "nonce list")


@dataclass(frozen=True)
class ProjectionShare:
    """M13: <r, x_i> plus pairwise zero-sum terms, mod 2**64."""

    t2: bytes
    total: bytes  # H(total)
    value: int

    def __post_init__(self) -> None:
        check_hashes(self)


@dataclass(frozen=True)
class Evidence:
    """What a released round leaves: M10, all M11, and all M13 where every survivor sent one."""

    outcome: Outcome
    votes: tuple[Signed[OutcomeVote], ...]
    projection: tuple[Signed[ProjectionShare], ...]

    def __post_init__(self) -> None:
        check_ascending(tuple(v.sender for v in self.votes), "outcome signatures")
        check_ascending(tuple(p.sender for p in self.projection), "projection")


@dataclass(frozen=True)
class RoundAborted:
    """The coordinator says that a round ended without a total, and why."""

    header: Header
    reason: str

    def __post_init__(self) -> None:
        check_text(self.reason, "reason")
