"""Several reports on one self-contained HTML page, and as tables for a paper."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from ..evaluation.comparison import ReportComparison, compare_reports
from ..evaluation.report import EvaluationReport
from ..io.files import check_folder, write_atomically
from .comparison_plots import comparison_curve, comparison_pictures, report_colour
from .page import page_colours, page_templates, warn_without_pictures
from .words import GROUPS, group_of

MAX_DIFFERING = 200


def load_comparison(folders: Sequence[str | os.PathLike[str]]) -> ReportComparison:
    """Read reports from their folders, named by what distinguishes the folders' paths, and compare them.

    Args:
        folders: of `EvaluationReport.save`, the one to compare with first.

    Raises:
        FileNotFoundError: if a folder holds no report.
        ValueError: if there is no folder, a file is not a report of ours, or a folder is given twice.

    Example:
        >>> print(load_comparison(["published/evaluation", "balanced/evaluation"]))
    """
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"found a folder twice among {', '.join(map(str, paths))}; expected each report once")
    reports = [EvaluationReport.load(path) for path in paths]
    return compare_reports(dict(zip(_names(paths), reports, strict=True)))


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the parts of the paths in which they differ, such as "published" for "runs/published/evaluation"."""
    parts = [path.resolve().parts for path in paths]
    ends = [each[::-1] for each in parts]
    begin = _num_equal(parts)
    end = min(_num_equal(ends), min(map(len, parts)) - begin) if len(parts) > 1 else 0
    names = ["/".join(each[begin : len(each) - end]) or each[-1] for each in parts]
    return [each[-1] for each in parts] if len(parts) == 1 or len(set(names)) < len(names) else names


def _num_equal(parts: Sequence[Sequence[str]]) -> int:
    """Return how many of the first parts are the same in all."""
    return len(list(itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))))


def save_comparison(comparison: ReportComparison, folder: str | os.PathLike[str]) -> None:
    """Save `comparison.html`, `comparison.md`, `comparison.csv`, `comparison.tex` and `citations.bib`.

    Args:
        comparison: from `compare_reports` or `load_comparison`.
        folder: created if it does not exist.

    Raises:
        NotADirectoryError: if the folder, or one above it, is a file.

    Example:
        >>> save_comparison(load_comparison(["published", "balanced"]), "comparison")
    """
    folder = Path(folder)
    check_folder(folder, "a comparison")
    texts = {
        "comparison.md": comparison.to_markdown() + "\n",
        "comparison.csv": comparison.to_csv(),
        "comparison.tex": comparison.to_latex() + "\n",
        "citations.bib": comparison.citations() + "\n",
        "comparison.html": render_comparison(comparison),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        write_atomically(folder / name, content)


def render_comparison(comparison: ReportComparison) -> str:
    """Return several reports as one HTML page: metrics side by side, differences, pictures, differing questions.

    As [`render_report`], it loads nothing and runs no script; prompts and answers are escaped.

    Args:
        comparison: from `compare_reports` or `load_comparison`.
    """
    groups = {key: [name for name in comparison.metrics if group_of(name) == key] for key in GROUPS}
    pictures, curve = _pictures(comparison)
    return (
        page_templates()
        .get_template("comparison.html.jinja")
        .render(
            title=f"{len(comparison.names)} models, compared",
            comparison=comparison,
            confidence=next(iter(comparison.reports.values())).confidence,
            colours=page_colours(),
            groups={key: names for key, names in groups.items() if names},
            pictures=pictures,
            curve=curve,
            has_before=any(comparison.before(name) is not None for name in comparison.metrics),
            differing=comparison.differing_questions[:MAX_DIFFERING],
            report_colour=report_colour,
            zip=lambda *items: zip(*items, strict=True),
        )
    )


def _pictures(comparison: ReportComparison) -> tuple[dict[str, Markup] | None, Markup | None]:
    """Return a picture for each group of shares, and the curve over the number of edits; `None` without."""
    try:
        pictures = {key: Markup(picture) for key, picture in comparison_pictures(comparison).items()}
        curve = comparison_curve(comparison)
    except ImportError as error:
        warn_without_pictures(str(error))
        return None, None
    return pictures, None if curve is None else Markup(curve)
