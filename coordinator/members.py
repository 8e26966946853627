"""Who was invited, who joined, and who was removed: one append-only file, a JSON object a line.

Commands and a running coordinator write to it, one at a time; each reads it anew. A line is on disk before anybody
hears of what it says. Of an invitation's secret only a hash is kept (``privacy/invitation.py``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from privacy.errors import Refusal, UserError
from privacy.files import append_durably, exclusively, whole_lines
from privacy.invitation import moment, secret_hash


@dataclass(frozen=True)
class Member:
    """A site that has joined."""

    name: str
    key: str  # identity, Ed25519, hex
    since: float
    removed: bool = False
    #: Its last certificate, PEM; empty where the site brought its own.
    certificate: str = field(default="", repr=False)
    #: Certificates issued before this are worth nothing: when a member of this name was last removed.
    barred: float = 0.0


@dataclass(frozen=True)
class Invited:
    """An invitation and what became of it."""

    member: str
    expires: float
    #: Who used it, and for which key of a certificate request; empty: nobody yet.
    key: str = ""
    tls: str = ""
    certificate: str = field(default="", repr=False)


@dataclass
class State:
    """What all lines together say."""

    members: dict[str, Member] = field(default_factory=dict)
    invited: dict[str, Invited] = field(default_factory=dict)  # by hash of the secret, hex

    def active(self) -> list[Member]:
        """Members that were not removed, in the order in which they joined."""
        return [m for m in self.members.values() if not m.removed]


class Members:
    """The file of one coordinator."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._path, self._clock = path, clock
        self._seen: tuple[tuple[int, int], State] = ((0, 0), State())

    @contextmanager
    def _locked(self) -> Iterator[State]:
        with exclusively(self._path.with_suffix(".lock")):
            yield self._load()

    def _load(self) -> State:
        state = State()
        for number, line in enumerate(whole_lines(self._path), 1):
            try:
                _apply(state, json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self._path}:{number}: expected a line about a member, found something else",
                    hint="restore the file from your backup: it says who has joined",
                ) from error
        return state

    def _add(self, kind: str, **values: object) -> None:
        line = json.dumps({"kind": kind, "at": self._clock(), **values})
        append_durably(self._path, line.encode() + b"\n")

    def read(self) -> State:
        """What all lines together say now."""
        with self._locked() as state:
            return state

    def known(self, name: str) -> Member | None:
        """What was last said of a name; the file is read again only when it has changed. For every call of a member."""
        if not self._path.exists():
            return None
        stat = self._path.stat()
        stamp = (stat.st_mtime_ns, stat.st_size)
        if stamp != self._seen[0]:
            self._seen = (stamp, self.read())
        return self._seen[1].members.get(name)

    def invite(self, name: str, secret: bytes, expires: int) -> None:
        """Keep an invitation; an earlier one for the same name that nobody used is worth nothing from now on.

        Raises:
            Refusal: a member of this name has joined already.
        """
        with self._locked() as state:
            if name in state.members and not state.members[name].removed:
                raise Refusal(f"'{name}' has joined already; remove it first: veilsum-coordinator remove {name}")
            self._add("INVITED", member=name, secret=secret_hash(secret).hex(), expires=expires)

    def admit(self, secret: bytes, name: str, key: str, tls: str, issue: Callable[[], str]) -> str:
        """The certificate for a site with an invitation: a new one, or the same one to the same keys again.

        Args:
            issue: makes the certificate; called only when everything else is right.

        Raises:
            Refusal: unknown, for another name, expired, used by other keys, or the key is another member's.
        """
        with self._locked() as state:
            found = state.invited.get(secret_hash(secret).hex())
            if found is None:
                raise Refusal("this invitation is not known here, or a later one replaced it: ask for another")
            if found.member != name:
                raise Refusal(f"this invitation is for another member, not for '{name}'")
            if self._clock() >= found.expires:
                raise Refusal(f"this invitation expired on {moment(found.expires)}: ask for another")
            if found.key:
                if (found.key, found.tls) != (key, tls):
                    raise Refusal(
                        "this invitation was used already, with other keys. If that was not this site, somebody else "
                        f"has read it: tell the operator to remove '{name}'"
                    )
                return found.certificate
            owner = next((m.name for m in state.active() if m.key == key), None)
            if owner is not None:
                raise Refusal(f"this identity key belongs to '{owner}' already: each member has one of its own")
            certificate = issue()
            hashed = secret_hash(secret).hex()
            self._add("JOINED", member=name, secret=hashed, key=key, tls=tls, certificate=certificate)
            return certificate

    def add(self, name: str, key: str) -> None:
        """A member that brings its own certificate.

        Raises:
            Refusal: name or key belong to a member already.
        """
        with self._locked() as state:
            taken = next((m.name for m in state.active() if name == m.name or key == m.key), None)
            if taken is not None:
                raise Refusal(f"this name or key belongs to member '{taken}' already")
            self._add("JOINED", member=name, secret="", key=key, tls="", certificate="")

    def renew(self, name: str, issue: Callable[[], str]) -> str:
        """Another certificate for a member.

        Raises:
            Refusal: removed, never joined here, or its certificate came from elsewhere.
        """
        with self._locked() as state:
            member = state.members.get(name)
            if member is None or member.removed:
                raise Refusal(f"'{name}' is not a member that joined here")
            if not member.certificate:
                raise Refusal(f"the certificate of '{name}' was not issued here: renew it where it came from")
            certificate = issue()
            self._add("RENEWED", member=name, certificate=certificate)
            return certificate

    def remove(self, name: str) -> None:
        """Take a member out of all rosters to come, and refuse it certificates at once; an invitation is withdrawn.

        Raises:
            UserError: no such member, and nobody of this name is invited.
        """
        with self._locked() as state:
            invited = any(one.member == name and not one.key for one in state.invited.values())
            if not invited and (name not in state.members or state.members[name].removed):
                known = ", ".join(m.name for m in state.active()) or "none"
                raise UserError(f"expected the name of a member, found '{name}'; members: {known}")
            self._add("REMOVED", member=name)


def _apply(state: State, line: Mapping[str, Any]) -> None:
    kind, name = line["kind"], str(line["member"])
    if kind == "INVITED":
        kept = {h: i for h, i in state.invited.items() if i.member != name}
        state.invited = kept | {str(line["secret"]): Invited(name, float(line["expires"]))}
    elif kind == "JOINED":
        key, tls, certificate = str(line["key"]), str(line["tls"]), str(line["certificate"])
        if line["secret"]:
            used = replace(state.invited[line["secret"]], key=key, tls=tls, certificate=certificate)
            state.invited[line["secret"]] = used
        before = state.members.pop(name, None)  # who comes back is the last one in the order
        barred = before.barred if before else 0.0
        state.members[name] = Member(name, key, float(line["at"]), certificate=certificate, barred=barred)
    elif kind == "RENEWED":
        state.members[name] = replace(state.members[name], certificate=str(line["certificate"]))
    elif kind == "REMOVED":
        left = {h: i for h, i in state.invited.items() if i.member != name}
        if name in state.members or left == state.invited:  # else it was only invited
            state.members[name] = replace(state.members[name], removed=True, barred=float(line["at"]))
        state.invited = left
    else:
        raise ValueError(kind)
