"""The losses of a run, step by step and epoch by epoch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LossHistory:
    """The losses of a run; every checkpoint has them, so that a resumed run continues with the same numbers.

    Attributes:
        epoch_losses: of the edits and their variants, one per epoch; with depth-first, one per edit.
        step_loss: of the last complete step.
        open_loss, open_edits: of the current step so far, while gradients accumulate.
        retained_losses: of the retained rows, one per epoch.
        unlearned: number of unlearned edits, one per epoch.
        retained_sum, epoch_sum, epoch_unlearned, epoch_edits: of the current epoch so far.
        edits_seen: in all steps of the run.
    """

    epoch_losses: list[float] = field(default_factory=list)
    step_loss: float = math.inf
    open_loss: float = 0.0
    open_edits: int = 0
    retained_losses: list[float] = field(default_factory=list)
    retained_sum: float = 0.0
    unlearned: list[int] = field(default_factory=list)
    epoch_sum: float = 0.0
    epoch_unlearned: int = 0
    epoch_edits: int = 0
    edits_seen: int = 0

    def add_batch(self, share: float, num_edits: int, retained_share: float = 0.0, num_unlearned: int = 0) -> None:
        """Add the shares of one batch in the loss of its step, see `RowLosses.batch_shares`.

        Args:
            share: of the edits and their variants.
            num_edits: edits in the batch.
            retained_share: of the retained rows.
            num_unlearned: edits in the batch that are not learned yet.
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
        """Close a depth-first edit with the loss of its last step."""
        self.epoch_losses.append(self.step_loss)
        self.step_loss = math.inf

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds, as plain data."""
        # JSON has no infinity
        return asdict(self) | {"step_loss": None if math.isinf(self.step_loss) else self.step_loss}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        # copies: the lists belong to a checkpoint, or to what an earlier run returned
        for name in ("epoch_losses", "retained_losses", "unlearned"):
            setattr(self, name, list(state[name]))
        self.step_loss = math.inf if state["step_loss"] is None else state["step_loss"]
