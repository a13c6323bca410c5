"""Rungs, survivors and neighbours: pure functions."""

from __future__ import annotations

from typing import Any

import pytest

from peft_locft.location_plan import Candidate, coarse_layers, cost, neighbours, rungs, survivors


def sizes(*arguments: Any, **options: Any) -> list[tuple[int, int]]:
    return [(rung.num_edits, rung.num_epochs) for rung in rungs(*arguments, **options)]


def test_rungs_grow_by_what_is_cut_off() -> None:
    assert sizes(27, 25, 10, keep=3) == [(9, 9), (27, 9), (27, 25)]
    assert sizes(100, 25, 160, keep=4) == [(25, 7), (100, 7), (100, 25)]
    assert sizes(100, 25, 160, keep=3) == [(12, 9), (34, 9), (100, 9), (100, 25)]
    assert sizes(32, 25, 10, keep=4) == [(8, 7), (32, 7), (32, 25)]
    assert sizes(100, 25, 160, keep=3, num_rungs=2) == [(100, 9), (100, 25)]
    assert sizes(100, 25, 160, keep=3, num_rungs=1) == [(100, 25)]
    # neither one location, nor a few edits, have much to cut
    assert sizes(100, 25, 1, keep=3) == [(100, 25)]
    assert sizes(8, 2, 100, keep=3) == [(8, 1), (8, 2)]
    assert sizes(1, 25, 9, keep=3) == [(1, 9), (1, 25)]


def test_a_search_costs_what_is_trained() -> None:
    ladder = rungs(27, 25, 10, keep=3)
    assert cost(ladder, 10, keep=3) == (10 * 9 * 9 + 3 * 27 * 9 + 27 * 25) / (27 * 25)
    assert cost(ladder[-1:], 10, keep=3) == 10
    # a large model's, and a small one's
    assert cost(rungs(100, 25, 160, keep=4), 160, keep=4) < 160 / 4
    assert cost(rungs(32, 25, 10, keep=4), 10, keep=4) < 10 / 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 25, 10, 1), "keep=1: one in so many goes on; expected 2 or more"),
        ((10, 25, 10, 2, 0), "num_rungs=0: expected 1 or more"),
        ((4, 25, 10, 3, 5), "num_rungs=5: expected 1 or more, and 4 edits have not so many sizes"),
    ],
)
def test_rungs_that_cannot_be(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rungs(*arguments)


def test_the_best_survive_and_of_equals_the_first() -> None:
    scores = {Candidate("down", layer): score for layer, score in enumerate([0.1, 0.5, 0.5, 0.4, 0.0, 0.2])}
    assert [candidate.layer for candidate in survivors(scores, 3)] == [1, 2]
    assert [candidate.layer for candidate in survivors(scores, 10)] == [1]


def test_layers_are_approached() -> None:
    layers = list(range(8))
    assert coarse_layers(layers, 3) == [1, 4, 7]
    assert coarse_layers(layers, 1) == layers
    best = [Candidate("down", 7), Candidate("up", 4)]
    assert neighbours(best, layers, 2) == [Candidate("down", 5), Candidate("up", 2), Candidate("up", 6)]
    # among those that are to be tried, not among all that there are
    assert neighbours([Candidate("up", 20)], [5, 10, 20, 25], 1) == [Candidate("up", 10), Candidate("up", 25)]
    for stride in (0, 9):
        with pytest.raises(ValueError, match=f"stride={stride}: expected 1 to 8"):
            coarse_layers(layers, stride)
