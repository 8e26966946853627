"""A site, opened: its file, pins, identity, records and ledgers; what a command needs before it talks to anyone."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from participant import records
from participant.client import Client
from participant.config import Home, load_home
from participant.counts import Counts
from participant.enrol import ROSTER, ROSTER_PIN, pinned_before
from participant.pace import Pace
from participant.store import Store
from privacy.budget.ledger import Ledger
from privacy.endings import Reason, Told, told_at_site
from privacy.errors import Refusal, UserError, shown
from privacy.files import DiskError, make_private_directory, read_file, write_durably
from privacy.identity import LOST, load_identity
from privacy.job import Job
from privacy.roster import RosterFile, load_roster
from privacy.secagg.keys import identity_public

log = structlog.get_logger()

LOOK_FIRST = "approve the federation's roster first: veilsum-participant roster show, then roster approve"
NOTES = "plans.json"
#: A reason may be the coordinator's own words.
MAX_REASON = 500


@dataclass
class Site:
    """One organisation's end, with its disk."""

    home: Home
    roster: RosterFile
    me: int
    identity: Ed25519PrivateKey = field(repr=False)
    store: Store
    counts: Counts = field(default_factory=Counts, repr=False)
    #: Plan -> what became of the last round of its stage here, if that was no total.
    ended: dict[str, Reason] = field(default_factory=dict, repr=False)
    _ledgers: dict[str, Ledger] = field(default_factory=dict, repr=False)
    #: Identity keys by index in each roster that was pinned here, by its hash.
    _keys: dict[bytes, tuple[bytes, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._keys[self.roster.hash] = self.roster.roster.keys()

    @classmethod
    def open(cls, directory: Path) -> Site:
        """Read everything a site is made of.

        Raises:
            UserError: a missing or damaged file, a roster other than the pinned one, or a key the roster does not name.
        """
        home = load_home(directory)
        pin = read_file(directory / ROSTER_PIN, "the pinned roster hash", LOOK_FIRST)
        try:
            pinned = bytes.fromhex(pin.decode().strip())
        except ValueError as error:
            raise UserError(f"{directory / ROSTER_PIN}: expected a hash in hex, found something else") from error
        roster = load_roster(directory / ROSTER, pinned)
        me = roster.roster.index(home.settings.member)
        identity = load_identity(directory)
        found, expected = identity_public(identity).hex(), roster.roster.members[me].key
        if found != expected:
            raise UserError(
                f"expected the identity key {expected[:16]}… that the roster has for '{home.settings.member}', "
                f"found {found[:16]}…",
                hint=LOST,
            )
        return cls(home, roster, me, identity, Store(home))

    def client(self) -> Client:
        """A connection to the coordinator."""
        settings = self.home.settings
        pace = Pace(settings.max_upload_rate)
        return Client(self.home.directory, settings.coordinator, self.roster, self.me, self.counts, pace)

    def ledger(self, dataset: str) -> Ledger:
        """The ledger of a data set, with every line that is on disk now."""
        if dataset in self._ledgers:
            self._ledgers[dataset].reload()
        else:
            self._ledgers[dataset] = Ledger(self.home.ledgers / f"{dataset}.jsonl", self.identity)
        return self._ledgers[dataset]

    def spent(self, job: Job, stage: int) -> list[records.Spent]:
        """Rounds in which this stage's delta was spent."""
        return self.store.spent(job.plan.name, job.plan.data.dataset, stage)

    def start_digest(self, job: Job, stage: int) -> bytes:
        """Digest of the adapter that a stage starts from here, computed here before anything was trained from it.

        Raises:
            Refusal: this site has not computed it.
        """
        if stage == 1:
            return bytes.fromhex(job.plan.adapter.digest)  # equal to the one computed here: prepare() checked it
        note = self.store.start(job.plan.name, stage)
        if note is None or note.plan != job.plan_file.digest.hex():
            raise Refusal(f"this site has not computed where stage {stage} of plan '{job.plan.name}' starts")
        return bytes.fromhex(note.digest)

    def stage_begun(self, job: Job) -> int:
        """The last stage of a plan whose start was computed here: no earlier one is gone back to."""
        stages = range(job.plan.last, 1, -1)
        notes = ((stage, self.store.start(job.plan.name, stage)) for stage in stages)
        return next((stage for stage, note in notes if note and note.plan == job.plan_file.digest.hex()), 1)

    def round_site(self, job: Job, vector: bytes, bond: tuple[int, ...] | None) -> records.Site:
        """What this site brings into the next round."""
        size, root = self.ledger(job.plan.data.dataset).head()
        return records.Site(
            *(self.me, self.identity, job.plan.name, job.plan.data.dataset, vector),
            *(self.store.rounds_joined(), self.store.peer_counts(self._index_now), size, root, bond),
        )

    def _index_now(self, roster: bytes, member: int) -> int | None:
        """The index in the pinned roster of who had this one in another that was pinned here; found by its key."""
        if roster not in self._keys:
            path = pinned_before(self.home.directory, roster)
            self._keys[roster] = load_roster(path).roster.keys() if path.exists() else ()
        keys, now = self._keys[roster], self.roster.roster.keys()
        return now.index(keys[member]) if member < len(keys) and keys[member] in now else None

    # --- notes for `status`; nothing depends on them -----------------------------------------------------------------

    def round_ended(self, plan: str, reason: Reason) -> None:
        """Remember how a round ended here without a total, until the next one gives one."""
        self.ended[plan] = reason
        self.note(plan, "ready", reason)

    def note(self, plan: str, state: str, reason: str = "") -> Told:
        """Remember what became of a plan here; what of it people see."""
        notes = self.notes()
        told = told_at_site(state, shown(reason, MAX_REASON), self.roster.roster.name)
        entry = {"state": state, **told.facts("site")}
        if {k: notes.get(plan, {}).get(k) for k in entry} != entry:
            notes[plan] = entry | {"since": round(time.time())}
            try:
                write_durably(self.home.directory / NOTES, json.dumps(notes, indent=2).encode() + b"\n")
            except DiskError as error:
                log.warning("note not kept", plan=plan, reason=str(error))
        return told

    def notes(self) -> dict[str, dict[str, Any]]:
        """Plan -> state, since when, the reason, its cause, the sites concerned, and what to do."""
        path = self.home.directory / NOTES
        found: dict[str, dict[str, Any]] = json.loads(path.read_bytes()) if path.exists() else {}
        return {plan: {"cause": "", "concerns": [], "todo": ""} | note for plan, note in found.items()}

    def release_directory(self, plan: str, stage: int) -> Path:
        """Where a release lies at this site."""
        return make_private_directory(self.home.releases / plan / f"stage-{stage}")

    def local_directory(self, plan: str, stage: int) -> Path:
        """The adapter this site trained alone; it never leaves."""
        return self.store.directory(plan, stage) / "local"
