"""Attacks on the total itself (protocol section 7): invented, split in two, or made to fit by a colluder.

The coordinator here ran an honest round up to M9 and then lies about the sum: root, H(total), transcript and
certificate all fit the lie, and only the two checks on the outcome stand against it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from coordinator import phases
from participant.phases import Checking
from privacy import merkle
from privacy.errors import ProtocolError, Refusal
from privacy.outcome import check_block, verify_cohort
from privacy.secagg import projection, transcript
from privacy.secagg.dialogue import ToMember
from privacy.secagg.masking import BLOCK, pack
from privacy.secagg.messages import Evidence, MaskedInput, NonceList, Outcome, OutcomeVote, ProjectionShare
from privacy.secagg.quantize import Quantizer
from privacy.secagg.signed import Signed
from privacy.secagg.transcript import VerifiedTranscript
from tests.adversary.world import signed_by
from tests.on_disk import OnDisk
from tests.simulation import Simulation
from tests.test_outcome import job_of_size, part, quantised, small

N, C, COLLUDER, DROPOUT = 5, 1, 4, 3
BLOCKS = 4
SIZE = (BLOCKS - 1) * BLOCK + 5
SURVIVORS = (0, 1, 2, 4)
HONEST = (0, 1, 2)


@dataclass(frozen=True)
class Ended:
    """A round in which nobody was told the outcome yet."""

    simulation: Simulation
    outcome: Outcome
    verified: VerifiedTranscript
    total: NDArray[np.int64]  # (SIZE,), the honest one

    def hash_of(self, total: NDArray[np.int64]) -> tuple[bytes, bytes]:
        """Root and H(total) of any total."""
        words = (total & 0xFFFFFF).astype(np.uint32)
        blocks = [pack(words[low : low + BLOCK], 24) for low in range(0, SIZE, BLOCK)]
        root = merkle.root([merkle.leaf_hash(block) for block in blocks])
        return root, transcript.total_hash(self.verified.t2, root)

    def lie(self, total: NDArray[np.int64]) -> Outcome:
        """M10 for another total, with everything that a member's machine checks in order."""
        root, total_hash = self.hash_of(total)
        return replace(self.outcome, total=total_hash, root=root)

    def shown(self, block: int) -> dict[int, tuple[bytes, tuple[bytes, ...]]]:
        """This block of every committed upload, with its path."""
        found = {}
        for member in self.verified.survivors:
            blocks = self.simulation.uploads[member]
            found[member] = (blocks[block], merkle.path([merkle.leaf_hash(b) for b in blocks], block))
        return found

    def roots(self) -> dict[int, bytes]:
        return {i.sender: i.body.root for i in self.outcome.transcript.inputs}

    def audit(self, block: int, total: NDArray[np.int64]) -> None:
        check_block(job_of_size(SIZE), self.verified, self.roots(), block, self.shown(block), part(total, block))

    def dealt(self, member: int) -> tuple[int, ...]:
        return projection.dealt_blocks(BLOCKS, self.verified.survivors, member, C)

    def refuses(self, member: int, total: NDArray[np.int64]) -> bool:
        """Does an honest member find fault with a block dealt to it?"""
        try:
            for block in self.dealt(member):
                self.audit(block, total)
        except ProtocolError:
            return True
        return False


def ended() -> Ended:
    def withhold(_member: int, message: ToMember) -> ToMember | None:
        return None if isinstance(message, Outcome) else message

    simulation = Simulation(N, C, size=SIZE, silent={DROPOUT: "M5"}, to_member=withhold).run()
    phase = simulation.phase
    assert isinstance(phase, phases.Released)
    assert simulation.total is not None
    verified = transcript.verify_transcript(simulation.context, phase.outcome.transcript)
    return Ended(simulation, phase.outcome, verified, Quantizer(SIZE, 24, N, 1.0, 1, ()).lift(simulation.total))


@cache
def shared() -> Ended:
    """For tests that send nothing to the members."""
    return ended()


def invented(coordinate: int, by: int = 1) -> NDArray[np.int64]:
    total = shared().total.copy()
    total[coordinate] += by
    return total


# --- one invented total -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinate", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 7, SIZE - 1])
def test_an_invented_total_fails_the_audit_at_an_honest_member(coordinate: int) -> None:
    round_, total = shared(), invented(coordinate)
    with pytest.raises(ProtocolError, match=f"block {coordinate // BLOCK} of the total is not the sum of the uploads"):
        round_.audit(coordinate // BLOCK, total)
    for other in set(range(BLOCKS)) - {coordinate // BLOCK}:
        round_.audit(other, total)
    assert any(round_.refuses(member, total) for member in HONEST)
    assert not any(round_.refuses(member, round_.total) for member in SURVIVORS)


@pytest.mark.parametrize("by", [1, -1, 1 << 20])
def test_a_machine_takes_the_invented_total_so_that_only_the_checks_stand_against_it(by: int) -> None:
    """Root, hash, transcript and certificate prove nothing about the sum; this is why the audit exists."""
    round_ = ended()
    total = round_.total.copy()
    total[3] += by
    machine = round_.simulation.members[0].machine
    machine.handle(round_.lie(total))
    assert isinstance(machine.phase, Checking)
    with pytest.raises(ProtocolError, match="block 0 of the total is not the sum"):
        round_.audit(0, total)


def projected(round_: Ended, total: NDArray[np.int64], colluder_adds: NDArray[np.int64] | None = None) -> bool:
    """All survivors confirm a total without an audit and project; does the projection hold?"""
    simulation, told = round_.simulation, round_.lie(total)
    heard: list[Any] = [simulation.members[i].hear(told) for i in SURVIVORS]
    votes: tuple[Signed[OutcomeVote], ...] = tuple(heard)
    shares: list[Any] = [simulation.members[i].hear(NonceList(votes)) for i in SURVIVORS]
    key = projection.challenge({v.sender: v.body.nonce for v in votes}, told.total)
    values: dict[int, int] = {share.sender: share.body.value for share in shares}
    if colluder_adds is not None:
        values[COLLUDER] += projection.project(key, colluder_adds)
    return sum(values.values()) % projection.WORD == projection.project(key, total)


def test_an_invented_total_fails_the_projection() -> None:
    round_ = ended()
    total = round_.total.copy()
    total[70_000] += 1
    assert not projected(round_, total)


def test_the_honest_total_passes_the_projection() -> None:
    round_ = ended()
    assert projected(round_, round_.total)


def test_a_colluder_makes_a_wrong_total_pass_the_projection_but_not_the_divided_audit() -> None:
    """As the design says: r is public before M13, so one survivor can add <r, d>; its upload was committed before."""
    round_ = ended()
    wrong = np.zeros(SIZE, np.int64)
    wrong[[5, 70_000]] = (-3, 9)
    assert projected(round_, round_.total + wrong, colluder_adds=wrong)
    assert any(round_.refuses(member, round_.total + wrong) for member in HONEST)


def test_published_evidence_with_an_invented_total_is_refused_by_everybody_who_verifies(tmp_path: Path) -> None:
    """All members skipped the audit and signed; whoever reads the release later still sees it."""
    job, _, honest = small()
    simulation = Simulation(N, C, size=job.quantizer.total_size)
    simulation.context = job.context(honest.outcome.transcript.header)
    simulation.coordinator.context = simulation.context
    simulation.vectors = {i: quantised(job, i) for i in range(N)}
    phase = simulation.run().phase
    assert isinstance(phase, phases.Released)
    assert simulation.total is not None
    total = simulation.total.copy()
    total[0] += np.uint32(1)
    (tmp_path / "total").write_bytes(pack(total, 24))
    root = merkle.root([merkle.leaf_hash(pack(total, 24))])
    told = replace(phase.outcome, root=root, total=transcript.total_hash(phase.closed.t2, root))
    votes = tuple(
        signed_by(i, replace(phase.votes[i].body, total=told.total, blocks=(0,)), simulation.context) for i in range(N)
    )
    shares = tuple(
        signed_by(i, ProjectionShare(phase.closed.t2, told.total, phase.shares[i].body.value), simulation.context)
        for i in range(N)
    )
    start = bytes.fromhex(job.plan.adapter.digest)
    with pytest.raises(ProtocolError, match="the random projection of the total is not that of the inputs"):
        verify_cohort(job, 1, start, Evidence(told, votes, shares), tmp_path / "total")
    with pytest.raises(ProtocolError, match="member 0 signed another total"):
        verify_cohort(job, 1, start, Evidence(told, tuple(phase.votes.values()), ()), tmp_path / "total")


# --- two totals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [(0,), (1,), (0, 1), (1, 2), (0, 2)])
def test_two_totals_to_two_halves_are_neither_certified_nor_projected(half: tuple[int, ...]) -> None:
    """One half hears the sum, the other an invented one; the colluder signs whatever helps, for every block."""
    round_ = ended()
    total = round_.total + np.eye(1, SIZE, 3, dtype=np.int64)[0]
    votes: dict[bytes, dict[int, Signed[OutcomeVote]]] = {}
    everything = tuple(range(BLOCKS))
    for i in HONEST:
        told, shown = (round_.outcome, round_.total) if i in half else (round_.lie(total), total)
        machine = round_.simulation.members[i].machine
        machine.handle(told)
        if not round_.refuses(i, shown):
            reply: Any = machine.confirm(round_.dealt(i)).reply
            votes.setdefault(told.total, {})[i] = reply
    nonce = round_.simulation.members[COLLUDER].machine._secrets.nonce
    for total_hash, given in votes.items():
        body = OutcomeVote(round_.verified.t2, total_hash, everything, nonce)
        given[COLLUDER] = signed_by(COLLUDER, body, round_.simulation.context)
        checked = {i: vote.body.blocks for i, vote in given.items()}
        invented_here = total_hash != round_.outcome.total
        assert projection.uncertified(BLOCKS, checked, C) > 0 or not invented_here
        listed = tuple(given[i] for i in sorted(given))
        with pytest.raises(ProtocolError, match="M12: expected the nonce of every survivor"):
            transcript.check_nonces(
                round_.verified.cohort, round_.verified.survivors, round_.verified.t2, total_hash, listed
            )


def test_no_set_of_colluders_certifies_a_block_alone() -> None:
    """Each block needs c + 1 signers, so one of them is honest, and it was dealt that block."""
    for block in range(BLOCKS):
        assert len([m for m in SURVIVORS if block in shared().dealt(m)]) == C + 1
        assert set(HONEST) & {m for m in SURVIVORS if block in shared().dealt(m)}
    assert projection.uncertified(BLOCKS, {COLLUDER: tuple(range(BLOCKS))}, C) == BLOCKS


# --- blocks and uploads -----------------------------------------------------------------------------------------------


def test_two_blocks_swapped_in_every_upload_fail_the_audit() -> None:
    round_ = shared()
    job, shown = job_of_size(SIZE), round_.shown(1)
    with pytest.raises(ProtocolError, match="block 0 is not the one that member 0 committed to"):
        check_block(job, round_.verified, round_.roots(), 0, shown, part(round_.total, 0))
    paths = {m: (shown[m][0], round_.shown(0)[m][1]) for m in shown}
    with pytest.raises(ProtocolError, match="block 0 is not the one that member 0 committed to"):
        check_block(job, round_.verified, round_.roots(), 0, paths, part(round_.total, 0))


def test_the_uploads_of_two_members_swapped_fail_the_audit() -> None:
    """The sum of the blocks is the same; each is bound to its own member's signature all the same."""
    round_ = shared()
    shown = round_.shown(2)
    shown[0], shown[1] = shown[1], shown[0]
    with pytest.raises(ProtocolError, match="block 2 is not the one that member 0 committed to"):
        check_block(job_of_size(SIZE), round_.verified, round_.roots(), 2, shown, part(round_.total, 2))


def test_an_upload_made_to_fit_an_invented_total_fails_the_audit() -> None:
    """The colluder changes its upload after the fact: the root that U3 signed is of the old one."""
    round_ = shared()
    shown = round_.shown(0)
    data, path = shown[COLLUDER]
    shown[COLLUDER] = (bytes([(data[0] + 1) % 256]) + data[1:], path)
    with pytest.raises(ProtocolError, match=f"block 0 is not the one that member {COLLUDER} committed to"):
        check_block(job_of_size(SIZE), round_.verified, round_.roots(), 0, shown, part(invented(0), 0))


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> OnDisk:
    """A released round of a real engine; the upload of member 4 arrived, was verified, and came too late."""
    world = OnDisk(tmp_path_factory.mktemp("federation"))
    world.ready()
    world.run(phases.Uploading)
    world.away = {4}
    round_id, inbox = world.message_for(4)
    world.run(phases.Signing)
    world.say(4, round_id, inbox)
    world.run(phases.Confirming)
    return world


def test_a_late_upload_is_never_shown(late: OnDisk) -> None:
    round_id = late.rounds[0].row.id
    path = late.engine.store.upload(round_id, 4)
    path.write_bytes(late.site(4).store.spool("toy", late.rounds[0].machine.context.header).read_bytes())
    assert isinstance(late.phase, phases.Confirming)
    assert late.phase.closed.survivors == (0, 1, 2, 3)
    late.engine.upload_block(round_id, 0, 0)
    with pytest.raises(Refusal, match="round 1 shows no upload of member 4"):
        late.engine.upload_block(round_id, 4, 0)
    with pytest.raises(Refusal, match="round 1 shows no upload of member 7"):
        late.engine.upload_block(round_id, 7, 0)
    with pytest.raises(Refusal, match="expected a block below 1, found 1"):
        late.engine.upload_block(round_id, 0, 1)
    with pytest.raises(Refusal, match="no round"):
        late.engine.upload_block(bytes(32), 0, 0)


def test_no_upload_is_shown_before_the_total_is_out(tmp_path: Path) -> None:
    """Until then every upload carries masks that its member may still be asked to open."""
    world = OnDisk(tmp_path)
    world.ready()
    for phase in (phases.Uploading, phases.Signing, phases.Unmasking):
        world.run(phase)
        for member in range(world.n):
            with pytest.raises(Refusal, match="shows no upload"):
                world.engine.upload_block(world.rounds[0].row.id, member, 0)
    assert [isinstance(m, Signed) and isinstance(m.body, MaskedInput) for m in world.sent(0)].count(True) == 1
