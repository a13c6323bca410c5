"""Rungs, survivors and neighbours: pure functions."""

from __future__ import annotations

import pytest

from peft_locft.location_plan import Candidate, coarse_layers, cost, neighbours, rungs, survivors


def test_rungs_grow_by_what_is_cut_off() -> None:
    assert rungs(27, 10, keep=3) == [3, 9, 27]
    assert rungs(100, 160, keep=3) == [4, 12, 34, 100]
    assert rungs(100, 160, keep=3, num_rungs=2) == [34, 100]
    assert rungs(100, 160, keep=3, num_rungs=1) == [100]
    # neither one location, nor a few edits, have anything to cut
    assert rungs(100, 1, keep=3) == [100]
    assert rungs(8, 100, keep=3) == [8]
    assert rungs(1, 1, keep=2) == [1]


def test_a_search_costs_the_edits_that_are_trained() -> None:
    assert cost([3, 9, 27], 10, keep=3) == (10 * 3 + 3 * 9 + 1 * 27) / 27
    assert cost([27], 10, keep=3) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 10, 1), "keep=1: one in so many goes on; expected 2 or more"),
        ((10, 10, 2, 0), "num_rungs=0: expected 1 or more"),
        ((4, 10, 3, 4), "num_rungs=4: expected 1 or more, and 4 edits have not so many sizes"),
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
