"""One round as a member sees it: M0 to M11, pure (protocol sections 4 and 6).

This file does no I/O and knows no clock, network or file: a message goes in, a :class:`Step` comes out, randomness is
passed in. The shell (``participant/daemon.py``) makes every record of a step durable before its reply leaves. All
checks of a message come before anything changes; a refused message leaves the state as it was.

Each message is taken once: the first acceptable M2, M4, M6, M8 and M10 is final, a repeat of it gets the stored reply,
anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import urandom

from participant.phases import (
    ACCEPTS,
    Advertising,
    Checking,
    Confirmed,
    Dealing,
    Finished,
    Masking,
    Phase,
    Projecting,
    Releasing,
    Stopped,
    Uploading,
    Voting,
)
from participant.records import Aborted, Joined, PeersSeen, Released, SignedSurvivors, Site, Spent, Step
from privacy import merkle
from privacy.encoding import encode
from privacy.errors import ProtocolError, Refusal
from privacy.secagg import keys, projection, transcript
from privacy.secagg.dealing import HeldShares, deal, has_path, leaf_hashes, open_leaf
from privacy.secagg.dialogue import FromMember, ToMember
from privacy.secagg.keys import RoundSecrets
from privacy.secagg.messages import (
    AbortStatement,
    Advertise,
    Certificate,
    Complaint,
    Header,
    Inbox,
    KeyList,
    MaskedInput,
    MaskSecretShare,
    NonceList,
    Offer,
    Outcome,
    OutcomeVote,
    ProjectionShare,
    RoundAborted,
    SelfMaskShare,
    Share,
    ShareRoot,
    Shares,
    SurvivorList,
    SurvivorVote,
    UnmaskShares,
)
from privacy.secagg.signed import Signed, sign
from privacy.secagg.transcript import Cohort, RoundContext

#: An offer may not skip more rounds than this, or one offer could use up all numbers of a stage.
MAX_ROUND_STEP = 10_000


def abort_step(site: Site, header: Header, reason: str) -> Step:
    """ABORTED and the signed statement, also for a round whose secrets a crash took; never after RELEASED."""
    statement = sign(site.identity, site.me, AbortStatement(reason), header.hash())
    return Step((Aborted(header, reason),), statement)


def accept_offer(offer: Offer, expected: RoundContext, highest_round: int) -> RoundContext:
    """Check M0 against what this site computed itself; the context of the offered round.

    Args:
        expected: context with this site's own header; its round number is ignored.
        highest_round: highest round of this plan and stage that was ever joined here, 0 if none.

    Raises:
        Refusal: another version, plan, stage, roster, start adapter or coordinator, or a round number seen before.
    """
    mine, theirs = expected.header, offer.header
    for name in ("version", "plan", "stage", "roster", "start", "coordinator"):
        found, wanted = getattr(theirs, name), getattr(mine, name)
        if found != wanted:
            shown = [v.hex()[:16] + "…" if isinstance(v, bytes) else str(v) for v in (wanted, found)]
            raise Refusal(f"M0: expected {name} {shown[0]}, found {shown[1]}")
    if theirs.round <= highest_round:
        raise Refusal(f"M0: expected a round above {highest_round}, the highest joined here, found {theirs.round}")
    if theirs.round > highest_round + MAX_ROUND_STEP:
        raise Refusal(f"M0: expected a round up to {highest_round + MAX_ROUND_STEP}, found {theirs.round}")
    return RoundContext(theirs, expected.identities, expected.rules, expected.upload_length)


class ParticipantRound:
    """The state machine of one member in one round."""

    def __init__(self, context: RoundContext, site: Site, rand: Callable[[int], bytes] = urandom) -> None:
        self.context = context
        self.site = site
        self._rand = rand
        self._secrets = RoundSecrets.generate(rand)
        self._mask_key = keys.mask_key(self._secrets.mask_secret)
        #: Last accepted message of each type, encoded, with the step it caused.
        self._answered: dict[type, tuple[bytes, Step]] = {}
        self.phase: Phase = Advertising(self._advertise())

    def _advertise(self) -> Signed[Advertise]:
        me, header_hash = self.site.me, self.context.header_hash
        body = Advertise(
            self._secrets.share_key.public,
            self._mask_key.public,
            keys.self_commitment(header_hash, me, self._secrets.self_seed),
            keys.nonce_commitment(header_hash, me, self._secrets.nonce),
            self.site.rounds_joined + 1,
            self.site.ledger_size,
            self.site.ledger_root,
        )
        return sign(self.site.identity, me, body, header_hash)

    def join(self) -> Step:
        """M1, with the record that forbids a second one."""
        if not isinstance(self.phase, Advertising):
            raise RuntimeError("join() belongs to the beginning of a round")
        return Step((Joined(self.context.header, self.site.rounds_joined + 1),), self.phase.own)

    def handle(self, message: ToMember) -> Step:
        """Take one message of the coordinator.

        Raises:
            ProtocolError: not acceptable; the state is what it was.
        """
        kind, encoded = type(message), encode(message)
        if kind in self._answered:
            before, step = self._answered[kind]
            if before == encoded:
                return step
            raise ProtocolError(f"a second, different {kind.__name__} in one round")
        if kind not in ACCEPTS[type(self.phase)]:
            raise ProtocolError(f"{kind.__name__} from the coordinator in phase {type(self.phase).__name__}")
        step, phase = self._dispatch(message)
        self.phase = phase
        self._answered[kind] = (encoded, Step((), step.reply))  # its records are durable by the time of a repeat
        return step

    def _dispatch(self, message: ToMember) -> tuple[Step, Phase]:
        phase = self.phase
        if isinstance(message, RoundAborted):
            return self._on_aborted(message)
        if isinstance(phase, Advertising) and isinstance(message, KeyList):
            return self._on_key_list(phase, message)
        if isinstance(phase, Dealing) and isinstance(message, Inbox):
            return self._on_inbox(phase, message)
        if isinstance(phase, Uploading) and isinstance(message, SurvivorList):
            return self._on_survivors(phase, message)
        if isinstance(phase, Voting) and isinstance(message, Certificate):
            return self._on_certificate(phase, message)
        if isinstance(phase, Uploading | Voting | Releasing) and isinstance(message, Outcome):
            return self._on_outcome(phase, message)
        if isinstance(phase, Confirmed) and isinstance(message, NonceList):
            return self._on_nonces(phase, message)
        raise RuntimeError(f"no handler for {type(message).__name__} in {type(phase).__name__}")

    def _on_key_list(self, phase: Advertising, message: KeyList) -> tuple[Step, Phase]:
        """M2 -> M3 (Bonawitz 2017, Fig. 4, round 1; T1, n, t and the holders are fixed here)."""
        context, me = self.context, self.site.me
        bond = self.site.bond
        transcript.check_key_list(context, message.members, context.rules.min_cohort if bond is None else len(bond))
        mine = [m for m in message.members if m.sender == me]
        if mine != [phase.own]:
            raise ProtocolError("M2: expected my own M1 byte for byte, found another or none")
        for member in message.members:
            seen = self.site.peer_counts.get(member.sender, 0)
            if member.sender != me and member.body.rounds_joined <= seen:
                raise ProtocolError(
                    f"M2: member {member.sender} counts {member.body.rounds_joined} rounds, {seen} were seen before: "
                    "its disk was restored to an earlier state, or the coordinator held an old M1 back"
                )  # nobody is named: the member may be honest
        cohort = Cohort(context, message.members)
        t1, threshold = cohort.t1, cohort.threshold
        leaves, own = deal(self._secrets, me, cohort.advertised, threshold, context.header_hash, t1, self._rand)
        root = sign(self.site.identity, me, ShareRoot(t1, merkle.root(leaf_hashes(leaves))), context.header_hash)
        counts = tuple(m.body.rounds_joined for m in message.members)
        record = PeersSeen(context.header, cohort.members, counts)
        return Step((record,), Shares(leaves, root)), Dealing(cohort, root, own)

    def _on_inbox(self, phase: Dealing, message: Inbox) -> tuple[Step, Phase]:
        """M4: check everything, open what was dealt to me, derive the masks; the shell then masks (M5)."""
        cohort, me = phase.cohort, self.site.me
        transcript.check_roots(cohort, message.roots)
        sharers = tuple(r.sender for r in message.roots)
        if [r.body for r in message.roots if r.sender == me] != [phase.own_root.body]:
            raise ProtocolError("M4: expected my own share root, found another or none")
        if self.site.bond is not None and sharers != self.site.bond:
            # Refusing only M7 would not do: t others could certify a list with this upload and open its b.
            raise ProtocolError(
                f"M4: this delta may only be in a sum over members {list(self.site.bond)}, found {list(sharers)}"
            )
        others = tuple(i for i in sharers if i != me)
        if tuple(leaf.owner for leaf in message.leaves) != others:
            raise ProtocolError("M4: expected one leaf of every other member of U2")
        roots = {r.sender: r.body.root for r in message.roots}
        for leaf in message.leaves:
            if leaf.leaf.holder != me or not has_path(leaf, cohort.members, roots[leaf.owner]):
                raise ProtocolError(f"M4: the leaf of member {leaf.owner} is not mine under its signed root")
        held = {me: phase.own_shares}
        for leaf in message.leaves:
            try:
                held[leaf.owner] = open_leaf(
                    self._secrets.share_key, self._mask_key, leaf.owner, leaf.leaf, self.context.header_hash, cohort.t1
                )
            except ProtocolError as error:
                return self._complain(cohort, leaf.owner, str(error))
        t2 = transcript.t2_hash(cohort.t1, message.roots)
        streams = transcript.input_streams(me, self._secrets.self_seed, self._seeds(held), t2)
        return Step(), Masking(cohort, sharers, t2, held, streams)

    def _seeds(self, held: Mapping[int, HeldShares]) -> dict[int, bytes]:
        """r of every pair I am in: chosen here towards higher ids, received from lower ones."""
        seeds = {}
        for other, shares in held.items():
            if other > self.site.me:
                seeds[other] = keys.pair_seed(self._secrets.mask_secret, other)
            elif shares.pair_seed is not None:
                seeds[other] = shares.pair_seed
        return seeds

    def _complain(self, cohort: Cohort, accused: int, reason: str) -> tuple[Step, Phase]:
        """A bad leaf: say so, signed, and take no further part; nothing was spent."""
        complaint = sign(
            self.site.identity, self.site.me, Complaint(cohort.t1, accused, reason), self.context.header_hash
        )
        return Step((Aborted(self.context.header, reason),), complaint), Stopped(reason)

    def commit(self, root: bytes) -> Step:
        """M5: the spool with this Merkle root holds the masked vector; it is durable and is all that is ever sent."""
        phase = self.phase
        if not isinstance(phase, Masking):
            raise RuntimeError(f"commit() belongs to phase Masking, not {type(phase).__name__}")
        body = MaskedInput(phase.t2, root, self.context.upload_length)
        own = sign(self.site.identity, self.site.me, body, self.context.header_hash)
        cohort, site = phase.cohort, self.site
        record = Spent(
            *(self.context.header, site.plan, site.dataset, cohort.t1, phase.t2, cohort.members),
            *(self.context.rules.colluders, cohort.threshold, root, site.vector),
        )
        self.phase = Uploading(phase.cohort, phase.sharers, phase.t2, phase.held, own)
        self._remember(Inbox, own)
        return Step((record,), own)

    def _remember(self, kind: type, reply: FromMember) -> None:
        """What answers a repeat of a message whose reply the shell had to work for; its records are durable by then."""
        self._answered[kind] = (self._answered[kind][0], Step((), reply))

    def _on_survivors(self, phase: Uploading, message: SurvivorList) -> tuple[Step, Phase]:
        """M6 -> M7 (Bonawitz 2017, Fig. 4, round 3: consistency check)."""
        transcript.check_inputs(phase.cohort, phase.sharers, phase.t2, message.inputs)
        if [i.body for i in message.inputs if i.sender == self.site.me] != [phase.own_input.body]:
            raise ProtocolError("M6: expected my own upload among the survivors, found another or none")
        survivors_l = transcript.survivors_hash(phase.t2, message.inputs)
        survivors = tuple(i.sender for i in message.inputs)
        if self.site.bond is not None and survivors != self.site.bond:
            raise ProtocolError(
                f"M6: this delta may only be in a sum over members {list(self.site.bond)}, found {list(survivors)}"
            )
        vote = sign(self.site.identity, self.site.me, SurvivorVote(phase.t2, survivors_l), self.context.header_hash)
        record = SignedSurvivors(self.context.header, survivors_l, survivors)
        voting = Voting(phase.cohort, phase.sharers, phase.t2, phase.held, survivors, survivors_l)
        return Step((record,), vote), voting

    def _on_certificate(self, phase: Voting, message: Certificate) -> tuple[Step, Phase]:
        """M8 -> M9: b-shares of survivors, z-shares of dropouts, never both (Bonawitz 2017, Fig. 4, round 4)."""
        transcript.check_certificate(phase.cohort, phase.survivors, phase.t2, phase.survivors_l, message.votes)
        shares: list[Share] = []
        for owner in phase.sharers:
            held = phase.held[owner]
            if owner in phase.survivors:
                shares.append(SelfMaskShare(owner, held.self_share))
            else:
                shares.append(MaskSecretShare(owner, held.secret_share))
        body = UnmaskShares(phase.t2, phase.survivors_l, tuple(shares))
        reply = sign(self.site.identity, self.site.me, body, self.context.header_hash)
        record = Released(self.context.header, phase.survivors_l)
        releasing = Releasing(phase.t2, phase.held, phase.survivors_l)
        return Step((record,), reply), releasing

    def _on_outcome(self, phase: Uploading | Voting | Releasing, message: Outcome) -> tuple[Step, Phase]:
        """M10: the transcript verifies from my own plan and roster, and is the one of the round I took part in."""
        verified = transcript.verify_transcript(self.context, message.transcript)
        if isinstance(phase, Uploading):
            mine = [i.body for i in message.transcript.inputs if i.sender == self.site.me] == [phase.own_input.body]
        else:
            mine = verified.survivors_l == phase.survivors_l
        if not mine or verified.t2 != phase.t2:
            raise ProtocolError("M10: the transcript is not of the round that I took part in")
        if message.total != transcript.total_hash(verified.t2, message.root):
            raise ProtocolError("M10: the hash of the total does not belong to its Merkle root")
        return Step(), Checking(message, verified, self._seeds(phase.held))

    def confirm(self, blocks: tuple[int, ...]) -> Step:
        """M11: the total fetched has the promised root, decodes, and these blocks of it were recomputed."""
        phase = self.phase
        if not isinstance(phase, Checking):
            raise RuntimeError(f"confirm() belongs to phase Checking, not {type(phase).__name__}")
        body = OutcomeVote(phase.verified.t2, phase.outcome.total, blocks, self._secrets.nonce)
        reply = sign(self.site.identity, self.site.me, body, self.context.header_hash)
        self.phase = Confirmed(phase.outcome, phase.verified, phase.seeds)
        self._remember(Outcome, reply)
        return Step((), reply)

    def _on_nonces(self, phase: Confirmed, message: NonceList) -> tuple[Step, Phase]:
        """M12: all nonces for my total fix the projection; the shell computes <r, x> and calls :meth:`project`."""
        verified, total = phase.verified, phase.outcome.total
        transcript.check_nonces(verified.cohort, verified.survivors, verified.t2, total, message.votes)
        key = projection.challenge({v.sender: v.body.nonce for v in message.votes}, total)
        others = {j: seed for j, seed in phase.seeds.items() if j in verified.survivors}
        term = projection.zero_sum_term(self.site.me, others, key)
        return Step(), Projecting(phase.outcome, verified.t2, key, term)

    def project(self, value: int) -> Step:
        """M13: <r, x> of my own quantised vector, hidden by the zero-sum terms; once."""
        phase = self.phase
        if not isinstance(phase, Projecting):
            raise RuntimeError(f"project() belongs to phase Projecting, not {type(phase).__name__}")
        body = ProjectionShare(phase.t2, phase.outcome.total, (value + phase.term) % projection.WORD)
        reply = sign(self.site.identity, self.site.me, body, self.context.header_hash)
        self.phase = Finished()
        self._remember(NonceList, reply)
        return Step((), reply)

    def _on_aborted(self, message: RoundAborted) -> tuple[Step, Phase]:
        """Asked to abort before M9: ABORTED is recorded, then the statement that this round stays shut."""
        if message.header != self.context.header:
            raise ProtocolError("the coordinator aborts another round than this one")
        return abort_step(self.site, self.context.header, message.reason), Stopped(message.reason)
