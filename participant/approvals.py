"""Plans that somebody at this site looked at and approved: kept beside the site's own file, which stays its people's.

``plans`` keeps what it showed, and ``approve`` pins the digest of exactly that; a plan that changes needs another look.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from participant import charging
from participant.client import OfferedPlan
from participant.config import Home
from participant.pace import UploadTime
from participant.policy import allow, consent
from participant.site import MAX_REASON, Site
from privacy.errors import Refusal, UserError, VeilsumError, shown
from privacy.files import make_private_directory, write_durably
from privacy.job import Job
from privacy.plan import PlanFile, load_plan, parse_plan

APPROVED, SHOWN = "approved.json", "offered"


@dataclass(frozen=True)
class Considered:
    """An offered plan, and what this site makes of it."""

    file: PlanFile
    state: str  # admitted, waiting, refused; or cancelled, aborted, released there
    reason: str
    #: What its upload takes here; ``None`` where the federation does not allow it, or it is over.
    upload: UploadTime | None = None


def approved(home: Home) -> dict[str, str]:
    """Name of a plan -> digest that was approved, hex.

    Raises:
        UserError: the file is damaged.
    """
    path = home.directory / APPROVED
    try:
        found: dict[str, str] = json.loads(path.read_bytes()) if path.exists() else {}
        return {str(name): str(digest) for name, digest in found.items()}
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: expected approved plans, found something else", hint="move it away and approve plans again"
        ) from error


def is_approved(home: Home, file: PlanFile) -> bool:
    """Was this very plan approved here?"""
    return approved(home).get(file.plan.name) == file.digest.hex()


def consider(site: Site, offered: OfferedPlan) -> Considered:
    """What becomes of an offered plan here; keeps it, so that it can be approved.

    Raises:
        UserError: what is offered is not a plan.
    """
    file = parse_plan(offered.toml)
    write_durably(make_private_directory(site.home.directory / SHOWN) / f"{file.plan.name}.toml", file.raw)
    if offered.state in ("cancelled", "aborted"):
        return Considered(file, offered.state, shown(offered.reason, MAX_REASON))
    upload = None
    try:
        job = Job.of(file, site.roster, site.home.factors)
        upload = UploadTime.of(job, site.home.settings.max_upload_rate, min(offered.stage, job.plan.last))
        allow(job, site.home.settings, charging.standing(site, job, offered.stage), offered.stage)
    except VeilsumError as error:
        return Considered(file, "refused", str(error), upload)
    try:
        return Considered(file, "admitted", consented(site.home, file, job), upload)
    except Refusal as error:
        return Considered(file, "waiting", str(error), upload)


def consented(home: Home, file: PlanFile, job: Job) -> str:
    """What this site agreed to a plan by: an approval of this very plan, or its own file.

    Raises:
        Waits: by neither.
    """
    if is_approved(home, file):
        return "approved"
    consent(job, home.settings)
    return "by participant.toml"


def approve(home: Home, name: str, expected: str = "") -> PlanFile:
    """Agree to a plan that was shown.

    Args:
        expected: its digest in hex; empty: whatever was shown last under this name.

    Raises:
        UserError: it was not shown, or has another digest.
    """
    known = {path.stem: path for path in (home.directory / SHOWN).glob("*.toml")}
    if name not in known:
        shown = ", ".join(sorted(known)) or "none"
        raise UserError(
            f"expected a plan that was shown, found '{name}'; shown: {shown}",
            hint="look at it first: veilsum-participant plans",
        )
    file = load_plan(known[name])
    if expected and file.digest.hex() != expected:
        raise UserError(
            f"plan '{name}': expected digest {expected[:16]}…, found {file.digest.hex()[:16]}… shown last",
            hint="look at it again: veilsum-participant plans",
        )
    found = approved(home) | {file.plan.name: file.digest.hex()}
    write_durably(home.directory / APPROVED, json.dumps(found, indent=2).encode() + b"\n")
    return file
