"""Bad dealers against an honest coordinator: what they dealt is opened, does not fit, and names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from coordinator import phases
from participant.phases import Dealing, Stopped
from privacy import merkle
from privacy.secagg import dealing, keys, shamir
from privacy.secagg.dealing import HeldShares
from privacy.secagg.messages import ShareLeaf, ShareRoot, Shares
from privacy.secagg.naming import BadDealer, BadSeed, accused
from tests.adversary.world import changed, cheating, signed_by
from tests.simulation import Simulation, seeded

X = bytes(32)


def redeal(
    simulation: Simulation,
    given: Shares,
    dealer: int,
    *,
    self_shares: Mapping[int, bytes] | None = None,
    secret_shares: Mapping[int, bytes] | None = None,
    seeds: Mapping[int, bytes] | None = None,
    sealed_seeds: Mapping[int, bytes] | None = None,
) -> Shares:
    """M3 of a dealer with other shares (by point) or pair seeds (by holder), sealed, hashed and signed as if good."""
    phase = simulation.coordinator.phase
    assert isinstance(phase, phases.Sharing)
    cohort, h = phase.cohort, simulation.context.header_hash
    secrets = simulation.members[dealer].machine._secrets
    points = [dealing.point(i) for i in cohort.members]
    b = {**shamir.share(secrets.self_seed, cohort.threshold, points, seeded("b")), **(self_shares or {})}
    z = {**shamir.share(secrets.mask_secret, cohort.threshold, points, seeded("z")), **(secret_shares or {})}
    leaves = []
    for leaf in given.leaves:
        i, x = leaf.holder, dealing.point(leaf.holder)
        altered = changed(
            leaf,
            self_share_hash=keys.secret_hash(dealing.KIND_SELF, dealer, i, b[x]),
            secret_share_hash=keys.secret_hash(dealing.KIND_SECRET, dealer, i, z[x]),
        )
        if i != dealer:
            info = keys.box_info(keys.LABEL_SHARE, h, cohort.t1, dealer, i)
            altered = changed(altered, sealed_shares=keys.seal(cohort.advertised[i].share_key, b[x] + z[x], info))
        if i > dealer:
            seed = (seeds or {}).get(i) or keys.pair_seed(secrets.mask_secret, i)
            info = keys.box_info(keys.LABEL_PAIR, h, cohort.t1, dealer, i)
            box = (sealed_seeds or {}).get(i) or keys.seal(cohort.advertised[i].mask_key, seed, info)
            seed_hash = keys.secret_hash(dealing.KIND_SEED, dealer, i, seed)
            altered = changed(altered, sealed_seed=box, seed_hash=seed_hash)
        leaves.append(altered)
    return adopted(
        simulation, dealer, tuple(leaves), HeldShares(b[dealing.point(dealer)], z[dealing.point(dealer)], None)
    )


def adopted(simulation: Simulation, dealer: int, leaves: tuple[ShareLeaf, ...], own: HeldShares) -> Shares:
    """The signed M3 with these leaves, which the dealer's machine takes for its own from here on."""
    machine = simulation.members[dealer].machine
    phase = machine.phase
    assert isinstance(phase, Dealing)
    body = ShareRoot(phase.cohort.t1, merkle.root(dealing.leaf_hashes(leaves)))
    root = signed_by(dealer, body, simulation.context)
    machine.phase = replace(phase, own_root=root, own_shares=own)
    return Shares(leaves, root)


def other_secret(seed: str) -> dict[int, bytes]:
    """Shares of a secret that is not the dealer's, on a good polynomial."""
    return shamir.share(bytes(range(32)), 4, range(1, 6), seeded(seed))


TOO_LARGE = dict.fromkeys(range(1, 6), (2**256).to_bytes(33, "big"))

#: Sentence -> (dealer, what it deals, does it drop out before M5, why the round is aborted).
DEALERS: dict[str, tuple[int, dict[str, Any], bool, str]] = {
    "shares on no polynomial": (
        4,
        {"self_shares": {2: bytes(33)}},
        False,
        "the opened seed of member 4 does not match its M1|the shares dealt by member 4 give no",
    ),
    "a self mask that B does not promise": (
        4,
        {"self_shares": other_secret("b")},
        False,
        "the opened seed of member 4 does not match its M1",
    ),
    "a self mask of more than 32 bytes": (
        4,
        {"self_shares": TOO_LARGE},
        False,
        "the shares dealt by member 4 give no 32-byte secret",
    ),
    "a secret that does not give its mask key": (
        4,
        {"secret_shares": other_secret("z")},
        True,
        "the opened seed of member 4 does not match its M1",
    ),
    "a secret of more than 32 bytes": (
        4,
        {"secret_shares": TOO_LARGE},
        True,
        "the shares dealt by member 4 give no 32-byte secret",
    ),
    "a pair seed that is not the one of its secret": (
        0,
        {"seeds": {3: X}},
        True,
        "member 0 dealt a pair seed that is not the one of its z",
    ),
}


def assert_named(simulation: Simulation, dealer: int, kind: type) -> None:
    """The coordinator has one piece of evidence, and it names the dealer to everybody."""
    (accusation,) = simulation.coordinator.accusations
    assert type(accusation.evidence) is kind
    assert accused(simulation.context, accusation) == dealer


@pytest.mark.parametrize(("dealer", "deal", "drops", "fragment"), DEALERS.values(), ids=DEALERS.keys())
def test_a_bad_dealer_is_named_when_its_shares_open(
    dealer: int, deal: dict[str, Any], drops: bool, fragment: str
) -> None:
    silent = {dealer: "M5"} if drops else {}
    simulation = cheating(ShareRoot, lambda s, m: redeal(s, m, dealer, **deal), cheat=dealer, silent=silent)
    assert not simulation.coordinator_refusals
    assert isinstance(simulation.phase, phases.Aborted)
    assert any(part in simulation.phase.reason for part in fragment.split("|"))
    assert simulation.phase.culprit == dealer
    assert simulation.total is None
    assert_named(simulation, dealer, BadSeed if "seeds" in deal else BadDealer)


def test_a_dealer_that_redeals_well_is_not_named() -> None:
    """The workbench above is sound: without a bad part it gives a good round."""
    simulation = cheating(ShareRoot, lambda s, m: redeal(s, m, 0), cheat=0, silent={0: "M5"})
    assert isinstance(simulation.phase, phases.Released)
    assert simulation.is_exact()
    assert simulation.coordinator.accusations == []


def test_a_pair_seed_sealed_badly_for_a_member_that_drops_out_names_its_dealer() -> None:
    """Nobody complains, since the holder is silent: its opened z shows what the dealer had sealed."""
    simulation = cheating(
        ShareRoot, lambda s, m: redeal(s, m, 0, sealed_seeds={3: bytes(1168)}), cheat=0, silent={3: "M5"}
    )
    assert isinstance(simulation.phase, phases.Aborted)
    assert "pair seed sealed by member 0: a sealed box does not open" in simulation.phase.reason
    assert simulation.phase.culprit == 0
    assert_named(simulation, 0, BadSeed)


def test_a_holder_of_a_bad_leaf_complains_and_the_others_finish() -> None:
    """Only the shares for member 2 are bad: it drops out, and what 4 dealt to the others opens."""

    def spoil(simulation: Simulation, message: Shares) -> Shares:
        phase = simulation.members[4].machine.phase
        assert isinstance(phase, Dealing)
        leaves = tuple(changed(m, sealed_shares=bytes(1202)) if m.holder == 2 else m for m in message.leaves)
        return adopted(simulation, 4, leaves, phase.own_shares)

    simulation = cheating(ShareRoot, spoil, n=6)
    assert isinstance(simulation.phase, phases.Released)
    assert simulation.survivors == (0, 1, 3, 4, 5)
    assert simulation.is_exact()
    assert isinstance(simulation.members[2].machine.phase, Stopped)
