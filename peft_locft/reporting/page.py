"""An evaluation as one self-contained HTML page, for readers who do not know the field too."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import jinja2
from markupsafe import Markup

from ..evaluation.agreement import MAX_DISAGREEMENTS, agreement_of, disagreements
from ..evaluation.by_language import MAX_LANGUAGES, shown_metrics
from ..evaluation.groups import EditGroup, edit_groups
from ..evaluation.intervals import Estimate, format_number
from ..evaluation.metric_result import MetricResult
from ..evaluation.report import EvaluationReport
from ..evaluation.summary import deciding_score
from ..evaluation.tables import DASH
from ..evaluation.worst import LEAST_LEARNED, MOST_DAMAGED, least_learned, most_damaged
from ..io.files import write_atomically
from .drawing import COLOURS
from .plots import curve_lines, curves_picture, metric_pictures
from .words import GROUPS, grouped, headline, higher_is_better, label_of, words_of

logger = logging.getLogger(__name__)

MAX_FAILURES = 200
MAX_WORST = 20
MAX_GROUPS = 40
# titles, and the columns of the rows that tell the groups apart
GROUPED_BY = {"Relation": "relation"}
MAX_CHARACTERS = 300  # of a text in the table of failures
# one, many
KIND_NAMES = {
    "reliability": ("edit", "edits"),
    "generalization": ("rephrasing", "rephrasings"),
    "locality": ("locality probe", "locality probes"),
    "portability": ("portability probe", "portability probes"),
    "cross_lingual": ("question in another language", "questions in another language"),
}
# beside those of the pictures: on a light page, on a dark one
PAGE_COLOURS = {
    "page": ("#f7f8fa", "#14191f"),
    "panel": ("#ffffff", "#1c232b"),
    "good": ("#1c7a54", "#55c797"),
    "bad": ("#b3432b", "#f08a70"),
}


def save_report(report: EvaluationReport, folder: str | os.PathLike[str]) -> None:
    """Save a report's data (see [`EvaluationReport.save`]) and `evaluation.html`, one page with pictures.

    Without matplotlib (the extra `plot`) the page has no pictures and says how to get them.

    Args:
        report: the report to save.
        folder: created if it does not exist.

    Raises:
        NotADirectoryError: if the folder, or one above it, is a file.

    Example:
        >>> save_report(evaluate_edits(peft_model, tokenizer, edits), "evaluation")
    """
    report.save(folder)
    # last: if the page exists, so does the data, and a failure to draw loses no data
    write_atomically(Path(folder) / "evaluation.html", render_report(report))


def render_report(report: EvaluationReport) -> str:
    """Return a report as one HTML file: metrics, pictures, what was not measured, and failures.

    The page loads nothing and runs no script; prompts and answers are escaped. Without matplotlib (the extra `plot`)
    the page has no pictures and says how to get them.

    Args:
        report: the report to show.

    Example:
        >>> Path("evaluation.html").write_text(render_report(report), encoding="utf-8")
    """
    groups = grouped(report.results)
    edits = report.settings.get("edits")
    edits = edits if isinstance(edits, dict) else {}
    return (
        page_templates()
        .get_template("report.html.jinja")
        .render(
            report=report,
            title=_title(edits.get("count"), _setting(report, "model")),
            setting=functools.partial(_setting, report),
            edits=edits,
            colours=page_colours(),
            groups=groups,
            has_chance=report.has_chance,
            cards=[
                _card(key, name, members[name])
                for key, members in groups.items()
                if (name := headline(key, members)) is not None
            ],
            pictures=_metric_pictures(report),
            curves=_curves(report),
            judge=_judge(report),
            by_group=_by_group(report),
            worst=_worst(report),
            failures=_failures(report),
        )
    )


def page_colours() -> list[tuple[str, tuple[str, str]]]:
    """Return the names of the CSS variables of a page, each with its colour on a light and on a dark page."""
    return [(name.replace("_", "-"), pair) for name, pair in {**PAGE_COLOURS, **COLOURS}.items()]


@functools.cache
def page_templates() -> jinja2.Environment:
    """Return the templates of the page, which escape every value and refuse an unknown name."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("peft_locft.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "as_json": lambda value: json.dumps(value, ensure_ascii=False),
        "in_words": _in_words,
        "kind_of_row": lambda row: KIND_NAMES.get(row["kind"], (_in_words(row["kind"]),))[0],
        "listed": lambda value: ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value),
        "number": _number,
        "score_of_row": _score_of_row,
    }
    environment.globals |= {
        "DASH": DASH,
        "GROUPS": GROUPS,
        "MAX_CHARACTERS": MAX_CHARACTERS,
        "MAX_LANGUAGES": MAX_LANGUAGES,
        "judgement": judgement,
        "label_of": label_of,
        "shown_metrics": shown_metrics,
        "words_of": words_of,
    }
    return environment


def _setting(report: EvaluationReport, name: str) -> Any:
    value = report.settings.get(name)
    return "not recorded" if value is None else value


def _title(num_edits: Any, model: Any) -> str:
    return f"What {num_edits} {'edit' if num_edits == 1 else 'edits'} did to {PurePath(str(model)).name}"


def _number(value: float, sign: str = "") -> str:
    return f"{sign if value > 0 else ''}{format_number(value)}"


def _in_words(name: Any) -> str:
    return str(name).replace("_", " ")


def _card(key: str, name: str, result: MetricResult) -> dict[str, str]:
    """Return the texts of the card that shows the headline metric of a group."""
    group = GROUPS[key]

    lower = " (lower is better)" if higher_is_better(name) is False else ""
    before = f"before {format_number(result.before.value)}, " if result.before else ""
    interval = f"interval {format_number(result.after.low)} to {format_number(result.after.high)}"
    return {
        "title": group.title,
        "value": format_number(result.after.value),
        "question": group.question,
        "details": f"{label_of(name)}{lower}: {before}{interval}",
    }


def judgement(name: str, change: Estimate | None) -> str | None:
    """Return whether a metric's change is `"good"` or `"bad"`; `None` if it may be chance or is not known."""
    better = higher_is_better(name)
    if change is None or better is None or change.low <= 0 <= change.high:
        return None
    return "good" if (change.value > 0) == better else "bad"


# ---------------------------------------------------------------------- pictures


def _metric_pictures(report: EvaluationReport) -> dict[str, Markup] | None:
    """Return a picture for each group of metrics; `None` without matplotlib."""
    if not report.results:
        return {}
    try:
        return {key: Markup(picture) for key, picture in metric_pictures(report).items()}
    except ImportError as error:
        warn_without_pictures(str(error))
        return None


@functools.cache
def warn_without_pictures(why: str) -> None:
    """Warn once that a page has no pictures."""
    logger.warning("The evaluation page has no pictures. %s", why)


@dataclass(frozen=True)
class _Curves:
    """Metrics by epoch: a picture, and the rows of a table, each an epoch and its values, `None` where unknown."""

    names: list[str]
    rows: list[tuple[float, list[float | None]]]
    picture: Markup | None


def _curves(report: EvaluationReport) -> _Curves | None:
    lines = {name: dict(points) for name, points in curve_lines(report.curves).items()}
    if not lines:
        return None
    try:
        picture = Markup(curves_picture(report.curves))
    except ImportError as error:
        warn_without_pictures(str(error))
        picture = None
    epochs = sorted({epoch for points in lines.values() for epoch in points})
    rows = [(epoch, [points.get(epoch) for points in lines.values()]) for epoch in epochs]
    return _Curves(list(lines), rows, picture)


# ---------------------------------------------------------------------- groups of edits, and the judge


@dataclass(frozen=True)
class _Groups:
    """Groups of edits: the largest, and the metrics that they have."""

    metrics: list[str]
    rows: list[EditGroup]


def _by_group(report: EvaluationReport) -> dict[str, _Groups]:
    """Return the groups of edits by what distinguishes them; without what has none or one."""
    found = {title: edit_groups(report.rows, report.settings, by) for title, by in GROUPED_BY.items()}
    return {title: _groups(groups) for title, groups in found.items() if groups}


def _groups(groups: list[EditGroup]) -> _Groups:
    names = dict.fromkeys(name for group in groups for name in group.results)
    return _Groups(list(names), groups[:MAX_GROUPS])


@dataclass(frozen=True)
class _Judge:
    """Who judged, what it was asked, and where it and exact match differ."""

    label: Any
    counts: Any
    prompt: Any
    prompt_sha256: Any
    agreement: str | None
    rows: list[dict[str, Any]]
    num_rows: int


def _judge(report: EvaluationReport) -> _Judge | None:
    judge = report.settings.get("judge")
    if not isinstance(judge, dict):
        return None
    agreement, differing = agreement_of(report.rows), disagreements(report.rows)
    return _Judge(
        judge.get("label"),
        judge.get("counts"),
        judge.get("prompt"),
        judge.get("prompt_sha256"),
        None if agreement is None else str(agreement),
        differing[:MAX_DISAGREEMENTS],
        len(differing),
    )


def _worst(report: EvaluationReport) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    """Return titles, rules and rows of what to look at first; empty if the table of failures shows no more."""
    lists = [
        ("Least learned", LEAST_LEARNED, least_learned(report.rows, MAX_WORST)),
        ("Most damaged", MOST_DAMAGED, most_damaged(report.rows, MAX_WORST)),
    ]
    is_short = sum(1 for _ in report.failures()) <= MAX_WORST
    return [] if is_short else [each for each in lists if each[2]]


# ---------------------------------------------------------------------- failures


@dataclass(frozen=True)
class _Failures:
    """Edits, rephrasings and probes that failed.

    Args:
        counts: how many of each kind failed, in words; empty if no row has a score.
        rows: the first of them, as in the report.
        num_rows: how many failed.
        compares_with_base: locality probes are compared with the base's answers.
    """

    counts: list[str]
    rows: list[dict[str, Any]]
    num_rows: int
    compares_with_base: bool


def _failures(report: EvaluationReport) -> _Failures:
    scores = [(row["kind"], deciding[0]) for row in report.rows if (deciding := deciding_score(row)) is not None]
    num_scored = Counter(scores)
    rows = list(report.failures())
    num_failed = Counter(row["kind"] for row in rows)
    counts = []
    for (kind, measure), count in num_scored.items():
        name = KIND_NAMES.get(kind, (_in_words(kind),) * 2)[count != 1]
        counts.append(f"{num_failed[kind]} of {count} {name} (by {_in_words(measure)})")
    return _Failures(counts, rows[:MAX_FAILURES], len(rows), ("locality", "unchanged") in num_scored)


def _score_of_row(row: dict[str, Any]) -> str:
    """Return in words the score by which a row without an answer failed."""
    deciding = deciding_score(row)
    return f"{_in_words(deciding[0])} {format_number(deciding[1])}" if deciding else DASH
