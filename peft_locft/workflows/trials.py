"""A trial: trains an adapter on a base, evaluates it, and removes it."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.edits import Edit
from ..engine.activation_storage import SharedActivations
from ..engine.memory import Usage, measured_usage
from ..evaluation.evaluator import EditEvaluator
from ..evaluation.report import EvaluationReport
from ..training.callbacks import EpochLines
from ..training.config import BreadthFirstConfig
from ..training.trainer import BreadthFirstTrainer


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial.

    Attributes:
        report: the evaluation of the adapter.
        epoch_losses: mean loss of each epoch.
        usage: of the training, with its preparation.
        evaluation_seconds: duration of the evaluation; the first trial also evaluates the base.
    """

    report: EvaluationReport
    epoch_losses: list[float]
    usage: Usage
    evaluation_seconds: float

    @property
    def training_seconds(self) -> float:
        return self.usage.seconds


def try_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    config: PeftConfig,
    args: BreadthFirstConfig,
    evaluator: EditEvaluator,
    shared_activations: SharedActivations | None = None,
) -> TrialResult:
    """Train an adapter and evaluate it.

    Args:
        model: the base; it is not changed.
        tokenizer: its tokenizer.
        edits: the edits to train.
        config: configuration of the adapter; pass a new one to every trial, since PEFT changes it.
        args: the recipe.
        evaluator: evaluator of the base, shared by all trials to evaluate the base once.
        shared_activations: activations of the base for all trials; `None`: every trial runs the frozen layers.

    Raises:
        RuntimeError: if the loss becomes NaN or infinite.
        FloatingPointError: if the logits of the edited model are NaN or infinite.
    """
    edited = get_peft_model(model, config)
    try:
        with measured_usage(next(model.parameters()).device) as usage:
            trainer = BreadthFirstTrainer(
                model=edited,
                args=args,
                train_dataset=edits,
                processing_class=tokenizer,
                shared_activations=shared_activations,
            )
            trainer.remove_callback(EpochLines)
            trainer.train()
        trained = time.perf_counter()
        report = evaluator.evaluate(edited)
        losses = list(trainer.epoch_losses)
    finally:
        edited.unload()
        trainer = None  # type: ignore[assignment]
        gc.collect()  # trainer and model refer to each other
    return TrialResult(report, losses, usage, time.perf_counter() - trained)


def known_result(path: Path, cell: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result in a file if it has the settings of this cell; else `None`."""
    if not path.is_file():
        return None
    row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # convert through JSON to compare with the file
    expected = json.loads(json.dumps(cell))
    return row if {name: row.get(name) for name in expected} == expected else None
