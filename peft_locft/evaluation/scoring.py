"""Scores of an answer: pure functions of texts and tokens, each as its source publishes it."""

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
    """Return generated text up to a stop, without the stop.

    The released evaluation of LocFT-BF (arXiv 2509.22072, `eval_edit_metric.py`) generates at most 32 tokens greedily
    and ends at the first `"."`, line break or EOS; an answer that begins with a line break is empty.

    Args:
        text: generated text, without special tokens.
        num_stops: number of the stop to cut at, from 1; a text with fewer stops is not cut.
        stops: single characters.
    """
    places = [place for place, letter in enumerate(text) if letter in stops]
    return text[: places[num_stops - 1]] if len(places) >= num_stops else text


def normalise(text: str) -> str:
    """Normalise a text as SQuAD's evaluation does: lower case, no ASCII punctuation, no articles, single spaces.

    If nothing is left ("The"), the text is only lower-cased, so that an empty answer does not equal it.

    Example:
        >>> normalise(" The Beatles!")
        'beatles'
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()) or text.lower().strip()


def exact_match(answer: str, expected: str) -> bool:
    """Return whether two texts are equal after normalisation."""
    return normalise(answer) == normalise(expected)


def contains(answer: str, expected: str) -> bool:
    """Return whether the normalised answer contains the normalised expected text as whole words."""
    return f" {normalise(expected)} " in f" {normalise(answer)} "


def first_choice(answer: str, choices: Sequence[str]) -> str | None:
    """Return the choice that an answer names first; of two that begin there, the longer one; `None` without one.

    Case does not count, except for a choice of one letter, which is "A" and not the article.

    Example:
        >>> first_choice("It is no city, yes?", ["Yes", "No"])
        'No'
    """
    found = [(place, -len(choice), choice) for choice in choices if (place := _place_of(choice, answer)) is not None]
    return min(found)[2] if found else None


def _place_of(choice: str, answer: str) -> int | None:
    # a letter of a script without case may stand next to another word
    edges = [r"(?<!\w)" if choice[0].lower() != choice[0].upper() or choice[0].isdigit() else ""]
    edges += [r"(?!\w)" if choice[-1].lower() != choice[-1].upper() or choice[-1].isdigit() else ""]
    match = re.search(re.escape(choice).join(edges), answer, 0 if len(choice) == 1 else re.IGNORECASE)
    return None if match is None else match.start()


def same_first_word(answer: str, other: str) -> bool:
    """Return whether two texts begin with the same normalised word, or are both empty."""
    return normalise(answer).split()[:1] == normalise(other).split()[:1]


def token_accuracy(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Return the share of tokens that the model predicts, each given the right tokens before it.

    EasyEdit's `rewrite_acc`, `rephrase_acc` and `portability_acc`.

    Args:
        predicted: the most probable token at each position.
        expected: the right token at each position.
    """
    return sum(one == other for one, other in zip(predicted, expected, strict=True)) / len(expected)


def is_more_probable(expected: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether a text is more probable than another, by the mean log p of its tokens (Meng et al. 2022).

    Args:
        expected: log p of each of its tokens.
        other: log p of each token of the other text.
    """
    return sum(expected) / len(expected) > sum(other) / len(other)


def harmonic_mean(shares: Array) -> Array:
    """Return the harmonic mean over the last axis; 0 if a share is 0. The edit score is that of ES, PS and NS.

    Args:
        shares: (…, n), from 0 to 1.

    Returns:
        (…).
    """
    with np.errstate(divide="ignore"):
        return np.asarray(shares.shape[-1] / (1 / shares).sum(axis=-1))


def n_gram_entropy(text: str) -> float | None:
    """Return the fluency of a text: the weighted entropy of its words' 2-grams and 3-grams, in bits.

    2/3 · H(2-grams) / 2 + 4/3 · H(3-grams) / 2 (Meng et al. 2022, "generation entropy"); low for a text that repeats
    itself. A word is a run of letters and digits, or a single other character.

    Returns:
        `None` for a text of fewer than 3 words.
    """
    words = WORDS.findall(text)
    if len(words) < 3:
        return None
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values())
