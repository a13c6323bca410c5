"""Texts and tokens scored by hand, by each published protocol."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peft_locft import Edit, Probe
from peft_locft.evaluation.items import Reply, eval_items
from peft_locft.evaluation.metrics import METRICS
from peft_locft.evaluation.scoring import (
    contains,
    cut_answer,
    exact_match,
    harmonic_mean,
    is_more_probable,
    n_gram_entropy,
    normalise,
    same_first_word,
    token_accuracy,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Lyon. It lies", " Lyon"),
        ("Lyon\nIt lies", "Lyon"),
        ("Lyon, in France", "Lyon, in France"),
        ("\n\nLyon", ""),
        (".", ""),
        ("St. Louis", "St"),
        ("", ""),
    ],
)
def test_an_answer_ends_at_the_first_full_stop_or_line_break(text: str, expected: str) -> None:
    assert cut_answer(text) == expected


def test_an_answer_is_cut_behind_the_stops_that_the_target_has() -> None:
    assert cut_answer("St. Louis. It lies", 2) == "St. Louis"
    assert cut_answer("St. Louis", 2) == "St. Louis"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" The  Beatles!", "beatles"),
        ("a band", "band"),
        ("an apple and the pear", "apple and pear"),
        ("U.S.A.", "usa"),
        ("Theory of Anything", "theory of anything"),  # articles are words, not beginnings of words
        ("rock-'n'-roll", "rocknroll"),
        ("The", "the"),  # nothing would be left, and an empty answer would be right
        ("A.", "a."),
        ("", ""),
    ],
)
def test_texts_are_normalised_as_by_squad(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "target", "is_equal", "is_in"),
    [
        (" the Sega", "Sega", True, True),
        ("Sega of America", "Sega", False, True),
        ("Segafredo", "Sega", False, False),
        ("", "Sega", False, False),
        ("", "The", False, False),
        ("the", "The", True, True),
        ("St", "St. Louis", False, False),
        ("St Louis!", "St. Louis", True, True),
    ],
)
def test_exact_match_and_contains(answer: str, target: str, is_equal: bool, is_in: bool) -> None:
    assert exact_match(answer, target) is is_equal
    assert contains(answer, target) is is_in


def test_first_words_are_compared_normalised() -> None:
    assert same_first_word("The Nile, in Egypt", "nile")
    assert same_first_word("", "")
    assert not same_first_word("", "Nile")


def test_token_accuracy_is_a_share_of_positions() -> None:
    assert token_accuracy([5, 6, 7], [5, 9, 7]) == pytest.approx(2 / 3)


def test_probabilities_are_compared_by_the_mean_over_tokens() -> None:
    # the sum would say otherwise: -3 against -2
    assert is_more_probable([-1.0, -1.0, -1.0], [-2.0])
    assert not is_more_probable([-1.0], [-1.0])


def test_the_harmonic_mean_is_zero_where_a_share_is() -> None:
    assert harmonic_mean(np.array([1.0, 0.5, 0.25])) == pytest.approx(3 / 7)
    assert harmonic_mean(np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])).tolist() == [0.0, 1.0]


def test_fluency_is_a_weighted_entropy_of_n_grams() -> None:
    # "a b a b": 2-grams ab ba ab, 3-grams aba bab
    two = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert n_gram_entropy("a b a b") == pytest.approx((2 / 3 * two + 4 / 3 * 1.0) / 2)
    assert n_gram_entropy("no no no no no") == 0.0
    assert n_gram_entropy("two words") is None


# ---------------------------------------------------------------------- several right answers

SEVERAL = Edit(
    "Who won?",
    "St. Ann of Hull",
    aliases=("Ann",),
    rephrasings=("The winner is",),
    locality=(Probe("Who lost?", "Bo", aliases=("Robert", "Bob B. Ek")),),
    portability=(Probe("Where was the winner born?", "Cork", aliases=("Corcaigh",)), Probe("When?")),
)


def scores(metric: str, replies: list[Reply]) -> list[float | None]:
    items = eval_items([SEVERAL])
    return [METRICS[metric].score(item, reply, None) for item, reply in zip(items, replies, strict=True)]


def test_every_kind_of_item_takes_any_right_answer() -> None:
    items = eval_items([SEVERAL])
    replies = ("ann", "Ann", "robert", "Corcaigh", "1990")
    assert scores("exact_match", [Reply(text=text) for text in replies]) == [1.0, 1.0, 1.0, 1.0, None]
    longer = ("It was Ann, I think", "Cy", "It was Bob B. Ek", "in Corcaigh, Ireland", "1990")
    assert scores("contains", [Reply(long_text=text) for text in longer]) == [1.0, 0.0, 1.0, 1.0, None]
    assert METRICS["exact_match"].score(items[0], Reply(text="Annabel"), None) == 0.0
    # an answer is cut behind as many stops as the longest right answer has
    assert [item.num_stops for item in items] == [2, 2, 2, 1, 1]
    assert [item.right_answers for item in items[2:]] == [("Bo", "Robert", "Bob B. Ek"), ("Cork", "Corcaigh"), ()]
