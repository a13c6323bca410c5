"""Rungs, survivors and neighbours: pure functions."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest

from peft_locft.locating.plan import (
    GRADIENT_TOKENS,
    Candidate,
    Rung,
    coarse_layers,
    edits_of,
    first_candidates,
    neighbours,
    num_trained,
    rungs,
    survivors,
)
from peft_locft.locating.results import LocationTrial
from peft_locft.training.config import GradientTokens
from peft_locft.workflows.location_trials import mean_scores


def sizes(*arguments: Any, **options: Any) -> list[tuple[int, int]]:
    return [(rung.num_edits, rung.batch_size) for rung in rungs(*arguments, **options)]


def test_rungs_grow_by_what_is_cut_off() -> None:
    assert sizes(72, 36, 10, keep=3) == [(8, 4), (24, 12), (72, 36)]
    assert sizes(100, 20, 160, keep=5) == [(8, 2), (20, 4), (100, 20)]
    assert sizes(300, 100, 160, keep=5) == [(12, 4), (60, 20), (300, 100)]
    assert sizes(100, 20, 25, keep=4, num_rungs=2) == [(25, 5), (100, 20)]
    assert sizes(100, 20, 160, keep=3, num_rungs=1) == [(100, 20)]
    # a batch is never larger than the sample, and never empty
    assert sizes(32, 100, 10, keep=4) == [(8, 8), (32, 32)]
    assert sizes(32, 1, 10, keep=4) == [(8, 1), (32, 1)]
    # neither the last two locations, nor a few edits, have much to cut
    assert sizes(100, 25, 1, keep=3) == sizes(100, 25, 2, keep=3) == [(100, 25)]
    assert sizes(15, 2, 100, keep=3) == [(15, 2)]


@pytest.mark.parametrize("batch_size", [1, 7, 20, 100])
@pytest.mark.parametrize("num_edits", [16, 33, 100, 500])
def test_every_rung_takes_the_steps_of_the_whole_recipe(num_edits: int, batch_size: int) -> None:
    ladder = rungs(num_edits, batch_size, 160, keep=5)
    whole = math.ceil(num_edits / ladder[-1].batch_size)
    for rung in ladder:
        if rung.batch_size > 1:
            # as nearly as whole batches can, which have one edit at least
            assert whole / 2 <= math.ceil(rung.num_edits / rung.batch_size) <= whole
    assert ladder[-1] == Rung(num_edits, min(batch_size, num_edits))


def test_a_search_costs_what_is_trained() -> None:
    ladder = rungs(72, 36, 10, keep=3)
    assert num_trained(ladder, 10, keep=3) == 10 * 8 + 3 * 24 + 2 * 72
    assert num_trained(ladder[-1:], 10, keep=3) == 10 * 72
    assert num_trained(rungs(100, 20, 160, keep=5), 160, keep=5) < 160 / 6 * 100


def test_a_rung_has_other_edits_than_those_before_it_as_long_as_there_are_some() -> None:
    ladder = rungs(100, 20, 160, keep=5)
    assert [edits_of(ladder, rung, 100) for rung in range(3)] == [slice(0, 8), slice(8, 28), slice(100)]
    assert edits_of(rungs(15, 2, 100, keep=3), 0, 15) == slice(0, 15)


def trial(layer: int, rung: int, num_edits: int, score: float, failed: str | None = None) -> LocationTrial:
    return LocationTrial("down", layer, rung, num_edits, 1e-3, score, {}, {}, failed, 1, (), (), 1.0, 1.0)


def test_what_is_known_of_a_location_is_the_mean_of_its_trials() -> None:
    trials = [trial(1, 0, 8, 0.9), trial(2, 0, 8, 0.5), trial(3, 0, 8, 0.8)]
    trials += [trial(1, 1, 24, 0.5), trial(3, 1, 24, 0.7, failed="NaN")]
    found = mean_scores(trials, [Candidate("down", layer) for layer in (1, 3)])
    assert found == {Candidate("down", 1): pytest.approx(0.6), Candidate("down", 3): 0.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 25, 10, 1), "keep=1: expected 2 or more; one in `keep` locations"),
        ((10, 25, 10, 2, 0), "num_rungs=0: expected 1 or more"),
        ((4, 25, 10, 3, 5), "num_rungs=5: 4 edits are too few for as many rungs"),
    ],
)
def test_rungs_that_cannot_be(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rungs(*arguments)


def test_the_best_survive_and_of_equals_the_first() -> None:
    scores = {Candidate("down", layer): score for layer, score in enumerate([0.1, 0.5, 0.5, 0.4, 0.0, 0.2])}
    assert [candidate.layer for candidate in survivors(scores, 3)] == [1, 2]
    # two are left to be told apart on all edits, if there are two
    assert [candidate.layer for candidate in survivors(scores, 10)] == [1, 2]
    assert survivors({Candidate("up", 0): 1.0}, 10) == [Candidate("up", 0)]


def test_layers_are_approached() -> None:
    layers = list(range(8))
    assert coarse_layers(layers, 3) == [1, 4, 7]
    assert coarse_layers(layers, 1) == layers
    best = [Candidate("down", 7), Candidate("up", 4)]
    assert neighbours(best, layers, 2, 8) == [Candidate("down", 5), Candidate("up", 2), Candidate("up", 6)]
    # among those that are to be tried, not among all that there are
    assert neighbours([Candidate("up", 20)], [5, 10, 20, 25], 1, 26) == [Candidate("up", 10), Candidate("up", 25)]
    for stride in (0, 9):
        with pytest.raises(ValueError, match=f"stride={stride}: expected 1 to 8"):
            coarse_layers(layers, stride)


def test_a_candidate_names_its_band_and_its_tokens() -> None:
    names = {
        Candidate("down", 5): ("down, layer 5", "down", "down-005"),
        Candidate("down", 5, 3): ("down, layers 5 to 7", "down, 3 layers", "down-005-007"),
        Candidate("down", 5, 1, "subject"): ("down, layer 5, subject", "down, subject", "down-005-subject"),
        Candidate("down", 5, 3, "from_subject"): (
            "down, layers 5 to 7, from_subject",
            "down, 3 layers, from_subject",
            "down-005-007-from_subject",
        ),
    }
    for candidate, expected in names.items():
        assert (str(candidate), candidate.kind, candidate.file_name) == expected


def test_a_search_begins_with_every_combination_that_fits() -> None:
    # as before there were bands
    assert first_candidates(["down", "up"], [0, 4], 1, 5) == [
        Candidate("down", 0), Candidate("down", 4), Candidate("up", 0), Candidate("up", 4)
    ]  # fmt: skip
    found = first_candidates(["down"], range(5), 1, 5, widths=(1, 4), gradient_tokens=("all", "subject"))
    assert [str(candidate) for candidate in found] == [
        *(f"down, layer {layer}, {tokens}" for tokens in ("all", "subject") for layer in range(5)),
        *(f"down, layers {layer} to {layer + 3}, {tokens}" for tokens in ("all", "subject") for layer in (0, 1)),
    ]
    # the stride counts the layers where a band fits, and may be longer than they are
    assert [each.layer for each in first_candidates(["down"], range(9), 4, 9, widths=(3,))] == [2, 6]
    assert [each.layer for each in first_candidates(["down"], range(9), 4, 9, widths=(8,))] == [1]
    with pytest.raises(ValueError, match="stride=10: expected 1 to 9"):
        first_candidates(["down"], range(9), 10, 9, widths=(3,))


@pytest.mark.parametrize(("layers", "width"), [(range(5), 6), ([3, 4], 3)])
def test_a_band_that_fits_nowhere_is_refused(layers: Any, width: int) -> None:
    message = f"widths: found {width}, but the model has 5 decoder layers, .* fits from layer {layers[0]} on"
    with pytest.raises(ValueError, match=message):
        first_candidates(["down"], layers, 1, 5, widths=(1, width))


def test_neighbours_keep_module_width_and_tokens() -> None:
    best = Candidate("up", 4, 3, "subject")
    assert neighbours([best], range(8), 2, 8) == [Candidate("up", 2, 3, "subject")]  # layers 6 to 8 are too many
    assert neighbours([best], range(8), 1, 8) == [Candidate("up", layer, 3, "subject") for layer in (3, 5)]


def test_the_tokens_to_try_are_those_of_the_recipe() -> None:
    assert sorted(GRADIENT_TOKENS) == sorted(get_args(GradientTokens))
