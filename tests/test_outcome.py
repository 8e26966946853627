"""The checks on an outcome: dealt blocks, the certificate, the random projection (protocol section 7)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from coordinator import phases
from privacy import merkle
from privacy.adapter import start_digest
from privacy.errors import ProtocolError
from privacy.job import Job
from privacy.outcome import VerifiedCohort, check_block, combine, manifest, verify_cohort
from privacy.plan import parse_plan
from privacy.roster import parse_roster
from privacy.secagg import projection, transcript
from privacy.secagg.masking import BLOCK, pack, tiles_of
from privacy.secagg.messages import Evidence
from privacy.secagg.quantize import Quantizer
from privacy.secagg.signed import Signed, sign
from privacy.secagg.transcript import RoundContext, VerifiedTranscript
from privacy.stages import Start, first_start, next_start, start_of
from tests.simulation import Simulation, identity
from tests.test_end_to_end import toy_plan

N, C = 5, 1
B = TypeVar("B")


@pytest.mark.parametrize("blocks", [1, 2, 7, 100])
@pytest.mark.parametrize(("survivors", "colluders"), [(3, 0), (5, 1), (8, 2), (4, 3)])
def test_every_block_goes_to_c_plus_1_survivors(blocks: int, survivors: int, colluders: int) -> None:
    members = [3 * i for i in range(survivors)]
    dealt = {m: projection.dealt_blocks(blocks, members, m, colluders) for m in members}
    for block in range(blocks):
        assert sum(block in listed for listed in dealt.values()) == min(colluders + 1, survivors)
    assert projection.uncertified(blocks, dealt, min(colluders, survivors - 1)) == 0
    sizes = [len(listed) for listed in dealt.values()]
    assert max(sizes) - min(sizes) <= colluders + 1


def test_blocks_are_dealt_in_turn() -> None:
    dealt = [projection.dealt_blocks(6, (1, 4, 6, 9, 12), member, 1) for member in (1, 4, 6, 9, 12)]
    assert dealt == [(0, 2, 5), (0, 3, 5), (1, 3), (1, 4), (2, 4)]


def test_a_block_checked_by_too_few_is_not_certified() -> None:
    assert projection.uncertified(3, {0: (0, 1, 2), 1: (0, 1)}, 1) == 1
    assert projection.uncertified(3, {0: (0, 1, 2), 1: (0, 1), 2: (3, 7)}, 1) == 1  # there are no such blocks
    assert projection.uncertified(3, {0: (0, 1, 2, 2), 1: (0, 1, 2)}, 1) == 0


def test_the_projection_is_linear_and_notices_one_coordinate() -> None:
    key = bytes(range(32))
    one = np.arange(-70000, 70000, dtype=np.int64)
    two = np.full(140000, -3, np.int64)
    found = (projection.project(key, one) + projection.project(key, two)) % projection.WORD
    assert projection.project(key, one + two) == found
    changed = one + two
    changed[99_999] += 1
    assert projection.project(key, changed) != found


def test_the_projection_is_the_inner_product_with_the_stream_however_the_vector_comes() -> None:
    key, vector = bytes(range(32)), np.arange(-70000, 70001, dtype=np.int32)
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(8 * len(vector)))
    words = struct.unpack(f"<{len(vector)}Q", stream)
    expected = sum(r * x for r, x in zip(words, vector.tolist(), strict=True)) % projection.WORD
    assert projection.project(key, vector) == projection.project(key, vector.astype(np.int64)) == expected
    assert projection.project(key, tiles_of(vector)) == expected


def test_the_zero_sum_terms_cancel_and_depend_on_r() -> None:
    seeds = {(i, j): bytes([i, j]) * 16 for i in range(4) for j in range(i + 1, 4)}

    def term(me: int, key: bytes) -> int:
        mine = {j: seeds[min(me, j), max(me, j)] for j in range(4) if j != me}
        return projection.zero_sum_term(me, mine, key)

    assert sum(term(i, bytes(32)) for i in range(4)) % projection.WORD == 0
    assert term(1, bytes(32)) not in (0, term(1, bytes(31) + b"\1"))


# --- a whole round of three blocks, by the real machines -----------------------------------------------------------

SIZE = 2 * BLOCK + 11


@dataclass(frozen=True)
class Finished:
    """A released round with its uploads and its total, (SIZE,) signed."""

    simulation: Simulation
    evidence: Evidence
    verified: VerifiedTranscript
    total: np.ndarray[tuple[int], np.dtype[np.int64]]

    @property
    def context(self) -> RoundContext:
        return self.simulation.context


@cache
def finished() -> Finished:
    simulation = Simulation(N, C, size=SIZE, silent={3: "M5"}).run()
    phase = simulation.phase
    assert isinstance(phase, phases.Released)
    assert simulation.total is not None
    votes = tuple(phase.votes[i] for i in sorted(phase.votes))
    shares = tuple(phase.shares[i] for i in sorted(phase.shares))
    evidence = Evidence(phase.outcome, votes, shares)
    verified = transcript.verify_transcript(simulation.context, phase.outcome.transcript)
    lifted = Quantizer(SIZE, 24, N, 1.0, 1, ()).lift(simulation.total)
    return Finished(simulation, evidence, verified, lifted)


def part(total: NDArray[np.int64], block: int) -> NDArray[np.int64]:
    """One block of a total."""
    return total[block * BLOCK : (block + 1) * BLOCK]


def job_of_size(size: int) -> Job:
    """A job whose vectors have ``size`` coordinates; only sizes and bits of it are used here."""
    roster = ["federation = 'f'", f"coordinator = '{'9' * 64}'", "[policy]"]
    roster += ["max_colluders = 1", "min_cohort = 4", "min_survivors = 3"]
    for i in range(N):
        roster += ["[[members]]", f"name = 'm{i}'", f"key = '{str(i + 1) * 64}'"]
    job = Job.of(parse_plan(toy_plan()), parse_roster("\n".join(roster).encode()))
    return replace(job, quantizer=Quantizer(size, 24, N, 1.0, 1, ()))


def uploads(block: int) -> dict[int, tuple[bytes, tuple[bytes, ...]]]:
    found = {}
    for member in finished().verified.survivors:
        blocks = finished().simulation.uploads[member]
        found[member] = (blocks[block], merkle.path([merkle.leaf_hash(b) for b in blocks], block))
    return found


def roots() -> dict[int, bytes]:
    return {i.sender: i.body.root for i in finished().evidence.outcome.transcript.inputs}


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_block_recomputed_from_the_uploads_is_that_of_the_total(block: int) -> None:
    check_block(job_of_size(SIZE), finished().verified, roots(), block, uploads(block), part(finished().total, block))


@pytest.mark.parametrize("coordinate", [0, BLOCK, SIZE - 1])
def test_a_total_with_one_wrong_coordinate_fails_the_audit_of_its_block(coordinate: int) -> None:
    wrong = finished().total.copy()
    wrong[coordinate] += 1
    block = coordinate // BLOCK
    with pytest.raises(ProtocolError, match=f"block {block} of the total is not the sum of the uploads"):
        check_block(job_of_size(SIZE), finished().verified, roots(), block, uploads(block), part(wrong, block))


def test_an_upload_other_than_the_committed_one_fails_the_audit() -> None:
    shown = uploads(1)
    data, path = shown[0]
    shown[0] = (bytes([data[0] ^ 1]) + data[1:], path)
    with pytest.raises(ProtocolError, match="block 1 is not the one that member 0 committed to"):
        check_block(job_of_size(SIZE), finished().verified, roots(), 1, shown, part(finished().total, 1))


def test_a_block_shown_in_place_of_another_fails_the_audit() -> None:
    with pytest.raises(ProtocolError, match="is not the one that member 0 committed to"):
        check_block(job_of_size(SIZE), finished().verified, roots(), 0, uploads(1), part(finished().total, 0))


# --- verify_cohort on evidence --------------------------------------------------------------------------------------


@cache
def small() -> tuple[Job, Simulation, Evidence]:
    """A round under a real plan and roster, with its quantiser's extras."""
    lines = ["federation = 'f'", f"coordinator = '{'9' * 64}'", "[policy]", "max_colluders = 1"]
    lines += ["min_cohort = 4", "min_survivors = 3"]
    from privacy.secagg.keys import identity_public

    for i in range(N):
        lines += ["[[members]]", f"name = 'm{i}'", f"key = '{identity_public(identity(i)).hex()}'"]
    job = Job.of(parse_plan(toy_plan()), parse_roster("\n".join(lines).encode()))
    simulation = Simulation(N, C, size=job.quantizer.total_size)
    header = job.header(1, 1, bytes.fromhex(job.plan.adapter.digest))
    simulation.context = job.context(header)
    simulation.coordinator.context = simulation.context
    simulation.vectors = {i: quantised(job, i) for i in range(N)}
    simulation.run()
    phase = simulation.phase
    assert isinstance(phase, phases.Released)
    votes = tuple(phase.votes[i] for i in sorted(phase.votes))
    checked = tuple(resigned(simulation, v.sender, replace(v.body, blocks=(0,))) for v in votes)
    return job, simulation, Evidence(phase.outcome, checked, tuple(phase.shares[i] for i in sorted(phase.shares)))


def quantised(job: Job, member: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    delta = np.linspace(-0.3, 0.3, job.quantizer.size, dtype=np.float32)
    return job.quantizer.quantize(delta, 10 + member, {"weight": 10 + member, "loss": 5})


def resigned(simulation: Simulation, member: int, body: B) -> Signed[B]:
    return sign(identity(member), member, body, simulation.context.header_hash)


def total_file(path: Path) -> Path:
    _, simulation, _ = small()
    assert simulation.total is not None
    path.write_bytes(pack(simulation.total, 24))
    return path


def verified(evidence: Evidence, path: Path) -> tuple[bool, bool]:
    job, _, _ = small()
    found = verify_cohort(job, 1, bytes.fromhex(job.plan.adapter.digest), evidence, path)
    combined = combine(job, [found])
    assert combined.weight == sum(10 + i for i in range(N))
    assert manifest(job, 1, [found], combined)["cohorts"][0]["survivors"] == [f"m{i}" for i in range(N)]
    return found.certified, found.projected


def test_complete_evidence_is_certified_and_its_projection_holds(tmp_path: Path) -> None:
    assert verified(small()[2], total_file(tmp_path / "t")) == (True, True)


def test_without_projection_or_enough_signers_it_says_so(tmp_path: Path) -> None:
    evidence = replace(small()[2], votes=small()[2].votes[:1], projection=())
    assert verified(evidence, total_file(tmp_path / "t")) == (False, False)


def test_a_wrong_projection_is_refused(tmp_path: Path) -> None:
    _, simulation, evidence = small()
    last = evidence.projection[-1]
    wrong = resigned(simulation, last.sender, replace(last.body, value=last.body.value ^ 1))
    bad = replace(evidence, projection=(*evidence.projection[:-1], wrong))
    with pytest.raises(ProtocolError, match="random projection of the total is not that of the inputs"):
        verified(bad, total_file(tmp_path / "t"))


def test_a_projection_that_lacks_a_survivor_is_refused(tmp_path: Path) -> None:
    evidence = small()[2]
    with pytest.raises(ProtocolError, match="expected a projection of every survivor"):
        verified(replace(evidence, projection=evidence.projection[:-1]), total_file(tmp_path / "t"))


def test_a_vote_for_another_total_or_with_another_nonce_is_refused(tmp_path: Path) -> None:
    _, simulation, evidence = small()
    body = evidence.votes[0].body
    for wrong, reason in (
        (replace(body, total=bytes(32)), "signed another total"),
        (replace(body, nonce=bytes(32)), "nonce of member 0"),
    ):
        votes = (resigned(simulation, 0, wrong), *evidence.votes[1:])
        with pytest.raises(ProtocolError, match=reason):
            verified(replace(evidence, votes=votes), total_file(tmp_path / "t"))


def test_another_total_than_the_outcome_names_is_refused(tmp_path: Path) -> None:
    path = total_file(tmp_path / "t")
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(ProtocolError, match="does not have the root"):
        verified(small()[2], path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ProtocolError, match="the file goes on"):
        verified(small()[2], path)


def test_one_member_in_two_cohorts_is_refused(tmp_path: Path) -> None:
    job, _, evidence = small()
    found = verify_cohort(job, 1, bytes.fromhex(job.plan.adapter.digest), evidence, total_file(tmp_path / "t"))
    with pytest.raises(ProtocolError, match="disjoint cohorts"):
        combine(job, [found, found])
    with pytest.raises(ProtocolError, match="disjoint cohorts"):
        combine(job, [])


def test_evidence_of_another_stage_is_refused(tmp_path: Path) -> None:
    job, _, evidence = small()
    with pytest.raises(ProtocolError, match="another plan, stage, roster or start adapter"):
        verify_cohort(job, 2, bytes.fromhex(job.plan.adapter.digest), evidence, total_file(tmp_path / "t"))


# --- where stages start -----------------------------------------------------------------------------------------------


def whole(tmp_path: Path) -> tuple[Job, VerifiedCohort]:
    job, _, evidence = small()
    return job, verify_cohort(job, 1, bytes.fromhex(job.plan.adapter.digest), evidence, total_file(tmp_path / "t"))


def test_a_stage_starts_from_the_release_of_the_one_before(tmp_path: Path) -> None:
    job, cohort = whole(tmp_path)
    first = first_start(job)
    assert (first.digest.hex(), first.cohorts) == (job.plan.adapter.digest, ())
    second = next_start(job, 2, first, [cohort])
    released = combine(job, [cohort]).tensors
    assert second.digest == start_digest(released) == start_digest(second.tensors)
    assert second.cohorts == ((1, cohort.total),)
    third = next_start(job, 3, second, [cohort])
    for name, _ in job.layout.trained:
        assert np.abs(released[name]).max() > 0.1
        assert np.allclose(third.tensors[name], 2 * released[name], atol=1e-6)
    for name, _ in job.layout.frozen:
        assert np.array_equal(third.tensors[name], first.tensors[name])


def test_no_stage_starts_from_a_total_without_a_certificate(tmp_path: Path) -> None:
    job, cohort = whole(tmp_path)
    other = replace(cohort, number=7, survivors=(), certified=False)
    for cohorts in ([other], [cohort, other]):
        with pytest.raises(ProtocolError, match="round 7 has no outcome certificate"):
            next_start(job, 2, first_start(job), cohorts)
    with pytest.raises(ProtocolError, match="a member twice or none at all"):
        next_start(job, 2, first_start(job), [])


def test_the_start_of_any_stage_is_computed_from_the_first_on(tmp_path: Path) -> None:
    job, cohort = whole(tmp_path)
    asked: list[tuple[int, bytes]] = []

    def cohorts(stage: int, start: Start) -> list[VerifiedCohort]:
        asked.append((stage, start.digest))
        return [cohort]

    first = first_start(job)
    second = next_start(job, 2, first, [cohort])
    third = next_start(job, 3, second, [cohort])
    assert [start_of(job, stage, cohorts).digest for stage in (1, 2, 3)] == [first.digest, second.digest, third.digest]
    assert asked == [(1, first.digest), (1, first.digest), (2, second.digest)]


def test_a_manifest_names_where_its_stage_started(tmp_path: Path) -> None:
    job, cohort = whole(tmp_path)
    combined = combine(job, [cohort])
    assert manifest(job, 1, [cohort], combined)["start"] == {"digest": job.plan.adapter.digest, "cohorts": []}
    second = next_start(job, 2, first_start(job), [cohort])
    found = manifest(job, 2, [cohort], combined, second.digest, second.cohorts)
    assert (found["stage"], found["stages"]) == (2, 1)
    assert found["start"] == {
        "digest": second.digest.hex(),
        "cohorts": [{"round": 1, "total": cohort.total.hex()}],
    }
