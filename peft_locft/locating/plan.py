"""Which locations a search tries, on how many edits, and which go on to the next rung: pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from ..data.gradient_tokens import GradientTokens

MIN_EDITS = 8  # of the first rung
MIN_FINALISTS = 2  # tried on all edits: on few edits, the order of similar locations is chance
GRADIENT_TOKENS = ("auto", *get_args(GradientTokens))  # the choices of `BreadthFirstConfig.gradient_tokens`


@dataclass(frozen=True, order=True)
class Candidate:
    """A location to try: a kind of module in one or more neighbouring decoder layers.

    Args:
        module: the kind of module, see `location_of`.
        layer: index of the decoder layer, from 0; of a band, the first one.
        num_layers: number of layers that are trained together.
        gradient_tokens: the tokens that write into the delta; `None`: as the recipe says.

    Example:
        >>> print(Candidate("down", 5, num_layers=3, gradient_tokens="subject"))
        down, layers 5 to 7, subject
    """

    module: str
    layer: int
    num_layers: int = 1
    gradient_tokens: str | None = None

    def __str__(self) -> str:
        layers = f"layer {self.layer}" if self.num_layers == 1 else f"layers {self.layer} to {self.last}"
        return ", ".join([self.module, layers, *self._tokens])

    @property
    def last(self) -> int:
        """The last layer."""
        return self.layer + self.num_layers - 1

    @property
    def kind(self) -> str:
        """What is trained, without the place: candidates of one kind differ in their layer alone."""
        width = [] if self.num_layers == 1 else [f"{self.num_layers} layers"]
        return ", ".join([self.module, *width, *self._tokens])

    @property
    def file_name(self) -> str:
        layers = [self.layer] if self.num_layers == 1 else [self.layer, self.last]
        return "-".join([self.module, *(f"{layer:03d}" for layer in layers), *self._tokens])

    @property
    def _tokens(self) -> list[str]:
        return [] if self.gradient_tokens is None else [self.gradient_tokens]


@dataclass(frozen=True)
class Rung:
    """One round of trials: the number of edits and the batch size."""

    num_edits: int
    batch_size: int


def rungs(num_edits: int, batch_size: int, num_candidates: int, keep: int, num_rungs: int | None = None) -> list[Rung]:
    """Return the rungs of successive halving.

    The last rung is the recipe on all edits. Each rung before has one in `keep` of the next one's edits, in batches
    smaller by the same factor: every trial takes as many steps as the whole recipe, since some locations learn slowly,
    but a step computes less. A trial costs up to `keep` times as much as in the rung before; one in `keep` candidates
    goes on, at least `MIN_FINALISTS`.

    Args:
        num_edits: size of the sample.
        batch_size: of the recipe.
        num_candidates: candidates in the first rung.
        keep: one in `keep` candidates goes on to the next rung.
        num_rungs: 1 tries every candidate on all edits. `None` chooses the number that leaves `MIN_FINALISTS` for the
            last rung, if the first then has at least `MIN_EDITS` edits and at most half of the next one's.

    Raises:
        ValueError: if `keep` is below 2, `num_rungs` is below 1, or there are too few edits for `num_rungs`.

    Example:
        >>> [(rung.num_edits, rung.batch_size) for rung in rungs(100, 20, num_candidates=160, keep=5)]
        [(8, 2), (20, 4), (100, 20)]
    """
    if keep < 2:
        raise ValueError(f"keep={keep}: expected 2 or more; one in `keep` locations goes on to the next rung.")
    if num_rungs is None:
        sizes, wanted = [num_edits], 1 + math.ceil(math.log(max(1, num_candidates / MIN_FINALISTS), keep) - 1e-9)
        while len(sizes) < wanted and sizes[0] >= 2 * MIN_EDITS:
            sizes.insert(0, max(MIN_EDITS, math.ceil(sizes[0] / keep)))
    else:
        sizes = [math.ceil(num_edits / keep**power) for power in reversed(range(num_rungs))]
        if num_rungs < 1:
            raise ValueError(f"num_rungs={num_rungs}: expected 1 or more.")
        if len(set(sizes)) < len(sizes):
            raise ValueError(
                f"num_rungs={num_rungs}: {num_edits} edits are too few for as many rungs. Use fewer rungs."
            )
    whole = min(batch_size, num_edits)
    return [Rung(size, math.ceil(size * whole / num_edits)) for size in sizes]


def edits_of(ladder: Sequence[Rung], rung: int, num_edits: int) -> slice:
    """Return the edits of a rung, as a slice of the sample: other edits than in the rungs before, while there are any.

    A location that was lucky on some edits is unlikely to be lucky on others.
    """
    begin = sum(before.num_edits for before in ladder[:rung])
    end = begin + ladder[rung].num_edits
    return slice(begin, end) if end <= num_edits else slice(ladder[rung].num_edits)


def survivors(scores: dict[Candidate, float], keep: int) -> list[Candidate]:
    """Return the candidates that go on, the best first; of equal ones, the first tried."""
    ranking = sorted(scores, key=lambda candidate: -scores[candidate])
    return ranking[: num_survivors(len(ranking), keep)]


def num_survivors(num_candidates: int, keep: int) -> int:
    """Return how many candidates go on: one in `keep`, at least `MIN_FINALISTS` if there are as many."""
    return max(min(MIN_FINALISTS, num_candidates), num_candidates // keep)


def coarse_layers(layers: Sequence[int], stride: int) -> list[int]:
    """Return every `stride`-th of some layers, including the last.

    Raises:
        ValueError: if `stride` is below 1 or above the number of layers.
    """
    if not 1 <= stride <= len(layers):
        raise ValueError(f"stride={stride}: expected 1 to {len(layers)}, the number of layers to try.")
    return list(layers[::-1][::stride][::-1])


def first_candidates(
    modules: Sequence[str],
    layers: Sequence[int],
    stride: int,
    num_layers: int,
    widths: Sequence[int] = (1,),
    gradient_tokens: Sequence[str | None] = (None,),
) -> list[Candidate]:
    """Return the candidates that a search begins with: every combination, in every `stride`-th layer.

    Args:
        modules: kinds of modules.
        layers: first layers to try, in ascending order.
        stride: see `coarse_layers`. For each width, it counts the layers where a band fits.
        num_layers: decoder layers of the model. A band that goes past the last one is no candidate.
        widths: numbers of neighbouring layers to train together.
        gradient_tokens: tokens that write; `None`: as the recipe says.

    Raises:
        ValueError: if `stride` is below 1 or above the number of layers, or a width fits nowhere.
    """
    coarse_layers(layers, stride)  # raises for a stride that is too long at every width
    coarse = {}
    for width in widths:
        fitting = [layer for layer in layers if layer + width <= num_layers]
        if not fitting:
            raise ValueError(
                f"widths: found {width}, but the model has {num_layers} decoder layers, and no band of {width} fits "
                f"from layer {layers[0]} on. Use a smaller width, or earlier layers."
            )
        coarse[width] = coarse_layers(fitting, min(stride, len(fitting)))
    return [
        Candidate(module, layer, width, tokens)
        for module in modules
        for width in widths
        for tokens in gradient_tokens
        for layer in coarse[width]
    ]


def neighbours(best: Iterable[Candidate], layers: Sequence[int], step: int, num_layers: int) -> list[Candidate]:
    """Return the candidates `step` places before and after the best ones in `layers`, each once.

    They have the module, width and tokens of the best ones. A band that goes past the last of the model's `num_layers`
    layers is left out.
    """
    place = {layer: index for index, layer in enumerate(layers)}
    return list(
        dict.fromkeys(
            replace(candidate, layer=layers[index])
            for candidate in best
            for index in (place[candidate.layer] - step, place[candidate.layer] + step)
            if 0 <= index < len(layers) and layers[index] + candidate.num_layers <= num_layers
        )
    )


def num_trained(ladder: Sequence[Rung], num_candidates: int, keep: int) -> int:
    """Return the number of edits that all trials of a search without a stride train on."""
    total, count = 0, num_candidates
    for rung in ladder:
        total += count * rung.num_edits
        count = num_survivors(count, keep)
    return total
