"""What a run trains on beside its edits: variants of them, and prompts whose answers it keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class TrainingRows:
    """Which rows of what is encoded are edits, which are variants of them, and which are kept as the base has them.

    The edits come first, then the variants, edit by edit, then what is kept.

    Args:
        num_edits: rows that are edits.
        num_variants: (edits,) rows that are variants of each.
        num_kept: rows that are kept.
        variants_per_epoch: of each edit's, drawn anew every epoch, 0.5 for one of every second edit's.
        kept_per_edit: kept rows beside every edit of a batch.
    """

    num_edits: int
    num_variants: Sequence[int] = ()
    num_kept: int = 0
    variants_per_epoch: float = math.inf
    kept_per_edit: float = 0.0

    @cached_property
    def first_kept(self) -> int:
        """The number of rows that are trained towards a target, before those that are kept."""
        return self.num_edits + sum(self.num_variants)

    def companions(self, batches: Sequence[list[int]], generator: torch.Generator) -> list[list[int]]:
        """Return the variants and kept rows that go with each batch of an epoch.

        Args:
            batches: of edits, an epoch of them.
            generator: the order follows from it alone.
        """
        variants, begin = [], self.num_edits
        for count in self.num_variants:
            number = self._number(count, generator)
            drawn = range(count) if number == count else torch.randperm(count, generator=generator)[:number].tolist()
            variants.append([begin + each for each in drawn])
            begin += count
        kept = self._kept_in_turn(round(self.kept_per_edit * sum(map(len, batches))), generator)
        companions, taken, edits_so_far = [], 0, 0
        for batch in batches:
            edits_so_far += len(batch)
            until = min(round(self.kept_per_edit * edits_so_far), len(kept))
            own = [row for edit in batch for row in variants[edit]] if variants else []
            companions.append(own + kept[taken:until])
            taken = until
        return companions

    def _number(self, count: int, generator: torch.Generator) -> int:
        if self.variants_per_epoch >= count:
            return count
        whole, part = divmod(self.variants_per_epoch, 1)
        more = bool(part) and bool(torch.rand((), generator=generator) < part)
        return min(int(whole) + more, count)

    def _kept_in_turn(self, number: int, generator: torch.Generator) -> list[int]:
        """Draw kept rows, none a second time before all the others were."""
        drawn: list[int] = []
        while self.num_kept and len(drawn) < number:
            drawn += (self.first_kept + torch.randperm(self.num_kept, generator=generator)).tolist()
        return drawn[:number]
