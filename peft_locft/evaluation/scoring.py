"""Scores of an answer: pure functions of texts and tokens, each as its source publishes it."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
import regex

from ..data.scripts import EAST, SOUTH, SPACELESS, find_word, words
from ..engine.questions import STOPS
from .intervals import Array

ARTICLES = regex.compile(r"\b(?:a|an|the)\b")
OTHER_THAN_LATIN = regex.compile(r"(?V1)[\p{L}--\p{Latin}]")
PUNCTUATION = regex.compile(r"[\p{P}\p{S}]+")
# NFKC would make letters, or a space, of these
SIGNS = regex.compile(r"[\p{Sk}™℠]+")
# not seen or without meaning: joiners, marks of direction, soft hyphens, and tatweel, which stretches Arabic words
INVISIBLE = regex.compile(r"[\p{Default_Ignorable_Code_Point}\u0640]+")
INNER_SPACE = regex.compile(rf"(?V1)(?<={SPACELESS})\s+(?={SPACELESS})")
TURKISH_I = regex.compile("[ıİ]|I\u0307")
# endings that Turkish writes behind the apostrophe of a name
TURKISH_ENDING = regex.compile(
    r"(?<=\p{L})['’](?=(?:n?[ıiuü]n|[ny]?[ıiuü]|[ny]?[ae]|[dt][ae]n?|[dt][ıiuü]r|y?l[ae])(?!\p{L}))"
)
FIRST_WORD = regex.compile(
    rf"(?V1)[\p{{Katakana}}ー]+|(?:(?={EAST})\X){{1,2}}|(?:(?={SOUTH})\X){{1,3}}|[\S--{SPACELESS}]+"
)


def cut_answer(text: str, num_stops: int = 1, stops: regex.Pattern[str] = STOPS) -> str:
    """Return generated text up to a stop, without the stop.

    The released evaluation of LocFT-BF (arXiv 2509.22072, `eval_edit_metric.py`) generates at most 32 tokens greedily
    and ends at the first `"."`, line break or EOS; an answer that begins with a line break is empty. The full stops of
    other scripts end an answer in the same way: "。", "।", "۔".

    Args:
        text: generated text, without special tokens.
        num_stops: number of the stop to cut at, from 1; a text with fewer stops is not cut.
        stops: a pattern of single characters.
    """
    places = [match.start() for match in stops.finditer(text)]
    return text[: places[num_stops - 1]] if len(places) >= num_stops else text


def normalise(text: str) -> str:
    """Normalise a text as SQuAD's evaluation does: lower case, no punctuation, no articles, single spaces.

    For other languages than English the rules are Unicode's: NFKC, which makes full-width letters plain; full case
    folding; punctuation and symbols of all scripts; digits of all scripts as 0 to 9; no invisible characters. Accents
    and vowel signs stay. Only a text all in Latin letters loses the articles, which are English ones, and letters of
    scripts without spaces have none between them.

    If nothing is left ("The"), the text is only lower-cased, so that an empty answer does not equal it.

    Example:
        >>> normalise(" The Beatles!"), normalise("ＡＢＣ、マドリード。")
        ('beatles', 'abcマドリード')
    """
    return _normalised(text, is_turkish=_is_turkish(text))


def _normalised(text: str, is_turkish: bool) -> str:
    folded = _folded(text, is_turkish)
    plain = PUNCTUATION.sub("", folded)
    if not OTHER_THAN_LATIN.search(plain):
        plain = ARTICLES.sub(" ", plain)
    return INNER_SPACE.sub("", " ".join(plain.split())) or folded.strip()


def _folded(text: str, is_turkish: bool) -> str:
    """Return a text in lower case, in the form in which equal texts are the same characters."""
    if text.isascii():
        return text.replace("I", "ı").lower() if is_turkish else text.lower()
    plain = INVISIBLE.sub("", unicodedata.normalize("NFKC", SIGNS.sub("", text)))
    if is_turkish:
        plain = plain.replace("İ", "i").replace("I", "ı")
    plain = "".join(str(unicodedata.decimal(each)) if each.isdecimal() else each for each in plain.casefold())
    return unicodedata.normalize("NFKC", plain)


def _is_turkish(*texts: str) -> bool:
    """Return whether texts have a dotted capital or a dotless small i, so that "I" is the capital of "ı"."""
    return any(TURKISH_I.search(text) for text in texts)


def _both(one: str, other: str) -> tuple[str, str]:
    is_turkish = _is_turkish(one, other)
    return _normalised(one, is_turkish), _normalised(other, is_turkish)


def exact_match(answer: str, expected: str) -> bool:
    """Return whether two texts are equal after normalisation."""
    one, other = _both(answer, expected)
    return one == other


def contains(answer: str, expected: str) -> bool:
    """Return whether the normalised answer contains the normalised expected text as whole words.

    In scripts without spaces every letter may begin a word, since telling words apart would need a dictionary.
    Particles and endings that Korean writes behind a name, and Turkish behind its apostrophe, may follow.
    """
    return any(_is_in(text, expected) for text in dict.fromkeys([answer, TURKISH_ENDING.sub(" ", answer)]))


def _is_in(answer: str, expected: str) -> bool:
    one, other = _both(answer, expected)
    return find_word(one, other) is not None if other else not one


def begins_with(answer: str, expected: str) -> bool:
    """Return whether the normalised answer begins with the normalised expected text, as whole words."""
    one, other = _both(answer, expected)
    return find_word(one, other) == 0 if other else not one


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
    if len(choice) > 1:
        is_turkish = _is_turkish(choice, answer)
        choice, answer = _folded(choice, is_turkish), _folded(answer, is_turkish)
    return find_word(answer, choice)


def same_first_word(answer: str, other: str) -> bool:
    """Return whether two texts begin with the same normalised word, or are both empty.

    In scripts without spaces, the first letters stand for the first word: two in Chinese and Japanese, a whole run of
    Katakana, three in Thai and its neighbours. A letter has its marks with it (Unicode's grapheme cluster).
    """
    one, another = (FIRST_WORD.match(text) for text in _both(answer, other))
    return (one and one[0]) == (another and another[0])


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
    itself. Words are those of `data.scripts.words`: in scripts without spaces, each letter is one.

    Returns:
        `None` for a text of fewer than 3 words.
    """
    found = words(text)
    if len(found) < 3:
        return None
    return (2 / 3 * _entropy(found, 2) + 4 / 3 * _entropy(found, 3)) / 2


def _entropy(found: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(found[start:] for start in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values())
