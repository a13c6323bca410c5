"""Which locations a search tries, for how long, and which of them go on: pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FEWEST_EDITS = 8  # of the first rung
FINALISTS = 2  # at least so many are tried on all edits: few edits tell near ones apart by chance


@dataclass(frozen=True, order=True)
class Candidate:
    """A location that is tried: a kind of module (see `location_of`) in a decoder layer, counted from 0."""

    module: str
    layer: int

    def __str__(self) -> str:
        return f"{self.module}, layer {self.layer}"

    @property
    def file_name(self) -> str:
        return f"{self.module}-{self.layer:03d}"


@dataclass(frozen=True)
class Rung:
    """How locations are tried: on how many edits, in batches of how many."""

    num_edits: int
    batch_size: int


def rungs(num_edits: int, batch_size: int, num_candidates: int, keep: int, num_rungs: int | None = None) -> list[Rung]:
    """Return how candidates are tried at first, and how those that are left are tried then.

    The last rung is the recipe on all edits. Each before it has one in `keep` of the edits of the next, in batches
    that are smaller by as much: every trial takes the steps of the whole recipe, as a location that learns slowly
    needs them, and what a step computes is less. A rung costs a candidate up to `keep` times as much as the one
    before, and has one in `keep` of its candidates, `FINALISTS` at least.

    Args:
        num_edits: of the sample.
        batch_size: of the recipe.
        num_candidates: that begin.
        keep: one in so many goes on to the next rung.
        num_rungs: how many; 1 tries every candidate on all edits. `None`: as many as leave `FINALISTS` for the last,
            while the first has `FEWEST_EDITS` edits or more, and no more than half of those of the next.

    Raises:
        ValueError: if `keep` is below 2, `num_rungs` is below 1, or the edits are too few for so many.

    Example:
        >>> [(rung.num_edits, rung.batch_size) for rung in rungs(100, 20, num_candidates=160, keep=5)]
        [(8, 2), (20, 4), (100, 20)]
    """
    if keep < 2:
        raise ValueError(f"keep={keep}: one in so many goes on; expected 2 or more.")
    if num_rungs is None:
        sizes, wanted = [num_edits], 1 + math.ceil(math.log(max(1, num_candidates / FINALISTS), keep) - 1e-9)
        while len(sizes) < wanted and sizes[0] >= 2 * FEWEST_EDITS:
            sizes.insert(0, max(FEWEST_EDITS, math.ceil(sizes[0] / keep)))
    else:
        sizes = [math.ceil(num_edits / keep**power) for power in reversed(range(num_rungs))]
        if num_rungs < 1 or len(set(sizes)) < len(sizes):
            raise ValueError(
                f"num_rungs={num_rungs}: expected 1 or more, and {num_edits} edits have not so many sizes."
            )
    whole = min(batch_size, num_edits)
    return [Rung(size, math.ceil(size * whole / num_edits)) for size in sizes]


def edits_of(ladder: Sequence[Rung], rung: int, num_edits: int) -> slice:
    """Return which edits of the sample a rung has: others than those before it, as long as there are enough.

    What chance has made of a location on some edits it will hardly make of it on others.
    """
    begin = sum(before.num_edits for before in ladder[:rung])
    end = begin + ladder[rung].num_edits
    return slice(begin, end) if end <= num_edits else slice(ladder[rung].num_edits)


def survivors(scores: dict[Candidate, float], keep: int) -> list[Candidate]:
    """Return the best one in `keep`, the best first; of equal ones, those that were tried first."""
    ranking = sorted(scores, key=lambda candidate: -scores[candidate])
    return ranking[: num_survivors(len(ranking), keep)]


def num_survivors(num_candidates: int, keep: int) -> int:
    """Return how many go on: one in `keep`, but `FINALISTS` at least where there are as many."""
    return max(min(FINALISTS, num_candidates), num_candidates // keep)


def coarse_layers(layers: Sequence[int], stride: int) -> list[int]:
    """Return every `stride`-th of some layers, the last of them included.

    Raises:
        ValueError: if `stride` is below 1 or there are fewer layers.
    """
    if not 1 <= stride <= len(layers):
        raise ValueError(f"stride={stride}: expected 1 to {len(layers)}, the number of layers to try.")
    return list(layers[::-1][::stride][::-1])


def neighbours(best: Iterable[Candidate], layers: Sequence[int], step: int) -> list[Candidate]:
    """Return the candidates that are `step` places before and behind others among the layers, each once."""
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
    """Return on how many edits a search without a stride trains, all its trials together."""
    total, count = 0, num_candidates
    for rung in ladder:
        total += count * rung.num_edits
        count = num_survivors(count, keep)
    return total
