"""A report in a few sentences, from its rows: what was learned, what holds in other words, what else changed."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.questions import STOPS
from .intervals import format_number

Row = Mapping[str, Any]

# a row failed if the first of these that it has is below 1; of a probe, what changed matters more than what is right
DECIDING = ("exact_match", "token_accuracy", "more_probable", "chosen", "most_probable", "contains")
DECIDING_OF_LOCALITY = ("unchanged", "tokens_unchanged", "first_word_unchanged", *DECIDING)

_shortened = reprlib.Repr()
_shortened.maxstring = 60


def deciding_score(row: Row) -> tuple[str, float] | None:
    """Return the name and value of the score that decides whether a row failed; `None` if it has none."""
    names = DECIDING_OF_LOCALITY if row["kind"].startswith("locality") else DECIDING
    scores = ((name, row.get(f"{name}_after")) for name in names)
    return next(((name, score) for name, score in scores if score is not None), None)


def sentences(rows: Sequence[Row], texts: Mapping[str, tuple[float | None, float]]) -> list[str]:
    """Return what rows say of the edits, and figures of ordinary text.

    Args:
        rows: of a report.
        texts: what to call a figure, and its values before (`None`: unknown) and after.
    """
    said = []
    plain, chat = ([row for row in rows if row.get("in_chat", False) is form] for form in (False, True))
    for title, own in (("As plain text: ", plain), ("In chat: ", chat)):
        of_form = _of_form(own)
        if plain and chat and of_form:
            of_form[0] = title + of_form[0]
        said += of_form
    for name, (before, after) in texts.items():
        change = "" if before is None else f"{format_number(before)} before, "
        said.append(f"{name}: {change}{format_number(after)} after.")
    return said


def _of_form(rows: Sequence[Row]) -> list[str]:
    """Return what rows say that were all asked as plain text, or all in chat."""
    said = []
    learned, num_edits = _counts(rows, "reliability")
    if num_edits:
        said.append(f"{learned} of {num_edits} edits learned{_before(rows)}.")
        said += _first_failure(rows)
    for kind, ending in (
        ("generalization", "prompts in other words are answered with the target"),
        ("portability", "questions that follow from the edits are answered right"),
        ("cross_lingual", "questions in another language are answered right"),
    ):
        passed, num = _counts(rows, kind)
        if num:
            said.append(f"{passed} of {num} {ending}.")
    return said + _of_others(rows)


def _counts(rows: Sequence[Row], kind: str) -> tuple[int, int]:
    """Return how many rows of a kind passed, and how many have a score."""
    scored = [row for row in rows if row["kind"] == kind and deciding_score(row) is not None]
    return sum(map(_passed, scored)), len(scored)


def _passed(row: Row, when: str = "after") -> bool:
    deciding = deciding_score(row)
    name = None if deciding is None else deciding[0]
    if name == "exact_match" and STOPS.search(row["expected"]):
        name = "contains"  # an answer is cut at the first stop, so it cannot be all of this one
    return name is not None and row.get(f"{name}_{when}") == 1


def _before(rows: Sequence[Row]) -> str:
    edited = [row for row in rows if row["kind"] == "reliability"]
    if all(row.get("answer_before") is None and row.get("token_accuracy_before") is None for row in edited):
        return ""
    return f" ({sum(_passed(row, 'before') for row in edited)} before)"


def _first_failure(rows: Sequence[Row]) -> list[str]:
    failed = [row for row in rows if row["kind"] == "reliability" and not _passed(row)]
    if not failed:
        return []
    row = failed[0]
    answer = row.get("answer_after")
    instead = "" if answer is None else f" is answered with {_shortened.repr(answer.strip())}"
    return [f"Not learned, for example: {_shortened.repr(row['prompt'])}{instead}."]


def _of_others(rows: Sequence[Row]) -> list[str]:
    unchanged, num = _counts(rows, "locality")
    if not num:
        return []
    compared = any(
        row.get("unchanged_after") is not None or row.get("tokens_unchanged_after") is not None for row in rows
    )
    if compared:
        return [f"{num - unchanged} of {num} other answers changed."]
    return [f"{unchanged} of {num} other questions are answered right."]
