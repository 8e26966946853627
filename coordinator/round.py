"""One round as the coordinator runs it: collects, relays, and learns one sum; pure (protocol section 4).

This file does no I/O: messages go in by :meth:`CoordinatorRound.receive`, what a member shall be told next is derived
from the phase by :meth:`message_for` (no outbox, so every retry gets the same bytes), deadlines come in as
:meth:`close_phase`. The shell (``coordinator/service.py``) stores each accepted message before it acknowledges it;
feeding the stored messages to a fresh machine gives the same state again.

An honest coordinator checks as much as the members will, so that a cheating member is named here and not there.
"""

from __future__ import annotations

from collections.abc import Mapping

from coordinator.opening import evidence_against, open_seeds
from coordinator.phases import (
    ACCEPTS,
    Aborted,
    Closed,
    Confirming,
    Folding,
    Joining,
    Phase,
    Projecting,
    Publishing,
    Released,
    Sharing,
    Signing,
    Unmasking,
    Uploading,
)
from privacy import endings, merkle
from privacy.encoding import encode
from privacy.errors import ProtocolError
from privacy.secagg import dealing, transcript
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.messages import (
    AbortStatement,
    Advertise,
    Certificate,
    Complaint,
    Inbox,
    KeyList,
    ListProof,
    MaskedInput,
    NonceList,
    Offer,
    Outcome,
    OutcomeVote,
    OwnedLeaf,
    ProjectionShare,
    RetryProof,
    RoundAborted,
    SelfMaskShare,
    Shares,
    SurvivorList,
    SurvivorVote,
    Transcript,
    UnmaskShares,
)
from privacy.secagg.naming import Accusation, BadShare, Naming, matches_leaf
from privacy.secagg.signed import Signed
from privacy.secagg.transcript import Cohort, RoundContext


def _body(message: FromMember) -> object:
    return message.root.body if isinstance(message, Shares) else message.body


def sender_of(message: FromMember) -> int:
    """Roster index that a message claims as its sender; the shell compares it with the TLS certificate."""
    return message.root.sender if isinstance(message, Shares) else message.sender


def outcome_of(phase: Publishing, root: bytes) -> Outcome:
    """M10 for a total with this Merkle root over its packed blocks."""
    return Outcome(transcript.total_hash(phase.closed.t2, root), root, phase.transcript)


class CoordinatorRound:
    """The state machine of one round."""

    def __init__(
        self,
        context: RoundContext,
        invited: tuple[int, ...],
        proofs: Mapping[int, tuple[RetryProof, ...]] | None = None,
    ) -> None:
        if len(invited) > context.rules.cohort:
            raise RuntimeError(f"{len(invited)} members invited to a cohort of at most {context.rules.cohort}")
        self.context = context
        self.invited = invited
        self.proofs = proofs or {}
        self.phase: Phase = Joining()
        self._accepted: dict[tuple[int, type], bytes] = {}
        #: Proven cheats, for the manifest.
        self.accusations: list[Accusation] = []
        self._leaf_hashes: dict[int, list[bytes]] = {}  # by owner: every member's inbox needs paths in all trees

    # --- what members say ----------------------------------------------------------------------------------------

    def receive(self, message: FromMember) -> bool:
        """Take one message of a member; ``False`` if it only repeats one taken before.

        Raises:
            ProtocolError: not acceptable; the state is what it was.
        """
        body, sender, encoded = _body(message), sender_of(message), encode(message)
        key = (sender, type(body))
        if key in self._accepted:
            if self._accepted[key] == encoded:
                return False
            raise ProtocolError(f"a second, different {type(body).__name__} of member {sender}")
        if type(body) not in ACCEPTS[type(self.phase)]:
            raise ProtocolError(f"{type(body).__name__} of member {sender} in phase {type(self.phase).__name__}")
        self._take(message)
        self._accepted[key] = encoded
        if self._complete():
            self.close_phase()
        return True

    def _take(self, message: FromMember) -> None:
        phase = self.phase
        if isinstance(phase, Joining):
            self._take_keys(phase, message)  # type: ignore[arg-type]  # ACCEPTS matched the body to the phase
        elif isinstance(phase, Sharing):
            self._take_shares(phase, message)  # type: ignore[arg-type]
        elif isinstance(phase, Uploading) and isinstance(_body(message), MaskedInput):
            self._take_input(phase, message)  # type: ignore[arg-type]
        elif isinstance(phase, Uploading):
            self._take_complaint(phase, message)  # type: ignore[arg-type]
        elif isinstance(phase, Signing):
            self._take_vote(phase, message)  # type: ignore[arg-type]
        elif isinstance(phase, Unmasking):
            self._take_release(phase, message)  # type: ignore[arg-type]
        elif isinstance(phase, Confirming):
            self._take_outcome_vote(phase, message)  # type: ignore[arg-type]
        elif isinstance(phase, Projecting):
            self._take_projection(phase, message)  # type: ignore[arg-type]
        elif isinstance(phase, Aborted):
            self._take_statement(phase, message)  # type: ignore[arg-type]

    def _take_keys(self, phase: Joining, message: Signed[Advertise]) -> None:
        if message.sender not in self.invited:
            raise ProtocolError(f"M1: member {message.sender} was not invited to this round")
        transcript.check_advertise(self.context, message)
        taken = {key for m in phase.keys.values() for key in (m.body.share_key, m.body.mask_key)}
        if taken & {message.body.share_key, message.body.mask_key} or message.body.share_key == message.body.mask_key:
            raise ProtocolError(f"M1: a key of member {message.sender} is not its own", culprit=message.sender)
        phase.keys[message.sender] = message

    def _take_shares(self, phase: Sharing, message: Shares) -> None:
        owner = message.root.sender
        transcript.check_root(phase.cohort, message.root)
        if tuple(leaf.holder for leaf in message.leaves) != phase.cohort.members:
            raise ProtocolError(f"M3 of member {owner}: expected one leaf for each member of the key list")
        hashes = dealing.leaf_hashes(message.leaves)
        if merkle.root(hashes) != message.root.body.root:
            raise ProtocolError(f"M3 of member {owner}: the leaves do not have the signed root", culprit=owner)
        for leaf in message.leaves:
            if bool(leaf.sealed_shares) != (leaf.holder != owner) or bool(leaf.sealed_seed) != (leaf.holder > owner):
                raise ProtocolError(f"M3 of member {owner}: misplaced boxes for member {leaf.holder}", culprit=owner)
        phase.shares[owner] = message
        self._leaf_hashes[owner] = hashes

    def _take_input(self, phase: Uploading, message: Signed[MaskedInput]) -> None:
        if message.sender in phase.complaints:
            raise ProtocolError(f"M5: member {message.sender} has complained instead")
        transcript.check_input(phase.cohort, phase.sharers, phase.t2, message)
        phase.inputs[message.sender] = message

    def _take_complaint(self, phase: Uploading, message: Signed[Complaint]) -> None:
        """A member that could not open a leaf takes no further part; its word stays among the events, no proof."""
        sender = message.sender
        if sender in phase.inputs:
            raise ProtocolError(f"complaint: member {sender} has uploaded already")
        if sender not in phase.sharers or message.body.accused not in phase.sharers:
            raise ProtocolError(f"complaint of member {sender}: expected two members of U2")
        transcript.check_signed(self.context, message, "complaint")
        if message.body.t1 != phase.cohort.t1:
            raise ProtocolError(f"complaint of member {sender} is about another round")
        phase.complaints[sender] = message

    def _take_vote(self, phase: Signing, vote: Signed[SurvivorVote]) -> None:
        closed = phase.closed
        transcript.check_list_vote(self.context, closed.survivors, closed.t2, closed.survivors_l, vote)
        phase.votes[vote.sender] = vote

    def _take_release(self, phase: Unmasking, message: Signed[UnmaskShares]) -> None:
        """M9: kinds fit U3, every share matches the hash in its leaf; a bad share names its sender."""
        closed, sender, body = phase.closed, message.sender, message.body
        if sender not in closed.survivors:
            raise ProtocolError(f"M9: member {sender} is not a survivor")
        transcript.check_signed(self.context, message, "M9")
        if (body.t2, body.survivors) != (closed.t2, closed.survivors_l):
            raise ProtocolError(f"M9: member {sender} released for another survivor list", culprit=sender)
        if tuple(s.owner for s in body.shares) != closed.sharers:
            raise ProtocolError(f"M9 of member {sender}: expected one share for each member of U2", culprit=sender)
        for share in body.shares:
            if isinstance(share, SelfMaskShare) != (share.owner in closed.survivors):
                raise ProtocolError(f"M9 of member {sender}: wrong kind of share of {share.owner}", culprit=sender)
            leaf = self._owned_leaf(closed, share.owner, sender)
            if not matches_leaf(share, leaf):
                # One proof is enough: a cheat that repeats itself in new words must not fill memory and disk.
                if all(
                    a.evidence.release.sender != sender for a in self.accusations if isinstance(a.evidence, BadShare)
                ):
                    self._accuse(closed, BadShare(message, closed.shares[share.owner].root, leaf))
                raise ProtocolError(
                    f"M9 of member {sender}: the share of member {share.owner} does not match its hash in M3",
                    culprit=sender,
                )
        phase.releases[sender] = message

    def _accuse(self, closed: Closed, evidence: Naming) -> None:
        self.accusations.append(Accusation(self.context.header, closed.cohort.keys, closed.roots, evidence))

    def _take_outcome_vote(self, phase: Confirming, vote: Signed[OutcomeVote]) -> None:
        closed = phase.closed
        transcript.check_outcome_vote(self.context, closed.survivors, closed.t2, phase.outcome.total, vote)
        transcript.check_nonce(closed.cohort, vote)
        phase.votes[vote.sender] = vote

    def _take_projection(self, phase: Projecting, share: Signed[ProjectionShare]) -> None:
        closed = phase.closed
        transcript.check_projection(self.context, closed.survivors, closed.t2, phase.outcome.total, share)
        phase.shares[share.sender] = share

    def _take_statement(self, phase: Aborted, message: Signed[AbortStatement]) -> None:
        """A holder says that it will never release in this round; n + c - t + 1 of them are retry proof (a)."""
        if phase.cohort is None or message.sender not in phase.cohort.members:
            raise ProtocolError(f"abort statement of member {message.sender}: it holds no shares of this round")
        transcript.check_signed(self.context, message, "abort statement")
        phase.statements[message.sender] = message

    # --- how phases end -------------------------------------------------------------------------------------------

    def missing(self) -> tuple[int, ...]:
        """Members whose answer this phase still waits for."""
        phase = self.phase
        if isinstance(phase, Joining):
            return tuple(i for i in self.invited if i not in phase.keys)
        if isinstance(phase, Sharing):
            return tuple(i for i in phase.cohort.members if i not in phase.shares)
        if isinstance(phase, Uploading):
            return tuple(i for i in phase.sharers if i not in phase.inputs and i not in phase.complaints)
        if isinstance(phase, Signing | Confirming):
            return tuple(i for i in phase.closed.survivors if i not in phase.votes)
        if isinstance(phase, Unmasking):
            return tuple(i for i in phase.closed.survivors if i not in phase.releases)
        if isinstance(phase, Projecting):
            return tuple(i for i in phase.closed.survivors if i not in phase.shares)
        return ()

    def taking_part(self) -> tuple[int, ...]:
        """Members that are in the round still: invited, and not left out by a phase that is closed."""
        phase = self.phase
        if isinstance(phase, Joining):
            return self.invited
        if isinstance(phase, Sharing):
            return phase.cohort.members
        if isinstance(phase, Uploading):
            return phase.sharers
        return () if isinstance(phase, Aborted) else phase.closed.survivors

    def _complete(self) -> bool:
        if isinstance(self.phase, Aborted):
            return False
        if isinstance(self.phase, Unmasking):  # t holders are enough; nobody waits for the rest
            return len(self.phase.releases) >= self.phase.closed.cohort.threshold
        return not self.missing()

    def close_phase(self) -> None:
        """The deadline of the phase has passed, or everybody answered: go on with who is there, or abort."""
        phase = self.phase
        if isinstance(phase, Joining):
            self._close_joining(phase)
        elif isinstance(phase, Sharing):
            self._close_sharing(phase)
        elif isinstance(phase, Uploading):
            self._close_uploading(phase)
        elif isinstance(phase, Signing):
            self._close_signing(phase)
        elif isinstance(phase, Unmasking):
            self._close_unmasking(phase)
        elif isinstance(phase, Confirming):
            self._close_confirming(phase)
        elif isinstance(phase, Projecting):
            self.phase = Released(phase.closed, phase.outcome, phase.votes, dict(phase.shares))

    @property
    def _is_list(self) -> bool:
        """Is this cohort a certified list that comes again? Then it is whole to the end, or its members refuse."""
        proofs = self.proofs.get(self.invited[0], ()) if self.invited else ()
        return any(isinstance(p, ListProof) and tuple(e.member for e in p.listed) == self.invited for p in proofs)

    def _least(self, usual: int) -> int:
        """Fewest members that a phase needs."""
        return len(self.invited) if self._is_list else usual

    def _too_few(self, step: endings.Step, found: int, needed: int) -> bool:
        if found >= needed:
            return False
        self.abort(endings.too_few(step, needed, found, self.missing()))
        return True

    def abort(self, reason: endings.Reason, culprit: int | None = None) -> None:
        """End the round without a total; a released one stays released."""
        phase = self.phase
        if isinstance(phase, Confirming | Projecting | Released | Aborted):
            return
        closed = phase.closed if isinstance(phase, Folding | Signing | Unmasking | Publishing) else None
        cohort = phase.cohort if isinstance(phase, Sharing | Uploading) else closed.cohort if closed else None
        votes: tuple[Signed[SurvivorVote], ...] = ()
        if isinstance(phase, Signing):
            votes = tuple(phase.votes[i] for i in sorted(phase.votes))
        elif isinstance(phase, Unmasking):
            votes = phase.votes
        elif isinstance(phase, Publishing):
            votes = phase.transcript.votes
        sharers = closed.sharers if closed else phase.sharers if isinstance(phase, Uploading) else ()
        self.phase = Aborted(reason, culprit, cohort, sharers, closed, votes)

    def _close_confirming(self, phase: Confirming) -> None:
        """With every nonce the projection can be made; a silent survivor makes it inconclusive."""
        votes = dict(sorted(phase.votes.items()))
        if len(votes) == len(phase.closed.survivors):
            self.phase = Projecting(phase.closed, phase.outcome, votes)
        else:
            self.phase = Released(phase.closed, phase.outcome, votes, {})

    def _close_joining(self, phase: Joining) -> None:
        if self._too_few("to join", len(phase.keys), self._least(self.context.rules.min_cohort)):
            return
        self.phase = Sharing(Cohort(self.context, tuple(phase.keys[i] for i in sorted(phase.keys))))

    def _close_sharing(self, phase: Sharing) -> None:
        if not self._too_few("with shares", len(phase.shares), self._least(phase.cohort.quorum)):
            self.phase = Uploading(phase.cohort, dict(sorted(phase.shares.items())))

    def _close_uploading(self, phase: Uploading) -> None:
        if self._too_few("with an upload", len(phase.inputs), self._least(phase.cohort.quorum)):
            return
        inputs = tuple(phase.inputs[i] for i in sorted(phase.inputs))
        survivors_l = transcript.survivors_hash(phase.t2, inputs)
        self.phase = Folding(Closed(phase.cohort, phase.shares, phase.roots, phase.t2, inputs, survivors_l))

    def sum_saved(self) -> None:
        """U3 and the sum that belongs to it are durable: M6 may leave."""
        if not isinstance(self.phase, Folding):
            raise RuntimeError("sum_saved() belongs to phase Folding")
        self.phase = Signing(self.phase.closed)

    def _close_signing(self, phase: Signing) -> None:
        if not self._too_few("to sign the survivor list", len(phase.votes), phase.closed.cohort.threshold):
            self.phase = Unmasking(phase.closed, tuple(phase.votes[i] for i in sorted(phase.votes)))

    def _close_unmasking(self, phase: Unmasking) -> None:
        if self._too_few("to release shares", len(phase.releases), phase.closed.cohort.threshold):
            return
        try:
            opened = open_seeds(phase)
            pair_leaves = self._pair_leaves(phase.closed)
            closed = phase.closed
            pairs = transcript.open_pairs(closed.cohort, closed.roots, closed.survivors, opened, pair_leaves)
        except ProtocolError as error:  # every share matched its hash: the dealer is to blame, and the sum is lost
            for evidence in evidence_against(phase, error.culprit, self._owned_leaf):
                self._accuse(phase.closed, evidence)
            self.abort(endings.wrong_shares(error), error.culprit)
            return
        streams = transcript.total_streams(closed.t2, closed.survivors, opened, pairs)
        record = Transcript(
            self.context.header, closed.cohort.keys, closed.roots, closed.inputs, phase.votes, opened, pair_leaves
        )
        self.phase = Publishing(closed, record, streams)

    def _pair_leaves(self, closed: Closed) -> tuple[OwnedLeaf, ...]:
        pairs = transcript.pairs_to_open(closed.survivors, closed.sharers)
        return tuple(self._owned_leaf(closed, owner, holder) for owner, holder in pairs)

    def _owned_leaf(self, dealt: Uploading | Closed, owner: int, holder: int) -> OwnedLeaf:
        index = dealt.cohort.members.index(holder)
        return OwnedLeaf(owner, dealt.shares[owner].leaves[index], merkle.path(self._leaf_hashes[owner], index))

    def publish(self, root: bytes) -> None:
        """The total is durable and has this Merkle root over its packed blocks: M10 may leave."""
        if not isinstance(self.phase, Publishing):
            raise RuntimeError("publish() belongs to phase Publishing")
        self.phase = Confirming(self.phase.closed, outcome_of(self.phase, root))

    # --- what members are told -------------------------------------------------------------------------------------

    def message_for(self, member: int) -> ToMember | None:
        """What ``member`` shall be told now, ``None`` for nothing; derived from the phase alone."""
        phase = self.phase
        if isinstance(phase, Aborted):
            return RoundAborted(self.context.header, phase.reason[:500])
        if isinstance(phase, Joining):
            offer = Offer(self.context.header, self.proofs.get(member, ()))
            return offer if member in self.invited else None
        if isinstance(phase, Sharing):
            return KeyList(phase.cohort.keys) if member in phase.cohort.members else None
        if isinstance(phase, Uploading):
            return self._inbox(phase, member) if member in phase.shares else None
        if isinstance(phase, Folding | Publishing) or member not in phase.closed.survivors:
            return None
        if isinstance(phase, Signing):
            return SurvivorList(phase.closed.inputs)
        if isinstance(phase, Unmasking):
            return Certificate(phase.votes)
        if isinstance(phase, Projecting):
            return NonceList(tuple(phase.votes[i] for i in phase.closed.survivors))
        return phase.outcome

    def _inbox(self, phase: Uploading, member: int) -> Inbox:
        others = (owner for owner in phase.sharers if owner != member)
        leaves = tuple(self._owned_leaf(phase, owner, member) for owner in others)
        return Inbox(phase.roots, leaves)
