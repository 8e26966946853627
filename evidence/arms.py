"""The arms of the grid: how the sites' records are used, and with which settings. No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from privacy.aggregation import Head, Method

#: Adapter and batches of every trained arm. The scale alpha / rank is the demo's.
RANK, ALPHA, BATCH = 8, 48.0, 16
#: What differs for the language model; ``records`` of each desk are trained on, at most ``tokens`` of each.
TEXT = {"alpha": 16.0, "batch": 4, "records": 24, "validation": 6, "test": 12, "tokens": 128}
#: Public range of one coordinate of a delta; nothing measured comes near it, and each result says how much was clipped.
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
    """

    kind: Literal["base", "alone", "pooled", "rounds", "analytic", "aligned", "tls"]
    method: Method = "freeze_a"
    rounds: int = 0
    rates: tuple[float, ...] = ()
    source: str | None = None
    server_lr: float = 1.0
    site_weights: Literal["examples", "uniform"] = "examples"
    head: Head = "trained"

    @property
    def definition(self) -> dict[str, object]:
        """What a result depends on; how the mean is taken and applied, only where that is not the usual way."""
        merging = {"server_lr": self.server_lr, "site_weights": self.site_weights, "head": self.head}
        usual = {
            "server_lr": 1.0,
            "site_weights": "examples",
            "head": "analytic" if self.kind in ("analytic", "aligned") else "trained",
        }
        unusual = {key: value for key, value in merging.items() if value != usual[key]}
        return {"kind": self.kind, "method": self.method, "rounds": self.rounds, **unusual}


#: Where the best of an arm's rates is the first or the last that was tried, the next of these is tried too.
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
#: With A frozen, B needs a higher rate than where both move, or where its head is there already.
HIGH, LOW = (1e-3, 3e-3, 1e-2), (3e-4, 1e-3, 3e-3)
#: Of a core, whose few numbers have further to go.
HIGHEST = (1e-2, 3e-2, 1e-1)
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
    "tls-freeze_a": Arm("tls", "freeze_a", 1, source="one-freeze_a"),
    "alone": Arm("alone", "freeze_a", 1, source="one-freeze_a"),
}
