"""The figures of `plots`, to be made in its style: bars with intervals, and lines by epoch."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..evaluation.intervals import Estimate, format_number
from ..evaluation.report import MetricResult
from .baseline_table import Baseline
from .words import GROUPS, group_of, label_of, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# on a light page, on a dark one; no two alike, for in a page each becomes a variable of its style sheet
COLOURS = {
    "ink": ("#1f2933", "#e4e7eb"),
    "muted": ("#616e7c", "#9aa5b1"),
    "grid": ("#e1e5ea", "#36414d"),
    "before": ("#b4bec9", "#66727f"),
    "after": ("#2f6fb3", "#4b8acb"),
    "reliability": ("#2f6fb4", "#6ea8e1"),
    "generalization": ("#b35c00", "#eb9b45"),
    "locality": ("#1c8a5f", "#55c797"),
    "portability": ("#8e4f9e", "#c88fd6"),
    "edit_score": ("#52606e", "#b8c2cd"),
}
MARKERS = {"reliability": "o", "generalization": "s", "locality": "^", "portability": "D", "edit_score": "v"}
DRAWN = (  # of baselines
    "reliability_exact_match",
    "reliability_contains",
    "generalization_exact_match",
    "locality_unchanged",
)
DASHES = ("-", "--", ":", "-.")

# inches
WIDTH, LEFT, RIGHT = 4.7, 1.45, 0.1
ROW, TITLE, SCALE, GAP = 0.46, 0.3, 0.24, 0.14

SIZE = 9  # of text, in points

Panel = Mapping[str, MetricResult]  # metrics on one axis


def metrics_figure(groups: Mapping[str, Panel], has_before: bool, titled: bool) -> Figure:
    """Return bars of metrics with their intervals.

    Args:
        groups: the metrics by their group, a key of `GROUPS`.
        has_before: some have a before, so that a legend is needed.
        titled: with the groups' titles and the legend; a page has its own.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = [(key, panel) for key, members in groups.items() for panel in _panels(key, members)]
    legend = 0.3 if titled and has_before else 0.0
    titles = TITLE * len(groups) if titled else 0.0
    height = legend + titles + sum(ROW * len(panel) + SCALE + GAP for _, panel in panels)
    figure = Figure(figsize=(WIDTH, height))
    if legend:
        handles = [Patch(color=COLOURS[when][0], label=f"{when} the edit") for when in ("before", "after")]
        figure.legend(handles=handles, loc="upper right", ncols=2)
    top, last = height - legend, ""
    for key, panel in panels:
        if titled and key != last:
            top -= TITLE
            figure.text(0.1 / WIDTH, (top + 0.06) / height, GROUPS[key].title, fontweight="bold")
        last = key
        rows = ROW * len(panel)
        place = (LEFT / WIDTH, (top - rows) / height, (WIDTH - LEFT - RIGHT) / WIDTH, rows / height)
        _draw_panel(figure.add_axes(place), panel, GROUPS[key].are_shares)
        top -= rows + SCALE + GAP
    return figure


def _panels(key: str, members: Panel) -> list[Panel]:
    """Return metrics by the axis that they are drawn on: shares have one together, of other units each has its own."""
    return [members] if GROUPS[key].are_shares else [{name: result} for name, result in members.items()]


def _draw_panel(axes: Axes, panel: Panel, are_shares: bool) -> None:
    labels = [textwrap.fill(label_of(name), 20, max_lines=3, placeholder="…") for name in panel]
    axes.set_yticks(range(len(panel)), labels)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a name is no formula
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"][0], labelsize=SIZE)
    axes.set_ylim(len(panel) - 0.5, -0.5)
    for place, result in enumerate(panel.values()):
        if result.before is None:
            _draw_bar(axes, place, result.after, "after")
        else:
            _draw_bar(axes, place - 0.19, result.before, "before")
            _draw_bar(axes, place + 0.19, result.after, "after")
    estimates = [each for result in panel.values() for each in (result.before, result.after) if each is not None]
    ends = [end for each in estimates for end in each if math.isfinite(end)]
    low, high = (0.0, 1.0) if are_shares else (min([0.0, *ends]), max([0.0, *ends]) or 1.0)
    axes.set_xlim(low, low + 1.17 * (high - low))
    if are_shares:
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    else:
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x")
    axes.spines["bottom"].set_visible(False)


def _draw_bar(axes: Axes, place: float, estimate: Estimate, when: str) -> None:
    if not all(map(math.isfinite, estimate)):
        axes.text(0, place, f" {format_number(estimate.value)}", va="center", fontsize=8)
        return
    value, low, high = estimate
    reach = [[max(0.0, value - low)], [max(0.0, high - value)]]
    error = {"ecolor": COLOURS["ink"][0], "elinewidth": 1, "capsize": 2.5, "capthick": 1}
    axes.barh(place, value, height=0.34, color=COLOURS[when][0], xerr=reach, error_kw=error)
    end = (max(value, high, 0.0), place)
    axes.annotate(format_number(value), end, (5, 0), textcoords="offset points", va="center", fontsize=8)


def curves_figure(curves: Sequence[Mapping[str, float]]) -> Figure:
    """Return lines of figures by epoch: shares in one panel, every other figure in one of its own.

    Raises:
        ValueError: if there is no figure, or a point has no epoch.
    """
    from matplotlib.figure import Figure

    lines = curve_lines(curves)
    if not lines:
        raise ValueError("curves: found no figure of any epoch; expected some such as loss or reliability_exact_match")
    shares = [name for name in lines if GROUPS[group_of(name)].are_shares]
    panels = ([shares] if shares else []) + [[name] for name in lines if name not in shares]
    heights = [2.6 if names is shares else 1.2 for names in panels]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.4), layout="constrained")
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, names in zip(rows, panels, strict=True):
        _draw_lines(axes, {name: lines[name] for name in names}, are_shares=names is shares)
    rows[-1].set_xlabel("epoch")
    rows[-1].locator_params(axis="x", integer=True)
    return figure


def curve_lines(curves: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """Return each figure's (epoch, value) in the order of the epochs.

    Raises:
        ValueError: if a point has no epoch.
    """
    without = next((number for number, point in enumerate(curves) if "epoch" not in point), None)
    if without is not None:
        raise ValueError(f"curves[{without}]: found {', '.join(curves[without]) or 'nothing'}; expected an epoch, too")
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in sorted(curves, key=lambda point: point["epoch"]):
        for name, value in point.items():
            if name != "epoch":
                lines.setdefault(name, []).append((point["epoch"], value))
    return lines


def _draw_lines(axes: Axes, lines: Mapping[str, list[tuple[float, float]]], are_shares: bool) -> None:
    drawn: Counter[str] = Counter()
    for name, points in lines.items():
        key = group_of(name) if are_shares else "after"
        axes.plot(
            *zip(*points, strict=True),
            color=COLOURS[key][0],
            linestyle=DASHES[drawn[key] % len(DASHES)],
            marker=MARKERS.get(key, "o"),
            markersize=3.5,
            label=label_of(name) if short_name(name) == name else f"{key}: {label_of(name)}",
        )
        drawn[key] += 1
    axes.grid(axis="y")
    if are_shares:
        axes.set_ylim(-0.03, 1.03)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, handlelength=1.6, columnspacing=1)
        return
    (name,) = lines
    axes.set_title(label_of(name), loc="left", parse_math=False)
    values = [value for _, value in lines[name] if math.isfinite(value)]
    # a loss falls by orders of magnitude, and its end would be a flat line
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")


def baselines_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the baselines' shares with their intervals, a row a baseline, a panel a metric.

    Args:
        rows: as `compare_baselines` returns them.
    """
    from matplotlib.figure import Figure

    names = [name for name in DRAWN if any(name in row["figures"] for row in rows)]
    labels = [str(Baseline(**row["baseline"])) for row in rows]
    figure = Figure(figsize=(2.4 + 1.8 * len(names), 0.7 + 0.24 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for place, row in enumerate(rows):
            estimate = row["figures"].get(name)
            if estimate is None:
                continue
            colour = COLOURS["generalization" if row["baseline"]["edit_order"] == "depth_first" else "after"][0]
            reach = [[estimate["value"] - estimate["low"]], [estimate["high"] - estimate["value"]]]
            axes.errorbar(estimate["value"], place, xerr=reach, fmt="o", markersize=4, capsize=2, color=colour)
        before = rows[0]["before"].get(name)
        if before is not None:
            axes.axvline(before["value"], color=COLOURS["before"][0], linestyle="--", linewidth=1)
        axes.set(
            xlim=(-0.03, 1.03),
            title=name.replace("_", ":\n", 1).replace("_", " "),
            yticks=range(len(rows)),
            yticklabels=labels,
        )
        axes.grid(axis="x")
    panels[0].invert_yaxis()  # the first on top
    return figure
