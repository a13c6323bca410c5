"""Edits that are learned sit out some epochs: faster than the published recipe, and not quite the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

STATE_KEY = "RestingEdits"


class RestingEdits:
    """Which edits are left out of an epoch, because their loss was below the floor a short while ago.

    Args:
        num_rows: edits and their variants.
        floor: the loss below which an edit is learned.
        epochs: how many it then sits out; 0 for none.
    """

    def __init__(self, num_rows: int, floor: float, epochs: int) -> None:
        self.floor = floor
        self.epochs = epochs
        self.losses = torch.zeros(num_rows)  # the mean over scored tokens, when it was last computed
        self.back_in = torch.zeros(num_rows, dtype=torch.int64)

    def split(self, indices: Sequence[int], epoch: int) -> tuple[list[int], list[int]]:
        """Return the edits of a batch that are trained in this epoch, and those that rest."""
        if not self.epochs:
            return list(indices), []
        rests = (self.back_in[list(indices)] > epoch).tolist()
        return (
            [index for index, is_resting in zip(indices, rests, strict=True) if not is_resting],
            [index for index, is_resting in zip(indices, rests, strict=True) if is_resting],
        )

    def add(self, indices: torch.Tensor, losses: torch.Tensor, epoch: int) -> None:
        """Take notice of the losses of edits that were trained.

        Args:
            indices: (B,)
            losses: (B,) the mean over each edit's scored tokens.
            epoch: the one at hand, counted from 0.
        """
        if self.epochs:
            losses = losses.cpu()
            self.losses[indices] = losses
            self.back_in[indices[losses < self.floor]] = epoch + 1 + self.epochs

    def state(self) -> dict[str, Any]:
        resting = self.back_in.nonzero().flatten()
        columns = (resting, self.back_in[resting], self.losses[resting])
        return dict(zip(("edits", "back_in", "losses"), (column.tolist() for column in columns), strict=True))

    def restore(self, state: dict[str, Any]) -> None:
        self.back_in.zero_()
        edits = torch.tensor(state.get("edits", []), dtype=torch.int64)
        self.back_in[edits] = torch.tensor(state.get("back_in", []), dtype=torch.int64)
        self.losses[edits] = torch.tensor(state.get("losses", []))
