"""Which tokens of a record count, under every template."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from participant.text_data import Message, Record
from participant.tokens import CHATML, Template, Tokens, encode, encoder
from privacy.errors import UserError
from tests.helpers_text import END, START, TEMPLATE, conversation, pair, plain, tiny_tokenizer

#: A template that says itself what is generated, and changes earlier turns: they lose their last letter.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] if loop.last else m['content'][:-1] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}"
    "<|im_end|>{% endif %}\n{% endfor %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TALK = conversation("Hi?", "Hello", "And?", "Bye")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def one(tokenizer: Any, record: Record, template: Template = "model", max_length: int = 999) -> Tokens:
    (found,) = encode(tokenizer, [record], template, max_length)
    assert found.ids.shape == found.counted.shape == (len(found),)
    return found


def whole(tokenizer: Any, tokens: Tokens) -> str:
    return str(tokenizer.decode(tokens.ids))


def counted(tokenizer: Any, tokens: Tokens) -> str:
    """What counts, a bar between stretches of it."""
    stretches: list[list[int]] = [[]]
    for token, counts in zip(tokens.ids.tolist(), tokens.counted.tolist(), strict=True):
        if counts:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return "|".join(tokenizer.decode(stretch) for stretch in stretches if stretch)


def test_of_a_conversation_the_assistants_turns_count_with_their_ends(tokenizer: Any) -> None:
    found = one(tokenizer, TALK)
    assert whole(tokenizer, found) == (
        f"{START}system\nBe kind{END}\n{START}user\nHi?{END}\n{START}assistant\nHello{END}\n"
        f"{START}user\nAnd?{END}\n{START}assistant\nBye{END}\n"
    )
    assert counted(tokenizer, found) == f"Hello{END}|Bye{END}"


def test_a_pair_is_a_turn_of_each_under_a_template(tokenizer: Any) -> None:
    assert (
        one(tokenizer, pair("Hi?", "Hello")).ids.tolist() == one(tokenizer, conversation("Hi?", "Hello")).ids.tolist()
    )
    assert counted(tokenizer, one(tokenizer, pair("Hi?", "Hello"))) == f"Hello{END}"


def test_what_is_asked_for_counts_where_a_model_has_to_go_on(tokenizer: Any) -> None:
    """The first token that counts is foretold from the very tokens that a user of the model would send."""
    found = one(tokenizer, conversation("Hi?", "Hello"))
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi?"}], tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    first = found.counted.tolist().index(True)
    assert found.ids[:first].tolist() == asked


def test_of_a_plain_text_all_counts_but_the_first_token_and_it_ends(tokenizer: Any) -> None:
    for template in ("model", "chatml", "none"):
        found = one(tokenizer, plain("Once upon"), template)
        assert whole(tokenizer, found) == f"Once upon{END}"
        assert counted(tokenizer, found) == f"nce upon{END}"


def test_without_a_template_the_response_follows_its_prompt(tokenizer: Any) -> None:
    found = one(tokenizer, pair("2 + 2 = ", "4"), "none")
    assert whole(tokenizer, found) == f"2 + 2 = 4{END}"
    assert counted(tokenizer, found) == f"4{END}"
    with pytest.raises(UserError, match="here: expected a prompt and a response, found a conversation") as caught:
        one(tokenizer, TALK, "none")
    assert caught.value.hint


def test_chatml_is_the_same_whatever_the_model_has() -> None:
    for own in (None, TEMPLATE):
        tokenizer = tiny_tokenizer(own)
        found = one(tokenizer, TALK, "chatml")
        assert whole(tokenizer, found).startswith(f"{START}user\nHi?{END}\n{START}assistant\nHello")
        assert counted(tokenizer, found) == f"Hello{END}|Bye{END}"
        assert encoder(tokenizer, "chatml", 9).template == CHATML


def test_a_model_without_a_template_of_its_own_is_named() -> None:
    with pytest.raises(UserError, match="expected a tokenizer with a chat template, found none") as caught:
        one(tiny_tokenizer(None), TALK)
    assert "chatml" in caught.value.hint


def test_a_template_that_marks_answers_is_taken_at_its_word() -> None:
    tokenizer = tiny_tokenizer(MARKED)
    found = one(tokenizer, TALK)
    assert f"assistant\nHell{END}" in whole(tokenizer, found)
    assert counted(tokenizer, found) == f"Hell{END}|Bye{END}"


def test_a_template_that_changes_earlier_turns_is_refused_without_marks() -> None:
    with pytest.raises(UserError, match="here: expected a chat template that renders a conversation turn by turn"):
        one(tiny_tokenizer(UNMARKED), TALK)


def test_a_conversation_that_a_template_refuses_is_named_and_not_shown() -> None:
    refusing = "{% if messages[0]['role'] != 'user' %}{{ raise_exception(messages[0]['content']) }}{% endif %}"
    record = Record("data, line 7", "conversation", (Message("system", "secret"), Message("assistant", "x")))
    with pytest.raises(UserError, match="data, line 7: expected a conversation that the chat template takes") as caught:
        one(tiny_tokenizer(refusing), record)
    assert "turns of: system, assistant" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_what_is_longer_is_cut_and_has_no_end(tokenizer: Any) -> None:
    found = one(tokenizer, plain("Once upon"), max_length=4)
    assert (whole(tokenizer, found), counted(tokenizer, found)) == ("Once", "nce")
    found = one(tokenizer, conversation("Hi?", "Hello"), max_length=8)
    assert len(found) == 8
    assert not found.counted.any()


def test_letters_of_several_tokens_count_as_a_whole(tokenizer: Any) -> None:
    found = one(tokenizer, conversation("ü?", "für"))
    assert counted(tokenizer, found) == f"für{END}"
    assert int(found.counted.sum()) == len("für".encode()) + 1


def test_a_tokenizer_that_begins_every_text_with_a_mark_keeps_it() -> None:
    tokenizer = tiny_tokenizer()
    first = tokenizer.convert_tokens_to_ids(START)
    processor = TemplateProcessing(single=f"{START} $A", special_tokens=[(START, first)])
    tokenizer.backend_tokenizer.post_processor = processor
    assert counted(tokenizer, one(tokenizer, plain("Once"))) == f"Once{END}"
    assert one(tokenizer, pair("2 = ", "2"), "none").ids[0] == first
    assert whole(tokenizer, one(tokenizer, conversation("Hi?", "x"), "chatml")).count(START) == 2


def test_a_tokenizer_that_ends_every_text_itself_ends_it_once() -> None:
    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids(END)
    processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
    tokenizer.backend_tokenizer.post_processor = processor
    for record, said in ((plain("Once"), f"nce{END}"), (pair("2 = ", "2"), f"2{END}")):
        found = one(tokenizer, record, "none")
        assert found.ids.tolist().count(end) == 1
        assert counted(tokenizer, found) == said
