"""Every picture: metrics before and after with their intervals, and how they went from epoch to epoch.

matplotlib is the optional extra `plot`. Pictures look the same whatever the user has set in it, and leave its
settings, its backend and pyplot's figures as they are.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.report import EvaluationReport
from ..io.files import write_atomically
from ..locating.results import LocationSearchResult
from .figures import COLOURS, SIZE, baselines_figure, curves_figure, metrics_figure
from .location_figures import locations_figure
from .words import grouped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE: dict[str, Any] = {
    "font.size": SIZE,
    "text.color": COLOURS["ink"][0],
    "axes.edgecolor": COLOURS["grid"][0],
    "axes.labelcolor": COLOURS["muted"][0],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": SIZE,
    "grid.color": COLOURS["grid"][0],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["muted"][0],
    "ytick.color": COLOURS["muted"][0],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "savefig.dpi": 200,
    # text stays text in a page, and the same picture is the same file
    "svg.fonttype": "none",
    "svg.hashsalt": "peft-locft",
}


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_metrics(report: EvaluationReport, path: str | os.PathLike[str]) -> None:
    """Draw bars of the metrics with their intervals, before and after side by side, grouped by what they measure.

    Args:
        report: what to draw.
        path: where to; its ending says what is written (`.png`, `.svg`, `.pdf`), whole or not at all.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the report has no metrics, or matplotlib cannot write such a file.
    """
    if not report.results:
        raise ValueError(f"{path}: found no metric to draw; expected a report with one at least")
    with _drawing():
        _save(metrics_figure(grouped(report.results), report.has_before, titled=True), Path(path))


def draw_curves(curves: Sequence[Mapping[str, float]], path: str | os.PathLike[str]) -> None:
    """Draw how the edits were learned, carried over to other words and what was forgotten, epoch by epoch.

    Args:
        curves: figures by name, such as `reliability_exact_match`, `locality_unchanged` or `loss`, and their `epoch`;
            any figure may be missing from any epoch. Shares have one panel, every other figure one of its own.
        path: as in [`draw_metrics`].

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is no figure, one has no epoch, or matplotlib cannot write such a file.

    Example:
        >>> draw_curves([{"epoch": 1, "loss": 2.1}, {"epoch": 2, "loss": 0.7}], "curves.png")
    """
    with _drawing():
        _save(curves_figure(curves), Path(path))


def draw_baselines(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw the shares that baselines reach, with their intervals; depth-first in another colour, the base dashed.

    Args:
        rows: as `compare_baselines` returns them, at least one.
        path: as in [`draw_metrics`].

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if matplotlib cannot write such a file.
    """
    with _drawing():
        _save(baselines_figure(rows), Path(path))


def draw_locations(search: LocationSearchResult, path: str | os.PathLike[str]) -> None:
    """Draw a heatmap of the score and of each metric of a search's first rung: modules by layers, the best framed.

    Args:
        search: as `search_locations` returns it.
        path: as in [`draw_metrics`].

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if matplotlib cannot write such a file.
    """
    with _drawing():
        _save(locations_figure(search), Path(path))


def metric_pictures(report: EvaluationReport) -> dict[str, str]:
    """Return an SVG element for each group of metrics, by its key in `GROUPS`.

    Its colours are the CSS variables of `COLOURS`, which the page must have.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    with _drawing():
        groups = grouped(report.results).items()
        figures = {key: metrics_figure({key: members}, report.has_before, titled=False) for key, members in groups}
        return {key: _svg(figure, key) for key, figure in figures.items()}


def curves_picture(curves: Sequence[Mapping[str, float]]) -> str:
    """Return [`draw_curves`]'s picture as an SVG element, coloured as in [`metric_pictures`].

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: as [`draw_curves`].
    """
    with _drawing():
        return _svg(curves_figure(curves), "curves")


@contextmanager
def _drawing() -> Iterator[None]:
    """Have our style, and nothing of the user's, for a while."""
    try:
        import matplotlib.style
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'peft-locft[plot]'") from error
    with matplotlib.style.context(["default", STYLE]):
        yield


def _save(figure: Figure, path: Path) -> None:
    kind = path.suffix.lower().removeprefix(".")
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"{path}: found the ending {path.suffix or 'none'!r}; expected one of .{', .'.join(known)}")
    content = io.BytesIO()
    figure.savefig(content, format=kind)
    write_atomically(path, content.getvalue())


def _svg(figure: Figure, prefix: str) -> str:
    content = io.StringIO()
    figure.savefig(
        content, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    text = content.getvalue()
    text = text[text.index("<svg") :]
    # its style sheet would hold for the whole page, where ours says the same
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    # of several pictures in a page, no two may have an id in common
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    for name, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{name.replace('_', '-')})")
    return text
