"""An evaluation as one HTML page that needs nothing else, for people who do not know the field, too."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from ..evaluation.intervals import Estimate, format_number
from ..evaluation.report import EvaluationReport, MetricResult
from ..evaluation.tables import DASH
from ..io.files import write_atomically
from .failures_table import failures_section
from .figures import COLOURS, curve_lines
from .html_elements import Html, element, scrolling, together
from .plots import curves_picture, metric_pictures
from .style import style_sheet
from .words import GROUPS, grouped, headline, higher_is_better, label_of, words_of

logger = logging.getLogger(__name__)


def save_report(report: EvaluationReport, folder: str | os.PathLike[str]) -> None:
    """Save a report: its data, see [`EvaluationReport.save`], and `evaluation.html`, one page with pictures.

    Without matplotlib (the extra `plot`) the page has no pictures, and says so.

    Args:
        report: what was measured.
        folder: made if it is not there.

    Raises:
        NotADirectoryError: if it or one above it is a file.

    Example:
        >>> save_report(evaluate_edits(peft_model, tokenizer, edits), "evaluation")
    """
    report.save(folder)
    # the last, so that where it is the others are, too, and drawing never costs the figures
    write_atomically(Path(folder) / "evaluation.html", render_report(report))


def render_report(report: EvaluationReport) -> str:
    """Return a report as one HTML file: its figures and pictures, what was not measured, and what failed.

    Nothing is loaded from elsewhere and no script runs; prompts and answers are escaped. Without matplotlib there are
    no pictures, and the page says how to get them.

    Args:
        report: what was measured.

    Example:
        >>> Path("evaluation.html").write_text(render_report(report), encoding="utf-8")
    """
    parts = [
        _head(report),
        _cards(report),
        *(element("p", note, class_="note") for note in report.notes),
        _metrics(report),
        *_pictures(report),
        *_missing(report),
        *_curves(report),
        *failures_section(report),
        _settings(report),
    ]
    head = together(
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        # whatever is in the report, a browser runs and fetches nothing
        Html(
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        ),
        element("title", _title(report)),
        element("style", Html(style_sheet(COLOURS))),
    )
    body = element("body", element("main", *(together("\n", part) for part in parts)))
    return "<!DOCTYPE html>\n" + element("html", element("head", head), "\n", body, lang="en") + "\n"


def _title(report: EvaluationReport) -> str:
    count = _edits(report).get("count")
    return f"What {count} {'edit' if count == 1 else 'edits'} did to {PurePath(str(_setting(report, 'model'))).name}"


def _setting(report: EvaluationReport, name: str) -> Any:
    value = report.settings.get(name)
    return "not recorded" if value is None else value


def _edits(report: EvaluationReport) -> Mapping[str, Any]:
    edits = report.settings.get("edits")
    return edits if isinstance(edits, dict) else {}


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _head(report: EvaluationReport) -> Html:
    edits, versions = _edits(report), report.settings.get("versions") or {}
    facts = {
        "Model": element("code", _setting(report, "model")),
        "Adapter": _listed(report.settings.get("adapters") or "none"),
        "Edits": together(f"{edits.get('count')}, sha256 ", element("code", str(edits.get("sha256"))[:16], "…")),
        "Asked by": _listed(_setting(report, "protocols")).replace("_", " "),
        "Numbers in": _setting(report, "dtype"),
        "Intervals": f"{report.confidence} confidence, by bootstrap of {_setting(report, 'num_resamples')} resamples",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    compared = (
        "Before is the model without the edits, after is the same model with them."
        if report.has_before
        else "There is no model without the edits to compare with, so that nothing here has a before."
    )
    pairs = [together(element("dt", name), element("dd", value)) for name, value in facts.items()]
    return element(
        "header", element("h1", _title(report)), element("p", compared, class_="muted"), element("dl", *pairs)
    )


def _cards(report: EvaluationReport) -> Html:
    cards = []
    for key, members in grouped(report.results).items():
        name = headline(key, members)
        if name is not None:
            cards.append(_card(key, name, members[name]))
    return element("section", *cards, class_="cards", aria_label="The main figures")


def _card(key: str, name: str, result: MetricResult) -> Html:
    group = GROUPS[key]

    def figure(value: float) -> str:
        return f"{value:.1%}" if group.are_shares and math.isfinite(value) else format_number(value)

    after = result.after
    interval = f"{figure(after.low)} to {figure(after.high)}"
    before = f"before {figure(result.before.value)}, " if result.before else ""
    lower = " (lower is better)" if higher_is_better(name) is False else ""
    return element(
        "div",
        element("h3", group.title),
        element("p", figure(after.value), class_="figure"),
        element("p", group.question),
        element("p", f"{label_of(name)}{lower}: {before}interval {interval}", class_="small"),
        class_="card",
    )


def _metrics(report: EvaluationReport) -> Html:
    numbers = [element("th", name, scope="col", class_="number") for name in ("Before", "After", "Change", "Of")]
    head = element("thead", element("tr", element("th", "Metric", scope="col"), *numbers))
    bodies = []
    for key, members in grouped(report.results).items():
        group = GROUPS[key]
        title = element("th", element("b", group.title), element("small", group.question), class_="group", colspan="5")
        rows = [_metric_row(name, result) for name, result in members.items()]
        bodies.append(element("tbody", element("tr", title), *rows))
    return element(
        "section",
        element("h2", "Figures"),
        element(
            "p",
            f"Below each figure is its interval of {report.confidence} confidence: how far it may be "
            "off because these edits, and not others of the same sort, were measured. A change is coloured, as better "
            "or worse, where its interval leaves out 0. Shares are from 0 to 1, and more is better.",
        ),
        scrolling(element("table", head, *bodies, class_="metrics"), "Figures"),
    )


def _metric_row(name: str, result: MetricResult) -> Html:
    words = words_of(name)
    about = [element("div", label_of(name), " ", element("code", name, class_="muted"))]
    about += [element("p", words)] if words else []
    about += [element("p", result.meaning, class_="small")]
    return element(
        "tr",
        element("th", *about, scope="row"),
        _figure_cell("Before", result.before),
        _figure_cell("After", result.after),
        _figure_cell("Change", result.change, sign="+", colour=_judged(name, result.change)),
        element("td", result.count, " ", element("small", result.unit), class_="number count", data_label="Of "),
    )


def _figure_cell(label: str, estimate: Estimate | None, sign: str = "", colour: str | None = None) -> Html:
    """Return a figure over its interval, with its column's name for where a narrow page has no columns."""
    if estimate is None:
        return element("td", DASH, class_="number muted", data_label=label)
    value, low, high = (f"{sign if each > 0 else ''}{format_number(each)}" for each in estimate)
    figure, interval = element("span", value, class_=colour), element("small", f"{low} to {high}")
    return element("td", figure, interval, class_="number", data_label=label)


def _judged(name: str, change: Estimate | None) -> str | None:
    """Say whether a change is good or bad; `None` where it may be chance, or that is not known."""
    better = higher_is_better(name)
    if change is None or better is None or change.low <= 0 <= change.high:
        return None
    return "good" if (change.value > 0) == better else "bad"


def _pictures(report: EvaluationReport) -> Iterable[Html]:
    if not report.results:
        return
    yield element("h2", "Before and after")
    try:
        pictures = metric_pictures(report)
    except ImportError as error:
        _warn_once(str(error))
        yield element(
            "p",
            "There are no pictures here, for matplotlib was not installed. To have them without evaluating again: ",
            element("code", "pip install 'peft-locft[plot]'"),
            ", then in Python ",
            element("code", "save_report(EvaluationReport.load(folder), folder)"),
            ".",
        )
        return
    if report.has_before:
        names = [element("span", f"{when} the edit", class_=when) for when in ("before", "after")]
        yield element("div", *names, class_="legend")
    figures = [_picture(picture, GROUPS[key].title, GROUPS[key].question) for key, picture in pictures.items()]
    yield element("div", *figures, class_="pictures")


def _picture(picture: str, title: str, words: str) -> Html:
    caption = element("figcaption", element("h3", title), element("span", words, class_="small"))
    # the figures are in the table
    drawn = element("div", Html(picture), role="img", aria_label=f"{title}: the figures of the table, drawn")
    return element("figure", caption, drawn)


@functools.cache
def _warn_once(why: str) -> None:
    logger.warning("The page of the evaluation has no pictures. %s", why)


def _missing(report: EvaluationReport) -> Iterable[Html]:
    if report.missing:
        yield element("h2", "Not measured")
        yield element("p", "None of these is a zero: there was nothing to measure.", class_="muted")
        reasons = [
            element("li", f"{why[:1].upper()}{why[1:]}: ", element("span", ", ".join(names), class_="muted"))
            for why, names in report.missing_by_reason().items()
        ]
        yield element("ul", *reasons)


def _curves(report: EvaluationReport) -> Iterable[Html]:
    lines = curve_lines(report.curves)
    if not lines:
        return
    yield element("h2", "From epoch to epoch")
    yield element(
        "p",
        "How training went: the share of edits learned (reliability), of those known in other words "
        "(generalization), and of other answers still as they were (locality).",
        class_="muted",
    )
    try:
        picture = curves_picture(report.curves)
        yield element("figure", element("div", Html(picture), role="img", aria_label="the figures by epoch, drawn"))
    except ImportError as error:
        _warn_once(str(error))
    by_name = {name: dict(points) for name, points in lines.items()}
    epochs = sorted({epoch for points in by_name.values() for epoch in points})
    names = [element("th", name.replace("_", " "), scope="col", class_="number") for name in lines]
    rows = []
    for epoch in epochs:
        values = (points.get(epoch) for points in by_name.values())
        cells = [element("td", DASH if value is None else format_number(value), class_="number") for value in values]
        rows.append(element("tr", element("th", f"{epoch:g}", scope="row"), *cells))
    head = element("thead", element("tr", element("th", "Epoch", scope="col"), *names))
    table = scrolling(element("table", head, element("tbody", *rows)), "Figures by epoch")
    yield element("details", element("summary", "The same in figures"), table)


def _settings(report: EvaluationReport) -> Html:
    pairs = [
        together(element("dt", name), element("dd", element("code", json.dumps(value, ensure_ascii=False))))
        for name, value in report.settings.items()
    ]
    return element("details", element("summary", "All settings"), element("dl", *pairs))
