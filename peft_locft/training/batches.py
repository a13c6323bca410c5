"""The order in which the edits are trained, and the micro-batches of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from .training_rows import TrainingRows


class EditBatches(Sampler[list[int]]):
    """The rows of every batch of one epoch, each edit exactly once; the order depends on seed and epoch alone.

    A batch lists its edits first, then variants of them and retained rows, if `rows` has any.

    Depth-first (`steps_per_edit` is set) trains edit 0 for `steps_per_edit` steps, then edit 1, and so on. The run has
    `steps_per_edit` epochs of one batch per edit.
    """

    def __init__(
        self,
        num_edits: int,
        batch_size: int,
        seed: int,
        steps_per_edit: int | None = None,
        rows: TrainingRows | None = None,
    ) -> None:
        self.num_edits = num_edits
        self.rows = TrainingRows(num_edits) if rows is None else rows
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_edit = steps_per_edit
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(self.num_edits / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        if self.steps_per_edit:
            first = self.epoch * self.num_edits
            for step in range(first, first + self.num_edits):
                yield [step // self.steps_per_edit]
            return
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_edits, generator=generator).tolist()
        batches = [order[start : start + self.batch_size] for start in range(0, self.num_edits, self.batch_size)]
        for batch, companions in zip(batches, self.rows.companions(batches, generator), strict=True):
            yield batch + companions


def micro_batches(
    indices: torch.Tensor, lengths: torch.Tensor, max_tokens: int, rank: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Split a batch into micro-batches.

    Args:
        indices: (B,) rows of the batch.
        lengths: (rows,) tokens of every row.
        max_tokens: of a micro-batch; a longer row is a micro-batch of its own.
        rank: (rows,) an order in which rows with a common prefix are neighbours, for a model that computes shared
            prefixes once, without padding. `None`: rows are padded, and grouped by length.

    Returns:
        Indices of rows, in order of length or rank.
    """
    order = indices[torch.argsort((lengths if rank is None else rank)[indices], stable=True)]
    cuts, start, sum_lengths = [], 0, 0
    for end, length in enumerate(lengths[order].tolist()):
        sum_lengths += length
        # the last of a padded micro-batch is its longest
        size = (end + 1 - start) * length if rank is None else sum_lengths
        if end > start and size > max_tokens:
            cuts.append(order[start:end])
            start, sum_lengths = end, length
    return [*cuts, order[start:]]
