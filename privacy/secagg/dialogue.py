"""Who may say what to whom: the two unions of all messages of a round, and the protocol's numbers for them."""

from __future__ import annotations

from privacy.secagg.messages import (
    AbortStatement,
    Advertise,
    Certificate,
    Complaint,
    Inbox,
    KeyList,
    MaskedInput,
    NonceList,
    Offer,
    Outcome,
    OutcomeVote,
    ProjectionShare,
    RoundAborted,
    ShareRoot,
    Shares,
    SurvivorList,
    SurvivorVote,
    UnmaskShares,
)
from privacy.secagg.signed import Signed

#: What the coordinator may tell a member.
ToMember = Offer | KeyList | Inbox | SurvivorList | Certificate | Outcome | NonceList | RoundAborted
#: What a member may tell the coordinator (M5's vector travels beside its signed root).
FromMember = (
    Signed[Advertise]
    | Shares
    | Signed[Complaint]
    | Signed[MaskedInput]
    | Signed[SurvivorVote]
    | Signed[UnmaskShares]
    | Signed[OutcomeVote]
    | Signed[ProjectionShare]
    | Signed[AbortStatement]
)

#: The protocol's numbers of what a member says.
NUMBERS = {
    Advertise: "M1",
    ShareRoot: "M3",
    Complaint: "complaint",
    MaskedInput: "M5",
    SurvivorVote: "M7",
    UnmaskShares: "M9",
    OutcomeVote: "M11",
    ProjectionShare: "M13",
    AbortStatement: "abort-statement",
}


def message_name(message: FromMember) -> str:
    """M1, M3, ... of a member's message."""
    return NUMBERS[type(message.root.body if isinstance(message, Shares) else message.body)]
