"""A model's state around training: dropout, configuration, and what it can take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def dropout_off(model: nn.Module) -> None:
    """Put the model into evaluation mode, and leave gradient checkpointing on where it was asked for."""
    model.eval()
    for module in model.modules():
        # checkpointing happens in training mode alone; the layer's children, and their dropout, stay in evaluation
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


@contextmanager
def configuration_unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what `Trainer` does to the model's configuration: `use_cache`, and the tokenizer's special tokens."""
    configurations: list[Any] = [getattr(model, name, None) for name in ("config", "generation_config")]
    if hasattr(configurations[0], "get_text_config"):
        configurations.append(configurations[0].get_text_config())
    before = [(vars(config), dict(vars(config))) for config in configurations if config is not None]
    try:
        yield
    finally:
        for attributes, kept in before:
            attributes.clear()
            attributes.update(kept)


def max_length(model: nn.Module) -> int | None:
    """Return how many positions the model has; `None` if its configuration does not say."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text_config, "max_position_embeddings", None)


def check_vocabulary(model: Any, input_ids: torch.Tensor) -> None:
    """Raise a ValueError if the model's embedding has no row for one of the token ids."""
    weight = model.get_input_embeddings().weight
    # a model that was loaded under ZeRO-3 has its shapes here, and no rows
    vocabulary_size = getattr(weight, "ds_shape", weight.shape)[0]
    largest = int(input_ids.max())
    if largest >= vocabulary_size:
        raise ValueError(
            f"The tokenizer gives token id {largest}, but the model's embedding has {vocabulary_size} rows: they do "
            "not belong together. Load both from the same place."
        )


class TrainingDivergedError(RuntimeError):
    """The loss became NaN or infinite while a model was trained."""


def check_finite(loss: float, step: int, max_steps: int, learning_rate: float) -> None:
    """Raise a RuntimeError if a loss is NaN or infinite; after the first step it is [`TrainingDivergedError`].

    Args:
        loss: taken before a step.
        step: the steps taken so far.
        max_steps: those of the whole run.
        learning_rate: of that step.
    """
    if math.isfinite(loss):
        return
    if step == 0:
        raise RuntimeError(
            f"The loss is {loss} before the first step: this model, in its dtype, gives no finite answer to these "
            "edits. Load it in float32 or bfloat16."
        )
    raise TrainingDivergedError(
        f"The loss became {loss} at step {step + 1} of {max_steps}: the learning rate, {learning_rate:g}, is too high "
        "for this model and location. Train again with a lower one."
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while, without gradients, its configuration restored afterwards."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # a LocFT model composes W + delta once for all that is asked
        with torch.no_grad(), configuration_unchanged(model), getattr(model, "composed_once", nullcontext)():
            yield
    finally:
        for module in was_training:
            module.training = True


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has an adapter that PEFT, or transformers' own integration of PEFT, can disable."""
    return isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)


@contextmanager
def as_base(model: nn.Module) -> Iterator[None]:
    """Disable a model's adapters for a while, so that it answers as its base."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    elif has_adapter(model):
        model.disable_adapters()  # type: ignore[operator]
        try:
            yield
        finally:
            model.enable_adapters()  # type: ignore[operator]
    else:
        yield
