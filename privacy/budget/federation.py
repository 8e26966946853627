"""Auditing all ledgers of a federation together: with the coordinator's memory, the peers', and what was released.

DIR/roster.toml                     the keys of all members
DIR/ledgers/MEMBER/NAME.jsonl       each site's ledgers; beside them its ``witnesses.jsonl``, if it gives it
DIR/witnesses.jsonl                 the checkpoints that the coordinator witnessed
DIR/releases/PLAN/stage-K/          releases with the transcripts of their rounds

Every transcript is verified by the roster, so that a survivor cannot deny a round: its ledger must have the RELEASE
line for it, and M1 of each member is one more witness of its ledger.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from privacy.budget.accounting import LimitReached, ask_child
from privacy.budget.anchors import Anchor
from privacy.budget.audit import LedgerReport, Terms, audit_ledger
from privacy.budget.book import LedgerError
from privacy.budget.entries import Commit, Release, Reserve
from privacy.budget.findings import Code, Found, worst
from privacy.budget.ledger import read_ledger, verify_lines
from privacy.budget.rounds import Round, Seen, coordinators_witnesses, peers_witnesses, rounds_of
from privacy.errors import UserError, shown
from privacy.files import read_file
from privacy.roster import RosterFile, load_roster

WITNESSES = "witnesses.jsonl"


@dataclass
class FederationReport:
    """What an audit of a federation found."""

    ledgers: list[LedgerReport] = field(default_factory=list)
    rounds: list[str] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)

    @property
    def code(self) -> Code:
        return worst([*self.found, *(one for ledger in self.ledgers for one in ledger.found)])


@dataclass(frozen=True)
class _File:
    """A ledger as given, with what its lines say before anything is judged."""

    member: str
    path: Path
    raw: bytes
    dataset: str
    plans: frozenset[str]  # digests of the plans that are reserved in it


def audit_federation(directory: Path, pin: bytes | None, terms: Terms) -> FederationReport:
    """Audit a directory of the shape above; what does not hold is in the report.

    Args:
        pin: the pinned roster hash; without it the roster in the directory is believed.

    Raises:
        UserError: a file that must be there is missing or none; no ledger at all, and nothing that misses one.
    """
    roster = load_roster(directory / "roster.toml", pin)
    report = FederationReport()
    files = [*_files(directory, roster)]
    rounds = list(rounds_of(directory / "releases", roster, report.found))
    anchors = _anchors(directory, roster, files, rounds, report)
    for file in files:
        report.ledgers.append(
            audit_ledger(
                file.raw,
                _key(roster, file.member),
                source=file.path.relative_to(directory).as_posix(),
                anchors=anchors.get((file.member, file.dataset), ()),
                own=own_checkpoint(file.path),
                terms=terms,
                owner=file.member,
            )
        )
    report.found += twins(report.ledgers)
    for one in rounds:
        _check_round(one, report, terms)
    _note_unmatched(rounds, report)
    _note_silent(roster, files, report)
    if not files and not report.found:  # nothing was looked at, which must not read as "nothing found"
        raise UserError(
            f"{directory}: expected ledgers/MEMBER/NAME.jsonl, found no ledger",
            hint="collect the members' ledgers in folders of their names, as docs/audit.md shows",
        )
    return report


def own_checkpoint(ledger: Path) -> bytes:
    """The checkpoint that a site keeps beside a ledger, if it was given along."""
    path = ledger.with_suffix(".checkpoint")
    return read_file(path, "a checkpoint") if path.exists() else b""


def _key(roster: RosterFile, member: str) -> bytes:
    return roster.roster.keys()[roster.roster.index(member)]


def _files(directory: Path, roster: RosterFile) -> Iterator[_File]:
    names = {member.name for member in roster.roster.members}
    for folder in sorted((directory / "ledgers").iterdir()) if (directory / "ledgers").is_dir() else []:
        if folder.name not in names:
            raise UserError(
                f"{folder}: expected the name of a member of the roster, found '{shown(folder.name)}'",
                hint="name each folder as its member",
            )
        for path in sorted(folder.glob("*.jsonl")):
            if path.name != WITNESSES:
                yield _read(folder.name, path, _key(roster, folder.name))


def _read(member: str, path: Path, key: bytes) -> _File:
    raw = read_ledger(path)
    try:
        entries = verify_lines(raw, key)
    except LedgerError as error:  # the audit says so again, in its place
        good = raw.split(b"\n")[: max(0, error.line - 1)]
        entries = verify_lines(b"".join(line + b"\n" for line in good), key)
    plans = frozenset(e.facts.plan_digest for e in entries if isinstance(e.facts, Reserve))
    return _File(member, path, raw, entries[0].dataset if entries else "", plans)


def _anchors(
    directory: Path, roster: RosterFile, files: Sequence[_File], rounds: Sequence[Round], report: FederationReport
) -> dict[tuple[str, str], list[Anchor]]:
    """Everybody's memory, by the ledger it is about: (member, data set) -> anchors; what is about none is a finding."""
    seen: list[Seen] = []
    if (directory / WITNESSES).exists():
        seen += coordinators_witnesses(directory / WITNESSES, roster, report.found)
    for path in sorted((directory / "ledgers").glob(f"*/{WITNESSES}")):
        seen += peers_witnesses(path, path.parent.name, roster, report.found)
    seen += [one for r in rounds for one in r.seen]
    found: dict[tuple[str, str], list[Anchor]] = defaultdict(list)
    missing: Counter[tuple[str, str]] = Counter()
    for one in seen:
        about = next((f for f in files if f.member == one.member and one.is_about(f.dataset, f.plans)), None)
        if about is None:
            missing[one.member, one.ledger] += 1
        elif one.anchor not in found[one.member, about.dataset]:
            found[one.member, about.dataset].append(one.anchor)
    for (member, ledger), times in sorted(missing.items()):
        text = f"{member}: {ledger} was witnessed {times} times, and no ledger here has it"
        report.found.append(Found(Code.TRUNCATED, text))
    return found


def twins(ledgers: Sequence[LedgerReport]) -> list[Found]:
    """Data sets and jobs that stand in two ledgers: each has one ledger, or its budget would be two."""
    datasets = Counter(ledger.dataset for ledger in ledgers if ledger.dataset)
    jobs = Counter(job.job for ledger in ledgers for job in ledger.jobs)
    return [
        Found(Code.REPLAY, f"{what} {name[:16]}… stands in {times} ledgers")
        for what, counted in (("data set", datasets), ("job", jobs))
        for name, times in counted.items()
        if times > 1
    ]


def _check_round(one: Round, report: FederationReport, terms: Terms) -> None:
    """Every survivor's ledger must have this round, with this cohort, this upload and the plan's own mechanism."""
    wanted = _mechanism_of(one, report, terms)
    matched = []
    for member, root in one.uploads.items():
        ledgers = [ledger for ledger in report.ledgers if ledger.owner == member]
        problem = _problem(one, ledgers, root, wanted)
        if problem is None:
            matched.append(member)
        else:
            report.found.append(Found(problem.code, f"{member}: {one.title}: {problem.text}"))
    report.rounds.append(
        f"{one.title}: {len(matched)} of {len(one.uploads)} members in the sum have its RELEASE line: "
        f"{', '.join(matched) or 'nobody'}"
    )


def _note_unmatched(rounds: Sequence[Round], report: FederationReport) -> None:
    """RELEASE lines about rounds that are not here: failed ones, or releases that the auditor was not given."""
    here = {one.t2.hex() for one in rounds}
    lines = [entry.facts for ledger in report.ledgers for entry in ledger.entries]
    others = sum(isinstance(facts, Release) and facts.t2 not in here for facts in lines)
    if others:
        report.rounds.append(f"note: {others} RELEASE lines are about rounds without a released transcript here")


def _note_silent(roster: RosterFile, files: Sequence[_File], report: FederationReport) -> None:
    """Members of whom there is no ledger: no finding, since they may never have had a job, but nothing was checked."""
    given = {file.member for file in files}
    silent = [member.name for member in roster.roster.members if member.name not in given]
    if silent and files:
        report.rounds.append(f"note: no ledger here is of {', '.join(silent)}")


def _problem(one: Round, ledgers: Sequence[LedgerReport], root: bytes, wanted: object) -> Found | None:
    lines = [entry.facts for ledger in ledgers for entry in ledger.entries]
    reserved = {f.job: f for f in lines if isinstance(f, Reserve) and (f.plan_digest, f.stage) == one.plan_and_stage}
    released = [f for f in lines if isinstance(f, Release) and f.job in reserved and f.round == one.number]
    if not released:
        return Found(Code.TRUNCATED, "the transcript has its upload, and no ledger has a RELEASE line for it")
    for line in released:
        if (line.t2, line.coordinator) != (one.t2.hex(), one.coordinator.hex()):
            return Found(Code.FORK, "its RELEASE line is about another cohort or coordinator than the transcript")
        if wanted is not None and reserved[line.job].mechanism != wanted:
            return Found(Code.DIFFERS, "its reservation has another mechanism than the plan gives")
    committed = [f for f in lines if isinstance(f, Commit) and f.job in reserved and f.round == one.number]
    if any(bytes.fromhex(f.root) != root for f in committed):
        return Found(Code.FORK, "its COMMIT line is about another upload than the transcript")
    return None


def _mechanism_of(one: Round, report: FederationReport, terms: Terms) -> object:
    """The mechanism that the released plan gives, derived in a process with limits; ``None`` with a finding."""
    try:
        return ask_child({"what": "plan", "plan": one.plan_text}, terms.seconds, terms.mib)
    except LimitReached as error:
        report.found.append(Found(Code.UNSUPPORTED, f"{one.title}: {error}"))
        return None
