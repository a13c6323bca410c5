"""The heatmaps of a search: what is in which cell, and which is framed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_locft.locating.results import LocationSearchResult, LocationTrial
from peft_locft.reporting.location_figures import locations_figure
from peft_locft.reporting.plots import draw_locations


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
