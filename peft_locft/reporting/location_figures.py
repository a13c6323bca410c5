"""The figure of a search for a location: a heatmap a metric, to be made in the style of `plots`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..locating.results import IN_TABLE, LocationSearchResult, LocationTrial
from .figures import COLOURS
from .words import group_of, higher_is_better, label_of, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCORE = "score"
CELL_WIDTH, CELL_HEIGHT, LEFT, TITLE, GAP = 0.4, 0.26, 0.95, 0.32, 0.3  # inches
LEAST_WIDTH = 3.2
MOST_BESIDE = 12  # columns of a panel that has another one beside it
MOST_WRITTEN = 16  # columns, in which there is room for numbers


def locations_figure(search: LocationSearchResult) -> Figure:
    """Return a panel for the score and for each metric: modules by layers, the better the darker, the best framed.

    All cells are of the first rung, in which every location was tried in the same way.
    """
    from matplotlib.figure import Figure

    trials = search.first_rung()
    names = [SCORE, *(name for name in IN_TABLE if any(name in trial.figures for trial in trials))]
    modules = list(dict.fromkeys(trial.module for trial in trials))
    layers = sorted({trial.layer for trial in trials})
    columns = 2 if len(layers) <= MOST_BESIDE else 1
    cell = max(CELL_WIDTH, LEAST_WIDTH / len(layers))
    wide, high = LEFT + cell * len(layers) + GAP, TITLE + CELL_HEIGHT * len(modules) + GAP
    num_rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(wide * columns, high * num_rows))
    for number, name in enumerate(names):
        row, column = divmod(number, columns)
        left, bottom = (column + LEFT / wide) / columns, 1 - (row + 1 - GAP / high) / num_rows
        place = (left, bottom, cell * len(layers) / (wide * columns), CELL_HEIGHT * len(modules) / (high * num_rows))
        _draw(figure.add_axes(place), name, trials, modules, layers, search.best)
    return figure


def _draw(
    axes: Axes,
    name: str,
    trials: Sequence[LocationTrial],
    modules: Sequence[str],
    layers: Sequence[int],
    best: LocationTrial,
) -> None:
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.patches import Rectangle

    lower_is_better = name != SCORE and higher_is_better(name) is False
    ends = ["#ffffff", COLOURS["after"][0]]
    colours = LinearSegmentedColormap.from_list(name, ends[::-1] if lower_is_better else ends)
    values = {(trial.module, trial.layer): _value(name, trial) for trial in trials}
    known = [value for value in values.values() if not math.isnan(value)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    norm = Normalize(low, high if high > low else low + 1)
    table = [[values.get((module, layer), math.nan) for layer in layers] for module in modules]
    axes.imshow(table, cmap=colours, norm=norm, aspect="auto")
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(modules)), list(modules))
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a name is no formula
    title = f"score by layer, {trials[0].num_edits} edits" if name == SCORE else label_of(name)
    if name != SCORE and short_name(name) != name:
        title = f"{group_of(name)}: {title}"
    axes.set_title(f"{title} ({low:.3g} to {high:.3g})", loc="left", parse_math=False)
    if len(layers) <= MOST_WRITTEN:
        _write(axes, table, norm, lower_is_better)
    corner = (layers.index(best.layer) - 0.5, modules.index(best.module) - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=COLOURS["generalization"][0], linewidth=2))


def _write(axes: Axes, table: Sequence[Sequence[float]], norm: object, lower_is_better: bool) -> None:
    assert callable(norm)
    for row, line in enumerate(table):
        for column, value in enumerate(line):
            share = float(norm(value)) if not math.isnan(value) else 0.0
            is_dark = (1 - share if lower_is_better else share) > 0.6
            text = "-" if math.isnan(value) else f"{value:.3g}"
            colour = "white" if is_dark else COLOURS["ink"][0]
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)


def _value(name: str, trial: LocationTrial) -> float:
    if name == SCORE:
        return trial.score
    estimate = trial.figures.get(name)
    return math.nan if estimate is None else estimate["value"]
