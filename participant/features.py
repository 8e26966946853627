"""Training the head alone: what the frozen model says of each text is computed once, and seen in a better light.

The inputs of a head mostly point one way, whatever the text: of all-MiniLM's, four fifths of the length is their common
mean. With noise on every coordinate and a bound on every gradient that costs most of what there is to learn. So private
training sees them shifted and scaled, f = (x - mean) / deviation, both taken from **public** text: the plan's labels
and random words. No record has a part in it, so it costs no privacy; and since W f + b is linear in x, the trained head
is an ordinary head again (:func:`leave`), which sums and loads like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from participant.training import Loaded, logits_of, tokenise
from privacy.plan import Plan

#: Of the random words; public.
SEED = 2026
RANDOM_TEXTS, RANDOM_WORDS = 32, 32


@dataclass(frozen=True)
class Standard:
    """A head that is trained on f = (x - mean) / deviation instead of on x itself."""

    head: torch.nn.Linear
    #: (width,), of the head's inputs on public text.
    mean: Tensor
    #: One number for all coordinates: their root mean square off the mean.
    deviation: float


def random_texts(loaded: Loaded, count: int, words: Sequence[int], longest: int) -> list[Tensor]:
    """Token ids of ``count`` texts of random words from a public seed; the k-th has about ``words[k]`` tokens."""
    generator = torch.Generator().manual_seed(SEED)
    size = min(len(loaded.tokenizer), loaded.model.config.vocab_size)
    special = set(loaded.tokenizer.all_special_ids)
    usable = [i for i in range(size) if i not in special]
    drawn = [torch.randint(len(usable), (words[k],), generator=generator).tolist() for k in range(count)]
    texts = tuple(loaded.tokenizer.decode([usable[i] for i in ids]) for ids in drawn)
    return tokenise(loaded.tokenizer, texts, longest)


def trained_head(loaded: Loaded) -> torch.nn.Linear | None:
    """The linear layer that is trained alone; None if that is not so."""
    trained = [m for m in loaded.model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    head = trained[0] if len(trained) == 1 else None
    return head if isinstance(head, torch.nn.Linear) else None


def standard_of(loaded: Loaded, plan: Plan) -> Standard | None:
    """How a head that is trained alone sees its inputs; None for any other model or plan."""
    head = trained_head(loaded)
    if head is None or head.bias is None:
        return None
    longest = plan.data.max_length
    texts = tokenise(loaded.tokenizer, plan.data.labels, longest) if plan.data.labels else []
    texts += random_texts(loaded, RANDOM_TEXTS, [RANDOM_WORDS] * RANDOM_TEXTS, longest)
    seen = inputs_of(head, loaded, texts)
    if seen is None:
        return None
    mean = seen.mean(0)
    deviation = float((seen - mean).square().mean().sqrt())
    return Standard(head, mean, deviation) if deviation > 0 else None


def inputs_of(head: torch.nn.Linear, loaded: Loaded, texts: Sequence[Tensor]) -> Tensor | None:
    """(count, width) what a head sees of each text; None if the logits are not simply what the head says of it.

    One text at a time and unpadded: in other company a text would get other low bits, and one record more or less would
    change what is seen of those after it.
    """
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        with torch.no_grad():
            for text in texts:
                logits = logits_of(loaded, [text])
                if seen[-1].dim() != 2 or not _same(head.forward(seen[-1]).float(), logits):
                    return None
    finally:
        handle.remove()
    return torch.cat(seen)


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit, NaN to NaN: a record that is not finite must not end the job, which would tell of it."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def standardised(standard: Standard, loaded: Loaded, texts: Sequence[Tensor]) -> Tensor:
    """(count, width) f of each text."""
    seen = inputs_of(standard.head, loaded, texts)
    assert seen is not None, "the head saw the public texts, and sees no others"
    return (seen - standard.mean) / standard.deviation


def enter(standard: Standard | None) -> None:
    """Rewrite the head, in place, so that it says of f what it said of x."""
    if standard is not None:
        with torch.no_grad():
            standard.head.bias.add_(standard.head.weight @ standard.mean)
            standard.head.weight.mul_(standard.deviation)


def leave(standard: Standard | None) -> None:
    """The inverse of :func:`enter`: the head says of x what it said of f."""
    if standard is not None:
        with torch.no_grad():
            standard.head.weight.div_(standard.deviation)
            standard.head.bias.sub_(standard.head.weight @ standard.mean)
