"""Evidence that names an honest member would be worse than none: attempts to frame one with what is public.

The framers hold a finished transcript, a colluder's identity key, and what honest members sent and released.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator import phases
from privacy import merkle
from privacy.errors import ProtocolError
from privacy.secagg import dealing
from privacy.secagg.dialogue import FromMember
from privacy.secagg.messages import OpenedMaskSecret, OwnedLeaf, ShareRoot, Shares, UnmaskShares
from privacy.secagg.naming import BadDealer, BadSeed, BadShare, Naming, named, proves
from privacy.secagg.signed import Signed
from privacy.secagg.transcript import Cohort
from tests.adversary.world import body_of, signed_by
from tests.simulation import Simulation

COLLUDER, DROPOUT = 4, 2


class Finished:
    """A good round of five: member 2 drops out before M5, so that its z is public; nobody cheated."""

    def __init__(self) -> None:
        self.shares: dict[int, Shares] = {}
        self.releases: dict[int, Signed[UnmaskShares]] = {}

        def hook(member: int, message: FromMember) -> FromMember:
            if isinstance(message, Shares):
                self.shares[member] = message
            elif isinstance(message.body, UnmaskShares):
                self.releases[member] = message
            return message

        simulation = Simulation(5, 1, silent={DROPOUT: "M5"}, from_member=hook).run()
        assert isinstance(simulation.phase, phases.Released)
        transcript = simulation.phase.outcome.transcript
        self.context = simulation.context
        self.cohort = Cohort(self.context, transcript.keys)
        self.roots = transcript.roots
        (self.opened,) = [seed for seed in transcript.opened if isinstance(seed, OpenedMaskSecret)]

    def leaf(self, owner: int, holder: int) -> OwnedLeaf:
        leaves = self.shares[owner].leaves
        place = [leaf.holder for leaf in leaves].index(holder)
        return OwnedLeaf(owner, leaves[place], merkle.path(dealing.leaf_hashes(leaves), place))


@pytest.fixture(scope="module")
def finished() -> Finished:
    return Finished()


def assert_names_nobody(round_: Finished, evidence: Naming) -> None:
    assert not proves(round_.cohort, round_.roots, evidence), "names somebody"


@pytest.mark.parametrize("holder", [0, 1, 3, 4])
def test_the_good_shares_of_an_honest_holder_do_not_name_it(finished: Finished, holder: int) -> None:
    if holder in finished.releases:
        for owner in range(5):
            leaf = finished.leaf(owner, holder)
            assert_names_nobody(finished, BadShare(finished.releases[holder], finished.shares[owner].root, leaf))


def test_a_leaf_of_another_holder_does_not_name_the_sender(finished: Finished) -> None:
    evidence = BadShare(finished.releases[0], finished.shares[3].root, finished.leaf(3, 1))
    with pytest.raises(ProtocolError, match="the leaf was dealt to another member"):
        named(finished.cohort, finished.roots, evidence)


def test_a_leaf_changed_afterwards_does_not_name_the_sender(finished: Finished) -> None:
    leaf = finished.leaf(3, 0)
    evidence = BadShare(
        finished.releases[0],
        finished.shares[3].root,
        replace(leaf, leaf=replace(leaf.leaf, self_share_hash=bytes(32))),
    )
    with pytest.raises(ProtocolError, match="not under its owner's signed root"):
        named(finished.cohort, finished.roots, evidence)


def test_a_second_root_signed_afterwards_does_not_name_an_honest_holder(finished: Finished) -> None:
    """The colluder deals well, collects the good share of member 0, and then signs leaves that it does not match."""
    leaves = tuple(
        replace(leaf, self_share_hash=bytes(32)) if leaf.holder == 0 else leaf
        for leaf in finished.shares[COLLUDER].leaves
    )
    hashes = dealing.leaf_hashes(leaves)
    root = signed_by(COLLUDER, ShareRoot(finished.cohort.t1, merkle.root(hashes)), finished.context)
    evidence = BadShare(finished.releases[0], root, OwnedLeaf(COLLUDER, leaves[0], merkle.path(hashes, 0)))
    assert_names_nobody(finished, evidence)


@pytest.mark.parametrize("dealer", [3, 4])
def test_an_honest_member_above_a_dropout_is_not_named_for_a_seed_it_did_not_owe(
    finished: Finished, dealer: int
) -> None:
    """The lower id deals the pair seed; the leaf of the higher one has none, and opens to none."""
    evidence = BadSeed(finished.shares[dealer].root, finished.leaf(dealer, DROPOUT), finished.opened)
    assert_names_nobody(finished, evidence)


@pytest.mark.parametrize("holder", [0, 1, 2])
def test_an_honest_dropout_is_not_named_for_a_seed_that_it_did_not_owe(finished: Finished, holder: int) -> None:
    evidence = BadSeed(finished.shares[DROPOUT].root, finished.leaf(DROPOUT, holder), finished.opened)
    assert_names_nobody(finished, evidence)


@pytest.mark.parametrize(("dealer", "holder"), [(DROPOUT, 3), (DROPOUT, 4), (0, DROPOUT), (1, DROPOUT)])
def test_good_pair_seeds_name_nobody(finished: Finished, dealer: int, holder: int) -> None:
    evidence = BadSeed(finished.shares[dealer].root, finished.leaf(dealer, holder), finished.opened)
    with pytest.raises(ProtocolError, match="the pair seed is the right one"):
        named(finished.cohort, finished.roots, evidence)


def test_the_z_of_a_third_member_names_nobody(finished: Finished) -> None:
    evidence = BadSeed(finished.shares[0].root, finished.leaf(0, 1), finished.opened)
    with pytest.raises(ProtocolError, match="belongs to neither end of the pair"):
        named(finished.cohort, finished.roots, evidence)


def test_an_invented_z_names_nobody(finished: Finished) -> None:
    invented = OpenedMaskSecret(DROPOUT, bytes(32))
    evidence = BadSeed(finished.shares[0].root, finished.leaf(0, DROPOUT), invented)
    with pytest.raises(ProtocolError, match="the opened z does not match the M1"):
        named(finished.cohort, finished.roots, evidence)


def dealer_evidence(finished: Finished, owner: int, holders: list[int]) -> BadDealer:
    shares = tuple(next(s for s in finished.releases[h].body.shares if s.owner == owner) for h in holders)
    return BadDealer(finished.shares[owner].root, tuple(finished.leaf(owner, h) for h in holders), shares)


def test_an_honest_dealer_is_not_named_by_its_good_shares(finished: Finished) -> None:
    holders = sorted(finished.releases)[:4]
    for owner in range(5):
        with pytest.raises(ProtocolError, match="the shares give what the owner committed to"):
            named(finished.cohort, finished.roots, dealer_evidence(finished, owner, holders))


def test_too_few_shares_do_not_name_their_dealer(finished: Finished) -> None:
    with pytest.raises(ProtocolError, match="expected 4 shares of one kind"):
        named(finished.cohort, finished.roots, dealer_evidence(finished, 0, sorted(finished.releases)[:3]))


def test_one_share_four_times_does_not_name_its_dealer(finished: Finished) -> None:
    with pytest.raises(ProtocolError, match="expected one leaf of a holder of its own for each share"):
        named(finished.cohort, finished.roots, dealer_evidence(finished, 0, [sorted(finished.releases)[0]] * 4))


def test_a_leaf_too_many_does_not_name_its_dealer(finished: Finished) -> None:
    good = dealer_evidence(finished, 0, sorted(finished.releases)[:4])
    for leaves in ((*good.leaves, good.leaves[0]), (*good.leaves, finished.leaf(0, DROPOUT)), good.leaves[:3]):
        with pytest.raises(ProtocolError, match="expected one leaf of a holder of its own for each share"):
            named(finished.cohort, finished.roots, replace(good, leaves=leaves))


def test_invented_shares_do_not_name_their_dealer(finished: Finished) -> None:
    good = dealer_evidence(finished, 0, sorted(finished.releases)[:4])
    invented = replace(good, shares=(replace(good.shares[0], share=bytes(33)), *good.shares[1:]))
    with pytest.raises(ProtocolError, match="a share does not match its leaf"):
        named(finished.cohort, finished.roots, invented)


def test_the_workbench_names_whom_it_should(finished: Finished) -> None:
    """A share that is not the one dealt, signed by the colluder, does name it: the checks above can fail."""
    assert body_of(finished.releases[0]).shares
    bad = replace(finished.releases[0].body.shares[1], share=bytes(33))
    shares = (finished.releases[0].body.shares[0], bad, *finished.releases[0].body.shares[2:])
    release = signed_by(COLLUDER, replace(finished.releases[0].body, shares=shares), finished.context)
    evidence = BadShare(release, finished.shares[1].root, finished.leaf(1, COLLUDER))
    assert named(finished.cohort, finished.roots, evidence) == COLLUDER
