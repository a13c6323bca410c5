"""Which rows of the training data are edits, variants or retained, and which of them make up a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, zip_longest

import torch


@dataclass(frozen=True)
class TrainingRows:
    """Which encoded rows are edits, variants of edits, or retained rows.

    Their order: the edits; the variants, edit by edit; the retained rows that were made from edits, edit by edit; the
    other retained rows.

    Args:
        num_edits: number of edits.
        num_variants: (edits,) variants of each edit.
        num_retained: number of retained rows.
        variants_per_epoch: variants of each edit in an epoch, drawn anew; 0.5 means one for every second edit.
        retained_per_edit: retained rows per edit in a batch.
        num_own_retained: (edits,) retained rows made from each edit. They go into the batches of their edit, whose
            step changes the answers to similar prompts most.
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
        """Index of the first retained row: the number of rows that are trained towards a target."""
        return self.num_edits + sum(self.num_variants)

    def companions(self, batches: Sequence[list[int]], generator: torch.Generator) -> list[list[int]]:
        """Return the variants and retained rows of each batch of an epoch.

        Args:
            batches: the edits of each batch.
            generator: decides the order alone.
        """
        variants = self._drawn_variants(generator) or [[]] * self.num_edits
        retained = self._drawn_retained(batches, generator) if self.num_retained else [[]] * len(batches)
        return [
            [row for edit in batch for row in variants[edit]] + beside
            for batch, beside in zip(batches, retained, strict=True)
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
        """Draw the retained rows of each batch: those of its edits by their share of all, then others in turn."""
        own, begin = [], self.first_retained
        for count in self.num_own_retained or [0] * self.num_edits:
            own.append((begin + torch.randperm(count, generator=generator)).tolist())
            begin += count
        own_share = (begin - self.first_retained) / self.num_retained
        # if all belong to edits, a batch whose edits have too few takes those of other edits
        others = self._in_turn(self.first_retained if own_share == 1 else begin, generator)
        drawn, edits_so_far, taken = [], 0, 0
        for batch in batches:
            edits_so_far += len(batch)
            until = round(self.retained_per_edit * edits_so_far)
            # one of each edit, then a second; the edits of a batch are in random order
            rounds = (row for of_round in zip_longest(*(own[edit] for edit in batch)) for row in of_round)
            num_own = round(own_share * until) - round(own_share * taken)
            rows = list(islice((row for row in rounds if row is not None), num_own))
            drawn.append(rows + list(islice(others, until - taken - len(rows))))
            taken = until
        return drawn

    def _in_turn(self, begin: int, generator: torch.Generator) -> Iterator[int]:
        """Yield the retained rows from `begin` on in random order, each once before any repeats."""
        while True:
            yield from (
                begin + torch.randperm(self.first_retained + self.num_retained - begin, generator=generator)
            ).tolist()
