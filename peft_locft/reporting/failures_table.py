"""The part of a report's page that shows which edits, rephrasings and probes failed, and what was said instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..evaluation.intervals import format_number
from ..evaluation.report import EvaluationReport, deciding_score
from ..evaluation.tables import DASH
from .html_elements import Html, element, scrolling, together

MAX_FAILURES = 200
MAX_LETTERS = 300  # of a text
# one, many
KINDS = {
    "reliability": ("edit", "edits"),
    "generalization": ("rephrasing", "rephrasings"),
    "locality": ("locality probe", "locality probes"),
    "portability": ("portability probe", "portability probes"),
}
NAMES = ("Edit", "Kind", "Prompt", "Expected", "Before", "After")


def failures_section(report: EvaluationReport) -> Iterator[Html]:
    """Yield how many of each kind failed, and the first of them as a table; nothing for a report without rows."""
    judged = [(row, *deciding) for row in report.rows if (deciding := deciding_score(row)) is not None]
    if not judged:
        return
    failures = list(report.failures())
    yield element("h2", "Failures")
    if not failures:
        yield element("p", "None: every answer is as it should be.")
        return
    asked = Counter((row["kind"], measure) for row, measure, _ in judged)
    failed = Counter(row["kind"] for row in failures)
    counts = [
        f"{failed[kind]} of {count} {KINDS.get(kind, (kind, kind))[count != 1]} (by {_in_words(measure)})"
        for (kind, measure), count in asked.items()
    ]
    shown_here = "All" if len(failures) <= MAX_FAILURES else f"The first {MAX_FAILURES}"
    yield element(
        "p",
        f"{', '.join(counts)}. {shown_here} of these {len(failures)} are here; ",
        element("code", "answers.csv"),
        " has every answer, those that are right too.",
    )
    if ("locality", "unchanged") in asked:
        yield element(
            "p",
            "The answer to a locality probe should be the one before, right or wrong, whatever was expected.",
            class_="muted",
        )
    head = element("thead", element("tr", *(element("th", name, scope="col") for name in NAMES)))
    body = element("tbody", *(together("\n", _row(row)) for row in failures[:MAX_FAILURES]))
    yield scrolling(element("table", head, body, class_="failures"), "Failures")


def _row(row: dict[str, Any]) -> Html:
    deciding = deciding_score(row)
    after = _text_cell(row.get("answer_after"))
    if row.get("answer_after") is None and deciding:
        # no answer was asked for, but what it failed by has a score
        after = element("td", f"{_in_words(deciding[0])} {format_number(deciding[1])}", class_="muted")
    return element(
        "tr",
        element("td", row["edit"], element("small", row.get("source") or "")),
        element("td", KINDS.get(row["kind"], (row["kind"],))[0]),
        _text_cell(row["prompt"]),
        _text_cell(row.get("expected")),
        _text_cell(row.get("answer_before")),
        after,
    )


def _text_cell(text: str | None) -> Html:
    if text is None:
        return element("td", DASH, class_="muted")
    if not text.strip():
        return element("td", "(nothing)", class_="muted")
    rest = len(text) - MAX_LETTERS
    more = element("small", f"… and {rest} letters more") if rest > 0 else ""
    # a text in Hebrew or Arabic begins on the right
    return element("td", text[:MAX_LETTERS], more, dir="auto")


def _in_words(measure: str) -> str:
    return measure.replace("_", " ")
