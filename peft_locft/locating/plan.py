"""Which locations a search tries, on how many edits, and which go on to the next rung: pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MIN_EDITS = 8  # of the first rung
MIN_FINALISTS = 2  # tried on all edits: on few edits, the order of similar locations is chance


@dataclass(frozen=True, order=True)
class Candidate:
    """A location to try: a kind of module (see `location_of`) in a decoder layer, from 0."""

    module: str
    layer: int

    def __str__(self) -> str:
        return f"{self.module}, layer {self.layer}"

    @property
    def file_name(self) -> str:
        return f"{self.module}-{self.layer:03d}"


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


def neighbours(best: Iterable[Candidate], layers: Sequence[int], step: int) -> list[Candidate]:
    """Return the candidates `step` places before and after the best ones in `layers`, each once."""
    place = {layer: index for index, layer in enumerate(layers)}
    return list(
        dict.fromkeys(
            Candidate(candidate.module, layers[index])
            for candidate in best
            for index in (place[candidate.layer] - step, place[candidate.layer] + step)
            if 0 <= index < len(layers)
        )
    )


def num_trained(ladder: Sequence[Rung], num_candidates: int, keep: int) -> int:
    """Return the number of edits that all trials of a search without a stride train on."""
    total, count = 0, num_candidates
    for rung in ladder:
        total += count * rung.num_edits
        count = num_survivors(count, keep)
    return total
