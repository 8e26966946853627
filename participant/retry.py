"""May a spent delta be masked again? Only with a proof about each round it was spent in (protocol section 6); pure.

(a) an abort certificate: n + c - t + 1 holders of that round, this member among them, will never release in it;
(b) a certified survivor list under this member's own T2 that does not contain it: it was late, its b stays closed;
(c) such a list that contains it: from then on in this stage it signs M7 for that very list of members only.

Otherwise the coordinator could get the same vector into two sums that differ by one member, and subtract.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from participant.records import Aborted, Record, Released, Spent
from privacy.errors import ProtocolError, Refusal
from privacy.secagg import transcript
from privacy.secagg.messages import AbortProof, ListProof, RetryProof
from privacy.secagg.threshold import abort_quorum
from privacy.secagg.transcript import RoundContext


def check_proofs(
    spent: Sequence[Spent], records: Sequence[Record], me: int, proofs: Sequence[RetryProof], context: RoundContext
) -> tuple[int, ...] | None:
    """Check the proofs of an offer against every round in which this stage's delta was spent.

    Args:
        spent: this site's SPENT records of (data set, plan name, stage).
        records: all records of this site.
        context: of the offered round; its roster must be that of the earlier rounds.

    Returns:
        The members of the only survivor list that may be signed from now on, ``None`` for no such bond.

    Raises:
        Refusal: a proof is missing. ProtocolError: a proof does not hold.
    """
    by_header = {proof.header.hash(): proof for proof in proofs}
    bonds: set[tuple[int, ...]] = set()
    for record in spent:
        proof = by_header.get(record.header.hash())
        if proof is None:
            raise Refusal(
                f"M0: the delta was spent in round {record.header.round}; expected a proof about that round, found none"
            )
        if record.header.roster != context.header.roster:
            raise Refusal(f"M0: round {record.header.round} was under another roster; this stage is over for this site")
        if isinstance(proof, AbortProof):
            _check_abort(record, records, me, proof, context)
        else:
            bonds |= _check_list(record, me, proof, context)
    if len(bonds) > 1:
        raise Refusal("M0: this delta is bound to two different survivor lists; this stage is over for this site")
    return bonds.pop() if bonds else None


def _check_abort(record: Spent, records: Sequence[Record], me: int, proof: AbortProof, context: RoundContext) -> None:
    number = record.header.round
    if not any(isinstance(r, Aborted) and r.header == record.header for r in records):
        raise Refusal(f"M0: this site has not aborted round {number} itself")
    earlier = replace(context, header=record.header)
    senders = [statement.sender for statement in proof.statements]
    if me not in senders:
        raise ProtocolError(f"M0: the abort certificate of round {number} lacks this site's own statement")
    for statement in proof.statements:
        if statement.sender not in record.members:
            raise ProtocolError(f"M0: member {statement.sender} held no shares in round {number}")
        transcript.check_signed(earlier, statement, "abort statement")
    needed = abort_quorum(len(record.members), record.colluders)
    if len(senders) < needed:
        raise ProtocolError(f"M0: expected {needed} statements that round {number} stays shut, found {len(senders)}")


def _check_list(record: Spent, me: int, proof: ListProof, context: RoundContext) -> set[tuple[int, ...]]:
    number = record.header.round
    earlier = replace(context, header=record.header)
    members = tuple(entry.member for entry in proof.listed)
    if not set(members) <= set(record.members):
        raise ProtocolError(f"M0: the list of round {number} names members who were not in it")
    survivors_l = transcript.list_hash(record.t2, [(entry.member, entry.root) for entry in proof.listed])
    if len(proof.votes) < record.threshold:
        raise ProtocolError(f"M0: expected {record.threshold} signatures on the list of round {number}")
    for vote in proof.votes:
        transcript.check_list_vote(earlier, members, record.t2, survivors_l, vote)
    if me not in members:
        return set()
    if any(entry.member == me and entry.root != record.root for entry in proof.listed):
        raise ProtocolError(f"M0: the list of round {number} has another upload of this site than its own")
    return {members}


def may_state_abort(records: Collection[Record], header_hash: bytes) -> bool:
    """ABORTED and RELEASED exclude each other: a site that released in a round never says that it has not."""
    return not any(isinstance(r, Released) and r.header.hash() == header_hash for r in records)
