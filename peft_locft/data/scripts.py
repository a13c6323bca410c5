"""Unicode's rules for the world's scripts: which write spaces between words, what a word is, how a sentence ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import regex

# Scripts written without spaces between words: their letters, marks and numbers, not the punctuation that scripts
# share, nor accents, which belong to the letter before them.
_OWN = r"[[\p{L}\p{M}\p{N}]--\p{Inherited}]"
EAST = rf"[[\p{{scx=Han}}\p{{scx=Hiragana}}\p{{scx=Katakana}}\p{{scx=Bopomofo}}\p{{scx=Yi}}]&&{_OWN}]"
SOUTH = (  # a space stands between phrases, and beside words and numbers of other scripts
    r"[[\p{scx=Thai}\p{scx=Lao}\p{scx=Khmer}\p{scx=Myanmar}\p{scx=Tibetan}\p{scx=Tai_Le}\p{scx=New_Tai_Lue}"
    rf"\p{{scx=Tai_Tham}}\p{{scx=Tai_Viet}}\p{{scx=Javanese}}\p{{scx=Balinese}}]&&{_OWN}]"
)
SPACELESS = f"[{EAST}{SOUTH}]"
SPACED = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--{SPACELESS}]"
JOINERS = "\u200c\u200d"  # inside words of Persian, Hindi and others

# particles and the copula, which Korean writes behind a name
KOREAN_ENDINGS = (
    r"(?:에서|에게|으로|까지|부터|처럼|보다|은|는|이|가|을|를|의|에|로|와|과|도|만|인|임"
    r"|이?라고|이?라는|이?라|이?며|이?고|이?다|이?요|이야|예요|이에요|입니다|이?었습니다|였습니다|이?었다|였다){1,2}"
)
_WORD_BEGIN = regex.compile(rf"(?V1)(?<!{SPACED})|(?={SPACELESS})|(?<={SPACELESS})")
_WORD_END = regex.compile(
    rf"(?V1)(?!{SPACED}|\p{{M}})|(?<={SPACELESS})(?!\p{{M}})|(?={SPACELESS})(?!\p{{M}})"
    rf"|(?=\p{{Hangul}}){KOREAN_ENDINGS}(?!{SPACED})"
)

_WORDS = regex.compile(rf"(?V1)(?={SPACELESS})\X|{SPACED}[{SPACED}{JOINERS}]*|(?!\s)\X")
_WRITTEN = regex.compile(rf"(?V1)(?P<east>{EAST})|(?P<south>{SOUTH})|(?P<spaced>[\p{{L}}--{SPACELESS}]\p{{M}}*)+")
_LAST_LETTER = regex.compile(r"(?r)\p{L}")
# letters in a word, about
_EAST_WORD, _SOUTH_WORD = 2, 4
_FULL_STOPS = {
    regex.compile(f"(?V1){letters}"): stop
    for letters, stop in {
        EAST: "。",
        r"[\p{Devanagari}\p{Bengali}\p{Gurmukhi}\p{Oriya}]": "। ",
        r"\p{Armenian}": "։ ",
        r"\p{Ethiopic}": "። ",
        r"\p{Khmer}": "។ ",
        r"\p{Myanmar}": "။ ",
        r"\p{Tibetan}": "། ",
        SOUTH: " ",  # Thai and Lao have no full stop
    }.items()
}
_SENTENCE_END = regex.compile(r"\p{Sentence_Terminal}\Z")


def words(text: str) -> list[str]:
    """Return the words of a text, each punctuation mark or symbol as a word of its own.

    A word is a run of letters, combining marks, digits and underscores. In scripts without spaces (Chinese, Japanese,
    Thai, Lao, Khmer, Burmese, …) each grapheme cluster, a letter with its marks, is one.

    Example:
        >>> words("Lyon, 里昂!")
        ['Lyon', ',', '里', '昂', '!']
    """
    return _WORDS.findall(text)


def is_spaceless(text: str) -> bool:
    """Return whether most words of a text are of scripts without spaces; `False` for a text without letters.

    Example:
        >>> is_spaceless("谁创立了Apple?"), is_spaceless("The Chinese name of Lyon, 里昂, means")
        (True, False)
    """
    counts = Counter(match.lastgroup for match in _WRITTEN.finditer(text))
    spaceless = counts["east"] / _EAST_WORD + counts["south"] / _SOUTH_WORD
    return spaceless > 0 and spaceless >= counts["spaced"]


def find_word(text: str, word: str) -> int | None:
    """Return where a text has a word, or several words, with no word that goes on before or behind; `None` without.

    In scripts without spaces every letter begins a word. In Korean, particles and the copula may follow.

    Example:
        >>> find_word("首都是里昂。", "里昂"), find_word("Lyonnais", "Lyon")
        (3, None)
    """
    return next(find_words(text, word), None)


def replace_word(text: str, word: str, other: str) -> str:
    """Return a text with another word in each place where [`find_word`] would find one.

    Example:
        >>> replace_word("法国的首都是", "法国", "西班牙")
        '西班牙的首都是'
    """
    parts, end = [], 0
    for place in find_words(text, word):
        parts += [text[end:place], other]
        end = place + len(word)
    return "".join([*parts, text[end:]])


def find_words(text: str, word: str) -> Iterator[int]:
    """Yield each place where a text has a word, as [`find_word`] finds the first; they do not overlap."""
    # a pattern of the word itself takes milliseconds to compile
    place = text.find(word)
    while place >= 0:
        is_word = begins_word(text, place) and ends_word(text, place + len(word))
        if is_word:
            yield place
        place = text.find(word, place + (len(word) if is_word else 1))


def begins_word(text: str, place: int) -> bool:
    """Return whether a word may begin at a place in a text; anywhere in a script without spaces."""
    return _WORD_BEGIN.match(text, place) is not None


def ends_word(text: str, place: int) -> bool:
    """Return whether a word may end before a place in a text; anywhere in a script without spaces."""
    return _WORD_END.match(text, place) is not None


def has_letters(text: str) -> bool:
    """Return whether a text has a letter of any script."""
    return _LAST_LETTER.search(text) is not None


def full_stop(text: str) -> str:
    """Return the full stop of the script that a text ends in, with the space that its script writes after it.

    Example:
        >>> full_stop("In the city"), full_stop("在城里"), full_stop("शहर में")
        ('. ', '。', '। ')
    """
    letter = _LAST_LETTER.search(text)
    found = (stop for script, stop in _FULL_STOPS.items() if letter and script.match(letter[0]))
    return next(found, ". ")


def ends_sentence(text: str) -> bool:
    """Return whether a text ends with a full stop, question or exclamation mark of any script."""
    return _SENTENCE_END.search(text) is not None
