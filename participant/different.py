"""Which texts of a site are different: those of which the model sees something different.

A minimum of texts is there because everybody learns sums over them, and a sum over one text alone is a multiple of its
features, however often the text is there. So what counts is what the model is given, the token ids: spellings that its
tokenizer does not tell apart, be it in case, white space or words it does not know, give the same features, and so do
texts that differ only behind the plan's ``max_length``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from participant.data import Examples
from participant.registry import normalised
from participant.task_data import TaskData
from participant.text_data import Records
from privacy.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

#: Texts that are tokenised at once: who has seen enough different ones need not wait for the others.
STEP = 1024


def keys_of(texts: Iterable[Tensor]) -> Iterator[bytes]:
    """The token ids of each text, as something that a set takes."""
    return (text.numpy().tobytes() for text in texts)


def seen_of(plan: Plan, base: Path, examples: TaskData) -> Iterator[bytes]:
    """What the model sees of each record, in their order, computed as it is asked for; equal for the same token ids.

    That the base model is the plan's is checked when it is loaded, before it says anything of a record. Of text
    generation all of a record counts, whoever says it.

    Raises:
        UserError: no tokenizer in ``base``, or a record that the plan's template does not take.
    """
    # torch takes seconds to import, and most who import this module need none.
    from participant.loading import load_tokenizer, tokenizer_for_classes
    from participant.tokens import encoder
    from participant.training import tokenise

    longest = plan.data.max_length
    if isinstance(examples, Records):
        assert plan.generation is not None
        encoded = encoder(load_tokenizer(base), plan.generation.template, longest)
        yield from keys_of(encoded.tokens(record).ids for record in examples.records)
        return
    tokenizer = tokenizer_for_classes(base)
    for first in range(0, len(examples), STEP):
        yield from keys_of(tokenise(tokenizer, examples.texts[first : first + STEP], longest))


def looks_of(texts: Iterable[str]) -> Iterator[str]:
    """The same without a tokenizer, by how texts look.

    Case and white space count for nothing here; a tokenizer that tells them apart would find more texts, so this errs
    on the safe side. It cannot know where a text is cut off, nor which words the model does not know: whoever has the
    base model asks :func:`seen_of`.
    """
    return map(normalised, texts)


def texts_by_label(examples: Examples, seen: Iterable[Hashable]) -> Counter[int]:
    """How many different texts each label has; ``seen`` says of each record which text it is."""
    return Counter(label for _, label in set(zip(seen, examples.labels, strict=True)))
