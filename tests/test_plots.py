"""Pictures: what is in them, what cannot be drawn, and that matplotlib is left as it was."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from example_reports import example_report, result
from matplotlib.figure import Figure
from matplotlib.image import imread

from peft_locft.evaluation.intervals import Estimate
from peft_locft.evaluation.metric_result import MetricResult
from peft_locft.locating.results import LocationSearchResult, LocationTrial
from peft_locft.reporting.plots import (
    COLOURS,
    curve_lines,
    curves_figure,
    curves_picture,
    draw_curves,
    draw_locations,
    draw_metrics,
    locations_figure,
    metric_pictures,
    metrics_figure,
)
from peft_locft.reporting.words import grouped


def texts(svg: str) -> list[str]:
    """Return the texts of an SVG element, which must be well-formed."""
    return [
        "".join(each.itertext()) for each in xml.etree.ElementTree.fromstring(svg).iter() if each.tag.endswith("}text")
    ]


def bars(figure: Figure) -> list[tuple[float, str]]:
    """Return each bar's length and colour, from top to bottom."""
    found = [patch for axes in figure.axes for patch in axes.patches]
    return [(patch.get_width(), matplotlib.colors.to_hex(patch.get_facecolor())) for patch in found]  # type: ignore[attr-defined]


def drawn(results: dict[str, MetricResult], titled: bool = False) -> Figure:
    has_before = any(each.before is not None for each in results.values())
    return metrics_figure(grouped(results), has_before, titled=titled)


def test_bars_are_as_long_as_the_figures() -> None:
    figure = drawn({"locality_exact_match": result(0.25, 0.75), "locality_unchanged": result(0.5)})
    before, after = COLOURS["before"][0], COLOURS["after"][0]
    assert bars(figure) == [(0.75, before), (0.25, after), (0.5, after)]
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["exact match", "unchanged"]
    assert axes.get_xlim() == (0, pytest.approx(1.17))
    assert {text.get_text() for text in axes.texts} == {"0.750", "0.250", "0.500"}


def test_intervals_are_drawn() -> None:
    (axes,) = drawn({"reliability_contains": MetricResult("", Estimate(0.5, 0.25, 0.625), None, None, 8)}).axes
    (interval,) = axes.collections
    assert interval.get_paths()[0].vertices[:, 0].tolist() == [0.25, 0.625]  # type: ignore[index,union-attr]


def test_what_is_no_share_has_an_axis_of_its_own() -> None:
    figure = drawn({"perplexity": result(30, 20), "kl_from_base": result(0.2), "other_thing": result(-3)})
    perplexity, divergence, other = figure.axes
    assert perplexity.get_xlim()[1] > 30
    assert divergence.get_xlim()[1] < 1
    assert other.get_xlim()[0] < -3


def test_a_figure_that_is_not_finite_is_written_and_not_drawn() -> None:
    figure = drawn({"perplexity": MetricResult("", Estimate(math.inf, 2, math.inf), None, None, 1)})
    assert bars(figure) == []
    assert [text.get_text() for text in figure.axes[0].texts] == [" inf"]


def test_titles_and_legend_are_for_a_picture_alone() -> None:
    results = {"reliability_exact_match": result(1, 0), "edit_score": result(0.5, 0.1)}
    alone = drawn(results, titled=True)
    assert [text.get_text() for text in alone.texts] == ["Reliability", "Edit score"]
    assert [text.get_text() for text in alone.legends[0].get_texts()] == ["before the edit", "after the edit"]
    assert not drawn(results).texts and not drawn(results).legends
    assert not drawn({"edit_score": result(0.5)}, titled=True).legends


@pytest.mark.parametrize("ending", ["png", "PNG", "svg", "pdf"])
def test_a_picture_is_written_whole(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"metrics.{ending}"
    draw_metrics(example_report(), path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending.lower()]
    assert path.read_bytes().startswith(start)


def test_a_picture_has_ink_on_it(tmp_path: Path) -> None:
    draw_curves(example_report().curves, tmp_path / "curves.png")
    pixels = imread(tmp_path / "curves.png")
    assert pixels.shape[1] > 800
    blue = np.array(matplotlib.colors.to_rgb(COLOURS["reliability"][0]))
    assert (np.abs(pixels[..., :3] - blue).max(axis=-1) < 0.02).sum() > 500


@pytest.mark.parametrize("name", ["metrics", "metrics.docx"])
def test_an_ending_that_cannot_be_written_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name}: found the ending .*; expected one of .*\.png"):
        draw_metrics(example_report(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no metric to draw"):
        draw_metrics(example_report(results={}), tmp_path / "metrics.png")
    for curves in ([], [{"epoch": 1.0}]):
        with pytest.raises(ValueError, match="curves: found no values; expected values by epoch"):
            draw_curves(curves, tmp_path / "curves.png")
    with pytest.raises(ValueError, match=r"curves\[1\]: found loss; expected `epoch` as well"):
        draw_curves([{"epoch": 1}, {"loss": 2}], tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_curves_are_in_the_order_of_the_epochs() -> None:
    assert curve_lines(example_report().curves) == {
        "reliability_exact_match": [(1, 0.5), (2, 0.875)],
        "locality_unchanged": [(1, 0.75)],
        "loss": [(1, 2.5), (2, 0.0625)],
    }


def test_curves_have_shares_together_and_the_rest_below() -> None:
    shares, loss = curves_figure(example_report().curves).axes
    assert [line.get_label() for line in shares.lines] == ["reliability: exact match", "locality: unchanged"]
    assert shares.lines[0].get_ydata().tolist() == [0.5, 0.875]  # type: ignore[union-attr]
    assert loss.get_title(loc="left") == "loss"
    assert loss.get_yscale() == "log"
    assert loss.get_xlabel() == "epoch"


def test_curves_of_one_kind_can_be_told_apart() -> None:
    points = [{"epoch": epoch, "reliability_exact_match": 0.5, "reliability_contains": 0.6} for epoch in (1, 2)]
    exact, contains = curves_figure(points).axes[0].lines
    assert exact.get_color() == contains.get_color()
    assert exact.get_linestyle() != contains.get_linestyle()


@pytest.mark.parametrize("point", [{"loss": 0.0}, {"loss": math.nan}, {"reliability_exact_match": 0.5}])
def test_one_epoch_and_one_figure_are_enough(point: dict[str, float]) -> None:
    curves = [{"epoch": 1, **point}]
    assert "epoch" in texts(curves_picture(curves))


def test_a_page_can_colour_its_pictures() -> None:
    pictures = metric_pictures(example_report())
    assert list(pictures) == ["reliability", "generalization", "locality", "edit_score", "general"]
    for svg in (*pictures.values(), curves_picture(example_report().curves)):
        assert svg.startswith("<svg")
        assert "var(--ink)" in svg and "var(--grid)" in svg
        assert not any(light in svg for light, _ in COLOURS.values())
        assert "<style" not in svg and "<script" not in svg
    assert "var(--before)" in pictures["reliability"]
    assert "var(--before)" not in pictures["locality"]


def test_no_two_colours_are_alike() -> None:
    for theme in zip(*COLOURS.values(), strict=True):
        assert len(set(theme)) == len(COLOURS)


def test_no_two_pictures_share_an_id_and_each_finds_its_own() -> None:
    seen: set[str] = set()
    for svg in metric_pictures(example_report()).values():
        ids = set(re.findall(r'\bid="([^"]*)"', svg))
        assert ids and not ids & seen
        assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', svg)) <= ids
        seen |= ids


def test_the_same_report_is_the_same_picture() -> None:
    assert metric_pictures(example_report()) == metric_pictures(example_report())


def test_a_hostile_name_is_text() -> None:
    name = "task_<script>$\\frac{1$ & a very long name that goes on and on and on"
    svg = metric_pictures(example_report(results={name: result(0.5)}))["other"]
    assert "<script>" not in svg
    assert any("<script>" in text for text in texts(svg))


# in a process of its own, where nothing else has imported pyplot or chosen a backend
LEFT_ALONE = """
import json, sys
import matplotlib
from example_reports import example_report
from peft_locft.reporting.plots import draw_curves, draw_metrics

matplotlib.rcParams["font.size"] = 3
matplotlib.rcParams["text.usetex"] = True
before = {name: repr(dict.__getitem__(matplotlib.rcParams, name)) for name in matplotlib.rcParams}
draw_metrics(example_report(), sys.argv[1] + "/metrics.png")
draw_curves(example_report().curves, sys.argv[1] + "/curves.svg")
after = {name: repr(dict.__getitem__(matplotlib.rcParams, name)) for name in matplotlib.rcParams}
print(json.dumps([[name for name in before if before[name] != after[name]], "matplotlib.pyplot" in sys.modules]))
"""


def test_matplotlib_is_left_as_it_was_and_its_settings_are_not_used(tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    command = [sys.executable, "-c", LEFT_ALONE, str(tmp_path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "[[], false]"
    assert (tmp_path / "metrics.png").exists() and (tmp_path / "curves.svg").exists()


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    drawing: list[Any] = [
        lambda: draw_metrics(example_report(), tmp_path / "metrics.png"),
        lambda: draw_curves(example_report().curves, tmp_path / "curves.png"),
        lambda: metric_pictures(example_report()),
        lambda: curves_picture(example_report().curves),
    ]
    for draw in drawing:
        with pytest.raises(ImportError, match=r"Pictures need matplotlib: pip install 'peft-locft\[plot\]'"):
            draw()
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- the heatmaps of a search


def trial(module: str, layer: int, rung: int, score: float, **figures: float) -> LocationTrial:
    estimates = {name: {"value": value, "low": value, "high": value} for name, value in figures.items()}
    return LocationTrial(module, layer, rung, 3 + rung, 1e-3, score, estimates, {}, None, 1, ("a",), (), 1.0, 1.0)


def example() -> LocationSearchResult:
    trials = [
        trial("down", 1, 0, 0.5, reliability_token_accuracy=1.0, kl_from_base=0.5),
        trial("down", 7, 0, 0.25, reliability_token_accuracy=0.75, kl_from_base=0.125),
        trial("up", 1, 0, 0.75, reliability_token_accuracy=0.5, kl_from_base=0.25),
        trial("up", 1, 1, 0.125, reliability_token_accuracy=0.25, perplexity=9.0),
    ]
    return LocationSearchResult(trials, {"score": {}}, {})


def panels(search: LocationSearchResult) -> dict[str, Any]:
    return {axes.get_title(loc="left").partition(" (")[0]: axes for axes in locations_figure(search).axes}


def test_a_cell_is_a_location_of_the_first_rung() -> None:
    found = panels(example())
    assert list(found) == ["score by layer, 3 edits", "reliability: token accuracy", "KL from the base"]
    score = found["score by layer, 3 edits"]
    np.testing.assert_array_equal(score.images[0].get_array().filled(-1), [[0.5, 0.25], [0.75, -1]])
    assert [label.get_text() for label in score.get_xticklabels()] == ["1", "7"]
    assert [label.get_text() for label in score.get_yticklabels()] == ["down", "up"]
    assert sorted(text.get_text() for text in score.texts) == ["-", "0.25", "0.5", "0.75"]


def test_each_width_and_choice_of_tokens_has_a_row() -> None:
    shallow = replace(trial("down", 1, 0, 0.5), gradient_tokens="subject")
    band = replace(trial("down", 1, 0, 0.75), num_layers=3, gradient_tokens="subject")
    search = LocationSearchResult([shallow, replace(shallow, layer=2, score=0.25), band], {}, {})
    [axes] = panels(search).values()
    assert axes.get_title(loc="left").startswith("score by first layer, 3 edits")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["down, subject", "down, 3 layers, subject"]
    np.testing.assert_array_equal(axes.images[0].get_array().filled(-1), [[0.5, 0.25], [0.75, -1]])
    [frame] = axes.patches
    assert frame.get_xy() == (-0.5, 0.5)
    # long labels have the room that they need
    [label] = [each for each in axes.get_yticklabels() if each.get_text() == band.candidate.kind]
    axes.figure.canvas.draw()
    assert label.get_window_extent().x0 >= 0


def test_the_best_is_framed_and_better_is_darker() -> None:
    found = panels(example())
    for axes in found.values():
        [frame] = axes.patches
        assert frame.get_xy() == (-0.5, 0.5)  # the first layer, the second module

    def darkness(name: str, value: float) -> float:
        image = found[name].images[0]
        return -sum(image.cmap(image.norm(value))[:3])

    assert darkness("reliability: token accuracy", 1.0) > darkness("reliability: token accuracy", 0.5)
    assert darkness("KL from the base", 0.125) > darkness("KL from the base", 0.5)


def test_it_is_written(tmp_path: Path) -> None:
    draw_locations(example(), tmp_path / "locations.png")
    assert (tmp_path / "locations.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"found the ending '\.txt'"):
        draw_locations(example(), tmp_path / "locations.txt")


def test_many_layers_have_a_row_of_their_own() -> None:
    few = LocationSearchResult([trial("up", layer, 0, 0.5, perplexity=2.0) for layer in range(3)], {}, {})
    many = LocationSearchResult([trial("up", layer, 0, 0.5, perplexity=2.0) for layer in range(30)], {}, {})
    tops = [[axes.get_position().y0 for axes in locations_figure(search).axes] for search in (few, many)]
    assert len(set(tops[0])) == 1 and len(set(tops[1])) == 2
    assert not locations_figure(many).axes[0].texts
