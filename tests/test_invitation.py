"""Invitations as text, and fingerprints as words."""

from __future__ import annotations

import pytest

from privacy.errors import ProtocolError, UserError
from privacy.invitation import MAX_TOKEN, PREFIX, Invitation, read_token
from privacy.words import fingerprint, in_words

SECRET = bytes(range(32))
INVITATION = Invitation("newsrooms", "north", 2_000_000_000, b"certificate", SECRET)


def test_an_invitation_comes_back_from_its_token_even_in_several_lines() -> None:
    token = INVITATION.token()
    assert token.startswith(PREFIX)
    assert read_token(token) == INVITATION
    assert read_token(f"  {token[:40]}\n{token[40:]}\n") == INVITATION


def test_the_secret_does_not_print() -> None:
    assert SECRET.hex() not in repr(INVITATION)
    assert repr(SECRET) not in repr(INVITATION)


@pytest.mark.parametrize("at", [len(PREFIX), len(PREFIX) + 20, -12, -1])
def test_a_mistyped_character_is_noticed(at: int) -> None:
    token = list(INVITATION.token())
    token[at] = "A" if token[at] != "A" else "Q"
    with pytest.raises(UserError, match="one that was cut or changed"):
        read_token("".join(token))


def test_a_cut_token_is_noticed() -> None:
    token = INVITATION.token()
    for length in range(len(PREFIX), len(token)):
        with pytest.raises(UserError, match="one that was cut or changed"):
            read_token(token[:length])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "that begins with"),
        ("hello", "that begins with"),
        (PREFIX, "cut or changed"),
        (PREFIX + "ä", "cut or changed"),
        (PREFIX + "A" * MAX_TOKEN, f"at most {MAX_TOKEN} characters"),
    ],
)
def test_what_is_no_token(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        read_token(text)
    assert "veilsum-coordinator invite" in caught.value.hint


def test_a_secret_of_another_length_is_refused() -> None:
    with pytest.raises(ProtocolError, match="a secret of 32 bytes, found 31"):
        Invitation("f", "north", 0, b"", SECRET[1:])


# --- words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [  # test vectors of BIP-39 (trezor/python-mnemonic, vectors.json)
        ("00" * 16, "abandon " * 11 + "about"),
        ("7f" * 16, "legal winner thank year wave sausage worth useful legal winner thank yellow"),
        ("80" * 16, "letter advice cage absurd amount doctor acoustic avoid letter advice cage above"),
        ("ff" * 16, "zoo " * 11 + "wrong"),
        ("00" * 32, "abandon " * 23 + "art"),
        (
            "7f" * 32,
            "legal winner thank year wave sausage worth useful legal winner thank year wave sausage worth useful "
            "legal winner thank year wave sausage worth title",
        ),
        ("ff" * 32, "zoo " * 23 + "vote"),
    ],
)
def test_words_are_those_of_bip_39(value: str, words: str) -> None:
    assert in_words(bytes.fromhex(value)) == words


def test_a_fingerprint_is_twelve_words_and_changes_with_every_bit() -> None:
    found = {fingerprint((1 << bit).to_bytes(32, "big")) for bit in range(256)}
    assert len(found) == 256
    assert all(len(words.split()) == 12 for words in found)
