"""A causal language model and a site's records: the loss of a batch, of each record by itself, and how good it is.

A batch's loss is the mean, over its tokens that count, of the cross-entropy of each token given those before it in its
own record. Padded or packed makes no difference but rounding: packing lays the records of a batch one behind another
into rows, each with positions of its own and blind to the others, which is tried on the very model before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from participant.device import autocast
from participant.text_data import Records
from participant.tokens import Tokens, encode
from participant.training import Loaded, Seen
from privacy.errors import UserError
from privacy.plan import Plan

log = structlog.get_logger()

#: Tokens per forward pass of an evaluation, padding included, unless one record alone is longer.
BATCH_TOKENS = 2048
#: How far a packed record's logits may be off those of the record alone, over the largest of them. Rounding in float32
#: gave less than 1e-6 on small models of four architectures, and records that saw one another gave 0.7 on three.
MAX_LEAK = 1e-3
#: Tokens of the records that packing is tried on; the seed of such records is public.
TRIAL, SEED = (5, 9, 7), 2026


@dataclass(frozen=True)
class Laid:
    """A batch as the model takes it, all (rows, columns) int64."""

    ids: Tensor
    #: Position of each token in its record; what is behind the last record of a row has position 0.
    positions: Tensor
    #: Which record of the batch a token belongs to; -1 for none.
    owners: Tensor
    counted: Tensor  # bool
    packed: bool


def lay_out(batch: Sequence[Tokens], pad: int, width: int | None = None) -> Laid:
    """One record a row, or, with a ``width``, as many a row as fit into so many tokens, in their order."""
    rows: list[list[int]] = []
    room = 0
    for number, tokens in enumerate(batch):
        if width is None or not rows or len(tokens) > room:
            rows.append([])
            room = width or 0
        rows[-1].append(number)
        room -= len(tokens)
    lengths = [sum(len(batch[number]) for number in row) for row in rows]
    shape = (len(rows), max(lengths, default=0))
    laid = Laid(
        torch.full(shape, pad, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.int64),
        torch.full(shape, -1, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.bool),
        width is not None,
    )
    for at, row in enumerate(rows):
        low = 0
        for number in row:
            tokens = batch[number]
            place = (at, slice(low, low + len(tokens)))
            laid.ids[place], laid.counted[place] = tokens.ids, tokens.counted
            laid.positions[place], laid.owners[place] = torch.arange(len(tokens)), number
            low += len(tokens)
    return laid


def logits_of(loaded: Loaded, laid: Laid) -> Tensor:
    """(rows, columns, vocabulary) float.

    Padded rows get a mask; packed ones positions that start anew, from which transformers makes a mask by record.
    """
    about: dict[str, Tensor] = {"input_ids": laid.ids.to(loaded.device)}
    if laid.packed:
        about["position_ids"] = laid.positions.to(loaded.device)
    else:
        about["attention_mask"] = (laid.owners >= 0).to(loaded.device, torch.int64)
    return loaded.model(**about, use_cache=False).logits  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Said:
    """Of each token that counts, over a whole batch: (count,) each."""

    losses: Tensor  # float32, nats
    right: Tensor  # bool: the likeliest token is the one that comes
    owners: Tensor  # int64, the record of the batch


def say(loaded: Loaded, laid: Laid, *, bf16: bool = True) -> Said:
    """What the model says of the tokens of a batch that count."""
    with autocast(loaded.device, bf16):
        logits = logits_of(loaded, laid)
    chosen = laid.counted[:, 1:].to(loaded.device)  # the first of a record never counts, so none has another's context
    targets = laid.ids[:, 1:].to(loaded.device)[chosen]
    foretold = logits[:, :-1][chosen].float()
    losses = cross_entropy(foretold, targets, reduction="none")
    return Said(losses, foretold.argmax(-1) == targets, laid.owners[:, 1:].to(loaded.device)[chosen])


def record_losses(said: Said, records: int) -> Tensor:
    """(records,) mean loss of each record by itself; zero for one of which no token counts."""
    sums = torch.zeros(records, device=said.losses.device).index_add(0, said.owners, said.losses)
    counts = torch.bincount(said.owners, minlength=records)
    return sums / counts.clamp(min=1)


def check_packing(loaded: Loaded, width: int) -> None:
    """Raise UserError unless a packed record gets the logits that it gets alone.

    Whether a model reads the positions that tell records apart is its own affair, and one that does not would let them
    see one another without a word. It is asked with random tokens.
    """
    batch = synthetic(loaded, TRIAL)
    with torch.inference_mode():
        packed = lay_out(batch, loaded.tokenizer.pad_token_id, max(width, sum(TRIAL)))
        together = logits_of(loaded, packed)[0].float()
        alone = torch.cat(
            [logits_of(loaded, lay_out([one], loaded.tokenizer.pad_token_id))[0].float() for one in batch]
        )
    apart = float((together - alone).abs().max() / alone.abs().max())
    if not apart <= MAX_LEAK:
        raise UserError(
            f"model: expected packed records not to see one another, found logits that are off by {apart:.3g}",
            hint="ask for a plan with generation.packing = false",
        )


def encoded(loaded: Loaded, plan: Plan, records: Records) -> list[Tokens]:
    """The records' tokens; the log says how many have none that counts.

    Raises:
        UserError: a record cannot be rendered, or none of them has a token that counts.
    """
    assert plan.generation is not None
    tokens = encode(loaded.tokenizer, records.records, plan.generation.template, plan.data.max_length)
    silent = sum(not bool(one.counted.any()) for one in tokens)
    if silent == len(tokens):
        raise UserError(
            f"data: expected records with a token that counts within {plan.data.max_length} tokens, found none",
            hint="a larger data.max_length may help: the answer comes after its question",
        )
    if silent:
        log.warning("nothing to learn", plan=plan.name, records=silent, max_length=plan.data.max_length)
    return tokens


def seen_by(loaded: Loaded, plan: Plan, records: Records) -> Seen:
    """The records as :func:`participant.training.train` sees them; a record is an example, packed or not.

    Raises:
        UserError: a record cannot be rendered, none has a token that counts, or packing that this model cannot do.
    """
    assert plan.generation is not None
    width = plan.data.max_length if plan.generation.packing else None
    if width is not None:
        check_packing(loaded, width)
    tokens, pad = encoded(loaded, plan, records), loaded.tokenizer.pad_token_id

    def loss_of(chosen: list[int]) -> Tensor:
        said = say(loaded, lay_out([tokens[i] for i in chosen], pad, width))
        return said.losses.sum() / max(1, len(said.losses))

    def forward(batch: list[Tensor]) -> Tensor:
        return logits_of(loaded, lay_out([Tokens(ids, torch.zeros(len(ids), dtype=torch.bool)) for ids in batch], pad))

    return Seen([one.ids for one in tokens], loss_of, forward)


def private_losses(loaded: Loaded, tokens: Sequence[Tokens]) -> Callable[[Sequence[int]], Tensor]:
    """Positions in the data set -> (B,) mean loss of each record by itself, for ``participant/dp_step.py``.

    Padded, always: the gradient of a packed row would be that of several records. In float32, always: kernels in bf16
    give a record other gradients in other company.
    """

    def losses(chosen: Sequence[int]) -> Tensor:
        laid = lay_out([tokens[i] for i in chosen], loaded.tokenizer.pad_token_id)
        return record_losses(say(loaded, laid, bf16=False), len(chosen))

    return losses


def private_tokens(loaded: Loaded, plan: Plan, records: Records) -> list[Tokens]:
    """The records' tokens; how many of them have none that counts is told to nobody."""
    assert plan.generation is not None
    return encode(loaded.tokenizer, records.records, plan.generation.template, plan.data.max_length)


def synthetic(loaded: Loaded, lengths: Sequence[int]) -> list[Tokens]:
    """Records of random tokens from a public seed, of these lengths, all of which count."""
    generator = torch.Generator().manual_seed(SEED)
    size = min(len(loaded.tokenizer), loaded.model.config.vocab_size)
    found = []
    for length in lengths:
        counted = torch.ones(length, dtype=torch.bool)
        counted[0] = False
        found.append(Tokens(torch.randint(size, (length,), generator=generator), counted))
    return found


@dataclass(frozen=True)
class Foretold:
    """Counts rather than ratios, so that sites can add theirs up."""

    #: Tokens that count, those of them whose likeliest candidate was right, and the sum of their losses in nats.
    tokens: int
    right: int
    nats: float


def foretell(loaded: Loaded, tokens: Sequence[Tokens]) -> Foretold:
    """How well the model foretells the tokens that count; records of like length share a batch."""
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    count, right, nats, first = 0, 0, 0.0, 0
    with torch.inference_mode():
        while first < len(order):
            last = first + 1
            while last < len(order) and (last + 1 - first) * len(tokens[order[last]]) <= BATCH_TOKENS:
                last += 1
            said = say(loaded, lay_out([tokens[i] for i in order[first:last]], loaded.tokenizer.pad_token_id))
            count += len(said.losses)
            right += int(said.right.sum())
            nats += float(said.losses.double().sum())
            first = last
    return Foretold(count, right, nats)
