"""Texts side by side in a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import zip_longest

GAP = " | "
NARROWEST = 22  # characters of a column that is still readable
EMPTY = "(empty)"


def side_by_side(columns: Sequence[tuple[str, str]], width: int) -> str:
    """Return titles and texts in columns, wrapped; below each other where the columns would be too narrow.

    The texts may come from anywhere: control characters, which could change a terminal, become `?`.

    Args:
        columns: a title and a text for each column.
        width: characters in a line.

    Example:
        >>> print(side_by_side([("base", "Oslo, the city"), ("facts", "Bergen")], 50))
        base                    | facts
        ----------------------- | -----------------------
        Oslo, the city          | Bergen
    """
    each = (width - len(GAP) * (len(columns) - 1)) // len(columns)
    if each < NARROWEST:
        return "\n".join(line for title, text in columns for line in _below(title, text, width))
    titles = [wrapped(title, each) for title, _ in columns]
    rules = [["-" * each]] * len(columns)
    texts = [wrapped(text, each) or [EMPTY] for _, text in columns]
    rows = [row for part in (titles, rules, texts) for row in zip_longest(*part, fillvalue="")]
    return "\n".join(GAP.join(_padded(cell, each) for cell in row).rstrip() for row in rows)


def _below(title: str, text: str, width: int) -> list[str]:
    indented = [f"  {line}" for line in wrapped(text, width - 2) or [EMPTY]]
    return [*wrapped(f"{title}:", width), *indented]


def wrapped(text: str, width: int) -> list[str]:
    """Return the lines of a text, none wider than `width`, without blank lines; longer words are cut."""
    paragraphs = [_printable(paragraph) for paragraph in text.splitlines() if paragraph.strip()]
    return [line for paragraph in paragraphs for line in _wrapped_line(paragraph, width)]


def _wrapped_line(text: str, width: int) -> Iterator[str]:
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if _columns(joined) <= width:
            line = joined
            continue
        if line:
            yield line
        *full, line = _pieces(word, width)
        yield from full
    yield line


def _pieces(word: str, width: int) -> list[str]:
    pieces = [""]
    for letter in word:
        if _columns(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _printable(text: str) -> str:
    """Return a line of text with `?` for characters that a terminal does not show but may act on."""
    return "".join(letter if letter.isprintable() else " " if letter.isspace() else "?" for letter in text)


def _columns(text: str) -> int:
    """Return the number of columns that a terminal uses for a text: 2 for wide letters, 0 for combining marks."""
    return sum(map(_columns_of_letter, text))


def _columns_of_letter(letter: str) -> int:
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _columns(text))
