"""Which locations a search tries, on how many edits, and which of them go on: pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FEWEST_EDITS = 3  # of the first rung


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


def rungs(num_edits: int, num_candidates: int, keep: int, num_rungs: int | None = None) -> list[int]:
    """Return on how many edits candidates are tried: few at first, `keep` times as many in each rung, all in the last.

    Args:
        num_edits: of the sample.
        num_candidates: that begin.
        keep: one in so many goes on to the next rung, which has so many times the edits.
        num_rungs: how many; 1 tries every candidate on all edits. `None`: as many as leave one candidate for the
            last, unless the first would have less than `FEWEST_EDITS` edits.

    Raises:
        ValueError: if `keep` is below 2, `num_rungs` is below 1, or the edits are too few for so many.

    Example:
        >>> rungs(num_edits=100, num_candidates=160, keep=3)
        [4, 12, 34, 100]
    """
    if keep < 2:
        raise ValueError(f"keep={keep}: one in so many goes on; expected 2 or more.")
    if num_rungs is None:
        most = min(num_candidates, num_edits / FEWEST_EDITS)
        num_rungs = 1 + (math.floor(math.log(most, keep) + 1e-9) if most > 1 else 0)
    sizes = [math.ceil(num_edits / keep**power) for power in reversed(range(num_rungs))]
    if num_rungs < 1 or len(set(sizes)) < len(sizes):
        raise ValueError(f"num_rungs={num_rungs}: expected 1 or more, and {num_edits} edits have not so many sizes.")
    return sizes


def survivors(scores: dict[Candidate, float], keep: int) -> list[Candidate]:
    """Return the best one in `keep`, one at least, the best first; of equal ones, those that were tried first."""
    ranking = sorted(scores, key=lambda candidate: -scores[candidate])
    return ranking[: max(1, len(ranking) // keep)]


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


def cost(sizes: Sequence[int], num_candidates: int, keep: int) -> float:
    """Return how many trainings of one location on all edits a search without a stride is worth.

    Example:
        >>> cost([4, 12, 34, 100], num_candidates=160, keep=3)
        23.54
    """
    total, count = 0, num_candidates
    for size in sizes:
        total += count * size
        count = max(1, count // keep)
    return total / sizes[-1]
