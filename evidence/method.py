"""How it was measured, in words."""

from __future__ import annotations

from evidence.arms import ALPHA, BATCH, HEAD_RATE, RANK
from evidence.cells import EPOCHS, SITES
from evidence.grid import estimate
from evidence.results import Results

METHOD = """\
## How it was measured

`make evidence`; without a graphics card, one thread a cell. It can be stopped at any time and goes on.

* {sites} sites, {epochs} local epochs in all: one round of {epochs}, or {epochs} rounds of one.
* LoRA of rank {rank} and alpha {alpha:g} on query and value of all six layers, and a head that starts at zero; AdamW,
  batches of {batch}, the logit-adjusted loss. The alpha is the demo's. It was chosen by looking at the demo's test
  data, another division of the same articles: for BBC News it is not a choice made without the test records.
* The division into training, validation and test records is the same for all seeds. A seed deals the training records
  to the sites, draws the frozen A, and orders the records. Whole copies of a text, and diagnoses under one
  three-character code, stay on one side. Of BBC News the model sees 64 tokens, and articles that begin alike do not:
  `python -m evidence.copies` counts them, and says what the bars are without them.
* `base` has a head of zeros: its accuracy is the share of the first class, which makes rho flattering. Read the
  differences.
* `analytic` is a head from sums on frozen features. As drafted plans say, a class with fewer than five texts at a site
  is left out there, which pooled training does not do: on ICD-10 a fifth of the records at 80 % skew, 1 to 2 % at
  Dirichlet 0.1; on BBC News none and about 1 %. `alone` is the mean over the sites, each with its own records, at the
  rate of `one-freeze_a`.
* `aligned` is one plan of two stages, of one upload each: the head from sums, and then all epochs of the adapter behind
  that head, which stays as it is. It trains in one round and is no one-shot arm: the bars do not count it.
* `one-head`, `multi-head` and `pooled-head` train the head at {head_rate:g} times the adapter's rate, and are compared
  with one another; `one-head-counted` and `one-head-uniform` take what the sites of `one-head` trained.
* `one-counted`, `one-uniform`, `one-x1.5` and `one-x2` take what the sites of `one-freeze_a` trained, with its rate: a
  head averaged by the records of each class, even weights, and a mean times 1.5 or 2. `one-fisher` takes its rate.
  What has no arm of several rounds of its own (`core`, `regmean`, `fisher`) is compared with `multi-freeze_a`.
* Rates are chosen on one seed and one split, by right answers among 226 or 243 records: two rates a few records apart
  are a choice by chance, and a higher rate often has the lower loss (see the table of rates).
* The faster head was measured on BBC News at 80 % skew and Dirichlet 0.1 only, the two splits of the bars; compare its
  pooled arm with the others of other splits with that in mind.
* SmolLM2: five sites, 24 articles of each desk dealt 80 : 20, the first 128 tokens of each, batches of 4, alpha 16; A
  frozen. Loss in nats a token on 60 other articles; lower is better. A fixed and small budget of tokens; `core` and
  `both` were left out: with them the grid would take more than its eight hours on two cores.
* On random weights `alone`, `aligned`, `fisher`, and what weighs or stretches the mean of `one-freeze_a` otherwise,
  were left out, and the faster head was measured on one split.
* A later round is a federation of its own; its deltas are relative to the release before, and the release is what the
  product's `combine` makes of that and the verified total. Learning rate and warm-up begin anew in each round.
* A Dirichlet deal gives every site at least 20 records of at least two classes; deals without are drawn anew, which
  makes 0.1 milder than it would be: of a hundred draws of 0.1 two are good enough on BBC News, 39 on ICD-10.
* Intervals: 95 % of a paired bootstrap over test records and seeds. Three seeds say little about seeds:
  such an interval never leaves what the three gave. The column by seed says what they gave; at Dirichlet 0.1 they
  differ by ten points and more.
* rho is left out where several rounds are not clearly better than the untrained network.
* The bars speak of the best one-shot arm; best is taken on the test records themselves, and so is the best pooled arm.
* Every aggregation ran masked, through the real state machines, the coordinator's engine and the sites' daemons in one
  process, without gRPC and TLS. Bytes are those of the protobuf messages and chunks, both ways, audit included. Beside
  it the same mean was computed in the clear, from floats, and the unmasked total was compared with the plain sum of
  what the sites sent, bit by bit: a cell where that differs is no result.
* `tls-freeze_a` is one cell between processes, over gRPC and mutual TLS; its bytes are counted by the service. Each
  site fetches the total once more there, with the release.
* tau is the Frobenius norm of what the adapter adds over that of the adapted matrices; the section on the mechanism
  has that over all weights beside it."""


def method(results: Results) -> list[str]:
    """How it was measured."""
    abouts = [result["about"] for _, result in (*results.reported, *results.tuned) if "about" in result]
    commits = ", ".join(sorted({about["commit"] for about in abouts})) or "none"
    spent = sum(result.get("cpu_s", 0.0) for _, result in (*results.reported, *results.tuned)) / 3600
    so_far = " so far" if results.missing else ""
    whole = sum(estimate(cell) for cell in (*(c for c, _ in (*results.reported, *results.tuned)), *results.missing))
    versions = sorted({f"Python {about['python']}, torch {about['torch']}, {about['machine']}" for about in abouts})
    return [
        *METHOD.format(
            sites=SITES, epochs=EPOCHS, rank=RANK, alpha=ALPHA, batch=BATCH, head_rate=HEAD_RATE
        ).splitlines(),
        f"* Commits: {commits}. {'; '.join(versions)}. {spent:.1f} CPU hours{so_far},",
        f"  on machines of different speed. Estimated for two cores with AVX-512: {whole / 7200:.1f} hours (`--list`).",
    ]
