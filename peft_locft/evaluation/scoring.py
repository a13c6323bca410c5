"""How an answer is scored: pure functions of texts and tokens, each the protocol that its source publishes."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..engine.questions import STOPS
from .intervals import Array

ARTICLES = re.compile(r"\b(a|an|the)\b")
WORDS = re.compile(r"\w+|[^\w\s]")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def cut_answer(text: str, num_stops: int = 1, stops: Sequence[str] = STOPS) -> str:
    """Cut what a model has generated at a stop, which is left out.

    The released evaluation of LocFT-BF (arXiv 2509.22072, `eval_edit_metric.py`) generates at most 32 tokens greedily
    and ends at the first `"."`, line break or EOS; an answer that begins with a line break is empty.

    Args:
        text: generated text, without special tokens.
        num_stops: cut at the first, the second, … stop; at the text's end if there are fewer.
        stops: single characters.
    """
    places = [place for place, letter in enumerate(text) if letter in stops]
    return text[: places[num_stops - 1]] if len(places) >= num_stops else text


def normalise(text: str) -> str:
    """Normalise a text as SQuAD's evaluation does: lower case, no ASCII punctuation, no articles, single spaces.

    A text of which that leaves nothing ("The") is taken as it is, in lower case: an empty answer is not equal to it.

    Example:
        >>> normalise(" The Beatles!")
        'beatles'
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()) or text.lower().strip()


def exact_match(answer: str, expected: str) -> bool:
    """Whether two texts are equal when normalised."""
    return normalise(answer) == normalise(expected)


def contains(answer: str, expected: str) -> bool:
    """Whether the normalised answer is the normalised expected text, or has it in it as whole words."""
    return f" {normalise(expected)} " in f" {normalise(answer)} "


def same_first_word(answer: str, other: str) -> bool:
    """Whether two texts begin with the same normalised word, or are both empty."""
    return normalise(answer).split()[:1] == normalise(other).split()[:1]


def token_accuracy(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Return the share of tokens that greedy decoding would say, each given the right ones before it.

    EasyEdit's `rewrite_acc`, `rephrase_acc` and `portability_acc`.

    Args:
        predicted: the most probable token at each position.
        expected: as many.
    """
    return sum(one == other for one, other in zip(predicted, expected, strict=True)) / len(expected)


def is_more_probable(wanted: Sequence[float], other: Sequence[float]) -> bool:
    """Whether a continuation is more probable than another, by the mean log p of its tokens (Meng et al. 2022).

    Args:
        wanted: log p of each of its tokens.
        other: log p of each of the other's.
    """
    return sum(wanted) / len(wanted) > sum(other) / len(other)


def harmonic_mean(shares: Array) -> Array:
    """Return the harmonic mean over the last axis, 0 where a share is 0; of ES, PS and NS it is the edit score.

    Args:
        shares: (…, n), from 0 to 1.

    Returns:
        (…).
    """
    with np.errstate(divide="ignore"):
        return np.asarray(shares.shape[-1] / (1 / shares).sum(axis=-1))


def n_gram_entropy(text: str) -> float | None:
    """Return the fluency of a text: the weighted entropy of its words' 2-grams and 3-grams, in bits.

    2/3 · H(2-grams) / 2 + 4/3 · H(3-grams) / 2 (Meng et al. 2022, "generation entropy"): a text that repeats itself
    has little of it. Words are runs of letters and digits, and single marks.

    Returns:
        `None` for fewer than 3 words, which have no 3-gram.
    """
    words = WORDS.findall(text)
    if len(words) < 3:
        return None
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values())
