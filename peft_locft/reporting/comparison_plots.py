"""Pictures of several reports: their metrics with intervals, side by side."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.comparison import ReportComparison
from .drawing import COLOURS, TEXT_POINTS, drawing, save_figure, svg_element
from .plots import curves_figure
from .words import GROUPS, group_of, headline, label_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# of the reports, in their order; after the last, from the first again
REPORT_COLOURS = ("after", "generalization", "locality", "portability", "edit_score", "muted")
REPORT_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH, LEFT, RIGHT = 4.7, 1.45, 0.1
ROW, GAP, SCALE = 0.17, 0.17, 0.3  # inches: of a report, around those of a metric, of the scale below


def draw_comparison(comparison: ReportComparison, path: str | os.PathLike[str]) -> None:
    """Draw the shares of several reports with their intervals: a row for each report, grouped by metric.

    Args:
        comparison: from `compare_reports`.
        path: as in [`draw_metrics`].

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if no report has a share, or matplotlib does not know the file's ending.
    """
    shares = [name for names in metrics_by_group(comparison).values() for name in names]
    if not shares:
        raise ValueError(f"{path}: found no share to draw; expected a metric from 0 to 1 in at least one report")
    with drawing():
        save_figure(shares_figure(comparison, shares, titled=True), Path(path))


def comparison_pictures(comparison: ReportComparison) -> dict[str, str]:
    """Return an SVG element for each group of shares, by its key in `GROUPS`.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    with drawing():
        return {
            key: svg_element(shares_figure(comparison, names, titled=False), f"compared-{key}")
            for key, names in metrics_by_group(comparison).items()
        }


def comparison_curve(comparison: ReportComparison) -> str | None:
    """Return the headline metrics over the number of edits as an SVG element; `None` if the edits do not grow.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    if not comparison.is_growing:
        return None
    shown = {
        name
        for key in GROUPS
        if (name := headline(key, [each for each in comparison.metrics if group_of(each) == key])) is not None
    }
    points = [
        {name: value for name, value in point.items() if name in shown | {"num_edits"}} for point in comparison.curve
    ]
    with drawing():
        return svg_element(curves_figure(points, "num_edits"), "curve")


def metrics_by_group(comparison: ReportComparison) -> dict[str, list[str]]:
    """Return the names of the shares that reports have, by their group."""
    groups = {key: [name for name in comparison.metrics if group_of(name) == key] for key in GROUPS}
    return {key: names for key, names in groups.items() if names and GROUPS[key].are_shares}


def shares_figure(comparison: ReportComparison, metrics: Sequence[str], titled: bool) -> Figure:
    """Return shares as dots with intervals.

    Args:
        comparison: the reports.
        metrics: names of shares.
        titled: name the groups in the labels, and draw a legend; a page has its own.
    """
    from matplotlib.figure import Figure

    each = ROW * len(comparison.names) + GAP
    legend = 0.2 * len(comparison.names) + 0.1 if titled else 0.05
    height = each * len(metrics) + SCALE + legend
    figure = Figure(figsize=(WIDTH, height))
    place = (LEFT / WIDTH, SCALE / height, (WIDTH - LEFT - RIGHT) / WIDTH, each * len(metrics) / height)
    axes = figure.add_axes(place)
    for number, name in enumerate(metrics):
        _draw_metric(axes, comparison, name, number * each + GAP / 2)
    labels = [f"{group_of(name)}: {label_of(name)}" if titled else label_of(name) for name in metrics]
    axes.set_yticks(
        [number * each + each / 2 for number in range(len(metrics))],
        [textwrap.fill(label, 20, max_lines=3, placeholder="…") for label in labels],
    )
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a name is not a formula
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"][0], labelsize=TEXT_POINTS)
    axes.set_ylim(each * len(metrics), 0)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)
    if titled:
        handles, names = axes.get_legend_handles_labels()
        by_name = dict(zip(names, handles, strict=True))
        found = figure.legend(by_name.values(), by_name.keys(), loc="upper left", bbox_to_anchor=(0, 1), fontsize=8)
        for text in found.get_texts():
            text.set_parse_math(False)
    return figure


def _draw_metric(axes: Axes, comparison: ReportComparison, metric: str, top: float) -> None:
    before = comparison.before(metric)
    high = ROW * len(comparison.names)
    if before is not None:
        axes.plot([before.value] * 2, [top, top + high], color=COLOURS["before"][0], linewidth=2, label="before")
    for number, (name, estimate) in enumerate(zip(comparison.names, comparison.after(metric), strict=True)):
        if estimate is None:
            continue
        reach = [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]
        axes.errorbar(
            estimate.value,
            top + ROW * (number + 0.5),
            xerr=reach,
            fmt=REPORT_MARKERS[number % len(REPORT_MARKERS)],
            markersize=4.5,
            capsize=2,
            color=COLOURS[report_colour(number)][0],
            label=name,
        )


def report_colour(number: int) -> str:
    """Return the name of the colour of a report, by its number from 0."""
    return REPORT_COLOURS[number % len(REPORT_COLOURS)]
