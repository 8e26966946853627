"""What goes wrong in which plan, from one seed and the points that a run was seen to pass."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from privacy.secagg.threshold import threshold
from tests.chaos.proxy import Disturbance
from tests.chaos.toy import Shape
from tests.chaos.world import COORDINATOR

#: A disk is full where something is written; elsewhere no write could fail.
WRITES = ("before-write:", "before-fsync:", "before-commit:", "before-rename:")
#: At these points of a member the round still needs it.
NEEDED = re.compile(r"(before|saved)-M[3579]@|(records|toy)\.jsonl@|spool")
FIVE, FOUR, THREE = Shape(5, 4, 5, 10), Shape(4, 3, 4, 10), Shape(3, 3, 3, 10)
#: Six sites in cohorts of three: two rounds of one stage that must share no member.
COHORTS = Shape(6, 3, 3, 10)
PLANS_PER_BATCH = 8


@dataclass(frozen=True)
class Schedule:
    """The faults of one plan.

    Attributes:
        coordinator: fault of the coordinator (``privacy/faults.py``), empty for none.
        victims: (site, fault) of members that a fault takes out.
        away: whether a victim stays away until its round is over; else it comes back at once.
        torn: victims, or all sites when everything is killed, leave half a line at the end of their records.
        network: (site, disturbance).
        stalls, kills: (process, at s [, for s]).
        echo: the site whose requests are repeated, empty for none.
        all_at_s: when every process is killed at once, 0 for never.
        full_at_s: when the coordinator's own small file system is filled, 0 for never.
        size: of the vector, see ``tests/chaos/toy.py``.
    """

    coordinator: str = ""
    victims: tuple[tuple[str, str], ...] = ()
    away: bool = True
    torn: bool = False
    network: tuple[tuple[str, Disturbance], ...] = ()
    stalls: tuple[tuple[str, float, float], ...] = ()
    kills: tuple[tuple[str, float], ...] = ()
    echo: str = ""
    all_at_s: float = 0.0
    full_at_s: float = 0.0
    size: str = "small"
    bits: int = 24


@dataclass(frozen=True)
class Batch:
    """Plans that one federation goes through, one after another."""

    number: int
    shape: Shape
    plans: tuple[Schedule, ...]
    disk_mb: int | None = None


def passes(passed: Mapping[str, int]) -> list[str]:
    """``NAME@K`` for passes of every point: the first, a middle and the last; of twenty or more, twelve.

    Args:
        passed: point -> how often a plan passed it.
    """
    points = []
    for name, count in sorted(passed.items()):
        few = 12 if count >= 20 else 3
        points += [f"{name}@{k}" for k in sorted({1 + i * (count - 1) // (few - 1) for i in range(few)})]
    return points


def tolerated(shape: Shape) -> int:
    """n - t: so many members may be lost in a round that everybody joins."""
    return min(shape.sites, shape.largest) - threshold(min(shape.sites, shape.largest), 1)


class Maker:
    """Draws schedules; the same seed and points give the same ones."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def site(self, shape: Shape) -> str:
        return self.rng.choice(shape.names)

    def upset(self, shape: Shape) -> tuple[tuple[str, Disturbance], ...]:
        """One to three disturbances of connections, none as long as a phase waits."""
        return tuple((self.site(shape), self._disturbance()) for _ in range(self.rng.randint(1, 3)))

    def _disturbance(self) -> Disturbance:
        kind = self.rng.choice(["cut", "delay", "stall", "refuse", "throttle"])
        low, high = {
            "cut": (500, 20_000),
            "delay": (20, 150),
            "stall": (500, 2000),
            "refuse": (300, 1500),
            "throttle": (1500, 6000),
        }[kind]
        return Disturbance(kind, self.rng.uniform(0, 3), self.rng.randint(low, high))

    def chunk_cuts(self, shape: Shape, size: str) -> tuple[tuple[str, Disturbance], ...]:
        """Cuts in the middle of an upload, at two sites; one of them slow."""
        length = {"medium": 3_600_000, "large": 9_600_000}[size]
        names = self.rng.sample(shape.names, 2)
        cuts = [(name, Disturbance("cut", 0, self.rng.randint(200_000, length))) for name in names]
        return (*cuts, (names[0], Disturbance("throttle", 0, self.rng.randint(3000, 8000))))

    def at_points(self, shape: Shape, coordinator: str, member: str) -> Schedule:
        """A kill at one point of the coordinator and at one of a member, and a bad network beside it."""
        victims = ((self.site(shape), member),) if member and tolerated(shape) else ()
        return Schedule(
            coordinator=coordinator,
            victims=victims,
            away=self.rng.random() < 0.5,
            torn=self.rng.random() < 0.3,
            network=self.upset(shape) if self.rng.random() < 0.6 else (),
            echo=self.site(shape) if self.rng.random() < 0.5 else "",
            size="medium" if self.rng.random() < 0.15 else "small",
            bits=self.rng.choice([16, 20, 24, 32]),
        )

    def too_many(self, shape: Shape, points: Sequence[str]) -> Schedule:
        """More members lost than the threshold bears, all of them at once back or only when the round is over."""
        count = min(tolerated(shape) + self.rng.randint(1, 2), shape.sites)
        early = [point for point in points if NEEDED.search(point)]
        victims = tuple((name, self.rng.choice(early)) for name in self.rng.sample(shape.names, count))
        return Schedule(victims=victims, away=self.rng.random() < 0.5, torn=self.rng.random() < 0.3)

    def at_random(self, shape: Shape) -> Schedule:
        """Kills and stalls at any instant, in a bad network."""
        kills = [(COORDINATOR, self.rng.uniform(0.2, 4)) for _ in range(self.rng.randint(0, 2))]
        kills += [(self.site(shape), self.rng.uniform(0.5, 5)) for _ in range(self.rng.randint(0, 1))]
        process = self.rng.choice([COORDINATOR, self.site(shape)])
        return Schedule(
            kills=tuple(kills),
            stalls=((process, self.rng.uniform(0.5, 4), self.rng.uniform(0.5, 2.5)),),
            network=self.upset(shape),
            echo=self.site(shape) if self.rng.random() < 0.5 else "",
        )

    def in_chunks(self, shape: Shape, coordinator: str = "") -> Schedule:
        """Uploads of several chunks, cut in the middle, repeated, with the coordinator killed meanwhile."""
        size = self.rng.choice(["medium", "medium", "large"])
        return Schedule(
            coordinator=coordinator,
            network=self.chunk_cuts(shape, size),
            echo=self.site(shape) if self.rng.random() < 0.6 else "",
            kills=((COORDINATOR, self.rng.uniform(1, 5)),) if not coordinator and self.rng.random() < 0.5 else (),
            size=size,
        )

    def full_disk(self, shape: Shape, coordinator: list[str], member: list[str]) -> Schedule:
        """No space at a write of the coordinator, or of a member, for one to three writes in a row.

        Args:
            coordinator, member: what is left of the points; one of them is taken.
        """
        times = self.rng.randint(1, 3)
        if len(coordinator) > len(member):
            return Schedule(coordinator=f"{coordinator.pop()}@full@{times}")
        return Schedule(victims=((self.site(shape), f"{member.pop()}@full@{times}"),))

    def everything(self) -> Schedule:
        """Every process killed at one instant."""
        return Schedule(all_at_s=self.rng.uniform(0.3, 4), torn=self.rng.random() < 0.5)

    def real_full(self) -> Schedule:
        """A real file system without a byte left, in the middle of uploads."""
        return Schedule(full_at_s=self.rng.uniform(0.1, 2.5), size=self.rng.choice(["small", "medium"]))


def schedules(
    seed: int, coordinator: Sequence[str], member: Sequence[str]
) -> Iterator[tuple[Shape, Schedule, int | None]]:
    """Endless schedules: first every point once, mixed with all other kinds, then points at random."""
    maker = Maker(seed)
    ours, theirs = list(coordinator), list(member)
    maker.rng.shuffle(ours)
    maker.rng.shuffle(theirs)
    writes: list[list[str]] = [[], []]
    number = 0
    while True:
        number += 1
        shape = maker.rng.choice([FIVE, FOUR, FOUR])
        point = ours.pop() if ours else maker.rng.choice(coordinator)
        yield shape, maker.at_points(shape, point, theirs.pop() if theirs else maker.rng.choice(member)), None
        if number % 3 == 0:
            shape = maker.rng.choice([FIVE, FOUR, COHORTS])
            yield shape, maker.at_random(shape), None
        if number % 4 == 0:
            shape = maker.rng.choice([FIVE, FOUR, THREE, COHORTS])
            yield shape, maker.too_many(shape, member), None
        if number % 3 == 1:
            for left, points in zip(writes, (coordinator, member), strict=True):
                if not left:
                    left += [point for point in points if point.startswith(WRITES) and point.endswith("@1")]
                    maker.rng.shuffle(left)
            yield shape, maker.full_disk(shape, *writes), None
        if number % 6 == 0:
            yield FOUR, maker.in_chunks(FOUR, ours.pop() if ours and maker.rng.random() < 0.5 else ""), None
        if number % 8 == 0:
            yield FOUR, maker.everything(), None
        if number % 9 == 0:
            yield THREE, maker.at_points(THREE, ours.pop() if ours else maker.rng.choice(coordinator), ""), None
        if number % 10 == 0:
            yield FOUR, maker.real_full(), 256  # room for all plans of a batch


def once_more(coordinator: Sequence[str], member: Sequence[str], number: int) -> Iterator[Batch]:
    """Points that never struck, each in a federation of its own, in the situation that it needs.

    Args:
        coordinator, member: names of points.
        number: of the first batch.
    """
    for name in coordinator:
        yield Batch(number, FIVE, (Schedule(coordinator=f"{name}@1"),))
        number += 1
    for name in member:
        lost = (("site-2", "before-M7@1"), ("site-3", "before-M7@1")) if "abort" in name else ()
        plan = Schedule(victims=(("site-1", f"{name}@1"), *lost))
        before: tuple[Schedule, ...] = ()
        if "truncate" in name:  # only a site that died in mid-append cuts anything off
            before, plan = (Schedule(),), replace(plan, kills=(("site-1", 1.0),), torn=True)
        yield Batch(number, FIVE, (*before, plan))
        number += 1


def batches(found: Iterator[tuple[Shape, Schedule, int | None]]) -> Iterator[Batch]:
    """Schedules of one shape together, so that a federation is started once for several plans."""
    waiting: dict[tuple[Shape, int | None], list[Schedule]] = {}
    number = 0
    for shape, schedule, disk_mb in found:
        plans = waiting.setdefault((shape, disk_mb), [])
        plans.append(schedule)
        if len(plans) == (PLANS_PER_BATCH if disk_mb is None else PLANS_PER_BATCH // 2):
            number += 1
            yield Batch(number, shape, tuple(plans), disk_mb)
            del waiting[shape, disk_mb]
