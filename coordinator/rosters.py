"""Drafting a roster from who has joined, and putting one in force."""

from __future__ import annotations

import json
import time
from pathlib import Path

from coordinator.config import Home
from coordinator.members import Members
from coordinator.operator import Operator
from privacy.console import Unreachable
from privacy.errors import UserError
from privacy.files import write_durably
from privacy.identity import load_identity
from privacy.roster import RosterFile, load_roster
from privacy.secagg.keys import identity_public

HEAD = """\
# A draft. Read the policy, change what the federation agreed on, then: veilsum-coordinator roster publish
# Members compare what is published by telephone before they approve it. docs/joining.md says how.

federation = {federation}
coordinator = "{key}"

# A plan may be stricter than this, never weaker. docs/protocol.md, section 5.
[policy]
"""
#: Where no roster says otherwise: one colluder, and sums of at least three.
FIRST_POLICY = {"max_colluders": 1, "min_cohort": 3, "min_survivors": 3}


def draft(home: Home) -> str:
    """A roster of everybody who has joined, with the policy of the one in force, or a first one."""
    key = identity_public(load_identity(home.directory)).hex()
    policy = FIRST_POLICY
    if home.roster.exists():
        given = load_roster(home.roster).roster.policy
        policy = given.model_dump(mode="json", exclude_unset=True)
    text = HEAD.format(federation=json.dumps(home.settings.federation), key=key)
    text += "".join(f"{name} = {json.dumps(value)}\n" for name, value in policy.items())
    for member in Members(home.members, time.time).read().active():
        text += f'\n[[members]]\nname = "{member.name}"\nkey = "{member.key}"\n'
    return text


def publish(home: Home, path: Path) -> tuple[RosterFile, bool]:
    """Put a roster in force; is a coordinator running that has taken it up?

    Raises:
        UserError: not a roster, another coordinator's, or it names somebody who has not joined with that key.
    """
    found = load_roster(path)
    own = identity_public(load_identity(home.directory)).hex()
    if found.roster.coordinator != own:
        raise UserError(f"{path}: expected this coordinator's key {own[:16]}…, found {found.roster.coordinator[:16]}…")
    joined = {member.name: member.key for member in Members(home.members, time.time).read().active()}
    for member in found.roster.members:
        if joined.get(member.name) != member.key:
            raise UserError(
                f"{path}: expected members that have joined with the key they have here, found '{member.name}'",
                hint="invite it, or add a member that brings its own certificate: veilsum-coordinator add NAME KEY",
            )
    write_durably(home.roster, found.raw)
    try:
        Operator(home).reload()
    except Unreachable:
        return found, False
    return found, True
