"""Evaluates edits during training, and selects the best epoch."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..data.edits import Edit
from ..data.texts import TextSource
from ..evaluation.config import EvaluationConfig
from ..evaluation.evaluator import EditEvaluator
from ..evaluation.metrics import LOWER_IS_BETTER
from ..evaluation.report import EvaluationReport
from ..io.files import write_atomically
from .callbacks import CURVES_KEY, STATE_KEY

logger = logging.getLogger(__name__)

BEST_NAME = "best_epoch.safetensors"
CURVES_NAME = "evaluation_curves"


class EvaluationCallback(TrainerCallback):
    """Evaluates a sample of the edits every few epochs, and can restore the best epoch and stop early.

    Each evaluation writes `evaluation_curves.json` and, with `draw`, `evaluation_curves.png` to `args.output_dir`.
    Beside them it stores the trained weights of the best epoch alone, no checkpoint. Without `args.output_dir` these
    weights are held in memory, and no file is written.

    Args:
        edits: the sample, with rephrasings and probes; they need not be in training.
        every: epochs between evaluations. The first evaluation is before the first epoch.
        args: the evaluation; the default computes no probabilities.
        text: for perplexity and KL, see `evaluate_edits`.
        best_metric: metric that selects the best epoch; `None`: train to the end and use the last epoch.
        patience: stop after this many evaluations without improvement. The weights of the best epoch are restored at
            the end of training.
        draw: draws the curves to a file, such as `peft_locft.reporting.draw_curves`; `None`: no picture.

    Attributes:
        curves: one dictionary per evaluation: `epoch`, `loss`, and the value of every metric.

    Raises:
        ValueError: if `every` or `patience` is below 1; when training begins, if `best_metric` is not measured, the
            trunk is offloaded (`offload_trunk=True`), or a rephrasing or probe is trained on (see
            `EvaluationConfig.on_leak`).

    Example:
        >>> callback = EvaluationCallback(edits[:100], every=5, best_metric="generalization_exact_match")
        >>> BreadthFirstTrainer(model, args, train_dataset=edits, processing_class=tokenizer, callbacks=[callback])
    """

    def __init__(
        self,
        edits: Sequence[Edit],
        every: int = 5,
        args: EvaluationConfig | None = None,
        *,
        text: TextSource | None = None,
        best_metric: str | None = None,
        patience: int = 2,
        draw: Callable[[Sequence[Mapping[str, float]], Path], None] | None = None,
    ) -> None:
        if every < 1 or patience < 1:
            raise ValueError(f"EvaluationCallback: found every={every}, patience={patience}; expected 1 or more.")
        self.edits = edits
        self.every = every
        self.args = args or EvaluationConfig(protocols=["generation", "token_accuracy"])
        self.text = text
        self.best_metric = best_metric
        self.patience = patience
        self.draw = draw
        self.curves: list[dict[str, float]] = []
        self._evaluator: EditEvaluator | None = None
        self._best: dict[str, torch.Tensor] | None = None  # where there is no folder

    # ------------------------------------------------------------------ events

    def on_train_begin(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if getattr(args, "offload_trunk", False):
            raise ValueError(
                "EvaluationCallback needs the whole model on its device, but offload_trunk=True keeps a part of it "
                "off the device. Set offload_trunk=False, or evaluate after training."
            )
        evaluation = as_trained(self.args, args)
        self._evaluator = EditEvaluator(
            model, processing_class, self.edits, evaluation, text=self.text, progress=not args.disable_tqdm
        )
        # a resumed run has some
        self.curves = list(state.stateful_callbacks.get(CURVES_KEY, {}).get("curves", []))
        if not self.curves:
            self._evaluate(args, state, model)

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        epoch = round(state.epoch or 0)
        if epoch % self.every == 0 or control.should_training_stop or epoch >= args.num_train_epochs:
            self._evaluate(args, state, model)
            control.should_training_stop |= self._waited() >= self.patience

    def on_train_end(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        best = self.best
        stored = Path(args.output_dir or "", BEST_NAME)
        if best is not None and (self._best is not None or (args.output_dir is not None and stored.is_file())):
            if best is not self.curves[-1]:
                _restore(model, load_file(stored) if self._best is None else self._best)
                value = best[self.best_metric or ""]
                logger.warning("Restored epoch %d, the best by %s: %.4f.", best["epoch"], self.best_metric, value)
            state.stateful_callbacks[CURVES_KEY] = {"curves": self.curves, "best_epoch": best["epoch"]}
            if state.is_world_process_zero and self._best is None:
                stored.unlink(missing_ok=True)

    # ------------------------------------------------------------------ the best epoch

    @property
    def best(self) -> dict[str, float] | None:
        """The best evaluation by `best_metric`, the first of equal ones; `None` without a metric."""
        if self.best_metric is None or not self.curves:
            return None
        sign = -1 if self.best_metric in LOWER_IS_BETTER else 1
        # not the one before the first epoch: it has learned nothing, and forgotten nothing
        return max(self.curves[1:] or self.curves, key=lambda row: sign * row.get(self.best_metric or "", -math.inf))

    def _waited(self) -> int:
        best = self.best
        return 0 if best is None else len(self.curves) - 1 - self.curves.index(best)

    def _evaluate(self, args: Any, state: TrainerState, model: nn.Module) -> None:
        assert self._evaluator is not None
        report = self._evaluator.evaluate(model)
        if self.best_metric is not None and self.best_metric not in report.results:
            why = report.missing.get(self.best_metric, f"expected one of {', '.join(report.results)}")
            raise ValueError(f"EvaluationCallback.best_metric={self.best_metric!r}: {why}.")
        self.curves.append(_point(report, state))
        state.stateful_callbacks[CURVES_KEY] = {"curves": self.curves}
        is_best = self.best is self.curves[-1]
        trained = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad and is_best}
        if args.output_dir is None:
            self._best = {name: tensor.clone() for name, tensor in trained.items()} if is_best else self._best
        elif state.is_world_process_zero:
            if is_best:
                write_atomically(Path(args.output_dir, BEST_NAME), save(trained))
            write_atomically(Path(args.output_dir, f"{CURVES_NAME}.json"), json.dumps(self.curves, indent=1) + "\n")
            if self.draw is not None and len(self.curves) > 1:
                self.draw(self.curves, Path(args.output_dir, f"{CURVES_NAME}.png"))


def as_trained(evaluation: EvaluationConfig, args: Any) -> EvaluationConfig:
    """Return settings with the chat template and the separator of a training, where they leave them open."""
    if evaluation.chat_template == "auto" and hasattr(args, "chat_template"):
        template_kwargs = evaluation.chat_template_kwargs or args.chat_template_kwargs
        evaluation = replace(evaluation, chat_template=args.chat_template, chat_template_kwargs=template_kwargs)
    if evaluation.target_separator == "auto" and hasattr(args, "target_separator"):
        evaluation = replace(evaluation, target_separator=args.target_separator)
    return evaluation


def _point(report: EvaluationReport, state: TrainerState) -> dict[str, float]:
    losses = state.stateful_callbacks.get(STATE_KEY, {}).get("epoch_losses", [])
    loss = {"loss": losses[-1]} if losses else {}
    values = {name: result.after.value for name, result in report.results.items()}
    return {"epoch": state.epoch or 0} | loss | values


@torch.no_grad()
def _restore(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
