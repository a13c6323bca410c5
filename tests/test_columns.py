"""Texts side by side: widths, wrapping, and what may not reach a terminal."""

from __future__ import annotations

import pytest

from peft_locft.reporting.columns import side_by_side, wrapped


def test_two_texts_are_columns() -> None:
    assert side_by_side([("base", "Oslo, the big city"), ("facts", "Bergen")], 47).splitlines() == [
        "base                   | facts",
        "---------------------- | ----------------------",
        "Oslo, the big city     | Bergen",
    ]


def test_columns_that_were_too_narrow_go_below_each_other() -> None:
    assert side_by_side([("base", "Oslo"), ("facts", "")], 46).splitlines() == [
        "base:",
        "  Oslo",
        "facts:",
        "  (empty)",
    ]


@pytest.mark.parametrize("width", [10, 24, 80])
@pytest.mark.parametrize("text", ["東京は日本の首都です。" * 5, "a" * 200, "the capital " * 20, "one\n\n\ntwo\n"])
def test_no_line_is_wider_and_no_letter_is_lost(text: str, width: int) -> None:
    lines = wrapped(text, width)
    wide = "東京は日本の首都です。"
    assert max(sum(1 + (letter in wide) for letter in line) for line in lines) <= width
    assert "".join(lines).replace(" ", "") == "".join(text.split())


def test_wide_letters_and_accents_keep_the_columns_straight() -> None:
    rows = side_by_side([("base", "東京\nOslo\nTromso\u0308"), ("facts", "a\nb\nc")], 60).splitlines()[2:]
    assert [row.index("|") for row in rows] == [29 - 2, 29, 29 + 1], "in letters; in columns the same"


def test_no_control_character_reaches_the_terminal() -> None:
    text = side_by_side([("base", "red \x1b[31m\x07 \u202eright\tto left"), ("facts", "a\r\nb")], 80)
    assert "red ?[31m? ?right to left" in text
    assert all(letter.isprintable() or letter == "\n" for letter in text)
