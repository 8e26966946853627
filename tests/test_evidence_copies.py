"""Which held-out texts count as copies, and that the bars are told without them."""

from __future__ import annotations

import numpy as np

from evidence.copies import alike, copied, without

TEXT = frozenset(range(20))


def test_texts_that_share_four_fifths_of_their_tokens_are_copies() -> None:
    assert alike(TEXT, TEXT | {20, 21, 22, 23, 24})
    assert not alike(TEXT, TEXT | {20, 21, 22, 23, 24, 25})


def test_a_copy_of_a_training_text_or_of_an_earlier_one_is_found_once() -> None:
    other, near = frozenset(range(100, 120)), TEXT | {20}
    assert copied([other, near, other, frozenset(range(200, 220))], [TEXT]) == [1, 2]
    assert copied([other, near], [frozenset(range(300, 320))]) == []


def test_records_are_left_out_of_every_seed() -> None:
    rest = without({0: np.array([1.0, 0.0, 1.0]), 1: np.array([0.0, 1.0, 1.0])}, [1])
    assert {seed: row.tolist() for seed, row in rest.items()} == {0: [1.0, 1.0], 1: [0.0, 1.0]}
