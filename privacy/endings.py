"""Why something ended, in words that both sides read alike: the reasons are made here and nowhere else.

A :class:`Reason` is what is stored and sent; it names members by number, as the protocol does. :func:`told` makes of it
what people see: names, a code for machines, and what each side can do next (``privacy/advice.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NewType

from privacy.advice import ENDINGS, Ending, Kind

#: A text that the table knows. Only the functions below make one.
Reason = NewType("Reason", str)
#: Nothing is the matter.
NONE = Reason("")

#: What too few members did.
Step = Literal["to join", "with shares", "with an upload", "to sign the survivor list", "to release shares"]

SILENT = re.compile(r"\bsilent: (\d+(?:, \d+)*)")
MEMBER = re.compile(r"\bmember (\d+)\b")
#: A round whose reason holds what an operator wrote: nothing in it is a number of a member.
FREE_TEXT = "plan cancelled: "


# --- the reasons -----------------------------------------------------------------------------------------------------


def too_few(step: Step, needed: int, found: int, silent: Sequence[int]) -> Reason:
    """A phase of a round ended without enough members."""
    names = ", ".join(map(str, silent)) or "none"
    return Reason(f"expected at least {needed} members {step}, found {found}; silent: {names}")


def wrong_shares(error: Exception) -> Reason:
    """Released shares match their hashes and give no seed."""
    return Reason(f"a member dealt wrong shares: {error}")


def not_published(error: Exception) -> Reason:
    """The coordinator's files do not give the total."""
    return Reason(f"the total cannot be published: {error}")


def plan_cancelled(reason: str) -> Reason:
    """The operator withdrew the plan of a running round."""
    return Reason(FREE_TEXT + reason)


def cancelled(reason: str) -> Reason:
    """The operator withdrew a plan, and says why in words of its own."""
    return Reason(reason)


def gave_up(count: int, last: str) -> Reason:
    """A plan without a release failed too often."""
    return Reason(f"{count} rounds failed, the last: {last}")


def roster_changed() -> Reason:
    """The roster of a plan was replaced."""
    return Reason("the roster changed; what is left to do needs a plan of another name")


def pause(count: int, last: str) -> Reason:
    """Rounds of a plan with a release fail, and become rare."""
    return Reason(f"{count} rounds failed since the last release, the last: {last}")


def uncertified(stage: int) -> Reason:
    """The next stage has nothing to start from."""
    return Reason(f"no total of stage {stage} is certified: stage {stage + 1} must wait")


def stage_blocked(stage: int, error: Exception) -> Reason:
    """The start of a stage cannot be computed."""
    return Reason(f"stage {stage} cannot begin: {error}")


def no_space(needed: int, members: int, free: int) -> Reason:
    """The disk is too full for a round; in bytes."""
    return Reason(
        f"expected {needed / 1e6:,.1f} MB free for the uploads of {members} members, found {free / 1e6:,.1f} MB"
    )


def no_adapter(plan: str) -> Reason:
    """A released plan whose files are gone."""
    return Reason(f"expected an adapter in releases/{plan}, found none")


def unconfirmed(members: Sequence[int]) -> Reason:
    """A total stands that some survivors have not confirmed."""
    return Reason("not confirmed by " + ", ".join(f"member {m}" for m in members))


def site_failed() -> Reason:
    """A site cannot go on, for a reason that is nobody else's to know."""
    return Reason("this site cannot go on: its administrator sees why")


def works_on(plan: str) -> Reason:
    """A site that was ready is busy with another plan."""
    return Reason(f"this site works on plan '{plan}' first")


def offer_refused(number: int, error: Exception) -> Reason:
    """A site did not take an offer."""
    return Reason(f"the offer of round {number} was refused: {error}")


def round_aborted(number: int, reason: str) -> Reason:
    """The last round that a site was in, as it is told there."""
    return Reason(f"round {number} was aborted: {reason}")


def total_wrong(number: int, error: Exception) -> Reason:
    """A site does not confirm a total."""
    return Reason(f"the total of round {number} does not hold: {error}")


def complained(number: int, reason: str) -> Reason:
    """A site takes no further part in a round, since shares do not open."""
    return Reason(f"round {number}: complained: {reason}")


def not_uploaded(number: int, error: Exception) -> Reason:
    """The coordinator did not take an upload."""
    return Reason(f"the upload of round {number} was not taken: {error}")


def upload_lost(number: int) -> Reason:
    """What was to be uploaded after a crash is gone."""
    return Reason(f"the upload of round {number} cannot go on: its spool is gone or another")


def stored(text: str) -> Reason:
    """A reason as it was kept on disk, or came over the wire."""
    return Reason(text)


# --- what people are told --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """A reason for people and machines.

    Attributes:
        cause: code of the table; empty where nothing is the matter.
        reason: with names.
        concerns: the sites that it names.
        operator: what the operator can do next.
        site: what the administrator of a site can do next.
    """

    cause: str = ""
    reason: str = ""
    concerns: tuple[str, ...] = ()
    operator: str = ""
    site: str = ""

    def facts(self, side: Literal["operator", "site"]) -> dict[str, Any]:
        """For JSON: reason, cause, the sites concerned, and what this side can do."""
        todo = self.operator if side == "operator" else self.site
        return {"reason": self.reason, "cause": self.cause, "concerns": list(self.concerns), "todo": todo}

    def logged(self, side: Literal["operator", "site"]) -> dict[str, Any]:
        """For a log line: what there is of :meth:`facts`; most lines tell of nothing that went wrong."""
        return {key: value for key, value in self.facts(side).items() if value}


def find(kind: Kind, reason: str) -> Ending:
    """The entry of the table for a reason."""
    return next(e for e in ENDINGS if e.kind == kind and re.search(e.pattern, reason))


def told(kind: Kind, reason: str, name: Callable[[int], str] | None = None, concerns: Sequence[str] = ()) -> Told:
    """What people see of a reason.

    Args:
        name: of a member by its number; without it the reason has names already.
        concerns: sites that it is about, where the reason itself does not say so.
    """
    if not reason:
        return Told()
    ending, members = find(kind, reason), list(concerns)
    if name is not None and FREE_TEXT not in reason and ending.code != "cancelled":
        numbers = [int(n) for listed in SILENT.findall(reason) for n in listed.split(", ")]
        members += [name(n) for n in (*numbers, *map(int, MEMBER.findall(reason)))]
        reason = SILENT.sub(lambda m: "silent: " + ", ".join(name(int(n)) for n in m[1].split(", ")), reason)
        reason = MEMBER.sub(lambda m: f"'{name(int(m[1]))}'", reason)
    unique = tuple(dict.fromkeys(members))
    filled = {"members": ", ".join(unique) or "the sites that did not answer"}
    return Told(ending.code, reason, unique, ending.operator.format_map(filled), ending.site.format_map(filled))


def told_at_site(state: str, reason: str, name: Callable[[int], str]) -> Told:
    """What a site says of a plan that it has in this state; nothing where it only waits its turn, or has a release."""
    if state in ("cancelled", "aborted"):
        return told("plan", reason or "no reason given", name)
    if found := re.match(r"round (\d+) was aborted: (.*?)(; \d+ of \d+ members are ready)?$", reason):
        of_round = told("round", found[2], name)
        text = round_aborted(int(found[1]), of_round.reason) + (found[3] or "")
        return Told(of_round.cause, text, of_round.concerns, of_round.operator, of_round.site)
    if state in ("refused", "failed"):
        return told("site", reason)
    if state in ("ready", "waiting") and find("site", reason).code != "other-refusal":
        return told("site", reason, name)
    return Told(reason=reason)
