"""What happens around the steps: the end of training, the record of losses, the progress bar."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ProgressCallback

from .batches import EditBatches, LossRecord
from .config import BreadthFirstConfig

STATE_KEY = "BreadthFirstTrainer"
CURVES_KEY = "EvaluationCallback"  # where that leaves its figures, which go into the provenance record


class FloorAndRecord(TrainerCallback):
    """Keeps the record of losses in the trainer's state, tells the batches their epoch, and stops what is learned."""

    def __init__(self, record: LossRecord, num_new: int, args: BreadthFirstConfig) -> None:
        self.record = record
        self.args = args
        self.num_new = num_new

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.record.restore(state.stateful_callbacks.get(STATE_KEY, LossRecord().state()))

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        batches = train_dataloader.batch_sampler
        assert isinstance(batches, EditBatches)
        batches.epoch = int(state.epoch)
        if self.args.steps_per_edit is None and self.record.epoch_losses:
            # a run that is resumed after its last epoch ends there again
            control.should_training_stop = self._is_learned()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        steps_per_edit = self.args.steps_per_edit
        if steps_per_edit is None and state.epoch.is_integer():
            # here and not in on_epoch_end: a checkpoint of this step comes before that, and is resumed after it
            self.record.end_epoch()
            control.should_training_stop |= self._is_learned()
        elif steps_per_edit is not None and state.global_step % steps_per_edit == 0:
            self.record.end_edit()
        state.stateful_callbacks[STATE_KEY] = self.record.state()

    def _is_learned(self) -> bool:
        """Whether the last epoch was below the floor, or enough of its edits were learned."""
        # of edits that are new: among many that are known, few of them would pass for a small share. A quotient, since
        # (1 - 0.9) * 10 is less than 1
        learned = (self.num_new - self.record.unlearned[-1]) / max(self.num_new, 1)
        asked = self.args.stop_at_learned or math.inf
        return learned >= asked or self.record.epoch_losses[-1] < self.args.loss_floor

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.args.steps_per_edit is None and self.record.epoch_edits:
            self.record.end_epoch()  # cut short, by max_steps or another callback
            state.stateful_callbacks[STATE_KEY] = self.record.state()


class EditProgress(ProgressCallback):
    """The Trainer's progress bar with loss, share of the edits learned, and speed, in place of a line for every log.

    Args:
        record: the last loss, and how many edits were not learned yet when the last epoch came to them.
        num_edits: of an epoch.
    """

    def __init__(self, record: LossRecord, num_edits: int) -> None:
        super().__init__()
        self.record = record
        self.num_edits = num_edits

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.begun, self.seen_before = time.perf_counter(), self.record.edits_seen
        if self.training_bar is not None:
            self.training_bar.update(state.global_step)
            self.current_step = state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if self.training_bar is not None:
            speed = (self.record.edits_seen - self.seen_before) / (time.perf_counter() - self.begun)
            learned = [f"{1 - number / self.num_edits:.0%} learned" for number in self.record.unlearned[-1:]]
            figures = [f"loss {self.record.step_loss:.4f}", *learned, f"{speed:.0f} edits/s"]
            self.training_bar.set_postfix_str(", ".join(figures))

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        pass
