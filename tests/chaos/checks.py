"""What must hold after every plan, read from the disks: exact or aborted, counted once, opened once, nothing lost.

Sites' records are the truth about what can be opened: every signature, release and abort is recorded before it leaves.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from participant.prepare import PLAIN_VECTOR
from participant.records import Aborted, Joined, PeersSeen, Record, Released, SignedSurvivors, Spent
from privacy.audit import audit_release
from privacy.errors import UserError, VeilsumError
from privacy.evidence import TOTAL_FILE
from privacy.job import Job
from privacy.plan import PlanFile
from privacy.roster import load_roster
from privacy.secagg.threshold import threshold
from privacy.vectors import read_total
from tests.chaos.disk import ledger, records
from tests.chaos.world import World

Report = dict[str, Any]


@dataclass
class Verdict:
    """What a plan came to. ``lost``: uploads with a receipt in no total of their released round."""

    rounds: int = 0
    completed: int = 0
    aborted: int = 0
    lost: int = 0
    #: 1 if a round was excused because this machine took long to start the coordinator again.
    slow: int = 0
    wrong: list[str] = field(default_factory=list)
    #: A round or plan that should have ended in a release and did not.
    unmet: list[str] = field(default_factory=list)


@dataclass
class Receipts:
    """Every receipt the coordinator ever showed, and the upload bytes it had counted then."""

    seen: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    bytes: dict[tuple[str, str], int] = field(default_factory=dict)
    #: Members for whom the driver repeated chunks: their count may grow.
    repeated: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def look(self, report: Report) -> None:
        """Compare a report with all before it."""
        for row in report["rounds"]:
            for member, receipt in row["receipts"].items():
                key, uploaded = (row["id"], member), row["traffic"].get(member, {"upload": 0})["upload"]
                if self.seen.setdefault(key, receipt) != receipt:
                    self._say(f"round {row['round']}: the receipt of {member} changed")
                if uploaded > self.bytes.setdefault(key, uploaded) and member not in self.repeated:
                    self._say(f"round {row['round']}: {member} uploads again after its receipt")
        shown = {(row["id"], member) for row in report["rounds"] for member in row["receipts"]}
        for key in self.seen.keys() - shown:
            self._say(f"the receipt of {key[1]} in round {key[0][:16]} is gone")

    def _say(self, what: str) -> None:
        if what not in self.wrong:
            self.wrong.append(what)


def check_plan(world: World, plan: PlanFile, report: Report, receipts: Receipts, excused: bool) -> Verdict:
    """All checks of one plan whose rounds are over.

    Args:
        excused: the coordinator could not write for a while, so a round of it may have been given up.
    """
    receipts.look(report)
    verdict = Verdict(rounds=len(report["rounds"]), wrong=list(receipts.wrong))
    released = [row for row in report["rounds"] if row["state"] == "released"]
    verdict.completed = len(released)
    verdict.aborted = sum(row["state"] == "aborted" for row in report["rounds"])
    verdict.lost = sum(member not in row["survivors"] for row in released for member in row["receipts"])
    kept = {name: [r for r in records(world.federation.site(name)) if is_of(r, plan)] for name in world.shape.names}
    verdict.wrong += survivors_wrong(released)
    verdict.wrong += totals_wrong(world, plan, released)
    verdict.wrong += [line for name, found in kept.items() for line in records_wrong(name, found)]
    verdict.wrong += openings_wrong(kept, world.shape.names)
    verdict.wrong += commits_wrong(world, plan, report)
    verdict.unmet += list(unmet(world, plan, report, kept, excused))
    return verdict


def is_of(record: Record, plan: PlanFile) -> bool:
    return record.header.plan == plan.digest


def survivors_wrong(released: list[Report]) -> list[str]:
    """Each upload at most once: released rounds of one stage share no member, and none has one twice."""
    counted = Counter(member for row in released for member in row["survivors"])
    return [f"{member} is counted {count} times" for member, count in counted.items() if count > 1]


def totals_wrong(world: World, plan: PlanFile, released: list[Report]) -> list[str]:
    """The total is the plain integer sum, bit for bit; the audit holds; and a release names exactly its rounds."""
    stage = world.federation.coordinator / "releases" / plan.plan.name / "stage-1"
    if not released:
        return [f"{stage} exists without a released round"] if (stage / "manifest.json").exists() else []
    job = Job.of(plan, load_roster(world.federation.coordinator / "roster.toml"))
    cohorts = json.loads((stage / "manifest.json").read_bytes())["cohorts"]
    if sorted(c["round"] for c in cohorts) != sorted(row["round"] for row in released):
        return [f"the manifest has rounds {[c['round'] for c in cohorts]}, released are {len(released)}"]
    wrong = []
    for cohort in cohorts:
        path = stage / "rounds" / str(cohort["round"]) / TOTAL_FILE
        total = job.quantizer.lift(read_total(path, job.quantizer.total_size, job.rules.bits))
        if not np.array_equal(total, plain_sum(world, plan, cohort["survivors"], job.quantizer.total_size)):
            wrong.append(f"the total of round {cohort['round']} is not the plain sum of {cohort['survivors']}")
    try:
        audit(stage, job.roster_file.hash, world.federation.coordinator / "rounds")
    except VeilsumError as error:
        wrong.append(f"the audit fails: {error}")
    return wrong


def plain_sum(world: World, plan: PlanFile, survivors: list[str], size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(size,) int64, the sum of what the sites kept in the clear for this."""
    plain = np.zeros(size, np.int64)
    for name in survivors:
        plain += np.load(world.federation.site(name) / "work" / plan.plan.name / "stage-1" / PLAIN_VECTOR)
    return plain


def audit(stage: Path, pin: bytes, uploads: Path) -> None:
    """``veilsum-audit transcript --uploads``; uploads of a certified outcome are deleted, now or while this looks."""
    try:
        audit_release(stage, pin, uploads)
    except (UserError, FileNotFoundError):
        audit_release(stage, pin)


def records_wrong(name: str, found: list[Record]) -> Iterator[str]:
    """Once per round, each of them; RELEASED and ABORTED exclude each other; one vector for the whole stage."""
    by_round: defaultdict[int, list[Record]] = defaultdict(list)
    for record in found:
        by_round[record.header.round].append(record)
    for number, kept in by_round.items():
        kinds = Counter(type(record) for record in kept)
        for kind in (Joined, PeersSeen, Spent, SignedSurvivors, Released):
            if kinds[kind] > 1:
                yield f"{name}: {kinds[kind]} records {kind.__name__} in round {number}"
        if kinds[Released] and kinds[Aborted]:
            yield f"{name}: released and aborted round {number}"
    if len({record.vector for record in found if isinstance(record, Spent)}) > 1:
        yield f"{name}: two different vectors were spent in one stage"


def opened_lists(kept: dict[str, list[Record]], names: list[str]) -> dict[int, set[frozenset[str]]]:
    """Round -> member lists that can be opened, now or later, even if any c members lie.

    A list needs t signatures and t releases. All but c of the first are in records; a member that recorded an abort
    never releases, so a round that n + c - t + 1 have aborted stays shut.
    """
    signed: defaultdict[tuple[int, bytes, tuple[int, ...]], set[str]] = defaultdict(set)
    aborted: defaultdict[int, set[str]] = defaultdict(set)
    rounds: dict[int, Spent] = {}
    for name, found in kept.items():
        for record in found:
            if isinstance(record, SignedSurvivors):
                signed[record.header.round, record.survivors, record.members].add(name)
            elif isinstance(record, Spent):
                rounds[record.header.round] = record
            elif isinstance(record, Aborted):
                aborted[record.header.round].add(name)
    lists: defaultdict[int, set[frozenset[str]]] = defaultdict(set)
    for (number, _, members), signers in signed.items():
        spent = rounds[number]
        needed = spent.threshold - spent.colluders
        willing = {names[m] for m in spent.members} - aborted[number]
        if len(signers) >= needed and len(willing) >= needed:
            lists[number].add(frozenset(names[m] for m in members))
    return lists


def openings_wrong(kept: dict[str, list[Record]], names: list[str]) -> Iterator[str]:
    """No member's vector in two rounds that can be opened with different member lists."""
    lists = opened_lists(kept, names)
    for number, found in lists.items():
        if len(found) > 1:
            yield f"round {number} has two certified lists"
    for (first, of_first), (second, of_second) in combinations(sorted(lists.items()), 2):
        for one in of_first:
            for other in of_second:
                if one != other and one & other:
                    yield f"{sorted(one & other)} can be opened in round {first} and, with others, in round {second}"


def commits_wrong(world: World, plan: PlanFile, report: Report) -> Iterator[str]:
    """A receipt that a site verified is still at the coordinator."""
    receipts = {row["round"]: set(row["receipts"]) for row in report["rounds"]}
    for name in world.shape.names:
        entries = ledger(world.federation.site(name))
        jobs = {e["job"] for e in entries if e["kind"] == "RESERVE" and e["plan"] == plan.plan.name}
        lines = [e for e in entries if e.get("job") in jobs]
        for number in {e["round"] for e in lines if e["kind"] == "COMMIT"}:
            if name not in receipts.get(number, set()):
                yield f"{name}: the coordinator lost its receipt of round {number}"


def unmet(world: World, plan: PlanFile, report: Report, kept: dict[str, list[Record]], excused: bool) -> Iterator[str]:
    """Every round that lost at most n - t members, and kept min_survivors, completed; every plan was released.

    n is U1, from the members' records of M2. A member counts as lost in the round it joined last when it died: its
    secrets were only in memory. A full disk, a bad line and a pause shorter than a phase waits take nobody out.
    """
    rules = Job.of(plan, load_roster(world.federation.coordinator / "roster.toml")).rules
    cohorts = {r.header.round: r.members for found in kept.values() for r in found if isinstance(r, PeersSeen)}
    for row in report["rounds"]:
        if row["state"] == "running":
            yield f"round {row['round']} is not over: {row['phase']}, waits for {row['waiting_for']}"
        if row["state"] == "aborted" and not row["reason"]:
            yield f"round {row['round']} aborted without a reason"
        if row["state"] != "aborted" or row["round"] not in cohorts or excused:
            continue
        members = {world.shape.names[m] for m in cohorts[row["round"]]}
        gone = members & world.lost[plan.digest, row["round"]]
        n, t = len(members), threshold(len(members), rules.colluders)
        if len(gone) <= n - t and n - len(gone) >= rules.min_survivors:
            yield f"round {row['round']} lost {sorted(gone)} of {n}, t = {t}, and aborted: {row['reason']}"
    left = world.shape.sites - len(report["released"])
    if report["state"] == "released" and left >= world.shape.smallest:
        yield f"{left} members wait for a cohort of their own"
    if report["state"] not in ("released", "cancelled"):
        yield f"the plan is {report['state']}: {report['reason']}"
