"""The rules of the larger ring graphs, by enumeration: `python -m model.ring`, part of `make model`.

Above 128 members a cohort would share along a ring: member i deals its b and z to the k / 2 members on either side and
holds no share of its own (protocol section 5). That graph is not built; this checks the rules that it would need, over
**every** set of colluders and every set of dropouts that a coordinator could choose after it saw the graph.

R1  a member's b and its z are not both opened, even if its honest holders were shown two lists
R2  no sum over a part of the honest survivors is opened: where dropouts and colluders cut them into parts, each part
    has a member whose b stays closed
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

#: (k, colluders among the k / 2 on a side at most, colluders among all k at most) -> shares that open a secret.
Threshold = Callable[[int, int, int], int]


def as_designed(k: int, c_side: int, t1: int) -> int:
    """t_loc = max(k/2 + c_side + 1, floor((k + t1)/2) + 1)."""
    return max(k // 2 + c_side + 1, (k + t1) // 2 + 1)


def against_two_lists_only(k: int, _c_side: int, t1: int) -> int:
    """Without the first bound: enough against two lists, not against a cut."""
    return (k + t1) // 2 + 1


def one_too_few(k: int, _c_side: int, t1: int) -> int:
    """One share less than that: not even enough against two lists."""
    return (k + t1) // 2


@dataclass(frozen=True)
class Ring:
    """n members in a circle, each with k / 2 neighbours on either side; sets are bit masks."""

    n: int
    k: int

    def side(self, i: int, step: int) -> int:
        """The k / 2 members on one side of i, ``step`` 1 or -1."""
        return sum(1 << (i + step * d) % self.n for d in range(1, self.k // 2 + 1))

    def neighbours(self, i: int) -> int:
        """The holders of i's shares."""
        return self.side(i, 1) | self.side(i, -1)

    def parts(self, members: int) -> Iterator[int]:
        """What ``members`` fall into when only they are left in the graph."""
        while members:
            part = members & -members
            while (grown := part | members & self._around(part)) != part:
                part = grown
            yield part
            members &= ~part

    def _around(self, part: int) -> int:
        found = 0
        for i in range(self.n):
            if part >> i & 1:
                found |= self.neighbours(i)
        return found


def colluder_sets(ring: Ring, most: int) -> Iterator[tuple[int, int, int]]:
    """(colluders, the most of them on one side of a member, the most of them around a member); one of each rotation."""
    seen: set[int] = set()
    for count in range(most + 1):
        for chosen in combinations(range(ring.n), count):
            mask = sum(1 << i for i in chosen)
            turned = min((mask >> s | mask << ring.n - s) & (1 << ring.n) - 1 for s in range(ring.n))
            if turned in seen:
                continue
            seen.add(turned)
            sides = max((turned & ring.side(i, step)).bit_count() for i in range(ring.n) for step in (1, -1))
            yield turned, sides, max((turned & ring.neighbours(i)).bit_count() for i in range(ring.n))


def both_open(ring: Ring, colluders: int, threshold: int) -> bool:
    """R1 broken: some member's honest holders can be split so that both of its secrets reach the threshold."""
    for i in range(ring.n):
        corrupt = (ring.neighbours(i) & colluders).bit_count()
        honest = ring.k - corrupt
        # Each honest holder gives one kind; a half of them each is the best split, colluders give both.
        if honest // 2 + corrupt >= threshold and honest - honest // 2 + corrupt >= threshold:
            return True
    return False


def opened_part(ring: Ring, colluders: int, dropouts: int, threshold: int) -> int:
    """R2 broken: a proper part of the honest survivors all of whose b are opened; 0 for none."""
    everybody = (1 << ring.n) - 1
    survivors = everybody & ~colluders & ~dropouts
    for part in ring.parts(survivors):
        if part == survivors:
            return 0
        giving = survivors | colluders
        members = [i for i in range(ring.n) if part >> i & 1]
        if all((ring.neighbours(i) & giving).bit_count() >= threshold for i in members):
            return part
    return 0


@dataclass(frozen=True)
class Verdict:
    """What the enumeration of one ring found."""

    graphs: int
    r1_broken: int
    r2_broken: int


def enumerate_ring(n: int, k: int, most_colluders: int, threshold: Threshold) -> Verdict:
    """Every set of at most so many colluders (up to rotation), every set of dropouts among the others."""
    ring = Ring(n, k)
    graphs = r1 = r2 = 0
    for colluders, c_side, t1 in colluder_sets(ring, most_colluders):
        t_loc = threshold(k, c_side, t1)
        r1 += both_open(ring, colluders, t_loc)
        honest = (1 << n) - 1 & ~colluders
        dropouts = honest
        while True:  # all subsets of the honest members
            graphs += 1
            r2 += opened_part(ring, colluders, dropouts, t_loc) != 0
            if not dropouts:
                break
            dropouts = dropouts - 1 & honest
    return Verdict(graphs, r1, r2)


CASES = ((9, 4, 4), (11, 4, 4), (12, 6, 4), (13, 6, 4), (12, 8, 3))


def main() -> int:
    """Print a table; 0 if the designed threshold holds everywhere and the lower ones fail where they should."""
    print(f"{'threshold':24} {'n':>3} {'k':>2} {'c':>2} {'graphs':>8} {'R1 broken':>10} {'R2 broken':>10}")
    found: dict[Threshold, list[Verdict]] = {}
    for rule in (as_designed, against_two_lists_only, one_too_few):
        for n, k, most in CASES:
            verdict = enumerate_ring(n, k, most, rule)
            found.setdefault(rule, []).append(verdict)
            counts = f"{verdict.graphs:>8} {verdict.r1_broken:>10} {verdict.r2_broken:>10}"
            print(f"{rule.__name__:24} {n:>3} {k:>2} {most:>2} {counts}", flush=True)
    holds = not any(v.r1_broken or v.r2_broken for v in found[as_designed])
    cut = any(v.r2_broken for v in found[against_two_lists_only])
    split = any(v.r1_broken for v in found[one_too_few])
    as_expected = holds and cut and split
    print(f"as designed: {'R1 and R2 hold' if holds else 'BROKEN'}; the lower ones break R2: {cut}, R1: {split}")
    return 0 if as_expected else 1


if __name__ == "__main__":
    sys.exit(main())
