"""In which ways a round, a plan or a site's part in it ends or waits, and what each side can do next: one table.

docs/endings.md shows it (``python -m scripts.reference``). A pattern is looked for in the reason; the first entry of
its kind counts, and the last one of a kind takes whatever is left. ``{members}`` are the sites that the reason names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: Of a round; of a plan that is over; of a plan that is held up; of a plan at a site.
Kind = Literal["round", "plan", "held", "site"]

AGAIN = "a round opens by itself once enough sites are ready"
ANOTHER = "submit what is left to do as a plan of another name"
NOTHING = "nothing"
LOOK = "nothing, unless this site is named: then veilsum-participant doctor says what stops it"


@dataclass(frozen=True)
class Ending:
    """One way to end or to wait."""

    kind: Kind
    code: str
    pattern: str
    #: What happened, for the documentation.
    means: str
    operator: str
    site: str


ENDINGS: tuple[Ending, ...] = (
    # --- a round that was aborted
    Ending(
        *("round", "too-few-joined", r"^expected at least \d+ members to join"),
        "fewer sites than the round needs (the plan's min_cohort, or a whole list that comes again) took the offer "
        "within join_s",
        f"start the daemon at {{members}}; {AGAIN}",
        LOOK,
    ),
    Ending(
        *("round", "too-few-shares", r"^expected at least \d+ members with shares"),
        "too few sites dealt their shares within share_s",
        f"start the daemon at {{members}} and look at the log there; {AGAIN}",
        LOOK,
    ),
    Ending(
        *("round", "too-few-uploads", r"^expected at least \d+ members with an upload"),
        "too few uploads were whole within upload_s",
        "look at the line and the log of {members} (max_upload_rate there, upload_s in the plan); the sites that are "
        f"there say that this round stays shut, and {AGAIN}, with the same updates",
        LOOK,
    ),
    Ending(
        *("round", "too-few-signatures", r"^expected at least \d+ members to sign the survivor list"),
        "too few sites signed the list of survivors within sign_s",
        f"start the daemon at {{members}}; {AGAIN}, with the same updates",
        LOOK,
    ),
    Ending(
        *("round", "too-few-releases", r"^expected at least \d+ members to release shares"),
        "too few sites released their shares within unmask_s, so that the sum stays masked",
        "start the daemon at {members}, with the directory as it was: the sites of this sum are the only ones that "
        "may go on, and they do it by themselves",
        LOOK,
    ),
    Ending(
        *("round", "wrong-shares", r"^a member dealt wrong shares: "),
        "shares that match what was signed give no seed: who dealt them cheated, or its machine is broken",
        "talk to {members}: veilsum-coordinator show names the evidence; take it off the roster if it stays so. "
        + AGAIN.capitalize(),
        "nothing, unless this site is named: then tell the operator, and compare its software and memory",
    ),
    Ending(
        *("round", "not-published", r"^the total cannot be published: "),
        "the coordinator's own files do not give the total that the round promised",
        f"veilsum-coordinator doctor; look at its disk and memory. {AGAIN.capitalize()}",
        NOTHING + ": the operator has to mend the coordinator",
    ),
    Ending(
        *("round", "plan-cancelled", r"^plan cancelled: "),
        "the operator withdrew the plan while the round ran",
        NOTHING + f", or {ANOTHER}",
        NOTHING + "; what the training cost stays charged",
    ),
    Ending(
        *("round", "other-round", ""),
        "none of the above; the coordinator is of another version",
        "veilsum-coordinator doctor",
        "ask the operator",
    ),
    # --- a plan that is over
    Ending(
        *("plan", "gave-up", r"^\d+ rounds failed, the last: "),
        "six rounds failed one after another, and the plan has no release",
        f"mend what stopped the last round ({{members}}), then {ANOTHER}",
        "if this site is named, mend it there; the operator submits what is left to do as a plan of another name",
    ),
    Ending(
        *("plan", "roster-changed", r"^the roster changed; "),
        "a plan belongs to the roster under which it was submitted",
        ANOTHER,
        "approve the roster in force, if that is still to do: veilsum-participant roster show",
    ),
    Ending(
        *("plan", "cancelled", ""),
        "the operator withdrew the plan; a release made before stays",
        NOTHING + f", or {ANOTHER}",
        NOTHING + "; the reason is the operator's",
    ),
    # --- a plan that is held up
    Ending(
        *("held", "no-space", r"MB free for the uploads of "),
        "the coordinator's disk has no room for all uploads of a round",
        "free space at the coordinator; the round opens by itself",
        NOTHING,
    ),
    Ending(
        *("held", "pause", r"^\d+ rounds failed since the last release"),
        "six rounds of late sites failed; who is in the release keeps it, and further rounds are rare",
        "start the daemon at {members}; the next round opens by itself after join_s",
        LOOK,
    ),
    Ending(
        *("held", "uncertified", r"^no total of stage \d+ is certified"),
        "not all survivors confirmed a total of this stage, and no site would start the next one from it",
        "start the daemons of the sites that are in no release: another round may be certified. Else cancel the plan "
        f"and {ANOTHER}",
        LOOK,
    ),
    Ending(
        *("held", "stage-blocked", r"^stage \d+ cannot begin: "),
        "the start of the next stage cannot be computed here, for want of space or of a file",
        "veilsum-coordinator doctor; it is tried again every ten seconds",
        NOTHING,
    ),
    Ending(
        *("held", "no-adapter", r"^expected an adapter in releases/"),
        "a round is released, and its files are gone from the coordinator's disk",
        "start the coordinator again: it writes releases anew; each site that fetched the release still has it",
        "veilsum-participant fetch has it where it came here before",
    ),
    Ending(
        *("held", "unconfirmed", r"^not confirmed by "),
        "the total stands, and some sites in it have not said that they verified it",
        "audit the transcript: veilsum-audit transcript; ask {members} what the log says there",
        LOOK,
    ),
    Ending(
        *("site", "site-failed", r"cannot go on: its administrator sees why$"),
        "a site's files, its training or what it was sent do not allow it; details never leave the site",
        "ask the administrator of {members}: veilsum-participant status there says why",
        "veilsum-participant status",
    ),
    Ending(
        *("site", "busy", r"works on plan '.*' first$"),
        "the site was ready, and trains for another plan or is in a round of it",
        "wait: it says again that it is ready",
        "wait: it comes back to this plan by itself",
    ),
    Ending(*("held", "other-held", ""), "none of the above", "veilsum-coordinator doctor", "ask the operator"),
    # --- a plan at a site: refusals
    Ending(
        *("site", "no-consent", r"has no consent here"),
        "nobody at the site agreed to the plan",
        "ask the administrator of {members} to look at the plan",
        "veilsum-participant plans, then veilsum-participant approve PLAN; or leave it",
    ),
    Ending(
        *("site", "hours", r"^training begins here at "),
        "[policy] hours of the site does not allow a training now",
        "wait: it begins by itself",
        "wait: it begins by itself",
    ),
    Ending(
        *("site", "budget", r"would cost epsilon "),
        "what the plan costs is more than what is left of the data set's budget",
        "cancel the plan and draft one with a lower epsilon, or fewer stages; or go on without {members}",
        "ask for a plan with a lower epsilon; raising the budget is yours: veilsum-participant dataset policy",
    ),
    Ending(
        *("site", "budget-without-privacy", r"has no \[privacy\], and the data set has a budget"),
        "a plan without [privacy] spends any budget",
        "cancel the plan and draft one with --epsilon",
        "ask for a plan with [privacy]",
    ),
    Ending(
        *("site", "budget-spent", r"meets a spent budget of epsilon"),
        "a job without privacy ran on this data set before",
        "go on without {members}: no private plan can run on that data set",
        "use another data set; nothing private can be promised of this one",
    ),
    Ending(
        *("site", "budget-terms", r"the budget is for|the budget allows|users of this data set have|no budget can be"),
        "the plan protects less than the budget is about",
        "cancel the plan and draft one with unit, delta and records per user as the site's budget has them",
        "ask for a plan that protects what the budget is about",
    ),
    Ending(
        *("site", "noise", r"expected an epsilon that noise in range can keep"),
        "no noise in range keeps the plan's epsilon",
        "cancel the plan and draft one with a larger epsilon, fewer steps or a lower rate",
        "ask for another plan",
    ),
    Ending(
        *("site", "late", r": it would be late; "),
        "at the site's max_upload_rate its upload takes longer than the plan's upload_s",
        "cancel the plan and submit one with a longer upload_s; or go on without {members}",
        "raise max_upload_rate, or ask for a plan with a longer upload_s",
    ),
    Ending(
        *("site", "unknown-name", r" trains (base model|on data set) '"),
        "the plan's base model or data set is not in the site's file under that name",
        "ask the administrator of {members} to add it, or go on without that site",
        "add it under [models] or [datasets] in participant.toml, or leave the plan",
    ),
    Ending(
        *("site", "policy", r"this site (demands|has not opted in|trains at most)|name the column under 'unit'"),
        "the plan is weaker than the site's own [policy], or asks for what it has not opted into",
        "cancel the plan and draft a stricter one, or go on without {members}",
        "keep to your policy, or change [policy] in participant.toml",
    ),
    Ending(
        *("site", "pinned-policy", r"by the pinned policy$|but policy and \d+ colluders|but policy and . colluders"),
        "the plan breaks the federation's own policy in the roster",
        "cancel the plan and draft one within the roster's policy",
        NOTHING + ": the operator has to correct the plan",
    ),
    Ending(
        *("site", "records", r"records these are registered already"),
        "the same records are known under another name, with a budget of its own",
        "use in plans the name under which the data set is registered at {members}",
        "use the first name in plans, or take the records out",
    ),
    Ending(
        *(
            "site",
            "ledger",
            r"the ledger of |the policy of its ledger|stay what they were at the first job|were witnessed|a fork$",
        ),
        "ledger, registry and participant.toml of a data set do not go together, or the ledger is an old copy",
        "wait for {members}; no ledger may be deleted",
        "restore the newest copy of the directory, or enter the change: veilsum-participant dataset policy",
    ),
    Ending(
        *(
            "site",
            "trained-before",
            r"another name to train again|its charge paid for that one only|a retrained delta is never masked",
        ),
        "the update of this plan was trained or spent before, and a second one is not allowed",
        f"go on without {{members}}, or {ANOTHER}",
        "sit out; a plan of another name can train again",
    ),
    Ending(
        *("site", "model", r"^private training: "),
        "the model has parts that cannot be trained privately",
        "cancel the plan and draft one for another model or other modules",
        "ask for another plan",
    ),
    Ending(
        *(
            "site",
            "other-start",
            r"; the coordinator now shows |has not computed where stage |from another start adapter",
        ),
        "the coordinator shows other totals than those from which this site has begun the stage",
        "restore the newest state of the coordinator: another release was seen at {members}",
        "do not go on; telephone the operator and the other sites",
    ),
    Ending(
        *("site", "offer-refused", r"^the offer of round |^M0: |was not trained under this file"),
        "the offer does not fit what this site has on disk, or lacks a proof about an earlier round",
        "ask {members} for the log; a coordinator that was restored from an old copy offers what was before",
        "nothing, if a later offer is taken; else ask the operator whether the coordinator was restored",
    ),
    Ending(
        *(
            *("site", "release-wrong"),
            r"^the total of round \d+ does not hold: |^M1[013]: |the total is wrong$|^a release is of another"
            r"|^releases: |^audit: |disjoint cohorts in a release|the file (ends early|goes on)$"
            r"|has no outcome certificate",
        ),
        "what the coordinator shows as a total or a release does not verify",
        "look at the coordinator's log, disk and memory: no site takes what it cannot verify",
        "use nothing of this release; keep the log, and tell the operator and the other sites",
    ),
    Ending(
        *("site", "complained", r"^round \d+: complained: "),
        "the shares that another site dealt to this one do not open; nothing was spent",
        "ask {members}, where they were dealt, for version and log; " + AGAIN,
        "nothing, if the next round goes on; else tell the operator",
    ),
    Ending(
        *("site", "not-uploaded", r"^the upload of round \d+ was not taken: "),
        "the upload came too late, or is not what was signed",
        "look at the line of {members} (max_upload_rate there, upload_s in the plan)",
        "nothing: the same update goes into a later round. If it stays so: a faster line, or a higher max_upload_rate",
    ),
    Ending(
        *("site", "upload-lost", r"^the upload of round \d+ cannot go on: "),
        "after a crash the masked file of a round was gone or another one",
        "wait: the round goes on without {members} if enough others are there",
        "nothing: a later round masks the update again. Look at the disk: veilsum-participant doctor",
    ),
    Ending(
        *("site", "round-aborted", r"^round \d+ was aborted: "),
        "the last round gave nothing; this site is ready for the next one",
        AGAIN,
        "see the reason of the round",
    ),
    Ending(
        *("site", "coordinator-refused", r"the coordinator refused: "),
        "the coordinator does not take what this site says",
        "see its reason",
        "ask the operator",
    ),
    Ending(
        *("site", "other-refusal", ""),
        "none of the above; the reason says it",
        "ask the administrator of {members}",
        "mend what the reason says: veilsum-participant doctor looks at everything else",
    ),
)
