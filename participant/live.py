"""The round that a site's daemon lives through now, for its own page: which phase, until when, how much is uploaded."""

from __future__ import annotations

from dataclasses import dataclass

from participant import phases
from privacy.sections import Deadlines

#: Phase -> its name for people, in order; in the others the site is in no round any more.
NAMES: dict[type, str] = {
    phases.Advertising: "joining",
    phases.Dealing: "sharing",
    phases.Masking: "masking",
    phases.Uploading: "uploading",
    phases.Voting: "signing",
    phases.Releasing: "unmasking",
    phases.Checking: "checking",
    phases.Confirmed: "confirming",
    phases.Projecting: "projecting",
}
#: Phases that one phase of the coordinator spans: its deadline counts from the first of them.
GOES_ON = {"uploading": "masking", "confirming": "checking"}


@dataclass(frozen=True)
class Live:
    """Where a site is in a round; times are Unix times."""

    plan: str
    stage: int
    stages: int
    round: int
    phase: str
    #: When this phase of the coordinator's began, as far as this site has heard.
    since: float
    #: Until when the coordinator waits by the plan; ``None`` where this site did not hear when that began.
    deadline: float | None
    #: Bytes of this site's upload that the coordinator has, and of how many.
    upload: tuple[int, int] | None = None


def seconds_of(phase: str, deadlines: Deadlines) -> int:
    """How long the coordinator waits for sites in a phase, by the plan."""
    return {
        "joining": deadlines.join_s,
        "sharing": deadlines.share_s,
        "masking": deadlines.upload_s,
        "uploading": deadlines.upload_s,
        "signing": deadlines.sign_s,
        "unmasking": deadlines.unmask_s,
    }.get(phase, deadlines.outcome_s)
