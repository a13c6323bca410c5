"""Trainer callbacks: the end of training at the loss floor, the progress bar, and a line an epoch without one."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .batches import EditBatches
from .config import BreadthFirstConfig
from .learned import LearnedEdits
from .loss_history import LossHistory

STATE_KEY = "BreadthFirstTrainer"
CURVES_KEY = "EvaluationCallback"  # where that callback leaves its metrics for the provenance record


class LossFloorCallback(TrainerCallback):
    """Stops training once the edits are learned; stores the losses in checkpoints and tells the batches their epoch.

    Args:
        history: the losses of the run.
        num_new: edits that the model had not learned before the run.
        args: the recipe.
        measure: returns which edits the model has learned; `None`, or a result of `None`: the losses alone decide.
    """

    def __init__(
        self,
        history: LossHistory,
        num_new: int,
        args: BreadthFirstConfig,
        measure: Callable[[], LearnedEdits | None] | None = None,
    ) -> None:
        self.history = history
        self.num_new = num_new
        self.args = args
        self.measure = measure

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.history.restore(state.stateful_callbacks.get(STATE_KEY, LossHistory().state()))

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        batches = train_dataloader.batch_sampler
        assert isinstance(batches, EditBatches)
        batches.epoch = int(state.epoch)
        if self.args.steps_per_edit is None and self.history.epoch_losses:
            # a run that is resumed after its last epoch ends there again
            control.should_training_stop = self._is_learned()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        steps_per_edit = self.args.steps_per_edit
        if steps_per_edit is None and state.epoch.is_integer():
            # not in on_epoch_end: the checkpoint of this step is written before that
            self.history.end_epoch()
            control.should_training_stop |= self._is_learned()
        elif steps_per_edit is not None and state.global_step % steps_per_edit == 0:
            self.history.end_edit()
        state.stateful_callbacks[STATE_KEY] = self.history.state()

    def _is_learned(self) -> bool:
        """Return whether the last epoch was below the loss floor, or enough of its new edits were learned."""
        # a quotient, since (1 - 0.9) * 10 is less than 1
        learned = (self.num_new - self.history.unlearned[-1]) / max(self.num_new, 1)
        enough = self.args.stop_at_learned or math.inf
        if self.history.epoch_losses[-1] < self.args.loss_floor:
            return True
        if learned < enough:
            return False
        # the losses are those of rows, an edit may have two, and of weights that have changed since
        found = None if self.measure is None else self.measure()
        return found is None or found.reliability >= enough

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.args.steps_per_edit is None and self.history.epoch_edits:
            self.history.end_epoch()  # cut short, by max_steps or another callback
            state.stateful_callbacks[STATE_KEY] = self.history.state()


class EditProgressBar(ProgressCallback):
    """The Trainer's progress bar with loss, share of learned edits and speed, and no line for every log.

    Args:
        history: the losses of the run.
        num_edits: edits in an epoch.
    """

    def __init__(self, history: LossHistory, num_edits: int) -> None:
        super().__init__()
        self.history = history
        self.num_edits = num_edits

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.begun, self.seen_before = time.perf_counter(), self.history.edits_seen
        if self.training_bar is not None:
            self.training_bar.update(state.global_step)
            self.current_step = state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if self.training_bar is not None:
            speed = (self.history.edits_seen - self.seen_before) / (time.perf_counter() - self.begun)
            learned = [f"{1 - number / self.num_edits:.2f} learned" for number in self.history.unlearned[-1:]]
            parts = [f"loss {self.history.step_loss:.4f}", *learned, f"{speed:.0f} edits/s"]
            self.training_bar.set_postfix_str(", ".join(parts))

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        pass


def logging_beside_bars(shown: bool) -> AbstractContextManager[None]:
    """Return a context in which log messages on the console do not tear progress bars.

    Args:
        shown: whether there are bars.
    """
    if not shown:
        return nullcontext()
    return logging_redirect_tqdm([logging.root, logging.getLogger("transformers")])


@contextmanager
def logged_without(name: str, text: str) -> Iterator[None]:
    """Leave out a message of another library's logger that a user can do nothing about."""
    logger = logging.getLogger(name)

    def is_other(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


class EpochLines(PrinterCallback):
    """Prints a line for every log of the Trainer, where there is no progress bar (`disable_tqdm=True`).

    Args:
        history: the losses of the run.
        num_new: edits that the model had not learned before the run.
    """

    def __init__(self, history: LossHistory, num_new: int) -> None:
        self.history = history
        self.num_new = num_new

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_local_process_zero or "loss" not in (logs or {}):
            return  # the totals at the end of training
        epochs, losses = state.epoch or 0.0, self.history.epoch_losses
        if epochs.is_integer() and losses:
            shares = [f", {1 - number / max(self.num_new, 1):.2f} learned" for number in self.history.unlearned[-1:]]
            tqdm.write(f"epoch {epochs:.0f}: loss {losses[-1]:.4f}{''.join(shares)}")
        else:
            tqdm.write(f"step {state.global_step}: loss {float(logs['loss']):.4f}")
