"""What a site's people look at before they approve a roster, and the approval: no network here.

``roster show`` keeps what it showed, and ``roster approve`` pins exactly that.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from participant import enrol
from privacy.errors import Refusal, UserError
from privacy.files import read_file, write_durably
from privacy.identity import load_identity
from privacy.roster import Roster, RosterFile, load_roster, parse_roster
from privacy.secagg.keys import identity_public
from privacy.words import fingerprint, in_words

log = structlog.get_logger()

#: Seconds between two looks at the pinned hash.
LOOK_S = 1.0
OFFERED = "roster.offered.toml"


@dataclass(frozen=True)
class Shown:
    """A roster as people compare it."""

    file: RosterFile
    pinned: bool
    #: What is other than in the pinned roster; ``None`` where none is pinned.
    changes: tuple[str, ...] | None

    @property
    def words(self) -> str:
        """The roster's hash, all of it, as 24 words: who has the same words has the same roster."""
        return in_words(self.file.hash)

    def members(self) -> list[dict[str, str]]:
        """Name, key and fingerprint of each member."""
        listed = self.file.roster.members
        return [{"member": m.name, "key": m.key, "words": fingerprint(bytes.fromhex(m.key))} for m in listed]


def check_own(directory: Path, roster: Roster, member: str) -> None:
    """Does a roster have this site's own key under its own name? Nobody else can know that it should be this one.

    Raises:
        Refusal: it has another key, or the site is not in it.
    """
    own, listed = identity_public(load_identity(directory)).hex(), roster.members[roster.index(member)].key
    if own != listed:
        raise Refusal(
            f"this roster has the key {listed[:16]}… for '{member}', whose key is {own[:16]}…: somebody would sign in "
            "this site's name. Do not approve it; telephone the operator and the other members"
        )


def pinned_roster(directory: Path) -> RosterFile | None:
    """The roster that this site approved, if any."""
    path = directory / enrol.ROSTER
    return load_roster(path) if (directory / enrol.ROSTER_PIN).exists() and path.exists() else None


def keep_offered(directory: Path, offered: RosterFile, member: str) -> Shown:
    """Keep a roster that the coordinator offers, to be shown and approved or not; raises as :func:`check_own`."""
    check_own(directory, offered.roster, member)
    before = pinned_roster(directory)
    same = before is not None and before.hash == offered.hash
    if not same:
        write_durably(directory / OFFERED, offered.raw)
    return Shown(offered, same, changes(before.roster, offered.roster) if before is not None else None)


def approve(directory: Path, member: str, expected: str = "") -> RosterFile:
    """Pin the roster that was shown last.

    Args:
        expected: its hash in hex; empty: whatever was shown.

    Raises:
        UserError: none was shown, or it has another hash. Refusal: it has another key for this site.
    """
    path = directory / OFFERED
    raw = read_file(path, "a roster that was shown", "look at it first: veilsum-participant roster show")
    offered = parse_roster(raw, str(path))
    if expected and offered.hash.hex() != expected:
        raise UserError(
            f"expected the roster {expected[:16]}…, found {offered.hash.hex()[:16]}… shown last",
            hint="look at it and compare it again: veilsum-participant roster show",
        )
    check_own(directory, offered.roster, member)
    enrol.pin_roster(directory, raw)
    path.unlink()
    return offered


def wait_for_approval(directory: Path, known: bytes, reason: str) -> None:
    """Wait until this site has approved another roster than the one a daemon runs with; it takes part in nothing.

    Args:
        known: hash of that one; another may have been approved already, while the daemon was busy.
    """
    pin = directory / enrol.ROSTER_PIN
    if pin.read_text().strip() == known.hex():
        log.warning("waiting for the approval of a roster", reason=reason)
    while pin.read_text().strip() == known.hex():
        time.sleep(LOOK_S)
    log.info("another roster is approved")


def changes(before: Roster, after: Roster) -> tuple[str, ...]:
    """What is other in a new roster, one line each."""
    found = []
    if before.federation != after.federation:
        found.append(f"the federation is called '{after.federation}', was '{before.federation}'")
    if before.coordinator != after.coordinator:
        found.append("the coordinator has ANOTHER KEY: is it still the same coordinator?")
    old, new = {m.name: m.key for m in before.members}, {m.name: m.key for m in after.members}
    found += [f"'{name}' is no longer a member" for name in old if name not in new]
    found += [f"'{name}' is a new member" for name in new if name not in old]
    found += [f"'{name}' has ANOTHER KEY: ask it why" for name in new if name in old and old[name] != new[name]]
    was, now = before.policy.model_dump(), after.policy.model_dump()
    found += [f"policy: {key} is {now[key]}, was {was[key]}" for key in now if now[key] != was[key]]
    if not found and before != after:
        found.append("the members are in another order")
    return tuple(found)
