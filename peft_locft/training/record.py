"""The entries of a training run in `locft_provenance.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data.edits import Edit, edits_sha256
from .config import BreadthFirstConfig
from .loss_history import LossHistory

RECIPE_FIELDS = (
    "recipe",
    "objective",
    "loss_averaging",
    "edit_order",
    "append_eos",
    "chat_template",
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


def training_record(
    edits: Sequence[Edit],
    args: BreadthFirstConfig,
    losses: LossHistory,
    num_steps: int,
    evaluations: dict[str, Any] | None = None,
    augmentation: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the entries of a training run in `locft_provenance.json`: hash of the edits, recipe, losses.

    Args:
        edits: what was trained.
        args: the recipe.
        losses: of the run.
        num_steps: of the run.
        evaluations: of an `EvaluationCallback`: its `curves`, and the `best_epoch` if it chose one.
        augmentation: from [`augmentation_record`].
    """
    recipe = {name: getattr(args, name) for name in RECIPE_FIELDS}
    return {
        "edits": {"count": len(edits), "sha256": edits_sha256(edits)},
        "recipe": {name: getattr(value, "value", value) for name, value in recipe.items()},
        "training": {"steps": num_steps, "epoch_losses": list(losses.epoch_losses), **(evaluations or {})},
        **({"augmentation": augmentation} if augmentation else {}),
    }
