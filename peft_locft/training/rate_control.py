"""Corrects a learning rate that turns out too high or too low, from the losses of the run."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState

from .loss_history import LossHistory

logger = logging.getLogger(__name__)

STATE_KEY = "RateControl"  # where a checkpoint holds the state
STEPS_BETWEEN = 5  # fewest optimizer steps between two decisions: fewer say little
TOO_HIGH = 1.25  # loss after the first steps, relative to the loss before training
TOO_SLOW = 0.95  # loss relative to the one of the decision before, above which the rate is raised
UNTOUCHED = 0.5  # loss relative to the one before training, below which the rate is not raised: it does learn
MOTIONLESS = 0.98  # the same, above which it is raised by more
LOWER, RAISE = 0.25, 2.0
STALLED = 2  # decisions in a row without a loss that is lower by a twentieth, after which the rate is halved
MAX_HALVED = 3  # times
LOWEST = 2.0**-20  # of the factor
HIGHEST = 0.5  # of the rate relative to the weights; a loss that does not fall above it has another reason


@dataclass
class _State:
    """What is known of the rate.

    Attributes:
        factor: current rate relative to the first one.
        first_loss: mean loss of the edits before training.
        last_loss: mean loss up to the last decision; `None`: since a restart there was none.
        sum_losses: of the steps since the last decision.
        num_steps: since the last decision.
        total_steps: of the run.
        may_raise: no rate that is too high was seen.
        best_loss: lowest of the losses at the decisions since a restart.
        num_stalled: decisions in a row without a lower one.
        num_halved: how often the rate was halved for that.
    """

    factor: float = 1.0
    first_loss: float | None = None
    last_loss: float | None = None
    sum_losses: float = 0.0
    num_steps: int = 0
    total_steps: int = 0
    may_raise: bool = True
    best_loss: float | None = None
    num_stalled: int = 0
    num_halved: int = 0


class RateControl(TrainerCallback):
    """Raises a learning rate that learns next to nothing; lowers one that makes the edits less probable.

    It decides after each epoch, but not before five steps. If the loss is well above the one before training, or not
    finite, the trained weights are put back, the optimizer starts again, and the rate is a quarter. If the loss has
    fallen by less than a twentieth since the last decision, and by less than half since the beginning, the rate is
    doubled (if it has hardly fallen at all: by four), until a rate was too high. If it has fallen by more than half
    and then stays where it is, twice in a row, the rate is halved: steps of that size no longer come closer.

    Args:
        history: the losses of the run.
        relative_rate: the first rate, relative to the weights.
    """

    def __init__(self, history: LossHistory, relative_rate: float) -> None:
        self.history = history
        self.relative_rate = relative_rate
        self.state = _State()
        self.is_diverged = False
        self._initial: dict[str, torch.Tensor | None] = {}

    def remember(self, model: nn.Module) -> None:
        """Copy the trained weights of a model, to put them back. Call it before a checkpoint is loaded."""
        # a fresh delta is zero, and needs no copy
        self._initial = {
            name: parameter.detach().to("cpu", copy=True) if parameter.any() else None
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @property
    def needs_first_loss(self) -> bool:
        return self.state.first_loss is None

    def takes_over(self, loss: float) -> bool:
        """Whether a loss is not finite, and training will start again with a lower rate after this step."""
        self.is_diverged |= (
            self.state.total_steps > 0 and self.state.factor * LOWER >= LOWEST and not math.isfinite(loss)
        )
        return self.is_diverged

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.state = _State(**state.stateful_callbacks.get(STATE_KEY, {}))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        own, loss = self.state, self.history.step_loss
        assert own.first_loss is not None
        own.sum_losses += loss
        own.num_steps += 1
        own.total_steps += 1
        # one batch says little: that of an update may hold the few new edits alone
        if self.is_diverged:
            self._start_again(kwargs)
        elif own.num_steps >= STEPS_BETWEEN and state.epoch is not None and state.epoch.is_integer():
            self._decide(kwargs)
        state.stateful_callbacks[STATE_KEY] = asdict(own)

    def _decide(self, objects: dict[str, Any]) -> None:
        own = self.state
        assert own.first_loss is not None
        loss, before = own.sum_losses / own.num_steps, own.last_loss
        own.last_loss, own.sum_losses, own.num_steps = loss, 0.0, 0
        if loss > TOO_HIGH * own.first_loss:
            self._start_again(objects)
            return
        if before is not None and own.may_raise and loss > max(TOO_SLOW * before, UNTOUCHED * own.first_loss):
            self._multiply(RAISE**2 if loss > MOTIONLESS * before else RAISE, objects)
        elif own.best_loss is not None and loss > TOO_SLOW * own.best_loss and loss <= UNTOUCHED * own.first_loss:
            self._halve_if_stalled(objects)
        else:
            own.num_stalled = 0
        own.best_loss = loss if own.best_loss is None else min(loss, own.best_loss)

    def _halve_if_stalled(self, objects: dict[str, Any]) -> None:
        own = self.state
        own.num_stalled += 1
        if own.num_stalled >= STALLED and own.num_halved < MAX_HALVED:
            own.num_stalled, own.num_halved, own.may_raise = 0, own.num_halved + 1, False
            self._multiply(1 / RAISE, objects)

    def _start_again(self, objects: dict[str, Any]) -> None:
        """Put the trained weights back and lower the rate."""
        self.is_diverged = False
        own = self.state
        own.may_raise, own.last_loss, own.sum_losses, own.num_steps = False, None, 0.0, 0
        own.best_loss, own.num_stalled = None, 0
        self._multiply(LOWER, objects)
        parameters = dict(objects["model"].named_parameters())
        with torch.no_grad():
            for name, value in self._initial.items():
                if value is None:
                    parameters[name].zero_()
                else:
                    parameters[name].copy_(value)
        optimizer: Optimizer = objects["optimizer"]
        getattr(optimizer, "optimizer", optimizer).state.clear()

    def _multiply(self, by: float, objects: dict[str, Any]) -> None:
        factor = self.state.factor * by
        if factor < LOWEST or (by > 1 and factor * self.relative_rate > HIGHEST):
            return
        self.state.factor = factor
        scheduler = objects["lr_scheduler"]
        scheduler = getattr(scheduler, "scheduler", scheduler)
        scheduler.base_lrs = [rate * by for rate in scheduler.base_lrs]
        for group in objects["optimizer"].param_groups:
            group["lr"] = group["lr"] * by
        logger.info("Learning rate %s: now %g times the first one.", "raised" if by > 1 else "lowered", factor)
