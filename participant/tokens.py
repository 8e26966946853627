"""Records as a causal language model sees them: token ids, and which of them it has to foretell.

Of a plain text every token counts. Of a conversation those count that the assistant says, the end of its turn included:
what a user says is nothing to learn to say. Which tokens these are is read off the chat template, by rendering the
conversation up to each answer; or from the template's own marks, where it has them (``{% generation %}``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor

from participant.text_data import Message, Record
from privacy.errors import UserError, shown

Template = Literal["model", "chatml", "none"]
Span = tuple[int, int]

#: ChatML as its first models had it, for base models without a template of their own. Its marks are plain text where a
#: tokenizer does not know them.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: With it a template says itself what the assistant generates.
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Tokens:
    """One record: ``counted[t]`` says whether token t is to be foretold from those before it; never so the first."""

    ids: Tensor  # (length,) int64
    counted: Tensor  # (length,) bool

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with the plan's template and length."""

    tokenizer: Any
    #: The chat template's text; None: prompt and response follow one another as they are.
    template: str | None
    max_length: int

    def tokens(self, record: Record) -> Tokens:
        """The record's tokens, cut at ``max_length``; a text or pair that was not cut ends with the end-of-sequence.

        Raises:
            UserError: a conversation without a template, or one that the template does not take; names the record.
        """
        if record.kind == "text":
            ids = list(self.tokenizer(record.text)["input_ids"])
            return self._ended(ids, [True] * len(ids))
        if self.template is None:
            if record.kind != "pair":
                raise UserError(
                    f"{record.where}: expected a prompt and a response, found a conversation, which needs a template",
                    hint='ask for a plan with generation.template = "model" or "chatml"',
                )
            prompt, response = (message.content for message in record.messages)
            whole = prompt + response
            return self._ended(*self._spanned(whole, [(len(prompt), len(whole))], special=True))
        if MARKED.search(self.template):
            return self._made(*self._marked(record))
        return self._made(*self._spanned(*self._rendered(record), special=False))

    def _ended(self, ids: list[int], counted: list[bool]) -> Tokens:
        end = self.tokenizer.eos_token_id
        if ids and ids[-1] == end:  # some tokenizers end every text themselves
            ids, counted = ids[:-1], counted[:-1]
        return self._made([*ids, end], [*counted, True])

    def _made(self, ids: Sequence[int], counted: Sequence[bool]) -> Tokens:
        foretold = [False, *counted[1 : self.max_length]]
        return Tokens(torch.tensor(ids[: self.max_length], dtype=torch.int64), torch.tensor(foretold))

    def _spanned(self, text: str, spans: Sequence[Span], *, special: bool) -> tuple[list[int], list[bool]]:
        """Token ids, and which tokens begin within one of the spans of characters."""
        found = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        inside = [
            end > begin and any(low <= begin < high for low, high in spans) for begin, end in found["offset_mapping"]
        ]
        return list(found["input_ids"]), inside

    def _rendered(self, record: Record) -> tuple[str, list[Span]]:
        """(the conversation as text, where the assistant speaks in it, without white space after the end of a turn)."""
        whole, spans = self._render(record, record.messages), []
        for turn, message in enumerate(record.messages):
            if message.role != "assistant":
                continue
            before = self._render(record, record.messages[:turn], ask=True)
            after = self._render(record, record.messages[: turn + 1])
            if not after.startswith(before) or not whole.startswith(after):
                raise UserError(
                    f"{record.where}: expected a chat template that renders a conversation turn by turn, found one "
                    "that changes earlier turns",
                    hint='take one that marks answers with {% generation %}, or generation.template = "chatml"',
                )
            spans.append((len(before), len(after.rstrip())))
        return whole, spans

    def _render(self, record: Record, messages: Sequence[Message], *, ask: bool = False) -> str:
        with _template_errors(record):
            return str(
                self.tokenizer.apply_chat_template(
                    _plain(messages), chat_template=self.template, tokenize=False, add_generation_prompt=ask
                )
            )

    def _marked(self, record: Record) -> tuple[list[int], list[bool]]:
        """Token ids and what counts of them, by the template's own marks."""
        with _template_errors(record):
            found = self.tokenizer.apply_chat_template(
                _plain(record.messages),
                chat_template=self.template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        return list(found["input_ids"]), [bool(inside) for inside in found["assistant_masks"]]


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


@contextmanager
def _template_errors(record: Record) -> Iterator[None]:
    """What a template says of a conversation it does not take may quote it, and is left out."""
    try:
        yield
    except TemplateError as error:
        turns = shown(", ".join(message.role for message in record.messages))
        raise UserError(
            f"{record.where}: expected a conversation that the chat template takes, found turns of: {turns}",
            hint="correct or remove the record, or ask for a plan with another generation.template",
        ) from error


def encoder(tokenizer: Any, template: Template, max_length: int) -> Encoder:
    """The tokenizer with the plan's template.

    Raises:
        UserError: the plan asks for the tokenizer's own chat template, and it has none.
    """
    if template != "model":
        return Encoder(tokenizer, CHATML if template == "chatml" else None, max_length)
    try:
        return Encoder(tokenizer, str(tokenizer.get_chat_template()), max_length)
    except ValueError as error:
        raise UserError(
            "model: expected a tokenizer with a chat template, found none",
            hint='ask for a plan with generation.template = "chatml", or "none" for pairs and texts',
        ) from error


def encode(tokenizer: Any, records: Iterable[Record], template: Template, max_length: int) -> list[Tokens]:
    """The tokens of each record, see :meth:`Encoder.tokens`."""
    found = encoder(tokenizer, template, max_length)
    return [found.tokens(record) for record in records]
