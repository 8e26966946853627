"""What a round costs: bytes and CPU milliseconds of every message, for small and large cohorts.

Run ``python -m bench.costs``; it needs no network and no accelerator. The machines are the real ones
(``coordinator/round.py``, ``participant/round.py``), driven message by message as the daemons would. A tenth of the
members, at least one, falls silent before M5: without dropouts M10 would carry no leaves. Bytes are those of the
protobuf message. Milliseconds are process CPU time, the median over members: at a member from the message it receives
to the message it sends, at the coordinator to build and to check one member's message. Masking is a line of its own,
since it alone grows with the vector.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from coordinator import phases
from coordinator.round import CoordinatorRound
from participant.phases import Checking, Masking, Projecting
from privacy import merkle
from privacy.secagg.dialogue import FromMember, ToMember, message_name
from privacy.secagg.masking import MaskStreams, pack
from privacy.secagg.messages import Offer
from privacy.secagg.projection import project
from privacy.wire.convert import to_wire
from tests.simulation import Member, context_for, make_member

R = TypeVar("R")

SIZE = 1 << 16  # coordinates: one block
BITS = 24
TOLD = {
    "Offer": "M0",
    "KeyList": "M2",
    "Inbox": "M4",
    "SurvivorList": "M6",
    "Certificate": "M8",
    "Outcome": "M10",
    "NonceList": "M12",
}
ORDER = [f"M{i}" for i in range(14)]
WHAT = {
    "M0": "offer",
    "M1": "keys",
    "M2": "key list",
    "M3": "shares",
    "M4": "inbox",
    "M5": "signed root",
    "M6": "survivor list",
    "M7": "vote",
    "M8": "certificate",
    "M9": "unmask shares",
    "M10": "outcome",
    "M11": "outcome vote",
    "M12": "nonces",
    "M13": "projection",
}


@dataclass
class Costs:
    """Bytes and CPU milliseconds by message; one figure for each member that sent or received it."""

    n: int
    colluders: int
    threshold: int = 0
    dropouts: int = 0
    size: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    member_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    coordinator_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    masking_ms: list[float] = field(default_factory=list)
    leaves: int = 0  # bytes of M10 that are leaves between survivors and dropouts
    opening_ms: float = 0.0

    def row(self, name: str) -> dict[str, float]:
        """Medians of one message; 0 where a side does nothing."""
        return {
            "bytes": round(statistics.median(self.size[name])),
            "member_ms": _median(self.member_ms[name]),
            "coordinator_ms": _median(self.coordinator_ms[name]),
        }


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 2) if values else 0.0


def timed(into: list[float], call: Callable[[], R]) -> R:
    """Run ``call`` and keep the CPU milliseconds it took."""
    began = time.process_time()
    found = call()
    into.append((time.process_time() - began) * 1000)
    return found


class Driver:
    """One round, message by message."""

    def __init__(self, n: int) -> None:
        colluders = max(1, n // 10)
        self.costs = Costs(n, colluders, dropouts=max(1, n // 10))
        self.context = context_for(n, colluders, size=SIZE, bits=BITS)
        self.coordinator = CoordinatorRound(self.context, tuple(range(n)))
        self.members: dict[int, Member] = {}

    def run(self) -> Costs:
        everybody = range(self.costs.n)
        self._each(everybody, self._join)
        self._each(everybody, self._hear)  # M2 -> M3
        phase = self.coordinator.phase
        assert isinstance(phase, phases.Uploading)
        self.costs.threshold = phase.cohort.threshold
        survivors = range(self.costs.dropouts, self.costs.n)
        self._each(survivors, self._hear)  # M4 -> M5
        self.coordinator.close_phase()
        self.coordinator.sum_saved()
        self._each(survivors, self._hear)  # M6 -> M7
        self._each(survivors, self._hear)  # M8 -> M9
        self._unmask()
        self._confirm(survivors)
        return self.costs

    def _confirm(self, survivors: Sequence[int]) -> None:
        self._each(survivors, self._hear)  # M10 -> M11
        self._each(survivors, self._hear)  # M12 -> M13
        assert isinstance(self.coordinator.phase, phases.Released)

    def _each(self, members: Sequence[int], take: Callable[[int], None]) -> None:
        """All are told before anybody's answer is taken: an answer may end the phase."""
        self._answers: list[FromMember] = []
        for member in members:
            take(member)
        for answer in self._answers:
            self._receive(answer)

    def _told(self, member: int) -> ToMember:
        spent: list[float] = []
        message = timed(spent, lambda: self.coordinator.message_for(member))
        assert message is not None
        name = TOLD[type(message).__name__]
        self.costs.coordinator_ms[name] += spent
        self.costs.size[name].append(_bytes(message, ToMember))
        return message

    def _receive(self, answer: FromMember) -> None:
        name = message_name(answer)
        self.costs.size[name].append(_bytes(answer, FromMember))
        if isinstance(self.coordinator.phase, phases.Publishing):
            return  # t releases are enough
        timed(self.costs.coordinator_ms[name], lambda: self.coordinator.receive(answer))

    def _join(self, index: int) -> None:
        offer = self._told(index)
        assert isinstance(offer, Offer)
        made = timed(self.costs.member_ms["M1"], lambda: make_member(index, offer, self.context, SIZE))
        self.members[index] = made
        self._say(made.keep(made.machine.join()))

    def _say(self, reply: FromMember | None) -> None:
        assert reply is not None
        self._answers.append(reply)

    def _hear(self, index: int) -> None:
        member, message = self.members[index], self._told(index)
        name = TOLD[type(message).__name__]
        reply = timed(self.costs.member_ms[name], lambda: member.keep(member.machine.handle(message)))
        phase = member.machine.phase
        if isinstance(phase, Masking):
            reply = timed(self.costs.masking_ms, member.mask)
        elif isinstance(phase, Checking):
            reply = timed(self.costs.member_ms["M11"], lambda: member.keep(member.machine.confirm(())))
        elif isinstance(phase, Projecting):
            key = phase.key
            reply = timed(
                self.costs.member_ms["M13"],
                lambda: member.keep(member.machine.project(project(key, member.vector))),
            )
        self._say(reply)

    def _unmask(self) -> None:
        """What the coordinator's shell does: take the masks off the sum; only its root matters here."""
        phase = self.coordinator.phase
        assert isinstance(phase, phases.Publishing)
        self.costs.opening_ms = max(self.costs.coordinator_ms["M9"])  # the t-th M9 ends the phase
        total = np.zeros(SIZE, np.uint32)
        off = phase.streams.inverse()
        MaskStreams(off.plus, off.minus, BITS).apply(total)
        self.coordinator.publish(merkle.root([merkle.leaf_hash(pack(total, BITS))]))
        self.costs.leaves = sum(to_wire(leaf, type(leaf)).ByteSize() for leaf in phase.transcript.pair_leaves)


def _bytes(message: Any, union: Any) -> int:
    """Bytes of the protobuf message as it stands in NextReply or SendRequest."""
    found: int = to_wire(message, union).ByteSize()
    return found


def table(runs: Sequence[Costs]) -> str:
    """The Markdown table of docs/protocol.md."""
    sizes = [f"{r.n}" for r in runs]
    head = ["message", *(f"bytes, n = {n}" for n in sizes), *(f"member ms, {n}" for n in sizes)]
    head += [f"coordinator ms, {n}" for n in sizes]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (3 * len(runs))]
    for name in ORDER:
        rows = [run.row(name) for run in runs]
        cells = [f"{row['bytes']:,.0f}" for row in rows]
        cells += [f"{row[side]:.2f}" if row[side] else "" for side in ("member_ms", "coordinator_ms") for row in rows]
        lines.append(f"| {name} {WHAT[name]} | " + " | ".join(cells) + " |")
    empty = [""] * len(runs)
    masking = [f"{_median(run.masking_ms):.1f}" for run in runs]
    opening = [f"{run.opening_ms:.1f}" for run in runs]
    lines.append(f"| masking {SIZE:,} coordinates | " + " | ".join(empty + masking + empty) + " |")
    lines.append("| opening all seeds from t releases | " + " | ".join(empty + empty + opening) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, and write ``build/costs.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[5, 20, 100], help="cohort sizes")
    parser.add_argument("--out", type=Path, default=Path("build/costs.json"))
    arguments = parser.parse_args()
    runs = [Driver(n).run() for n in arguments.members]
    report = [
        {
            "n": r.n,
            "c": r.colluders,
            "t": r.threshold,
            "dropouts": r.dropouts,
            "leaves_in_m10": r.leaves,
            "messages": {name: r.row(name) for name in ORDER},
            "masking_ms": _median(r.masking_ms),
            "opening_ms": round(r.opening_ms, 1),
            "coordinates": SIZE,
            "python": platform.python_version(),
            "machine": platform.machine(),
        }
        for r in runs
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    for r in runs:
        print(f"n = {r.n}, c = {r.colluders}, t = {r.threshold}, {r.dropouts} dropouts: {r.leaves:,} of M10 are leaves")
    print(table(runs))


if __name__ == "__main__":
    main()
