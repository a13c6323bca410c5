"""In which order the edits are trained, and the losses that the floor is held against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils.data import Sampler

from .training_rows import TrainingRows


class EditBatches(Sampler[list[int]]):
    """The rows of every batch of one epoch, each edit exactly once; the order follows from seed and epoch alone.

    A batch begins with its edits. Behind them come, where `rows` has any, variants of them and rows that are kept.

    Depth-first (`steps_per_edit` given) has as many epochs as each edit has steps, and as many batches in each as
    there are edits: the run is edit 0 so many times, then edit 1, and so on, cut into epochs of equal length.
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
    """Cut a batch into micro-batches.

    Args:
        indices: (B,) edits of the batch.
        lengths: (edits,) tokens of every edit.
        max_tokens: of a micro-batch; an edit that is longer by itself is one alone.
        rank: (edits,) an order in which edits that begin alike are neighbours, where what they share is computed once
            and nothing is padded. Without it the edits are padded, and those of similar length put together.

    Returns:
        Indices, in order of length or rank.
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


@dataclass
class LossRecord:
    """The losses of a run; part of every checkpoint, so that a resumed run goes on with the same numbers."""

    epoch_losses: list[float] = field(default_factory=list)
    step_loss: float = math.inf  # of the last step that was whole
    open_loss: float = 0.0  # of the batches so far, where gradients accumulate
    open_edits: int = 0
    retained_losses: list[float] = field(default_factory=list)
    retained_sum: float = 0.0
    unlearned: list[int] = field(default_factory=list)  # edits, by epoch
    epoch_sum: float = 0.0
    epoch_unlearned: int = 0
    epoch_edits: int = 0
    edits_seen: int = 0

    def add_batch(self, share: float, num_edits: int, retained_share: float = 0.0, num_unlearned: int = 0) -> None:
        """Add one batch's shares of its step's loss: of the edits and their variants, and of what is kept.

        Args:
            share: of the edits and their variants.
            num_edits: in the batch.
            retained_share: of what is kept.
            num_unlearned: of its edits, those that are not learned yet, see `RowLosses.figures`.
        """
        self.open_loss += share
        self.open_edits += num_edits
        self.retained_sum += retained_share * num_edits
        self.epoch_unlearned += num_unlearned

    def end_step(self) -> float:
        """Close a step; return its loss."""
        self.step_loss = self.open_loss
        self.epoch_sum += self.open_loss * self.open_edits
        self.epoch_edits += self.open_edits
        self.edits_seen += self.open_edits
        self.open_loss, self.open_edits = 0.0, 0
        return self.step_loss

    def end_epoch(self) -> float:
        """Close a breadth-first epoch; return its mean loss, weighted by batch size."""
        self.epoch_losses.append(self.epoch_sum / self.epoch_edits)
        self.retained_losses.append(self.retained_sum / self.epoch_edits)
        self.unlearned.append(self.epoch_unlearned)
        self.epoch_sum, self.retained_sum, self.epoch_edits, self.epoch_unlearned = 0.0, 0.0, 0, 0
        return self.epoch_losses[-1]

    def end_edit(self) -> None:
        """Close a depth-first edit: its last loss is what counts."""
        self.epoch_losses.append(self.step_loss)
        self.step_loss = math.inf

    def state(self) -> dict[str, Any]:
        # JSON has no infinity
        return asdict(self) | {"step_loss": None if math.isinf(self.step_loss) else self.step_loss}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        # the lists in the state are part of a checkpoint, or of what an earlier run has returned
        for name in ("epoch_losses", "retained_losses", "unlearned"):
            setattr(self, name, list(state[name]))
        self.step_loss = math.inf if state["step_loss"] is None else state["step_loss"]
