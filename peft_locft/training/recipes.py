"""The recipes: values of the fields of `BreadthFirstConfig` that were left open."""

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "published": {
        "relative_learning_rate": 0.025,
        "num_train_epochs": 50,
        "lr_scheduler_type": "constant",
        "stop_at_learned": 0.0,
        "adam_epsilon": 1e-8,
        "loss_averaging": "edit",
        "gradient_tokens": "all",
        "num_prefixes": 0,
        "variants_per_epoch": 1.0,
        "retained_subjects": 0,
        "retained_relations": 0,
        "retained_per_edit": 1.0,
        "retained_answer_tokens": 1,
        "retained_weight": 1.0,
        "preserve_soft_strength": 0.0,
        "delta_decay": 0.0,
    },
    "balanced": {
        "relative_learning_rate": 0.06,
        "num_train_epochs": 40,
        "lr_scheduler_type": "linear",
        "stop_at_learned": 0.99,
        "adam_epsilon": 1e-4,
        "loss_averaging": "token",
        "gradient_tokens": "all",
        "num_prefixes": 5,
        "prefixes_per_edit": 2,
        "variants_per_epoch": 0.3,
        "retained_subjects": 4,
        "retained_relations": 0,
        "retained_per_edit": 1.0,
        "retained_answer_tokens": 1,
        "retained_weight": 1.0,
        "preserve_soft_strength": 20.0,
        "delta_decay": 0.05,
    },
}
