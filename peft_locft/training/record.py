"""What is recorded of a training run beside its adapter: the edits, the recipe, the losses."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ..adapters.provenance import Augmentation, TrainedEdits, TrainingResult, TrainingRun
from ..data.edits import Edit, edits_sha256
from .config import AUTO, RECIPES, BreadthFirstConfig
from .learned import LearnedEdits
from .loss_history import LossHistory

# The settings that decide the weights, listed one by one: those at their default are recorded too, since a default may
# change; and paths, names and tokens (output_dir, retained_facts, hub_token, …) must not go into a shared file. What
# the settings of added rows led to is in the record of the augmentation.
RECIPE_FIELDS = (
    "recipe",
    "objective",
    "loss_averaging",
    "edit_order",
    "append_eos",
    "chat_template",
    "chat_template_kwargs",
    "target_separator",
    "loss_floor",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "optim",
    "adam_epsilon",
    "weight_decay",
    "lr_scheduler_type",
    "stop_at_learned",
    "max_grad_norm",
    "seed",
    "variants_per_epoch",
    "variant_weight",
    "retained_answer_tokens",
    "retained_per_edit",
    "retained_weight",
    "retained_loss",
    "preserve_text",
    "preserve_tokens",
    "preserve_soft_strength",
    "preserve_energy_share",
    "delta_decay",
    "delta_bound",
    "delta_density",
)


# a run that goes on has its own number of edits and processes
NOT_INHERITED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "chat_template",
    "target_separator",
)


def inherited_recipe(args: BreadthFirstConfig, recorded: Mapping[str, Any]) -> BreadthFirstConfig:
    """Return settings with those of an earlier run, where they were left at their defaults.

    A rate that fitted the weights is taken over relative to them, as it was corrected by that run's losses.

    Args:
        args: the settings. If they name another recipe than the default one, only these count.
        recorded: the recipe in the provenance of the earlier run.
    """
    default = BreadthFirstConfig()
    if args.recipe != default.recipe:
        return args
    args = copy.copy(args)
    inherited = {name: recorded[name] for name in RECIPE_FIELDS if recorded.get(name) is not None}
    if recorded.get("relative_learning_rate") is not None:
        inherited |= {"learning_rate": AUTO, "relative_learning_rate": recorded["relative_learning_rate"]}
    for name in {*RECIPES[default.recipe], *inherited} - {*NOT_INHERITED}:
        if getattr(args, name) == getattr(default, name):
            setattr(args, name, inherited.get(name))
    args.resolve()
    return args


def training_record(
    edits: Sequence[Edit],
    args: BreadthFirstConfig,
    losses: LossHistory,
    num_steps: int,
    evaluations: Mapping[str, Any] | None = None,
    augmentation: Augmentation | None = None,
    learned: LearnedEdits | None = None,
    *,
    relative_rate: float | None = None,
) -> TrainingRun:
    """Return what is recorded of a training run beside its adapter.

    Args:
        edits: the edits that it trained; their number and hash are recorded.
        args: its settings, of which `RECIPE_FIELDS` are recorded.
        losses: its losses.
        num_steps: its optimizer steps.
        evaluations: `curves`, and `best_epoch` if it chose one, as an `EvaluationCallback` leaves them.
        augmentation: the rows beyond the edits.
        learned: what the model learned.
        relative_rate: the learning rate relative to the weights, if none was given.
    """
    settings = {name: getattr(args, name) for name in RECIPE_FIELDS} | {"relative_learning_rate": relative_rate}
    return TrainingRun(
        TrainedEdits(len(edits), edits_sha256(edits)),
        {name: getattr(value, "value", value) for name, value in settings.items()},
        TrainingResult(
            list(losses.epoch_losses),
            num_steps,
            learned=None if learned is None else learned.record(),
            **(evaluations or {}),
        ),
        augmentation,
    )
