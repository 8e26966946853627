"""The arms of the grid: how the sites' records are used, and with which settings. No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from privacy.aggregation import Head, Method

#: Adapter and batches of every trained arm. The scale alpha / rank is the demo's.
RANK, ALPHA, BATCH = 8, 48.0, 16
#: What differs for the language model; ``records`` of each desk are trained on, at most ``tokens`` of each.
TEXT = {"alpha": 16.0, "batch": 4, "records": 24, "validation": 6, "test": 12, "tokens": 128}
#: Public range of one coordinate of a delta; each result says how much was clipped: almost nothing, see the last bar.
CLIP = 1.0
#: The same of the method "core".
CORE_CLIP = 8.0
MAX_WEIGHT = 4096


@dataclass(frozen=True)
class Arm:
    """One way to use the sites' records.

    Attributes:
        kind: "base", "alone", "pooled", "rounds" (federated training), "analytic" (a head from sums), "tls" (one
            round between processes over TLS; measured once); or "aligned": the head from sums, and then one round in
            which the adapter is trained behind it.
        method: how the adapter is trained and aggregated, ``aggregation.method`` of the plan.
        rounds: rounds of an arm of kind "rounds"; its local epochs are shared out evenly.
        rates: learning rates tried first on the validation records, a part of :data:`LADDER`.
        source: arm whose learning rate this one takes over, and whose sites' training where the method is the same.
        server_lr: what the mean is multiplied by.
        site_weights: whether sites count by their number of examples, or each the same.
        head: whether it is trained, computed, or trained and averaged by the records of each class.
        head_rate: the learning rate of a trained head, over that of the adapter.
    """

    kind: Literal["base", "alone", "pooled", "rounds", "analytic", "aligned", "tls"]
    method: Method = "freeze_a"
    rounds: int = 0
    rates: tuple[float, ...] = ()
    source: str | None = None
    server_lr: float = 1.0
    site_weights: Literal["examples", "uniform"] = "examples"
    head: Head = "trained"
    head_rate: float = 1.0

    @property
    def definition(self) -> dict[str, object]:
        """What a result depends on; the settings that most arms share, only where they are not the usual ones."""
        usual = {
            "server_lr": 1.0,
            "site_weights": "examples",
            "head": "analytic" if self.kind in ("analytic", "aligned") else "trained",
            "head_rate": 1.0,
        }
        unusual = {key: getattr(self, key) for key, value in usual.items() if getattr(self, key) != value}
        return {"kind": self.kind, "method": self.method, "rounds": self.rounds, **unusual}


#: Where the best of an arm's rates is the first or the last that was tried, the next of these is tried too.
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
#: With A frozen, B needs a higher rate than where both move, or where its head is there already.
HIGH, LOW = (1e-3, 3e-3, 1e-2), (3e-4, 1e-3, 3e-3)
#: Of a core, whose few numbers have further to go.
HIGHEST = (1e-2, 3e-2, 1e-1)
#: A head starts at zero, and the adapter's rate is not enough for it in the few steps of a round.
HEAD_RATE = 10.0
ARMS: dict[str, Arm] = {
    "base": Arm("base"),
    "analytic": Arm("analytic", head="analytic"),
    "pooled-freeze_a": Arm("pooled", "freeze_a", 0, HIGH),
    "one-freeze_a": Arm("rounds", "freeze_a", 1, HIGH),
    "one-both": Arm("rounds", "both", 1, LOW),
    "one-counted": Arm("rounds", "freeze_a", 1, source="one-freeze_a", head="counted"),
    "one-uniform": Arm("rounds", "freeze_a", 1, source="one-freeze_a", site_weights="uniform"),
    "one-x1.5": Arm("rounds", "freeze_a", 1, source="one-freeze_a", server_lr=1.5),
    "one-x2": Arm("rounds", "freeze_a", 1, source="one-freeze_a", server_lr=2.0),
    "one-core": Arm("rounds", "core", 1, HIGHEST),
    "one-fisher": Arm("rounds", "fisher", 1, source="one-freeze_a"),
    "one-regmean": Arm("rounds", "regmean", 1, HIGH),
    "aligned": Arm("aligned", "freeze_a", 1, LOW, head="analytic"),
    "multi-freeze_a": Arm("rounds", "freeze_a", 3, HIGH),
    "multi-both": Arm("rounds", "both", 3, LOW),
    "pooled-head": Arm("pooled", "freeze_a", 0, HIGH, head_rate=HEAD_RATE),
    "one-head": Arm("rounds", "freeze_a", 1, HIGH, head_rate=HEAD_RATE),
    "one-head-counted": Arm("rounds", "freeze_a", 1, source="one-head", head="counted", head_rate=HEAD_RATE),
    "one-head-uniform": Arm("rounds", "freeze_a", 1, source="one-head", site_weights="uniform", head_rate=HEAD_RATE),
    "multi-head": Arm("rounds", "freeze_a", 3, HIGH, head_rate=HEAD_RATE),
    "tls-freeze_a": Arm("tls", "freeze_a", 1, source="one-freeze_a"),
    "alone": Arm("alone", "freeze_a", 1, source="one-freeze_a"),
}


def counterpart(kind: Literal["one", "multi", "pooled"], arm: str) -> str:
    """The arm of one round, of several, or of pooled records that trains as this one does; if none does, freeze_a's."""
    about = ARMS[arm]
    name = f"{kind}-{about.method if about.head_rate == 1.0 else 'head'}"
    return name if name in ARMS else f"{kind}-freeze_a"
