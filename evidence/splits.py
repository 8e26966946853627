"""Who holds what: the training records dealt to the sites, evenly or with one of several skews.

Every split is a function of the records' labels and a public seed, and deals each record to exactly one site.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

#: Share of a class that its own sites hold in the natural split; the other sites divide the rest evenly.
OWN_SHARE = 0.8
#: A Dirichlet deal is drawn anew until every site has so many records, of two classes at least: with one class there is
#: nothing to learn, and with one batch B has no gradient, since in the first step the head is still zero. With fewer
#: records than this a site would also have to sit out the method regmean.
LEAST_RECORDS, LEAST_CLASSES = 20, 2
MOST_DRAWS = 10_000

Deal = tuple[tuple[int, ...], ...]


def deal(split: str, labels: Sequence[int], classes: int, sites: int, seed: int) -> Deal:
    """Site -> numbers of its records, in the order it trains on them before any shuffling of its own.

    Args:
        split: "iid", "natural", or "dirichlet-" and the concentration, such as "dirichlet-0.5".
        seed: another seed is another deal of the same kind.

    Raises:
        ValueError: no such split, or no draw gives every site enough.
    """
    rng = random.Random(f"{split} {seed}")
    if split == "iid":
        order = list(range(len(labels)))
        rng.shuffle(order)
        return tuple(tuple(order[site::sites]) for site in range(sites))
    if split == "natural":
        return _natural(labels, classes, sites, rng)
    if split.startswith("dirichlet-"):
        return _dirichlet(float(split.removeprefix("dirichlet-")), labels, classes, sites, rng)
    raise ValueError(f"expected iid, natural or dirichlet-ALPHA, found {split!r}")


def _by_class(labels: Sequence[int], classes: int, rng: random.Random) -> list[list[int]]:
    members: list[list[int]] = [[] for _ in range(classes)]
    for number, label in enumerate(labels):
        members[label].append(number)
    for one in members:
        rng.shuffle(one)
    return members


def _shuffled(parts: list[list[int]], rng: random.Random) -> Deal:
    for part in parts:
        rng.shuffle(part)
    return tuple(map(tuple, parts))


def _natural(labels: Sequence[int], classes: int, sites: int, rng: random.Random) -> Deal:
    """A class belongs to every ``classes``-th site; where there are fewer sites than classes, to one of them."""
    parts: list[list[int]] = [[] for _ in range(sites)]
    for label, members in enumerate(_by_class(labels, classes, rng)):
        own = [site for site in range(sites) if site % classes == label] or [label % sites]
        others = [site for site in range(sites) if site not in own]
        mine = round(OWN_SHARE * len(members)) if others else len(members)
        for position, number in enumerate(members[:mine]):
            parts[own[position % len(own)]].append(number)
        for position, number in enumerate(members[mine:]):
            parts[others[position % len(others)]].append(number)
    return _shuffled(parts, rng)


def _dirichlet(alpha: float, labels: Sequence[int], classes: int, sites: int, rng: random.Random) -> Deal:
    """Each class is shared out by a draw from a symmetric Dirichlet distribution (Yurochkin et al. 2019)."""
    for _ in range(MOST_DRAWS):
        parts: list[list[int]] = [[] for _ in range(sites)]
        for members in _by_class(labels, classes, rng):
            draws = [rng.gammavariate(alpha, 1.0) for _ in range(sites)]
            reached, last = 0.0, 0
            for site, draw in enumerate(draws):
                reached += draw / sum(draws)
                bound = round(reached * len(members))
                parts[site] += members[last:bound]
                last = bound
        kinds = [len({labels[number] for number in part}) for part in parts]
        if min(map(len, parts)) >= LEAST_RECORDS and min(kinds) >= LEAST_CLASSES:
            return _shuffled(parts, rng)
    raise ValueError(f"dirichlet-{alpha}: no draw in {MOST_DRAWS} gives {sites} sites {LEAST_RECORDS} records each")
