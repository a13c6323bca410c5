"""What a run trains on beside its edits: variants of them, and prompts whose answers it keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, zip_longest

import torch


@dataclass(frozen=True)
class TrainingRows:
    """Which rows of what is encoded are edits, which are variants of them, and which are kept as the base has them.

    The edits come first, then the variants, edit by edit, then what is kept: first what was made of an edit, edit by
    edit, then all else.

    Args:
        num_edits: rows that are edits.
        num_variants: (edits,) rows that are variants of each.
        num_retained: rows that are kept.
        variants_per_epoch: of each edit's, drawn anew every epoch, 0.5 for one of every second edit's.
        retained_per_edit: kept rows beside every edit of a batch.
        num_own_retained: (edits,) retained rows made of each edit. They go into the batches that their
            edit is in: what an update changes first is what is asked as its edits ask.
        num_known: edits that the model had learned before this run.
    """

    num_edits: int
    num_variants: Sequence[int] = ()
    num_retained: int = 0
    variants_per_epoch: float = math.inf
    retained_per_edit: float = 0.0
    num_own_retained: Sequence[int] = ()
    num_known: int = 0

    @property
    def num_new(self) -> int:
        """Edits that the model had not learned before this run."""
        return self.num_edits - self.num_known

    @cached_property
    def first_retained(self) -> int:
        """The number of rows that are trained towards a target, before those that are kept."""
        return self.num_edits + sum(self.num_variants)

    def companions(self, batches: Sequence[list[int]], generator: torch.Generator) -> list[list[int]]:
        """Return the variants and kept rows that go with each batch of an epoch.

        Args:
            batches: of edits, an epoch of them.
            generator: the order follows from it alone.
        """
        variants = self._drawn_variants(generator) or [[]] * self.num_edits
        kept = self._drawn_retained(batches, generator) if self.num_retained else [[]] * len(batches)
        return [
            [row for edit in batch for row in variants[edit]] + beside
            for batch, beside in zip(batches, kept, strict=True)
        ]

    def _drawn_variants(self, generator: torch.Generator) -> list[list[int]]:
        """Draw variants of each edit."""
        drawn, begin = [], self.num_edits
        for count in self.num_variants:
            number = self._number(count, generator)
            places = range(count) if number == count else torch.randperm(count, generator=generator)[:number].tolist()
            drawn.append([begin + place for place in places])
            begin += count
        return drawn

    def _number(self, count: int, generator: torch.Generator) -> int:
        if self.variants_per_epoch >= count:
            return count
        whole, part = divmod(self.variants_per_epoch, 1)
        more = bool(part) and bool(torch.rand((), generator=generator) < part)
        return min(int(whole) + more, count)

    def _drawn_retained(self, batches: Sequence[list[int]], generator: torch.Generator) -> list[list[int]]:
        """Draw the kept rows of each batch: its edits' own for their share of all, and what is no edit's in turn."""
        own, begin = [], self.first_retained
        for count in self.num_own_retained or [0] * self.num_edits:
            own.append((begin + torch.randperm(count, generator=generator)).tolist())
            begin += count
        own_share = (begin - self.first_retained) / self.num_retained
        # where all are some edit's, a batch whose edits have too few takes those of others
        others = self._in_turn(self.first_retained if own_share == 1 else begin, generator)
        drawn, edits_so_far, taken = [], 0, 0
        for batch in batches:
            edits_so_far += len(batch)
            until = round(self.retained_per_edit * edits_so_far)
            # one of each edit's, then a second; the edits of a batch are in random order
            rounds = (row for of_round in zip_longest(*(own[edit] for edit in batch)) for row in of_round)
            num_own = round(own_share * until) - round(own_share * taken)
            rows = list(islice((row for row in rounds if row is not None), num_own))
            drawn.append(rows + list(islice(others, until - taken - len(rows))))
            taken = until
        return drawn

    def _in_turn(self, begin: int, generator: torch.Generator) -> Iterator[int]:
        """Yield the kept rows from `begin` on, none a second time before all the others were."""
        while True:
            yield from (
                begin + torch.randperm(self.first_retained + self.num_retained - begin, generator=generator)
            ).tolist()
