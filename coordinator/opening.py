"""Opening the seeds from t released shares each, and the evidence where a dealer's shares give something else; pure."""

from __future__ import annotations

from collections.abc import Callable

from coordinator.phases import Closed, Unmasking
from privacy.errors import ProtocolError
from privacy.secagg import dealing, shamir, transcript
from privacy.secagg.messages import Opened, OpenedMaskSecret, OpenedSelfMask, OwnedLeaf
from privacy.secagg.naming import BadDealer, BadSeed, Naming, proves


def _holders(phase: Unmasking) -> list[int]:
    """The t members whose shares are used."""
    return sorted(phase.releases)[: phase.closed.cohort.threshold]


def _reconstruct(phase: Unmasking, owner: int, weights: dict[int, int] | None = None) -> Opened | None:
    """b of a survivor or z of a dropout; ``None`` if the shares give no 32-byte secret."""
    index = phase.closed.sharers.index(owner)
    shares = {dealing.point(h): phase.releases[h].body.shares[index].share for h in _holders(phase)}
    secret = shamir.combine(shares, weights)
    if secret is None:
        return None
    return OpenedSelfMask(owner, secret) if owner in phase.closed.survivors else OpenedMaskSecret(owner, secret)


def open_seeds(phase: Unmasking) -> tuple[Opened, ...]:
    """One opened seed for each member of U2.

    Raises:
        ProtocolError: t matching shares do not give what their owner committed to; the owner is the culprit.
    """
    points = [dealing.point(h) for h in _holders(phase)]
    weights = dict(zip(points, shamir.lagrange_at_zero(points), strict=True))
    found: list[Opened] = []
    for owner in phase.closed.sharers:
        opened = _reconstruct(phase, owner, weights)
        if opened is None:
            raise ProtocolError(f"the shares dealt by member {owner} give no 32-byte secret", culprit=owner)
        transcript.check_seed(phase.closed.cohort, phase.closed.survivors, opened)
        found.append(opened)
    return tuple(found)


def evidence_against(
    phase: Unmasking, culprit: int | None, owned_leaf: Callable[[Closed, int, int], OwnedLeaf]
) -> list[Naming]:
    """What shows everybody that a dealer cheated: its shares, or a pair seed against an opened z."""
    if culprit is None:
        return []
    closed, index = phase.closed, phase.closed.sharers.index(culprit)
    root = closed.shares[culprit].root
    leaves = tuple(owned_leaf(closed, culprit, holder) for holder in _holders(phase))
    shares = tuple(phase.releases[holder].body.shares[index] for holder in _holders(phase))
    candidates: list[Naming] = [BadDealer(root, leaves, shares)]
    for owner, holder in transcript.pairs_to_open(closed.survivors, closed.sharers):
        if owner == culprit:
            leaf = owned_leaf(closed, owner, holder)
            opened = (_reconstruct(phase, end) for end in (owner, holder) if end not in closed.survivors)
            candidates += [BadSeed(root, leaf, seed) for seed in opened if isinstance(seed, OpenedMaskSecret)]
    return [found for found in candidates if proves(closed.cohort, closed.roots, found)]
