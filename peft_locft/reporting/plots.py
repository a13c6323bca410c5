"""Pictures: metrics before and after, curves by epoch, baselines side by side, heatmaps of a location search.

matplotlib is the optional extra `plot`.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.intervals import Estimate, format_number
from ..evaluation.metric_result import MetricResult
from ..evaluation.report import EvaluationReport
from ..evaluation.tables import DASH
from ..locating.results import TABLE_METRICS, LocationSearchResult, LocationTrial
from .baselines import BaselineResult, by_baseline, columns_of, over_seeds
from .drawing import COLOURS, TEXT_POINTS, drawing, save_figure, svg_element
from .words import GROUPS, group_of, grouped, higher_is_better, label_of, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"reliability": "o", "generalization": "s", "locality": "^", "portability": "D", "edit_score": "v"}
BASELINE_METRICS = (
    "reliability_exact_match",
    "reliability_contains",
    "generalization_exact_match",
    "locality_unchanged",
    "perplexity",
)
COLOUR_OF_ORDER = {"depth_first": "generalization", "breadth_first": "after", None: "locality"}
DASHES = ("-", "--", ":", "-.")
X_LABELS = {"num_edits": "edits so far"}

# inches, of the bars
WIDTH, LEFT, RIGHT = 4.7, 1.45, 0.1
ROW, TITLE, SCALE, GAP = 0.46, 0.3, 0.24, 0.14

SCORE = "score"
# inches, of the heatmaps
CELL_WIDTH, CELL_HEIGHT, MAP_LEFT, MAP_TITLE, MAP_GAP = 0.4, 0.26, 0.95, 0.32, 0.3
CHARACTER_WIDTH, CHARACTERS_LEFT = 0.07, 12  # as many characters of a row's label fit into MAP_LEFT
MIN_MAP_WIDTH = 3.2
MAX_COLUMNS_BESIDE = 12  # columns of a heatmap that has another one beside it
MAX_COLUMNS_WITH_NUMBERS = 16


def draw_metrics(report: EvaluationReport, path: str | os.PathLike[str]) -> None:
    """Draw the metrics as bars with their intervals, before and after side by side, in groups.

    Args:
        report: the report to draw.
        path: the file to write, atomically; its ending chooses the format (`.png`, `.svg`, `.pdf`).

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the report has no metrics, or matplotlib does not know the file's ending.
    """
    if not report.results:
        raise ValueError(f"{path}: found no metric to draw; expected a report with at least one metric")
    with drawing():
        save_figure(metrics_figure(grouped(report.results), report.has_before, titled=True), Path(path))


def draw_curves(curves: Sequence[Mapping[str, float]], path: str | os.PathLike[str], by: str = "epoch") -> None:
    """Draw metrics and losses as lines over the epochs, or over the number of edits.

    Args:
        curves: a dictionary for each point in time: `epoch`, and values by name, such as `reliability_exact_match`,
            `locality_unchanged` or `loss`. Any value may be missing. Shares have one panel together, every other
            metric has its own.
        path: as in [`draw_metrics`].
        by: the name of what is on the x-axis: `"epoch"`, or `"num_edits"` for the curve of a
            `SequentialEvaluationCallback` or of a `ReportComparison`.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there are no values, a point has no epoch, or matplotlib does not know the file's ending.

    Example:
        >>> draw_curves([{"epoch": 1, "loss": 2.1}, {"epoch": 2, "loss": 0.7}], "curves.png")
    """
    with drawing():
        save_figure(curves_figure(curves, by), Path(path))


def draw_baselines(
    results: Sequence[BaselineResult], path: str | os.PathLike[str], columns: Sequence[str] | None = None
) -> None:
    """Draw the baselines' metrics with their intervals, and the base as a dashed line.

    Depth-first and methods that do not train have other colours. With several seeds, a bar is the standard deviation
    over seeds.

    Args:
        results: what `compare_baselines` returned, at least one.
        path: as in [`draw_metrics`].
        columns: metrics to draw; `None`: exact answers, generalization, unchanged answers, and perplexity.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if matplotlib does not know the file's ending.
    """
    with drawing():
        save_figure(baselines_figure(results, columns), Path(path))


def draw_locations(search: LocationSearchResult, path: str | os.PathLike[str]) -> None:
    """Draw heatmaps of a search's first rung, one for the score and one for each metric; the best location is framed.

    Args:
        search: what `search_locations` returned.
        path: as in [`draw_metrics`].

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if matplotlib does not know the file's ending.
    """
    with drawing():
        save_figure(locations_figure(search), Path(path))


def metric_pictures(report: EvaluationReport) -> dict[str, str]:
    """Return an SVG element for each group of metrics, by its key in `GROUPS`.

    The colours are CSS variables named after `COLOURS`, which the page must define.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    with drawing():
        groups = grouped(report.results).items()
        figures = {key: metrics_figure({key: members}, report.has_before, titled=False) for key, members in groups}
        return {key: svg_element(figure, key) for key, figure in figures.items()}


def curves_picture(curves: Sequence[Mapping[str, float]], by: str = "epoch") -> str:
    """Return the picture of [`draw_curves`] as an SVG element, with the colours of [`metric_pictures`].

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: as [`draw_curves`].
    """
    with drawing():
        return svg_element(curves_figure(curves, by), "curves")


# ---------------------------------------------------------------------- metrics

Panel = Mapping[str, MetricResult]  # metrics on one axis


def metrics_figure(groups: Mapping[str, Panel], has_before: bool, titled: bool) -> Figure:
    """Return the metrics as bars with their intervals.

    Args:
        groups: metrics by group, a key of `GROUPS`.
        has_before: some metrics have a value from before the edit, which needs a legend.
        titled: draw the groups' titles and the legend; a page has its own.
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
    """Return the metrics of each axis: shares have one together, each other metric has its own."""
    return [members] if GROUPS[key].are_shares else [{name: result} for name, result in members.items()]


def _draw_panel(axes: Axes, panel: Panel, are_shares: bool) -> None:
    labels = [textwrap.fill(label_of(name), 20, max_lines=3, placeholder="…") for name in panel]
    axes.set_yticks(range(len(panel)), labels)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a name is not a formula
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"][0], labelsize=TEXT_POINTS)
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


# ---------------------------------------------------------------------- curves


def curves_figure(curves: Sequence[Mapping[str, float]], by: str = "epoch") -> Figure:
    """Return lines over the epochs, or over what else `by` names: shares in one panel, other metrics in their own.

    Raises:
        ValueError: if there are no values, or a point has no epoch.
    """
    from matplotlib.figure import Figure

    lines = curve_lines(curves, by)
    if not lines:
        raise ValueError(f"curves: found no values; expected values by {by}, such as loss or reliability_exact_match")
    shares = [name for name in lines if GROUPS[group_of(name)].are_shares]
    panels = ([shares] if shares else []) + [[name] for name in lines if name not in shares]
    heights = [2.6 if names is shares else 1.2 for names in panels]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.4), layout="constrained")
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, names in zip(rows, panels, strict=True):
        _draw_lines(axes, {name: lines[name] for name in names}, are_shares=names is shares)
    rows[-1].set_xlabel(X_LABELS.get(by, by))
    if by == "epoch":
        rows[-1].locator_params(axis="x", integer=True)
    else:
        _scale_counts(rows[-1], [count for points in lines.values() for count, _ in points])
    return figure


def _scale_counts(axes: Axes, counts: Sequence[float]) -> None:
    """Show 10, 100 and 1,000 at equal distances, and name every count."""
    ticks = sorted(set(counts))
    if ticks[0] > 0 and len(ticks) > 1:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(ticks, [f"{count:,g}" for count in ticks])


def curve_lines(curves: Sequence[Mapping[str, float]], by: str = "epoch") -> dict[str, list[tuple[float, float]]]:
    """Return each metric's (epoch, value) pairs in the order of the epochs, or of what else `by` names.

    Raises:
        ValueError: if a point has no epoch.
    """
    without = next((number for number, point in enumerate(curves) if by not in point), None)
    if without is not None:
        raise ValueError(
            f"curves[{without}]: found {', '.join(curves[without]) or 'nothing'}; expected `{by}` as well"
        )
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in sorted(curves, key=lambda point: point[by]):
        for name, value in point.items():
            if name != by:
                lines.setdefault(name, []).append((point[by], value))
    return lines


def _draw_lines(axes: Axes, lines: Mapping[str, list[tuple[float, float]]], are_shares: bool) -> None:
    drawn: Counter[str] = Counter()
    for name, points in lines.items():
        key = group_of(name) if are_shares else "after"
        axes.plot(
            *zip(*points, strict=True),
            color=COLOURS.get(key, COLOURS["muted"])[0],
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
    # a loss falls by orders of magnitude: on a linear axis its end would be a flat line
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")


# ---------------------------------------------------------------------- baselines


def baselines_figure(results: Sequence[BaselineResult], columns: Sequence[str] | None = None) -> Figure:
    """Return the figure of `draw_baselines`: a row for each baseline, a panel for each metric."""
    from matplotlib.figure import Figure

    shown = [name for name in BASELINE_METRICS if any(name in result.metrics for result in results)]
    names = columns_of(results, columns or shown or None)
    groups = by_baseline(results)
    figure = Figure(figsize=(2.4 + 1.8 * len(names), 0.7 + 0.24 * len(groups)), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for place, group in enumerate(groups):
            estimate = over_seeds([result.metrics.get(name) for result in group])
            if estimate is not None:
                colour = COLOURS[COLOUR_OF_ORDER[group[0].baseline.edit_order]][0]
                reach = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
                axes.errorbar(estimate.value, place, xerr=reach, fmt="o", markersize=4, capsize=2, color=colour)
        before = results[0].before.get(name)
        if before is not None:
            axes.axvline(before.value, color=COLOURS["before"][0], linestyle="--", linewidth=1)
        axes.set(
            title=name.replace("_", ":\n", 1).replace("_", " "),
            yticks=range(len(groups)),
            yticklabels=[str(group[0].baseline) for group in groups],
        )
        if group_of(name) not in ("general", "other"):  # a share
            axes.set_xlim(-0.03, 1.03)
        axes.grid(axis="x")
    panels[0].invert_yaxis()  # the first on top
    return figure


# ---------------------------------------------------------------------- location search


def locations_figure(search: LocationSearchResult) -> Figure:
    """Return a heatmap for the score and for each metric: modules by layers, better is darker, the best is framed.

    Each width and each choice of tokens has rows of its own; a band is in the column of its first layer. All cells
    come from the first rung, where every location was tried in the same way.
    """
    from matplotlib.figure import Figure

    trials = search.first_rung()
    names = [SCORE, *(name for name in TABLE_METRICS if any(name in trial.metrics for trial in trials))]
    kinds = list(dict.fromkeys(trial.candidate.kind for trial in trials))
    layers = sorted({trial.layer for trial in trials})
    columns = 2 if len(layers) <= MAX_COLUMNS_BESIDE else 1
    cell = max(CELL_WIDTH, MIN_MAP_WIDTH / len(layers))
    margin = MAP_LEFT + CHARACTER_WIDTH * max(0, max(map(len, kinds)) - CHARACTERS_LEFT)
    wide, high = margin + cell * len(layers) + MAP_GAP, MAP_TITLE + CELL_HEIGHT * len(kinds) + MAP_GAP
    num_rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(wide * columns, high * num_rows))
    for number, name in enumerate(names):
        row, column = divmod(number, columns)
        left, bottom = (column + margin / wide) / columns, 1 - (row + 1 - MAP_GAP / high) / num_rows
        place = (left, bottom, cell * len(layers) / (wide * columns), CELL_HEIGHT * len(kinds) / (high * num_rows))
        _draw_map(figure.add_axes(place), name, trials, kinds, layers, search.best)
    return figure


def _draw_map(
    axes: Axes,
    name: str,
    trials: Sequence[LocationTrial],
    kinds: Sequence[str],
    layers: Sequence[int],
    best: LocationTrial,
) -> None:
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.patches import Rectangle

    lower_is_better = name != SCORE and higher_is_better(name) is False
    ends = ["#ffffff", COLOURS["after"][0]]
    colours = LinearSegmentedColormap.from_list(name, ends[::-1] if lower_is_better else ends)
    values = {(trial.candidate.kind, trial.layer): _map_value(name, trial) for trial in trials}
    known = [value for value in values.values() if not math.isnan(value)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    norm = Normalize(low, high if high > low else low + 1)
    table = [[values.get((kind, layer), math.nan) for layer in layers] for kind in kinds]
    axes.imshow(table, cmap=colours, norm=norm, aspect="auto")
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(kinds)), list(kinds))
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a name is not a formula
    by = "layer" if all(trial.num_layers == 1 for trial in trials) else "first layer"
    title = f"score by {by}, {trials[0].num_edits} edits" if name == SCORE else label_of(name)
    if name != SCORE and short_name(name) != name:
        title = f"{group_of(name)}: {title}"
    axes.set_title(f"{title} ({low:.3g} to {high:.3g})", loc="left", parse_math=False)
    if len(layers) <= MAX_COLUMNS_WITH_NUMBERS:
        _write_numbers(axes, table, norm, lower_is_better)
    corner = (layers.index(best.layer) - 0.5, kinds.index(best.candidate.kind) - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=COLOURS["generalization"][0], linewidth=2))


def _write_numbers(axes: Axes, table: Sequence[Sequence[float]], norm: object, lower_is_better: bool) -> None:
    assert callable(norm)
    for row, line in enumerate(table):
        for column, value in enumerate(line):
            share = float(norm(value)) if not math.isnan(value) else 0.0
            is_dark = (1 - share if lower_is_better else share) > 0.6
            text = DASH if math.isnan(value) else f"{value:.3g}"
            colour = "white" if is_dark else COLOURS["ink"][0]
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)


def _map_value(name: str, trial: LocationTrial) -> float:
    if name == SCORE:
        return trial.score
    estimate = trial.metrics.get(name)
    return math.nan if estimate is None else estimate["value"]
